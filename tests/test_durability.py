"""What is written lies on the disk before it has its name: a machine that dies leaves the old or the new, in whole."""

import os
from pathlib import Path

import pytest
import torch
from published import PALETTE, make
from tiny import CONFIG, FAST, write_tokens

from igpt_fast import atomic
from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


class Disk:
    """What was synced, as its inode and length then, and the names that were given, in order."""

    def __init__(self, monkeypatch) -> None:
        self.events: list = []
        monkeypatch.setattr(os, "fsync", self._sync)
        for where, name in ((os, "rename"), (os, "replace"), (atomic, "_exchange")):
            monkeypatch.setattr(where, name, self._naming(getattr(where, name)))

    def _sync(self, handle: int) -> None:
        found = os.fstat(handle)
        self.events.append((found.st_ino, found.st_size))

    def _naming(self, real):
        def name(old, new):
            self.events.append(Path(new))
            return real(old, new)

        return name

    def before(self, path: Path) -> list:
        """What came before `path` had its name."""
        return self.events[: self.events.index(path)]

    def behind(self, path: Path) -> list:
        """What came after that."""
        return self.events[self.events.index(path) + 1 :]


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def synced(path: Path, events: list) -> bool:
    """Whether all of a file, or a directory with its names, was."""
    found = path.stat()
    if path.is_file():
        return (found.st_ino, found.st_size) in events
    return found.st_ino in {event[0] for event in events if isinstance(event, tuple)}


def unsynced(folder: Path, events: list) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if not synced(path, events)]


def test_a_file(disk, tmp_path):
    for data in (b"old", b"newer"):
        disk.events.clear()
        write_atomically(tmp_path / "a", data)
        assert synced(tmp_path / "a", disk.before(tmp_path / "a"))


def test_a_checkpoint_and_its_name(disk, tmp_path):
    model = make(classes=3)
    model.class_names = ("a", "b", "c")
    path = save_checkpoint(tmp_path, 1, model, PALETTE, {}, {"exp_avg.wte": torch.ones(3)})
    assert len(list(path.iterdir())) == 6 and not unsynced(path, disk.before(path))
    assert synced(path, disk.before(path)) and synced(path.parent, disk.behind(path))


def test_metrics_are_no_younger_than_a_checkpoint(disk, tmp_path):
    train(write_tokens(tmp_path / "data"), tmp_path / "run", CONFIG, **{**FAST, "steps": 2, "log_every": 1})
    assert synced(tmp_path / "run" / "metrics.jsonl", disk.before(tmp_path / "run" / "checkpoints" / "step-00000002"))


def test_tokens(disk, tmp_path):
    path = write_tokens(tmp_path).path
    assert not unsynced(path, disk.before(path))


@pytest.mark.parametrize("exchanges", [True, False])
def test_published_weights_and_those_that_take_their_place(disk, tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for overwrite in (False, True):
        disk.events.clear()
        make().save_pretrained(tmp_path / "w", PALETTE, overwrite)
        assert not unsynced(tmp_path / "w", disk.before(tmp_path / "w"))
