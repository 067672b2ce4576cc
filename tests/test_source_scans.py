"""Scans among the files of a source: DICOM without a suffix is found, NIfTI is named."""

import io
import os
import tarfile
import zipfile

import pytest
from test_sources import ARCHIVES, SORTED, make_folder, pack

from igpt_fast.errors import InputError
from igpt_fast.found import HIDDEN, OTHER, SCANS
from igpt_fast.image_files import is_image
from igpt_fast.sources import open_source


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


@pytest.mark.parametrize("name", ["dicomdir", "DICOMDIR;1", "x/DicomDir"])
def test_the_list_of_a_disk_is_none_however_it_is_written(tmp_path, name):
    assert not is_image(name, lambda count: bytes(128) + b"DICM") and is_image("x/IM1", lambda _: bytes(128) + b"DICM")


def test_what_cannot_be_looked_into_is_no_image(folder, tmp_path, monkeypatch):
    """Only files without a suffix are looked into, and those that are left out anyway end nothing."""
    (folder / "LICENSE").write_bytes(b"x")
    real = open

    def closed(path, *rest, **more):
        if str(path).endswith("LICENSE"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr("builtins.open", closed)
    assert open_source(folder).names == SORTED
    monkeypatch.undo()
    path = pack(folder, tmp_path / "stored.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("README", b"words")
        archive.writestr("a/metadata.csv", b"file_name,label\none.png,x\n", zipfile.ZIP_BZIP2)
    assert open_source(path).names == SORTED
    data = bytearray(path.read_bytes())
    for name in (b"README", b"a/metadata.csv"):  # the flags of encrypted entries
        data[data.rindex(name) - 46 + 8] |= 1
        path.write_bytes(data)
        if name == b"README":
            assert open_source(path).names == SORTED
    with pytest.raises(InputError, match=r"metadata\.csv is encrypted"):
        open_source(path)


def test_hard_links_without_a_suffix_are_not_sought(folder, tmp_path, monkeypatch):
    """In a compressed tar each would be read from the start; their first name has told what they are."""
    head = bytes(128) + b"DICM"
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        for name, target in (("1/IM1", ""), ("1/NOTE", ""), ("2/IM1", "1/IM1"), ("2/NOTE", "1/NOTE")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = (tarfile.LNKTYPE, target) if target else (tarfile.REGTYPE, "")
            data = b"" if target else head if "IM" in name else b"words"
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    real = tarfile.TarFile.extractfile

    def look(self, entry):
        assert not entry.islnk()
        return real(self, entry)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", look)
    source = open_source(tmp_path / "x.tgz")
    assert source.names == ["1/IM1", "2/IM1"] and source.ignored == {OTHER: 2} and source.refs[0] == source.refs[1]
