"""What a folder or an archive holds, entry by entry: where its images lie, what is told of them, what is left out.

Nobody's pixels are read: names say what an image is, of scans the first bytes, and these also whom one shows.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from igpt_fast.classes import METADATA, is_table
from igpt_fast.image_files import SUFFIXES, is_image
from igpt_fast.scientific import DICOM_SUFFIXES, patient_of

HIDDEN, OTHER, REPLACED = "hidden", "not an image", "replaced by a later entry of the same name"
SCAN_SUFFIXES = (".nii", ".nii.gz")
SCANS = "NIfTI, which is not read (export its slices as 16-bit PNG)"
OTHER_TABLES = (METADATA, "metadata.jsonl")  # in capitals, or of another kind
HEAD = 1 << 16  # bytes of a DICOM file within which it names its patient

log = logging.getLogger("igpt_fast")


@dataclass
class Found:
    """refs: where each image lies. tables: each metadata.csv. patients: whom each DICOM file shows, as patient_of says.
    ignored: how many files are left out, by reason.
    """

    refs: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    def takes(self, name: str, read: Callable[[int], bytes]) -> bool:
        """Whether an entry is an image, whose place the caller then notes; a table is kept, and all else is counted.

        read: its first so many bytes, at most HEAD, none where they cannot be had; of -1 all.
        """
        if any(map(is_hidden, name.split("/"))):
            self.ignored[HIDDEN] += 1
        elif is_table(name):
            self.tables[name] = read(-1)
        elif is_image(name, read):
            self.ignored.update([REPLACED] if name in self.refs else [])
            suffix = os.path.splitext(name)[1].lower()
            if suffix in DICOM_SUFFIXES or suffix not in SUFFIXES:
                self.patients[name] = patient_of(read(HEAD))
            return True
        else:
            if os.path.basename(name).lower() in OTHER_TABLES:
                log.warning("%s: is not used; classes and groups are read from a table called %s", name, METADATA)
            self.ignored[SCANS if name.lower().endswith(SCAN_SUFFIXES) else OTHER] += 1
        return False


def is_hidden(part: str) -> bool:
    """Whether a part of a path is none of the user's own."""
    return (part.startswith(".") and part != "..") or part == "__MACOSX"
