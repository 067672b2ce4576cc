"""Where images come from: a folder, a zip, a tar, an array or a single file, all seen as one list of names.

Nothing is extracted to disk: a Source knows where each image's bytes lie, and its Reader, which may be sent to another
process, fetches them.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import math
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from igpt_fast.arrays import npy_layout, npz_layout
from igpt_fast.errors import InputError, reading
from igpt_fast.image_files import REMEDY, SUFFIXES, read_image
from igpt_fast.made import MADE, made_here

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
KINDS = "a folder, a .zip, .tar or .tar.gz, a .npy or .npz array, or an image file"
HIDDEN, OTHER, REPLACED = "hidden", "not an image", "replaced by a later entry of the same name"
SCAN_SUFFIXES = (".nii", ".nii.gz")
MOST_WAYS = 16  # to one folder by links; a knot of them would have no end that anybody waits for
SCANS = "NIfTI, which is not read (export its slices as 16-bit PNG)"

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

    def _fetch_zip(self, offset: int, stored: int, method: int, crc: int) -> bytes:
        self._stream.seek(offset)
        head = self._stream.read(30)  # the entry's own header; the name and extra field behind it may differ in length
        if head[:4] != b"PK\3\4":
            raise ValueError("its place in the zip holds something else")
        self._stream.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), os.SEEK_CUR)
        data = self._stream.read(stored)
        data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
        if zlib.crc32(data) != crc:
            raise ValueError("its checksum in the zip does not match")
        return data


@dataclass(frozen=True)
class Source:
    """A list of images. Opening one reads names only, and no pixel.

    names: relative to the source, with "/", sorted; of an array the row numbers. labels: int64 [N], -1 where unknown,
    or None when there are none. classes: the names that labels index. ignored: how many files were left out, by reason.
    sequential: the bytes come fast in the order of `reading_order` only. stamp: changes when a file changes.
    """

    path: Path
    reader: Reader
    names: list[str]
    refs: list
    stamp: str
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    sequential: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """Names image `index` for a person: its path, or the archive and the name inside."""
        if self.reader.kind == "folder":
            return os.path.join(self.reader.path, self.names[index])
        return f"{self.path}: {'image ' if self.reader.kind == 'array' else ''}{self.names[index]}"

    def reading_order(self) -> np.ndarray:
        """int64 [N]: the images by their place in the file when that is the fast way to read them, else as they are."""
        return np.argsort([ref[0] for ref in self.refs], kind="stable") if self.sequential else np.arange(len(self))

    def read(self, index: int, **reading: Any) -> np.ndarray:
        """Image `index` at its own size, uint8 [H, W, 3]. reading, raises: as read_image."""
        where = self.where(index)
        return np.asarray(read_image(fetch(self.reader, self.refs[index], where), where, **reading))


def fetch(reader: Reader, ref: object, where: str) -> bytes | np.ndarray:
    """reader.fetch(ref), with every reason why not as an InputError that names `where`."""
    with reading(f"{where}:", REMEDY):
        return reader.fetch(ref)


def open_source(path: str | Path) -> Source:
    """Lists the images of a folder (recursively), a .zip, a .tar (plain, .gz, .bz2, .xz), a .npy or .npz, or one file.

    Class labels: the first level of folders that tells images apart (wrapping folders that hold everything are passed
    over), its names sorted. Hidden files, __MACOSX, files without an image's suffix and, in a folder, what igpt-fast
    made (igpt_fast.made) are counted in `.ignored`. Arrays are numbers [N, H, W, C] or [N, H, W]; an .npz holds them as
    images, x or data, and labels as labels or y. Raises InputError when there is no such path, it is cut short, or no
    image is in it.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {KINDS}")
    if path.is_dir():
        return _open_folder(path)
    openers = {".zip": _open_zip, ".npy": _open_array, ".npz": _open_array}
    opener = _open_tar if name.endswith(TAR_SUFFIXES) else openers.get(path.suffix.lower())
    if name.endswith(SCAN_SUFFIXES):
        raise InputError(f"{path}: {SCANS}")
    if opener is None and path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: not a kind of file that holds images; give {KINDS}")
    info = path.stat()
    stamp = f"{info.st_size}-{info.st_mtime_ns}"
    if opener is None:
        return Source(path, Reader(str(path.parent), "folder"), [path.name], [path.name], stamp)
    if not info.st_size:
        raise InputError(f"{path}: the file is empty (0 bytes); give {KINDS}")
    with reading(f"{path}:", "it may be cut short: make or copy it again"):
        return opener(path, stamp)


def open_stream(path: str) -> BinaryIO:
    """The bytes of a file, decompressed when it is gzip, bzip2 or xz by its first bytes."""
    with open(path, "rb") as file:
        magic = file.read(2)
    return _COMPRESSED.get(magic, open)(path, "rb")


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _ignore(name: str, ignored: Counter[str], refs: dict) -> bool:
    """True when a file is left out; counts it, and an earlier entry of an archive that this one replaces."""
    if any(map(_hidden, name.split("/"))):
        reason = HIDDEN
    else:
        other = SCANS if name.lower().endswith(SCAN_SUFFIXES) else OTHER
        reason = None if os.path.splitext(name)[1].lower() in SUFFIXES else other
    ignored.update([reason] if reason else [REPLACED] if name in refs else [])
    return reason is not None


