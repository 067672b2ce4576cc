"""DICOM files say whom they show: those of one patient stay on one side of every split."""

import io
import tarfile
import zipfile

import numpy as np
import pytest

from igpt_fast.found import HEAD
from igpt_fast.sources import open_source

pydicom = pytest.importorskip("pydicom")
dataset = pytest.importorskip("pydicom.dataset")
uid = pytest.importorskip("pydicom.uid")


def scan(patient: str | None) -> bytes:
    """A DICOM file of 16 x 16 pixels. patient: its PatientID; None: it has none."""
    file, meta = dataset.Dataset(), dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = uid.ExplicitVRLittleEndian, uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = uid.generate_uid()
    file.file_meta, file.PhotometricInterpretation = meta, "MONOCHROME2"
    if patient is not None:
        file.PatientID = patient
    file.Rows = file.Columns = 16
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 7, 0, 1
    file.PixelData = bytes(256)
    data = io.BytesIO()
    pydicom.dcmwrite(data, file, enforce_file_format=True)
    return data.getvalue()


def write(where, files):
    """A folder, a .zip or a .tgz with those files."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif where.suffix == ".tgz":
        with tarfile.open(where, "w:gz") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    else:
        for name, data in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(data)
    return where


def alike(groups: list[str]) -> list[int]:
    """Groups by the order in which they are met."""
    return [list(dict.fromkeys(groups)).index(group) for group in groups]


@pytest.mark.parametrize("kind", ["folder", "x.zip", "x.tgz"])
def test_scans_of_a_patient_are_a_group(tmp_path, caplog, kind):
    files = {"a/1.dcm": "P1", "a/2": "P2", "b/3.DICOM": "P1 ", "b/4.dcm": "P2", "b/5.dcm": "", "b/6.dcm": None}
    source = open_source(write(tmp_path / kind, {name: scan(who) for name, who in files.items()}))
    assert alike(source.groups) == [0, 1, 0, 1, 2, 3] and source.classes == ["a", "b"]
    assert source.groups[4:] == ["image b/5.dcm", "image b/6.dcm"]
    assert "2 of its DICOM files name no patient" in caplog.text
    assert "P1" not in str(source.groups)  # the names of patients go into no file of ours


def test_a_patient_is_the_same_in_every_source(tmp_path):
    one = open_source(write(tmp_path / "one", {"1.dcm": scan("P1"), "2.dcm": scan("P2")}))
    other = open_source(write(tmp_path / "other", {"8.dcm": scan("P3"), "9.dcm": scan("P1")}))
    assert one.groups[0] == other.groups[1] and len(set(one.groups + other.groups)) == 3


def test_a_table_says_who_belongs_together(tmp_path, caplog):
    folder = write(tmp_path / "x", {"a/1.dcm": scan("P1"), "b/2.dcm": scan("P1"), "b/3.dcm": scan("P2")})
    (folder / "metadata.csv").write_text("file_name,group\na/1.dcm,u\nb/3.dcm,u\n")
    assert open_source(folder).groups == ["group u", "image b/2.dcm", "group u"]
    assert not [one for one in caplog.records if "fewer patients" in one.getMessage()]


@pytest.mark.parametrize("who", [["ANON", "ANON", "ANON"], ["", None, "ANON"], ["", None, ""]])
def test_scans_that_name_one_patient_or_none_are_each_alone(tmp_path, caplog, who):
    files = dict(zip(("a/1.dcm", "a/2.dcm", "b/3.dcm"), map(scan, who), strict=True))
    assert open_source(write(tmp_path / "x", files)).groups is None
    named = "at most one" if "ANON" in who else "no"
    assert f"3 of its DICOM files name {named} patient, and may be of fewer" in caplog.text


def test_patients_are_kept_together_without_labels_and_beside_other_images(tmp_path, caplog):
    files = {
        "1.dcm": scan("P1"),
        "2.dcm": scan("P2"),
        "3.dcm": scan("P1"),
        "4.png": b"",
        "5.dcm": b"",
        "6.dcm": b"x" * 99,
    }
    source = open_source(write(tmp_path / "x", files))
    assert source.labels is None and not caplog.records
    assert alike(source.groups) == [0, 1, 0, 2, 3, 4]


def test_a_packed_tar_is_read_on_only(tmp_path, monkeypatch):
    """An entry is sought once, and of names without a suffix little is kept."""
    files = {f"{k}": scan(f"P{k % 2}") for k in range(4)} | {"LICENSE": np.random.default_rng(0).bytes(HEAD)}
    path = write(tmp_path / "x.tgz", files)
    real, sought = tarfile.TarFile.extractfile, []

    def extract(self, entry):
        sought.append(entry.name)
        return real(self, entry)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", extract)
    assert alike(open_source(path).groups) == [0, 1, 0, 1] and sorted(sought) == ["0", "1", "2", "3", "LICENSE"]


def test_a_hard_link_shows_whom_its_file_shows(tmp_path):
    path, data = tmp_path / "x.tar", scan("P1")
    with tarfile.open(path, "w") as archive:
        for name, whose in (("./1/a.dcm", ""), ("2/b", "./1/a.dcm"), ("2/c.dcm", "1/a.dcm"), ("3/d.dcm", None)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = (tarfile.LNKTYPE, whose) if whose else (tarfile.REGTYPE, "")
            body = b"" if whose else data if whose is not None else scan("P2")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    source = open_source(path)
    assert source.names == ["1/a.dcm", "2/b", "2/c.dcm", "3/d.dcm"] and alike(source.groups) == [0, 0, 0, 1]


def test_a_damaged_scan_in_a_zip_ends_no_listing(tmp_path):
    path = write(tmp_path / "x.zip", {"1.dcm": scan("P1"), "2.dcm": scan("P2"), "3.dcm": scan("P3")})
    data = bytearray(path.read_bytes())
    data[data.index(b"1.dcm") + 10 : data.index(b"2.dcm") - 40] = b"\xff" * (
        data.index(b"2.dcm") - 50 - data.index(b"1.dcm")
    )
    path.write_bytes(data)
    assert alike(open_source(path).groups) == [0, 1, 2] and open_source(path).groups[0] == "image 1.dcm"


def test_a_patient_is_found_before_what_goes_on_for_long(tmp_path, caplog, recwarn):
    """As in enhanced files of many frames, whose sequences are longer than what is looked at."""
    files = {}
    for name, who in (("1.dcm", "P1"), ("2.dcm", "P" * 70), ("3.dcm", "P1")):
        file = pydicom.dcmread(io.BytesIO(scan(who)))
        frames = []
        for _ in range(1500):
            frames.append(frame := dataset.Dataset())
            frame.WindowCenter, frame.WindowWidth, frame.RescaleSlope = 40, 400, 1
        file.PerFrameFunctionalGroupsSequence = frames
        file["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
        data = io.BytesIO()
        pydicom.dcmwrite(data, file, enforce_file_format=True)
        assert len(data.getvalue()) > HEAD
        files[name] = data.getvalue()
    recwarn.clear()
    assert alike(open_source(write(tmp_path / "x", files)).groups) == [0, 1, 0] and not recwarn.list


def test_folders_of_patients_whom_the_files_name_are_not_told(tmp_path, caplog):
    files = {f"{kind}/{who}/{k}.dcm": scan(who) for k, (kind, who) in enumerate([("a", "p"), ("a", "q"), ("b", "r")])}
    assert open_source(write(tmp_path / "x", files)).classes == ["a", "b"] and not caplog.records
