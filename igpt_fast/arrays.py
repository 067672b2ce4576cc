"""Images that lie in a .npy or .npz file: where each row's bytes are, and the labels beside them. No pixel is read."""

import contextlib
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from igpt_fast.errors import InputError

log = logging.getLogger("igpt_fast")

# What columns and arrays are called by which images may belong together.
OWNERS = re.compile(r"group|patient|subject|person|study|series|case|site|scene|region|tile|(^|[_ ])id$", re.I)
IMAGE_KEYS, LABEL_KEYS, GROUP_KEYS = ("images", "x", "data"), ("labels", "y", "label"), ("groups", "group")


@dataclass(frozen=True)
class ArrayLayout:
    """count images of dtype [*row] each, one behind the other from byte `offset` of the file or its `member`."""

    count: int
    row: tuple[int, ...]
    dtype: str
    offset: int
    member: str = ""
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    groups: np.ndarray | None = None


def npy_layout(path: Path) -> ArrayLayout:
    """The layout of a .npy file. Raises InputError when it does not hold images, anything when it is no .npy."""
    with open(path, "rb") as stream:
        return _layout(stream, os.path.getsize(path), str(path))


def npz_layout(path: Path) -> ArrayLayout:
    """The layout of the images in an .npz file, with its labels and groups. Raises as npy_layout does."""
    with zipfile.ZipFile(path) as archive:
        members = {n.removesuffix(".npy").lower(): n for n in archive.namelist() if n.endswith(".npy")}
        keys = {kind: next((k for k in wanted if k in members), None) for kind, wanted in _KEYS.items()}
        if keys["images"] is None:
            has = ", ".join(sorted(members)) or "none"
            raise InputError(f"{path}: no images among its arrays ({has}); name the array {' or '.join(IMAGE_KEYS)}")
        member = members[keys["images"]]
        with archive.open(member) as stream:
            layout = _layout(stream, archive.getinfo(member).file_size, f"{path}: {member}")
        beside = {}
        for kind in ("labels", "groups"):
            if keys[kind] is not None:
                with archive.open(members[keys[kind]]) as stream, _unless(kind, keys):
                    beside[kind] = _each(_stored(stream, keys[kind], path), layout.count, f"{path}: {kind}")
        _warn_of_idle(path, members.keys() - set(keys.values()), keys)
    labels, classes = _labels(beside["labels"]) if "labels" in beside else (None, None)
    return replace(layout, member=member, labels=labels, classes=classes, groups=beside.get("groups"))


@contextlib.contextmanager
def _unless(kind: str, keys: dict[str, str | None]) -> Iterator[None]:
    """An array of a common name, `label` or `group`, that holds something else is none of that kind."""
    try:
        yield
    except InputError:
        if keys[kind] not in ("label", "group"):
            raise
        keys[kind] = None


def _warn_of_idle(path: Path, idle: Iterable[str], used: dict[str, str | None]) -> None:
    """Says, in the log, which arrays are not used that are called as if they were to be."""
    owners = [f"`{name}`" for name in sorted(idle) if OWNERS.search(name) and name not in GROUP_KEYS]
    if owners and used["groups"] is None:
        log.warning(
            "%s: its array %s is not used; if it says which images belong together, as those of one scene, call it "
            "`groups`, or some will be learned from and others tested on",
            path,
            " or ".join(owners),
        )
    for kind, names in _KEYS.items():
        if twice := [name for name in names if name in idle]:
            why = f"{used[kind]} is read" if used[kind] else "it does not hold an integer or a text for each image"
            log.warning("%s: its array %s is not used: %s", path, " and ".join(twice), why)


_KEYS = {"images": IMAGE_KEYS, "labels": LABEL_KEYS, "groups": GROUP_KEYS}


def _layout(stream: BinaryIO, length: int, where: str) -> ArrayLayout:
    shape, fortran, dtype = _header(stream)
    form = f"{dtype} {list(shape)}"
    if dtype.kind not in "buif" or len(shape) not in (3, 4):
        raise InputError(f"{where}: holds {form}; give numbers [N, H, W, C] or, for grayscale, [N, H, W]")
    if len(shape) == 4 and shape[2] == shape[3] > max(shape[1], 4):
        raise InputError(f"{where}: {form} has its channels first; save numpy.moveaxis(it, 1, 3).copy()")
    if len(shape) == 3 and shape[2] in (3, 4):
        raise InputError(f"{where}: {form} looks like one image; give [1, H, W, {shape[2]}]")
    if fortran:
        raise InputError(f"{where}: is in Fortran order; save numpy.ascontiguousarray of it")
    if min(shape) < 1:
        raise InputError(f"{where}: {form} holds no pixel; give at least one image")
    offset = stream.tell()
    if offset + math.prod(shape) * dtype.itemsize > length:
        raise InputError(f"{where}: cut short: {form} needs more than its {length} bytes; make or copy it again")
    return ArrayLayout(shape[0], shape[1:], dtype.str, offset)


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read_header(stream)


def _stored(stream: BinaryIO, name: str, path: Path) -> np.ndarray:
    """An array. InputError for one of Python objects, which pandas makes of texts; anything for a damaged one."""
    if _header(stream)[2].hasobject:
        raise InputError(f"{path}: {name} is an array of Python objects; save it as {name}.astype(str)")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _each(values: np.ndarray, count: int, where: str) -> np.ndarray:
    """An integer (negative: unknown) or a string (empty: unknown) of each image, [N]; bytes become text."""
    if values.size != count or values.dtype.kind not in "iuUS":
        form = f"{values.dtype} {list(values.shape)}"
        raise InputError(
            f"{where} are {form}; give one integer or string for each of the {count} images, or leave them out"
        )
    values = values.reshape(-1)
    if values.dtype.kind == "S":
        values = np.array([value.decode("utf-8", "backslashreplace") for value in values.tolist()])
    return np.char.strip(values) if values.dtype.kind == "U" else values  # as a metadata.csv is read


def _labels(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Integers (negative: unknown) or strings (empty: unknown) to labels int64 [N] and the sorted classes."""
    unknown = values == "" if values.dtype.kind == "U" else values < 0
    known, labels = np.unique(values[~unknown], return_inverse=True)
    result = np.full(len(values), -1, np.int64)
    result[~unknown] = labels.reshape(-1)
    return result, [str(value) for value in known]
