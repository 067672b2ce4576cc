"""`igpt-fast train --resume`: what a run needs to go on, and what it says when some of it, or of DATA, is amiss."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import write_tokens

from igpt_fast import checkpoint
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset

MODEL = ("--layers", 1, "--width", 16, "--heads", 2)
FAST = ("--steps", 4, "--batch", 4, "--sample-every", 2, "--save-every", 2, "--log-every", 1)
IMAGES = ("--size", 4, "--colors", 8, "--workers", 0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Twenty images in two class folders; the working directory is among them."""
    for number in range(20):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, igpt) -> Path:
    """A run of four steps on tokens."""
    data = write_tokens(tmp_path / "data", count=20)
    assert igpt("train", data.path, "--out", tmp_path / "run", *MODEL, *FAST)[0] == 0
    return tmp_path / "run"


def test_one_command_begins_and_goes_on(tmp_path, igpt, photos, run):
    """As a scheduler repeats it, with all that the beginning takes."""
    again = "train", photos, "--out", tmp_path / "again", "--init", run, "--size", "6", "--auto-resume", *FAST[:2]
    code, _, said = igpt(*again)
    assert code == 0 and "step 4: loss" in said, said
    code, _, said = igpt(*again[:-1], 6)
    assert code == 0 and "step 6: loss" in said and read_options(tmp_path / "again")["command"]["init"] == str(run)
    code, _, said = igpt("train", photos, "--out", tmp_path / "again", "--init", run, "--size", "6", *FAST[:2])
    assert code == 2 and "add --resume to go on from it" in said


def test_finetune_too(tmp_path, igpt, photos, run):
    again = "finetune", run, photos, "--out", tmp_path / "tuned", "--resize", "hf", "--auto-resume", "--steps"
    assert igpt(*again, 1)[0] == 0
    code, _, said = igpt(*again, 2)
    assert code == 0 and "of 2 best" in said


def resume(igpt, run: Path, *words) -> tuple[int, str]:
    """Exit code and stderr."""
    code, _, said = igpt("train", run.parent / "data/tokens", "--out", run, "--resume", *words)
    assert code in (0, 2) and (not code or said.count("\n") <= 2)
    return code, said


def test_a_run_inside_its_own_data_goes_on(photos, igpt):
    assert igpt("train", ".", "--out", "run", *MODEL, *FAST, *IMAGES)[0] == 0
    assert Path("run/loss.png").exists() and Path("run/samples/step-000002.png").exists()
    code, _, said = igpt("train", ".", "--out", "run", "--resume", "--steps", 5)
    assert code == 0 and "using the tokens at run/tokens again: 20 images" in said
    code, _, said = igpt("train", ".", "--out", "run2", *MODEL, *FAST, *IMAGES)
    assert code == 0 and "made by igpt-fast" in said
    assert TokenDataset("run2/tokens").classes == ["a", "b"] and len(TokenDataset("run2/tokens")) == 20


def test_changed_images_and_broken_tokens_have_a_way_on(photos, tmp_path, igpt):
    run = tmp_path / "a run"
    assert igpt("train", ".", "--out", run, *MODEL, *FAST, *IMAGES)[0] == 0
    (photos / "a/0.png").rename(photos / "a/new.png")
    code, _, said = igpt("train", ".", "--out", run, "--resume")
    assert code == 2 and f"igpt-fast train '{run}/tokens' --out '{run}' --resume goes on" in said
    assert "delete" not in said
    assert igpt("train", run / "tokens", "--out", run, "--resume", "--steps", 5)[0] == 0
    (photos / "a/new.png").rename(photos / "a/0.png")
    assert igpt("train", ".", "--out", run, "--resume", "--steps", 6)[0] == 0
    shard = run / "tokens/shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:200])
    code, _, said = igpt("train", ".", "--out", run, "--resume", "--steps", 7)
    assert code == 2 and f"delete {run / 'tokens'}, which train makes again" in said
    for file in (run / "tokens").iterdir():
        file.unlink()
    (run / "tokens").rmdir()
    assert igpt("train", ".", "--out", run, "--resume", "--steps", 7)[0] == 0


