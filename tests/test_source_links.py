"""Links in a folder of images: rings, knots, links to nothing, and folders that may not be read."""

import os
import tarfile

import pytest
from test_sources import SORTED, make_folder, pixels_of, png

from igpt_fast.errors import InputError
from igpt_fast.sources import OTHER, open_source


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
