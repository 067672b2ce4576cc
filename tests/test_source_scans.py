"""Scans among the files of a source: DICOM without a suffix is found, NIfTI is named."""

import os

import pytest
from test_sources import ARCHIVES, SORTED, make_folder, pack

from igpt_fast.errors import InputError
from igpt_fast.sources import HIDDEN, OTHER, SCANS, open_source


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "photos")


def test_scans_in_files_of_their_own_kind_are_named(folder):
    for name in ("a.nii", "b.nii.gz"):
        (folder / name).write_bytes(b"x")
        with pytest.raises(InputError, match=f"{name}: NIfTI, which is not read .export its slices as 16-bit PNG"):
            open_source(folder / name)
    assert open_source(folder).ignored[SCANS] == 2
    (folder / "alone").mkdir()
    (folder / "alone" / "a.nii").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no image among its 1 files .*, of which 1 are NIfTI"):
        open_source(folder / "alone")


@pytest.mark.parametrize("kind", [None, *ARCHIVES])
def test_dicom_files_need_no_suffix(folder, tmp_path, kind):
    """Scanners number them; what else has no suffix is no image, as the list of a disk's DICOM files is none."""
    head = bytes(128) + b"DICM"
    found = {"b/IM0001": head, "b/1.2.840.10008.57": head, "b/DICOMDIR": head, "b/README": b"words", "b/x.bin": head}
    for name, data in found.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "b/pipe") if kind is None else None
    source = open_source(pack(folder, tmp_path / kind) if kind else folder)
    assert source.names == sorted([*SORTED, "b/IM0001", "b/1.2.840.10008.57"])
    assert source.ignored == {HIDDEN: 1, OTHER: 4 + (kind is None)}
    assert open_source(folder / "b/IM0001").names == ["IM0001"]
    with pytest.raises(InputError, match="README: not a kind of file that holds images"):
        open_source(folder / "b/README")


def test_a_pipe_is_no_file_of_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: is a pipe or a device; give a folder"):
        open_source(tmp_path / "a.png")