def test_a_stray_picture_stops_nothing(run, igpt):
    (run / "samples/step-best.png").write_bytes(b"the user's")
    (run / "samples/step-000099.png").write_bytes(b"of a step to come")
    assert resume(igpt, run, "--steps", 5)[0] == 0
    assert (run / "samples/step-best.png").exists() and not (run / "samples/step-000099.png").exists()


def test_a_finished_run_refuses_what_would_change_nothing(run, igpt):
    before = (run / "train.json").read_bytes()
    for words in (("--lr", 0.5), ("--warmup", 1), ("--clip", 2)):
        code, said = resume(igpt, run, *words)
        assert code == 2 and f"{words[0]} changes nothing: {run} has taken its 4 steps; give more --steps" in said
    assert (run / "train.json").read_bytes() == before
    assert resume(igpt, run, "--lr", 0.5, "--steps", 5)[0] == 0 and read_options(run)["options"]["lr"] == 0.5


def test_what_a_kill_behind_the_last_save_left_goes(run, igpt):
    """A checkpoint is many gigabytes, and no later save would come by."""
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000001")  # killed while it was removed
    shutil.copytree(folder / "step-00000002", folder / "step-00000000")  # and before
    leftovers = [place / ".0123abcd.7.tmp" for place in (run, run / "samples", folder / "step-00000004")]
    for leftover in leftovers:
        leftover.touch()  # killed while a file was written
        os.utime(leftover, (0, 0))
    assert resume(igpt, run)[0] == 0 and not any(leftover.exists() for leftover in leftovers)
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000004"]


def test_a_finished_run_without_metrics_still_reports(run, igpt):
    (run / "metrics.jsonl").unlink()
    code, said = resume(igpt, run)
    assert code == 0 and "step 4: no loss in" in said


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("options", "steps"), "10"),
        (("options", "lr"), "abc"),
        (("options", "flip"), 1),
        (("options", "batch"), True),
        (("config", "layers"), "2"),
        (("config", "size"), None),
        (("command", "images"), 3),
        (("command", "images", "size"), 8),
        (("command", "images", "size"), [8]),
        (("command", "images", "background"), 7),
        (("command", "images", "value_range"), "0,9"),
        (("command", "images", "bands"), 3),
    ],
)
def test_a_hand_edited_train_json_is_called_damaged(run, igpt, where, value):
    saved = json.loads((run / "train.json").read_text())
    at = saved
    for name in where[:-1]:
        at = at[name]
    at[where[-1]] = value
    (run / "train.json").write_text(json.dumps(saved))
    code, said = resume(igpt, run)
    assert code == 2 and "train.json is damaged (" in said and repr(value) in said


def test_without_train_json_the_advice_works(run, tmp_path, igpt):
    (run / "train.json").unlink()
    code, said = resume(igpt, run)
    assert code == 2 and f"--init {run} and another --out" in said
    assert igpt("train", tmp_path / "data/tokens", "--init", run, "--out", tmp_path / "other", *FAST)[0] == 0


def test_a_disk_that_is_full_at_the_first_save(tmp_path, monkeypatch, igpt):
    data = write_tokens(tmp_path / "data", count=20)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_files", full)
        code, _, said = igpt("train", data.path, "--out", tmp_path / "run", *MODEL, *FAST)
    assert code == 2 and "No space left on device; make room, then start again" in said and "--resume" not in said
    assert igpt("train", data.path, "--out", tmp_path / "run", *MODEL, *FAST)[0] == 0


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGKILL])
def test_a_work_that_was_ended_while_images_are_read_leaves_nothing_for_ever(photos, igpt, which):
    script = (
        "import os, sys; from igpt_fast import data; from igpt_fast.cli import main\n"
        f"data.refuse_none_left = lambda *_: os.kill(os.getpid(), {int(which)}); main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    words = [str(word) for word in ("train", "a", "--out", "run", *MODEL, *FAST, *IMAGES)]
    ended = subprocess.run([sys.executable, "-c", script, *words], env=environment, timeout=120).returncode
    left = list(Path().glob("run/.tokens.*.tmp"))
    assert (ended, len(left)) == ((143, 0) if which == signal.SIGTERM else (-9, 1))
    assert igpt(*words)[0] == 0
    assert not list(Path().glob("run/.tokens.*.tmp"))
