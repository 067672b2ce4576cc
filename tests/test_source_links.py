"""Links in a folder of images: rings, knots, links to nothing, and folders that may not be read."""

import os
import tarfile
import zipfile

import pytest
from test_sources import SORTED, make_folder, pixels_of, png

from igpt_fast.errors import InputError
from igpt_fast.found import OTHER
from igpt_fast.sources import open_source


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "photos")


def test_links(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.png").write_bytes(png(pixels_of("far")))
    (folder / "d").symlink_to(elsewhere)
    (folder / "0d").symlink_to("d")  # is there under each of its names
    (folder / "a" / "up").symlink_to(folder)  # a ring
    (folder / "a" / "self").symlink_to("self")
    (folder / "c" / "lost.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    source = open_source(folder)
    (tmp_path / "knot").mkdir()
    for k in range(17):
        (tmp_path / "knot" / str(k)).symlink_to(elsewhere)
    with pytest.raises(InputError, match="links lead here in more than 16 ways"):
        open_source(tmp_path / "knot")
    assert source.names == sorted([*SORTED, "0d/far.png", "d/far.png", "c/lost.png"])
    with pytest.raises(InputError, match=r"c/lost\.png: cannot be read \(No such file"):
        source.read(source.names.index("c/lost.png"))
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.add(folder / "a/one.png", "one.png")
        archive.add(folder / "c/lost.png", "lost.png")
    assert open_source(tmp_path / "links.tar").ignored == {OTHER: 1}


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch):
    real, closed = os.scandir, folder / "c"
    monkeypatch.setattr(os, "scandir", lambda path: real(path if path != closed else folder / "nothing"))
    with pytest.raises(InputError, match=r"/c: cannot be read \(No such .*\); allow it, or move it elsewhere"):
        open_source(folder)


def test_names_that_lead_up_and_hard_links_in_archives(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.write(folder / "a/one.png", "../../a/one.png")
        archive.write(folder / "b/ant.PNG", "b/ant.PNG")
    source = open_source(tmp_path / "up.zip")
    assert source.names == ["../../a/one.png", "b/ant.PNG"] and not source.ignored
    assert (source.read(0) == pixels_of("a/one.png")).all()
    os.link(folder / "a/one.png", folder / "b/same.png")
    os.link(folder / "notes.txt", folder / "b/notes.png")  # its first name is no image's, this one is
    with tarfile.open(tmp_path / "linked.tar", "w") as archive:
        for name in ("a/one.png", "notes.txt", "b/same.png", "b/notes.png"):
            archive.add(folder / name, f"./{name}")
        assert archive.getmembers()[2].islnk()
        gone = tarfile.TarInfo("gone.png")
        gone.type, gone.linkname = tarfile.LNKTYPE, "nowhere.png"
        archive.addfile(gone)
    source = open_source(tmp_path / "linked.tar")
    assert source.names == ["a/one.png", "b/notes.png", "b/same.png"] and source.ignored == {OTHER: 2}
    assert (source.read(2) == pixels_of("a/one.png")).all()
