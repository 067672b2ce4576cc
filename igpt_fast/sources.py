"""Where images come from: a folder, a zip, a tar, an array or a single file, all seen as one list of names.

Nothing is extracted to disk: a Source knows where each image's bytes lie, and its Reader fetches them.
"""

import contextlib
import hashlib
import io
import math
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast.arrays import npy_layout, npz_layout
from igpt_fast.classes import as_groups, by_patients, classes_of, warn_of_folders
from igpt_fast.errors import InputError, as_input_error
from igpt_fast.found import HEAD, OTHER, SCAN_SUFFIXES, SCANS, Found, is_hidden
from igpt_fast.image_files import is_image, read_image
from igpt_fast.images import Preprocessing
from igpt_fast.made import MADE, made_here
from igpt_fast.reader import Reader, checksum_of, fetch, open_stream
from igpt_fast.scientific import DICOM_HEAD

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
KINDS = "a folder, a .zip, .tar or .tar.gz, a .npy or .npz array, or an image file"
GLANCE = 1 << 12  # bytes of a file that are looked at in some 64 places
MOST_WAYS = 16  # to one folder by links, which can multiply without an end that anybody waits for


@dataclass(frozen=True)
class Source:
    """A list of images. Opening one reads names, of DICOM also patients, and no pixel.

    names: relative to the source, with "/", sorted; of an array the row numbers. labels: int64 [N], -1 where unknown,
    or None when there are none. classes: the names that labels index. groups: of each image, those of one stay together
    in every split; None: each is alone. ignored: how many files were left out, by reason.
    sequential: the bytes come fast in the order of `reading_order` only. stamp: changes when a file changes.
    """

    path: Path
    reader: Reader
    names: list[str]
    refs: list
    stamp: str
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    groups: list[str] | None = None
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

    def read(self, index: int, **preprocessing: Any) -> np.ndarray:
        """Image `index` at its own size, uint8 [H, W, 3]. preprocessing: fields of Preprocessing. Raises InputError."""
        where, how = self.where(index), Preprocessing(**preprocessing)
        data = fetch(self.reader, self.refs[index], where)
        return np.asarray(read_image(data, where, how.background, how.value_range, how.bands))


