"""Which class each image of a source has, and which images belong together: by folders, by a metadata.csv, and by the
patients whom DICOM files name.

metadata.csv lies among the images, as Hugging Face's ImageFolder has it. Its first line names the columns: file_name
(relative to where the file lies), label, and, where images of one patient or region are not to be on both sides of a
split, group; in capitals or not.
"""

import csv
import io
import logging
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from igpt_fast.arrays import OWNERS
from igpt_fast.errors import InputError

METADATA = "metadata.csv"
FILE, LABEL, GROUP = "file_name", "label", "group"  # its columns

# What folders are called that are parts of one data set, and no classes.
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

_IN, _ALONE = "group ", "image "  # before a group's name, and before that of an image that has no group

log = logging.getLogger("igpt_fast")


@dataclass(frozen=True)
class Classes:
    """labels: int64 [N], -1 where unknown, with the names that they index; groups: of each image. None: none.

    by_folder: whether folders, and no table, say what the labels are.
    """

    labels: np.ndarray | None = None
    names: list[str] | None = None
    groups: list[str] | None = None
    by_folder: bool = False


def is_table(name: str) -> bool:
    """Whether an entry of a source is a metadata.csv."""
    return posixpath.basename(name) == METADATA


def classes_of(names: list[str], tables: dict[str, bytes], where: str) -> Classes:
    """The classes of images with those names. tables: each metadata.csv by its name. where: names the source in errors.

    Images of which no table says anything have no label, and are a group of their own. Raises InputError for a table
    that cannot be read, contradicts itself, or names no image of the source.
    """
    rows: dict[str, dict[str, str]] = {}
    columns: set[str] = set()
    images = set(names)
    for table, data in tables.items():
        named = f"{where}: {table}"
        columns |= _read(data, named, posixpath.dirname(table), rows, images)
    groups = None
    if GROUP in columns:
        owners = [rows.get(name, {}).get(GROUP, "") for name in names]
        if 0 < (lone := owners.count("")) < len(names):
            log.warning("%s: %d of %d images have no group, and count as one each", where, lone, len(names))
        groups = as_groups(owners, names)
    if LABEL not in columns:
        if columns:
            log.warning("%s: has no column `label`, so folders are the classes", where if len(tables) > 1 else named)
        return Classes(*by_folder(names, where), groups, by_folder=True)
    texts = [rows.get(name, {}).get(LABEL, "") for name in names]
    classes = _in_order({text for text in texts if text})
    if not classes:
        return Classes(groups=groups)
    number = {text: k for k, text in enumerate(classes)} | {"": -1}
    return Classes(np.array([number[text] for text in texts], np.int64), classes, groups)


def by_patients(names: list[str], found: Classes, patients: dict[str, str], where: str) -> Classes:
    """Classes with a group for each patient whom DICOM files name, unless a table has groups or all name one.

    patients: whom each DICOM file shows, "" where it does not say. Labelled ones that are then in no group are told.
    """
    if found.groups is not None:
        return found
    patients = {name: patients[name] for name in names if name in patients}
    alone, one = [name for name in patients if not patients[name]], len(set(patients.values()) - {""}) == 1
    if one:
        alone = list(patients)
    elif len(alone) < len(patients):
        owners = (f"patient {patients[name]}" if patients.get(name) else "" for name in names)
        found = replace(found, groups=as_groups(owners, names))
    if len(alone) > 1 and found.labels is not None:
        log.warning(
            "%s: %d of its DICOM files name %s patient, and may be of fewer patients; `group` in a metadata.csv "
            "beside `file_name` keeps those of one on one side of every split",
            where,
            len(alone),
            "at most one" if one else "no",
        )
    return found


def warn_of_folders(names: list[str], found: Classes, where: str) -> None:
    """Says, in the log, that images of one class lie in several folders, which may be of a scene or a patient each."""
    if not found.by_folder or found.labels is None or found.groups is not None:
        return
    first: dict[int, str] = {}
    for name, label in zip(names, found.labels.tolist(), strict=True):
        folder = "/".join(part for part in posixpath.dirname(name).split("/") if part.lower() not in PARTS)
        if label >= 0 and first.setdefault(label, folder) != folder:
            log.warning(
                "%s: images lie in folders below their class, as %s; if each is of one scene or patient, `group` in a "
                "metadata.csv beside `file_name` says so, or some will be learned from and others tested on",
                where,
                max(folder, first[label], key=len),
            )
            return


def as_groups(texts: Iterable[str], names: list[str]) -> list[str]:
    """The groups of a Source: of an image without one (""), its own name, apart from the names of groups."""
    return [_IN + text if text else _ALONE + name for text, name in zip(texts, names, strict=True)]


