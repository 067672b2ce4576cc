"""The bytes of one image, wherever they lie: in a folder, a zip, a tar or an array, for any process that asks."""

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from igpt_fast.errors import as_input_error
from igpt_fast.image_files import REMEDY

MOST = 2 << 30  # bytes of an image that a zip may unpack: a file of zeros is packed a thousandfold
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by a file's first two bytes


@dataclass
class Reader:
    """Fetches the stored bytes of one image. Holds paths only until it is used, so it can be sent to a process."""

    path: str
    kind: str  # folder, zip, tar or array
    member: str = ""  # of an .npz: the array inside
    row: tuple[int, ...] = ()  # of an array: the shape of one image
    dtype: str = "|u1"  # and its numbers
    _stream: BinaryIO | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_stream": None}

    def fetch(self, ref: object) -> bytes | np.ndarray:
        """ref: what the Source noted for the image (a relative path, or where its bytes lie). Raises anything."""
        if self.kind == "folder":
            return Path(self.path, ref).read_bytes()
        if self._stream is None:
            self._stream = self._open()
        if self.kind == "zip":
            return self._fetch_zip(*ref)
        offset, length = ref
        self._stream.seek(offset)
        data = self._stream.read(length)
        if len(data) != length:
            raise EOFError("the file ends before this image does")
        return np.frombuffer(data, self.dtype).reshape(self.row) if self.kind == "array" else data

    def close(self) -> None:
        """Closes the file; the next fetch opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> BinaryIO:
        if self.member:
            return zipfile.ZipFile(self.path).open(self.member)
        return open_stream(self.path) if self.kind == "tar" else open(self.path, "rb")

    def _fetch_zip(self, offset: int, stored: int, size: int, method: int, crc: int, named: int) -> bytes:
        if size > MOST:
            raise ValueError(f"it unpacks to {size:,} bytes, of which no more than {MOST:,} are read")
        self._stream.seek(offset)
        head = self._stream.read(30)  # the entry's own header; the extra field behind its name may differ in length
        if head[:4] != b"PK\3\4":
            raise ValueError("its place in the zip holds something else")
        name = self._stream.read(int.from_bytes(head[26:28], "little"))
        if name and named not in (checksum_of(name.decode("cp437")), checksum_of(name.decode("utf-8", "replace"))):
            raise ValueError("its name in the zip's list is not the one at its place")
        self._stream.seek(int.from_bytes(head[28:30], "little"), os.SEEK_CUR)
        data = self._stream.read(stored)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # and no more, whatever is packed
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("its checksum in the zip does not match")
        return data


def fetch(reader: Reader, ref: object, where: str) -> bytes | np.ndarray:
    """reader.fetch(ref), with every reason why not as an InputError that names `where`."""
    with as_input_error(f"{where}:", REMEDY):
        return reader.fetch(ref)


def open_stream(path: str) -> BinaryIO:
    """The bytes of a file, decompressed when it is gzip, bzip2 or xz by its first bytes."""
    with open(path, "rb") as file:
        magic = file.read(2)
    return _COMPRESSED.get(magic, open)(path, "rb")


def checksum_of(name: str) -> int:
    """By which a name in a zip's list is compared with the one at its place, which may be encoded otherwise."""
    return zlib.crc32(name.replace("\\", "/").encode("utf-8", "surrogatepass"))