def _open_folder(path: Path) -> Source:
    stamps: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    pending: list[tuple[str, bool, frozenset]] = [("", False, frozenset())]
    ways: Counter[tuple[int, int]] = Counter()
    while pending:
        folder, made, above = pending.pop()
        with reading(f"{path / folder}:", "allow it, or move it elsewhere"):
            info, entries = os.stat(path / folder), list(os.scandir(path / folder))
        here = info.st_dev, info.st_ino
        if here in above:  # a link that leads back up; folders that are there twice are read twice
            continue
        ways.update([here])
        if ways[here] > MOST_WAYS:
            raise InputError(f"{path / folder}: links lead here in more than {MOST_WAYS} ways; give a folder without")
        ours = made_here(path / folder, {entry.name for entry in entries}, given=not folder)
        for entry in entries:
            name, own = posixpath.join(folder, entry.name), made or entry.name in ours
            # Of a link that leads to itself, is_dir raises and isdir says no.
            inner = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if inner and not _hidden(entry.name):
                pending.append((name, own, above | {here}))
            elif own:
                ignored[MADE] += 1
            elif not _ignore(name, ignored, stamps):
                # A link to nothing stays in the list, so that reading it can name it; a pipe or a device goes.
                info = entry.stat() if os.path.exists(entry.path) else None
                if info is not None and not stat.S_ISREG(info.st_mode):
                    ignored[OTHER] += 1
                else:
                    stamps[name] = f"{info.st_size}-{info.st_mtime_ns}" if info else ""
    text = "\n".join(f"{name}\0{stamps[name]}" for name in sorted(stamps))
    stamp = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return _by_name(path, Reader(str(path), "folder"), {name: name for name in stamps}, ignored, stamp)


def _open_zip(path: Path, stamp: str) -> Source:
    refs: dict[str, tuple] = {}
    ignored: Counter[str] = Counter()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = posixpath.normpath(entry.filename).lstrip("/")
            if entry.is_dir() or _ignore(name, ignored, refs):
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                how = "encrypted" if entry.flag_bits & 1 else f"compressed by method {entry.compress_type}"
                raise InputError(f"{path}: {name} is {how}; pack the images again with plain zip (deflate)")
            refs[name] = entry.header_offset, entry.compress_size, entry.compress_type, entry.CRC
    return _by_name(path, Reader(str(path), "zip"), refs, ignored, stamp)


def _open_tar(path: Path, stamp: str) -> Source:
    refs: dict[str, tuple] = {}
    ignored: Counter[str] = Counter()
    with open_stream(str(path)) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for entry in archive:
            name = posixpath.normpath(entry.name).lstrip("/")
            if entry.isdir():
                continue
            if not entry.isreg() or entry.sparse:  # a link or a device
                ignored[OTHER] += 1
            elif not _ignore(name, ignored, refs):
                refs[name] = entry.offset_data, entry.size
        # tarfile takes a damaged header for the end: only blocks of zeros are one.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"broken or cut after {len(refs)} images")
        packed = not isinstance(stream, io.BufferedReader)
        stream.seek(0, os.SEEK_END)  # a compressed one is read to its end, and so to its checksum
    return _by_name(path, Reader(str(path), "tar"), refs, ignored, stamp, sequential=packed)


def _open_array(path: Path, stamp: str) -> Source:
    packed = path.suffix.lower() == ".npz"
    layout = npz_layout(path) if packed else npy_layout(path)
    length = math.prod(layout.row) * np.dtype(layout.dtype).itemsize
    refs = [(layout.offset + row * length, length) for row in range(layout.count)]
    reader = Reader(str(path), "array", layout.member, layout.row, layout.dtype)
    names = [f"{row:08d}" for row in range(layout.count)]
    return Source(path, reader, names, refs, stamp, layout.labels, layout.classes, sequential=packed)


def _by_name(
    path: Path, reader: Reader, refs: dict, ignored: Counter[str], stamp: str, sequential: bool = False
) -> Source:
    """A Source in the order of names, with labels from folders. Raises InputError when there is no image."""
    if not refs:
        count = sum(ignored.values())
        what = f"no image among its {count} files (.png, .jpg and the like)" if count else "empty"
        what += f", of which {ignored[SCANS]} are {SCANS}" if ignored[SCANS] else ""
        raise InputError(f"{path}: {what}; give {KINDS}")
    names = sorted(refs)
    labels, classes = label_by_folder(names)
    return Source(path, reader, names, [refs[n] for n in names], stamp, labels, classes, dict(ignored), sequential)


def label_by_folder(names: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (int64 [N], -1 for images beside the class folders) and class names; (None, None) with fewer than two."""
    folders = [posixpath.dirname(name) for name in names]
    parts = {folder: folder.split("/") if folder else [] for folder in set(folders)}
    level = 0
    while all(len(p) > level for p in parts.values()) and len({p[level] for p in parts.values()}) == 1:
        level += 1
    classes = sorted({p[level] for p in parts.values() if len(p) > level})
    if len(classes) < 2:
        return None, None
    number = {folder: classes.index(p[level]) if len(p) > level else -1 for folder, p in parts.items()}
    return np.array([number[folder] for folder in folders], np.int64), classes