def group_names(groups: Iterable[str]) -> list[str]:
    """The names of groups as tables have them: "" of an image that is alone."""
    return [group.removeprefix(_IN) if group.startswith(_IN) else "" for group in groups]


def in_both(groups: list[str] | None, others: list[str] | None) -> list[str]:
    """The names of the groups, as the tables have them, of which both lists hold images."""
    both = {group for group in groups or () if group.startswith(_IN)}.intersection(others or ())
    return sorted(group.removeprefix(_IN) for group in both)


def by_folder(names: list[str], where: str = "") -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (int64 [N], -1 for images beside the class folders) and class names; (None, None) with fewer than two.

    Folders that are all called as the parts of a data set are, train and test, are no classes, which is logged; those
    in them are. where: names the source then.
    """
    folders = [posixpath.dirname(name) for name in names]
    parts = {folder: folder.split("/") if folder else [] for folder in set(folders)}
    level = 0
    while all(len(p) > level for p in parts.values()) and len({p[level] for p in parts.values()}) == 1:
        level += 1
    classes = sorted({p[level] for p in parts.values() if len(p) > level})
    if len(classes) > 1 and PARTS.issuperset(name.lower() for name in classes):
        log.warning(
            "%s: the folders %s are taken for parts of a data set and read as one: give one alone, others as --test",
            where,
            ", ".join(classes),
        )
        level += 1
        classes = sorted({p[level] for p in parts.values() if len(p) > level})
    if len(classes) < 2:
        return None, None
    number = {name: k for k, name in enumerate(classes)}
    of = {folder: number[p[level]] if len(p) > level else -1 for folder, p in parts.items()}
    return np.array([of[folder] for folder in folders], np.int64), classes


def by_class(labels: np.ndarray, which: np.ndarray) -> list[np.ndarray]:
    """The images `which`, bool [N], of each class that has some: indices, ascending, the classes too."""
    places = np.flatnonzero(which)
    places = places[np.argsort(labels[places], kind="stable")]
    return np.split(places, np.flatnonzero(np.diff(labels[places])) + 1) if len(places) else []


def _read(data: bytes, where: str, folder: str, rows: dict[str, dict[str, str]], images: set[str]) -> set[str]:
    """Adds a table's rows to `rows`, by the images' names. Returns its columns, of those that are known here."""
    try:
        text = data.decode("utf-8-sig")
        first = text.partition("\n")[0]
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
        titles = [name.strip() for name in lines.fieldnames or ()]
        known = {name: name.lower() for name in titles if name.lower() in (FILE, LABEL, GROUP)}
        lines.fieldnames = [known.get(name, name) for name in titles]
        columns, rest = set(known.values()), [name for name in titles if name not in known and OWNERS.search(name)]
        if twice := [name for name in columns if lines.fieldnames.count(name) > 1]:
            raise InputError(f"{where}: has two columns {twice[0]}; leave one of them out")
        if FILE not in columns:
            log.warning("%s: is not used, for it has no column `file_name`", where)
            return set()
        if rest and GROUP not in columns:
            log.warning(
                "%s: its column %s is not used; if it says which images belong together, as those of one patient, call "
                "it `group`, or some will be learned from and others tested on",
                where,
                " or ".join(f"`{name}`" for name in rest),
            )
        count = found = 0
        for line in lines:
            if not (line[FILE] or "").strip():
                continue
            if any(more.strip() for more in line.get(None, ())):  # the label would be what stands before the comma
                way = "quote what has a comma, or give the column a name there"
                raise InputError(f"{where}, line {lines.line_num}: has more columns than line 1; {way}")
            count += 1
            name = posixpath.normpath(posixpath.join(folder, line[FILE].strip()))
            row = {column: (line[column] or "").strip() for column in columns - {FILE}}
            if rows.setdefault(name, row) != row:
                raise InputError(f"{where}, line {lines.line_num}: says something else of {name} than a line before")
            found += name in images
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: is no CSV file in UTF-8 ({error}); write it again") from error
    if not found:
        raise InputError(
            f"{where}: names none of the images here; file_name is their path from here, with / and its ending"
        )
    if found < count:
        log.warning("%s: %d of its %d rows name no image here", where, count - found, count)
    return columns


def _in_order(classes: set[str]) -> list[str]:
    """Numbers by their size, else by the alphabet."""
    numbers = all(text.isascii() and text.isdecimal() for text in classes)
    return sorted(classes, key=lambda text: (len(text.lstrip("0")), text.lstrip("0"), text) if numbers else text)
