"""What a Reader fetches of a file that was made to harm."""

import io
import struct
import tarfile
import tracemalloc
import zipfile

import pytest
from PIL import Image

from igpt_fast import reader
from igpt_fast.errors import InputError
from igpt_fast.sources import open_source


def test_a_zip_unpacks_no_more_than_it_says_and_than_an_image_has(tmp_path, monkeypatch):
    path, names = tmp_path / "bomb.zip", ("a.png", "b.png")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(1 << 20))
    data = bytearray(path.read_bytes())
    size = data.index(b"PK\1\2") + 24
    data[size : size + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    source = open_source(path)
    monkeypatch.setattr(reader, "MOST", 1 << 16)
    for i, (name, reason) in enumerate(zip(names, ("its checksum", "it unpacks to 1,048,576 bytes"), strict=True)):
        tracemalloc.start()
        with pytest.raises(
            InputError, match=rf"bomb\.zip: {name}: cannot be read \({reason}.*mend or remove the file$"
        ):
            source.read(i)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_whose_entries_have_extra_fields_as_those_of_info_zip(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 0, 9)).save(image := io.BytesIO(), "PNG")
            entry = zipfile.ZipInfo(f"{number}.png")
            entry.compress_type, entry.extra = method, struct.pack("<HHBI", 0x5455, 5, 1, 7)  # a time
            archive.writestr(entry, image.getvalue())
    source = open_source(tmp_path / "a.zip")
    assert [source.read(number)[0, 0].tolist() for number in range(3)] == [[number, 0, 9] for number in range(3)]


def test_a_changed_name_in_the_list_of_a_zip_is_found(tmp_path):
    """It would be another class, and the name has no checksum; but it stands there twice."""
    picture = io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    path, names = tmp_path / "a.zip", ("dog/1.png", "Bär/1.png", "b\u0308/1.png")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, picture.getvalue())
    source = open_source(path)
    assert sorted(source.names) == sorted(names) and [source.read(i).shape for i in range(3)] == [(2, 2, 3)] * 3
    data = path.read_bytes()
    at = data.rindex(b"dog/1.png")
    path.write_bytes(data[:at] + b"fog" + data[at + 3 :])
    source = open_source(path)
    with pytest.raises(InputError, match=r"a\.zip: fog/1\.png: cannot be read \(its name in the zip's list"):
        source.read(source.names.index("fog/1.png"))


def test_names_of_a_zip_may_be_encoded_in_two_ways(tmp_path):
    """One by its list and one by its place, or with another slash, as long as they are the same name."""
    picture = io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/\u00e9.png", picture.getvalue())
        archive.writestr("cat/2.png", picture.getvalue())
    data = path.read_bytes()
    assert data[6:8] == b"\0\x08"  # names in UTF-8
    name = "cat/\u00e9.png"
    utf8, cp437 = name.encode(), name.encode("cp437")
    assert data[30 : 30 + len(utf8)] == utf8 and len(cp437) == len(utf8) - 1
    # The byte that the name has less is an extra field.
    head = data[:6] + b"\0\0" + data[8:26] + struct.pack("<HH", len(cp437), 1) + cp437 + b"\0"
    path.write_bytes((head + data[30 + len(utf8) :]).replace(b"cat/2.png", b"cat\\2.png", 1))
    source = open_source(path)
    assert sorted(source.names) == ["cat/2.png", name] and [source.read(i).shape for i in range(2)] == [(2, 2, 3)] * 2


def test_a_tar_that_became_shorter_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        Image.new("L", (64, 64), 9).save(image := io.BytesIO(), "BMP")
        (entry := tarfile.TarInfo("a.bmp")).size = len(image.getvalue())
        archive.addfile(entry, io.BytesIO(image.getvalue()))
    source, path = open_source(tmp_path / "a.tar"), tmp_path / "a.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"a\.tar: a\.bmp: .*the file ends before this image does"):
        source.read(0)