def open_source(path: str | Path) -> Source:
    """Lists the images of a folder (recursively), a .zip, a .tar (plain, .gz, .bz2, .xz), a .npy or .npz, or one file.

    Class labels: the first level of folders that tells images apart (wrapping folders that hold everything are passed
    over), its names sorted; or what a metadata.csv says, see igpt_fast.classes. Hidden files, __MACOSX, files that are
    no images by their names (DICOM without a suffix is known by its first bytes) and, in a folder, what igpt-fast made
    (igpt_fast.made) are counted in `.ignored`. Arrays are numbers [N, H, W, C] or [N, H, W]; an .npz holds them as
    images, x or data, labels as labels, y or label, and, where images of one group stay together, groups or group.
    Raises InputError when there is no such path, it is cut short, or no image is in it.
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
    if opener is None and not is_image(path.name, partial(_read_first, str(path))):
        raise InputError(f"{path}: not a kind of file that holds images; give {KINDS}")
    if not path.is_file():
        raise InputError(f"{path}: is a pipe or a device; give {KINDS}")
    with as_input_error(f"{path}:", "allow it, or move it elsewhere"):
        stamp = _stamp(path)
    if opener is None:
        return Source(path, Reader(str(path.parent), "folder"), [path.name], [path.name], stamp)
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty (0 bytes); give {KINDS}")
    with as_input_error(f"{path}:", "it may be cut short: make or copy it again"):
        return opener(path, stamp)


def _read_first(path: str, count: int) -> bytes:
    if not os.path.isfile(path):  # a link to nothing; a pipe, that nobody may ever write to
        if count < 0:
            raise InputError(f"{path}: is no file, or a link to nothing; mend or remove it")
        return b""
    try:
        with as_input_error(f"{path}:", "allow it, or move it elsewhere"), open(path, "rb") as file:
            return file.read(count)
    except InputError:
        if count < 0:
            raise
        return b""  # not known to be an image by its name, nor by these


def _stamp(path: Path) -> str:
    """Of a file: its size, its time, and a digest of some of its bytes: arrays of one shape have one size, and what is
    unpacked may have one time.
    """
    info, digest = path.stat(), hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        for at in range(0, info.st_size, max(GLANCE, info.st_size // 64)):
            file.seek(at)
            digest.update(file.read(GLANCE))
    return f"{info.st_size}-{info.st_mtime_ns}-{digest.hexdigest()}"


def _open_folder(path: Path) -> Source:
    found, stamps = Found(), {}
    pending: list[tuple[str, bool, frozenset]] = [("", False, frozenset())]
    ways: Counter[tuple[int, int]] = Counter()
    while pending:
        folder, made, above = pending.pop()
        with as_input_error(f"{path / folder}:", "allow it, or move it elsewhere"):
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
            if inner and not is_hidden(entry.name):
                pending.append((name, own, above | {here}))
            elif own:
                found.ignored[MADE] += 1
            elif found.takes(name, partial(_read_first, entry.path)):
                # A link to nothing stays in the list, so that reading it can name it; a pipe or a device goes.
                info = None
                with contextlib.suppress(OSError):
                    info = entry.stat()
                if info is not None and not stat.S_ISREG(info.st_mode):
                    found.ignored[OTHER] += 1
                else:
                    found.refs[name] = name
                    stamps[name] = f"{info.st_size}-{info.st_mtime_ns}" if info else ""
    stamps |= {name: hashlib.blake2b(table).hexdigest() for name, table in found.tables.items()}
    text = "\n".join(f"{name}\0{stamps[name]}" for name in sorted(stamps))
    stamp = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return _by_name(path, Reader(str(path), "folder"), found, stamp)


def _open_zip(path: Path, stamp: str) -> Source:
    found = Found()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = posixpath.normpath(entry.filename).lstrip("/")
            if entry.is_dir() or not found.takes(name, partial(_read_zipped, archive, entry)):
                continue
            _refuse_packing(path, entry)
            sizes = entry.compress_size, entry.file_size
            named = checksum_of(entry.orig_filename)
            found.refs[name] = entry.header_offset, *sizes, entry.compress_type, entry.CRC, named
    return _by_name(path, Reader(str(path), "zip"), found, stamp)


def _refuse_packing(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = "encrypted" if entry.flag_bits & 1 else f"compressed by method {entry.compress_type}"
        raise InputError(f"{path}: {entry.filename} is {how}; pack the images again with plain zip (deflate)")


def _read_zipped(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, count: int) -> bytes:
    try:
        with archive.open(entry) as file:
            return file.read(count)
    except (RuntimeError, EOFError, zlib.error, zipfile.BadZipFile):
        if count < 0:
            _refuse_packing(archive.filename, entry)
            raise
        return b""  # encrypted, damaged, or compressed in a way that nobody here knows


def _open_tar(path: Path, stamp: str) -> Source:
    found, places, heads = Found(), {}, {}
    with open_stream(str(path)) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for entry in archive:
            name = posixpath.normpath(entry.name).lstrip("/")
            if entry.isdir():
                continue
            own = posixpath.normpath(entry.linkname if entry.islnk() else entry.name)  # of two names, the first
            if not entry.islnk():
                heads.pop(own, None)

            def read(count: int, entry: tarfile.TarInfo = entry, own: str = own) -> bytes:
                # Once, in a stream that only goes on; of a link, whose place may be far behind, not at all.
                if own not in heads and not entry.islnk():
                    heads[own] = archive.extractfile(entry).read(max(count, HEAD) if count >= 0 else count)
                return heads.get(own, b"")[: count if count >= 0 else None]

            if entry.isreg() and not entry.sparse:
                places[own] = entry.offset_data, entry.size
            if own not in places or not (entry.isreg() or entry.islnk()) or entry.sparse:  # a link or a device
                found.ignored[OTHER] += 1
            elif found.takes(name, read):
                found.refs[name] = places[own]
                if entry.islnk() and name in found.patients:
                    found.patients[name] = found.patients.get(own.lstrip("/"), "")
            if own in heads and name not in found.tables:
                heads[own] = heads[own][:DICOM_HEAD]
        # tarfile takes a damaged header for the end: only blocks of zeros are one.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"broken or cut after {len(found.refs)} images")
        packed = not isinstance(stream, io.BufferedReader)
        stream.seek(0, os.SEEK_END)  # a compressed one is read to its end, and so to its checksum
    return _by_name(path, Reader(str(path), "tar"), found, stamp, sequential=packed)


def _open_array(path: Path, stamp: str) -> Source:
    packed = path.suffix.lower() == ".npz"
    layout = npz_layout(path) if packed else npy_layout(path)
    length = math.prod(layout.row) * np.dtype(layout.dtype).itemsize
    refs = [(layout.offset + row * length, length) for row in range(layout.count)]
    reader = Reader(str(path), "array", layout.member, layout.row, layout.dtype)
    names = [f"{row:08d}" for row in range(layout.count)]
    groups = layout.groups
    if groups is not None:
        groups = as_groups(("" if isinstance(one, int) and one < 0 else str(one) for one in groups.tolist()), names)
    return Source(path, reader, names, refs, stamp, layout.labels, layout.classes, groups, sequential=packed)


def _by_name(path: Path, reader: Reader, found: Found, stamp: str, sequential: bool = False) -> Source:
    """A Source in the order of names, with its classes. Raises InputError when there is no image."""
    if not found.refs:
        ignored, count = found.ignored, sum(found.ignored.values())
        what = f"no image among its {count} files (.png, .jpg and the like)" if count else "empty"
        what += f", of which {ignored[SCANS]} are {SCANS}" if ignored[SCANS] else ""
        raise InputError(f"{path}: {what}; give {KINDS}")
    names = sorted(found.refs)
    refs, labelled = [found.refs[name] for name in names], classes_of(names, found.tables, str(path))
    labelled = by_patients(names, labelled, found.patients, str(path))
    warn_of_folders(names, labelled, str(path))
    labels = labelled.labels, labelled.names, labelled.groups
    return Source(path, reader, names, refs, stamp, *labels, dict(found.ignored), sequential)
