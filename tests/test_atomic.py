"""Files and directories appear whole or not at all, and errors name them."""

import errno
import os
from pathlib import Path

import pytest

from igpt_fast import atomic
from igpt_fast.atomic import (
    move_into_place,
    open_atomically,
    refuse_others,
    remove_leftovers,
    work_directory,
    write_atomically,
)
from igpt_fast.errors import InputError


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_is_replaced_in_one_step(tmp_path, monkeypatch, exchanges):
    out, names = tmp_path / "out", lambda: sorted(os.listdir(tmp_path))
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with work_directory(out) as work:
            (work / text).touch()
            move_into_place(work, out)
        assert os.listdir(out) == [text] and names() == ["out"]
    with work_directory(out) as work:  # as if killed before what is old was removed
        (work / "newest").touch()
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
        move_into_place(work, out)
    monkeypatch.undo()
    assert os.listdir(out) == ["newest"] and len(names()) == 2
    if exchanges:
        with work_directory(out):
            assert len(names()) == 2, "what the killed one left is gone"


def test_a_directory_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    out, real = tmp_path / "out", os.rename
    out.mkdir()
    (out / "old").touch()

    def refuse(old, new):
        if str(old).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"), work_directory(out) as work:
        move_into_place(work, out)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["old"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "old").touch()
    out = tmp_path / "out"
    out.symlink_to("theirs")
    with work_directory(out) as work:
        (work / "new").touch()
        move_into_place(work, out)
    assert sorted(os.listdir(tmp_path)) == ["out", "theirs"] and not out.is_symlink()
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path / "theirs") == ["old"]


def test_a_folder_that_another_process_has_come_to_use_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), work_directory(tmp_path / "made" / "deep" / "out"):
        (tmp_path / "made" / "stranger").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "made") == ["stranger"]


def test_refuse_others_names_them(tmp_path):
    for name in ("ours-1", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds notes\.txt, which would be lost"):
        refuse_others(tmp_path, r"ours-\d")
    refuse_others(tmp_path, r"ours-\d|notes\.txt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, b"new")
    assert error.value.filename == str(path), "not the temporary name, nor none"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_failing_write_names_the_file(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=r"/a\.png'$") as error:
        write_atomically(tmp_path / "a.png", b"data")
    assert error.value.filename == str(tmp_path / "a.png") and len(list(tmp_path.iterdir())) == 1


def test_the_folder_one_is_in_and_mounted_ones_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "in")
    for out in (Path(), tmp_path / "out"):
        with pytest.raises(InputError, match=r"cannot be replaced as a whole \(you are in it\)"), work_directory(out):
            pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "out")
    with (
        pytest.raises(InputError, match=r"a disk is mounted there\); give a folder inside"),
        work_directory(Path("out")),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir("out") == ["in"]


def test_the_longest_names_are_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    write_atomically(path, b"data")
    assert path.read_bytes() == b"data" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="File name too long") as error:
        write_atomically(tmp_path / ("x" * 300 + ".png"), b"data")
    assert error.value.filename == str(tmp_path / ("x" * 300 + ".png"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"a\.png") as error:
        write_atomically(tmp_path / "file" / "deep" / "a.png", b"data")
    assert error.value.filename == str(tmp_path / "file" / "deep" / "a.png")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch, where):
    """And goes on as what it was: Ctrl-C, not a write that seems to have gone well."""
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_folders_that_are_missing_are_made(tmp_path):
    write_atomically(tmp_path / "two" / "deep" / "a", b"data")
    assert (tmp_path / "two" / "deep" / "a").read_bytes() == b"data"


def test_what_the_dead_left_goes_whatever_its_name(tmp_path):
    out = tmp_path / "run[1] *"
    dead, others = tmp_path / ".run[1] *.0123abcd.tmp", tmp_path / ".run1 all.0123abcd.tmp"
    for folder in (dead, others):
        folder.mkdir()
    with work_directory(out) as work:
        assert not dead.exists() and others.exists() and work.is_dir()


def test_files_that_the_dead_were_writing_go_and_those_of_the_living_stay(tmp_path):
    for name in (".0123abcd.77.tmp", ".0123abcd.tmp", ".notes.7.tmp", "0123abcd.77.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".0123abcd.78.tmp").mkdir()
    (tmp_path / ".0123abcd.79.tmp").touch()  # whole, perhaps, and about to get its name
    with open_atomically(tmp_path / "out") as file:
        file.write(b"all")
        file.flush()
        os.utime(file.name, (0, 0))
        remove_leftovers(tmp_path, tmp_path / "missing")
    left = {".0123abcd.tmp", ".notes.7.tmp", "0123abcd.77.tmp", ".0123abcd.78.tmp", ".0123abcd.79.tmp", "out"}
    assert {*os.listdir(tmp_path)} == left and (tmp_path / "out").read_bytes() == b"all"


def test_a_link_to_nowhere_is_replaced(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with work_directory(tmp_path / "out") as work:
        (work / "new").touch()
        move_into_place(work, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


def test_names_that_cannot_be_exchanged_are_not_taken_for_exchanged(tmp_path, monkeypatch):
    """Or else what was just written would be removed as what is old."""
    (tmp_path / "there").mkdir()
    assert not atomic._exchange(tmp_path / "there", tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["there"]

    class Refuses:
        renameat2 = staticmethod(lambda *_: -1)

    out = tmp_path / "there"
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Refuses)
    with work_directory(out) as work:
        (work / "new").touch()
        move_into_place(work, out)
    assert os.listdir(tmp_path) == ["there"] and os.listdir(out) == ["new"]


def test_names_that_only_begin_like_ours_are_others(tmp_path):
    (tmp_path / "ours-1.bak").touch()
    with pytest.raises(InputError, match=r"holds ours-1\.bak"):
        refuse_others(tmp_path, r"ours-\d")


def test_no_handle_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    with work_directory(tmp_path / "out"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
