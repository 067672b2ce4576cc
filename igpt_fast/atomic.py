"""Files and directories that appear whole or not at all, whatever happens meanwhile."""

import contextlib
import ctypes
import fcntl
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from igpt_fast.errors import InputError

FRESH = 60.0  # seconds in which a file that nobody locks may still be somebody's


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes `data` so that `path` holds either all of it or what it held before, see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write: behind the block `path` holds it in whole, else what it held before, whatever happens meanwhile.

    Makes the folder when it is missing. Raises OSError, naming `path` and leaving nothing behind, when the disk is full
    or read-only, or `path` is a directory.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{os.getpid()}.tmp")  # the name itself may be as long as may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # held until it is closed, or the process ends: see remove_leftovers
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_leftovers(*folders: Path) -> None:
    """Removes what `open_atomically` has left in folders, its process being killed; what is being written stays, and
    what was until just now: between its last byte and its name nothing locks it.
    """
    for path in [path for folder in folders for path in folder.glob(".*.tmp")]:
        with contextlib.suppress(OSError):
            ours = re.fullmatch(r"\.[0-9a-f]{8}\.\d+\.tmp", path.name) and path.is_file()
            if ours and time.time() - path.stat().st_mtime > FRESH and (lock := _lock(path)) is not None:
                try:
                    path.unlink()
                finally:
                    os.close(lock)


@contextlib.contextmanager
def work_directory(out: Path, work: Path | None = None) -> Iterator[Path]:
    """Makes a directory, `work` or a hidden one beside `out`, to write into what then becomes `out`.

    When the block fails it goes, and so do the folders made for it; hidden ones of processes that were killed go first,
    whose locks nobody holds any more. Raises InputError when it cannot be made, or cannot become `out`.
    """
    if out.is_dir() and (os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve())):
        why = "a disk is mounted there" if os.path.ismount(out) else "you are in it"
        raise InputError(f"{out}: cannot be replaced as a whole ({why}); give a folder inside, or another place")
    if work is None:
        folder, name = out.absolute().parent, out.absolute().name
        for old in folder.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 8}.tmp"):
            if (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        work = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    missing, lock = [above for above in work.parents if not above.exists()], None
    try:
        try:
            work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror}); choose a place that can") from error
        lock = _lock(work)
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for above in missing:
            if above.is_dir() and not any(above.iterdir()):  # another process may have come to use it
                above.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def sync(path: Path) -> None:
    """Returns when the disk has a file's bytes, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """A handle that holds a path's lock until it is closed or the process ends; None where that cannot be had."""
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # which NFS wants of a file
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def move_into_place(work: Path, out: Path) -> None:
    """Renames a directory of `work_directory`. At `out` is the old one or the new one, in whole, at any moment.

    Only a file system that cannot exchange two names (some of the network's) has a moment without either.
    """
    if not os.path.lexists(out):
        os.rename(work, out)
        return
    old = work
    if not _exchange(work, out):
        old = work.with_name(work.name + ".old")
        os.rename(out, old)
        try:
            os.rename(work, out)
        except BaseException:
            os.rename(old, out)
            raise
    if old.is_symlink():
        old.unlink()
    else:  # after an exchange, what a process that is killed now leaves of it goes with the next work_directory
        shutil.rmtree(old, ignore_errors=True)


def refuse_others(folder: Path, ours: str) -> None:
    """InputError where a directory that is to be replaced holds names other than `ours`, a regular expression."""
    if others := sorted(name for name in os.listdir(folder) if not re.fullmatch(ours, name)):
        raise InputError(f"{folder} holds {', '.join(others[:3])}, which would be lost; choose another place")


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange(here, os.fsencode(one), here, os.fsencode(other), flag) == 0
