"""`igpt-fast train` as people and programs meet it: what it prints and where, exit codes, kill -9 with --resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import rows, same, weights, write_tokens

from igpt_fast.cli import main
from igpt_fast.palette import Palette
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset

MODEL = ["--layers", "2", "--width", "32"]
FAST = [
    "--steps",
    "9",
    "--batch",
    "4",
    "--log-every",
    "2",
    "--val-every",
    "4",
    "--sample-every",
    "5",
    "--save-every",
    "3",
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `igpt-fast train ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["igpt-fast", "train", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    return code, *capsys.readouterr()


def test_json_alone_on_stdout_and_the_way_on_on_stderr(dataset, tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run"
    code, out, err = call(monkeypatch, capsys, dataset.path, "--out", run, *MODEL, *FAST, "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["step"] == 9 and answer["run"] == str(run) and 0 < answer["val_loss"] < 3
    held_out = len(dataset.split("val", read_options(run)["options"]["val_fraction"]))
    assert (answer["train"], answer["val"], answer["skipped"]) == (len(dataset) - held_out, held_out, [])
    assert (
        Path(answer["checkpoint"]).is_dir()
        and Path(answer["loss_curve"]).is_file()
        and Path(answer["samples"]).is_file()
    )
    for line in ("train: 9/9 steps", "26,560 parameters", str(answer["checkpoint"]), f"igpt-fast sample '{run}'"):
        assert line in err, line
    code, out, err = call(monkeypatch, capsys, dataset.path, "--out", run, "--resume", "--steps", "10")
    assert code == 0 and out == "" and "going on from" in err and "changed since the checkpoint: steps 9 → 10" in err
    assert read_options(run)["options"]["batch"] == 4, "a resumed run keeps what it was started with"


def test_images_are_tokenised_once_and_a_palette_may_be_given(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    Palette(torch.linspace(-1, 1, 24).reshape(8, 3)).save(tmp_path / "eight.npy")
    common = [
        tmp_path / "images.npy",
        "--workers",
        "0",
        "--resize",
        "none",
        "--size",
        "8",
        *MODEL,
        *FAST,
        "--objective",
        "bert",
    ]
    run = tmp_path / "given"
    assert call(monkeypatch, capsys, *common, "--out", run, "--palette", tmp_path / "eight.npy")[0] == 0
    assert TokenDataset(run / "tokens").colors == 8 and read_options(run)["config"]["size"] == [8, 8]
    (tmp_path / "eight.npy").unlink()
    code, _, err = call(monkeypatch, capsys, tmp_path / "images.npy", "--out", run, "--resume", "--steps", "10")
    assert code == 0 and "using the tokens" in err and "igpt-fast probe" in err and "igpt-fast sample" not in err
    tokens = tmp_path / "given/tokens"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    TokenDataset(tokens).palette.save(Path("p.npy"))
    again = tmp_path / "again"
    assert call(monkeypatch, capsys, tokens, *MODEL, *FAST, "--out", again, "--palette", "p.npy")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, capsys, tokens, "--out", again, "--resume", "--steps", "10")[0] == 0, "it is theirs"
    assert call(monkeypatch, capsys, *common, "--out", tmp_path / "made", "--colors", "5")[0] == 0
    assert read_options(tmp_path / "made")["config"]["colors"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "30"], "width 30 does not divide into 4 heads"),
        (["--steps", "0"], "--steps is 0; use at least 1"),
        (["--size", "8"], "size is [4, 6], not [8, 8]"),
        (["--size", "x"], "--size 'x' is not a size"),
        (["--colors", "16"], "--colors changes nothing"),
        (["--device", "abacus"], "device 'abacus' is not supported"),
        (["--resume"], "holds no checkpoint to go on from"),
        (["--palette", "none.npy"], "none.npy"),
        (["--pattern", "rwo"], "no pattern named 'rwo'; did you mean 'row'?"),
        (["--pattern", "row|neighborhood(6)"], "neighborhood: side is 6; use an odd whole number"),
        (["--pattern", "row / "], "pattern ' ' cannot be read"),
        (["--layers", "1", "--pattern", "row", "--pattern", "dense"], "pattern lists 2 for 1 layers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(dataset, tmp_path, monkeypatch, capsys, arguments, message):
    code, out, err = call(monkeypatch, capsys, dataset.path, "--out", tmp_path / "run", *arguments)
    assert code == 2 and out == "" and message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--layers", "3"],
        ["--size", "6x4"],
        ["--batch", "8"],
        ["--seed", "1"],
        ["--objective", "bert"],
        ["--flip"],
        ["--pattern", "row"],
    ],
)
def test_resuming_with_another_model_or_data_names_the_option(dataset, tmp_path, monkeypatch, capsys, arguments):
    run = tmp_path / "run"
    assert call(monkeypatch, capsys, dataset.path, "--out", run, *MODEL, *FAST, "--sample-every", "0")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, err = call(monkeypatch, capsys, dataset.path, "--out", run, "--resume", *arguments)
    assert code == 2 and f"error: --resume with another {arguments[0][2:]}: {run} was trained with " in err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_patterns_of_layers_and_heads_are_kept_by_a_run(dataset, tmp_path, monkeypatch, capsys):
    run, patterns = tmp_path / "run", ["--pattern", "row|neighborhood(3) / column", "--pattern", "dense"]
    code, _, err = call(monkeypatch, capsys, dataset.path, "--out", run, *MODEL, *FAST, *patterns)
    assert code == 0 and "attention by row | neighborhood(3) / column, dense" in err
    kept = [["row | neighborhood(3)", "column"], None]
    assert read_options(run)["config"]["pattern"] == kept
    for again in ([], patterns):
        code, _, err = call(monkeypatch, capsys, dataset.path, "--out", run, "--resume", "--steps", "10", *again)
        assert code == 0 and read_options(run)["config"]["pattern"] == kept
    old = json.loads((run / "train.json").read_text())
    del old["config"]["pattern"], old["config"]["positions"]
    (run / "train.json").write_text(json.dumps(old))  # a run of a version that had none
    code, _, err = call(monkeypatch, capsys, dataset.path, "--out", run, "--resume", "--pattern", "row")
    assert code == 2 and "--resume with another pattern" in err


def test_an_unwritable_out_is_found_before_the_images_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no directory")
    code, _, err = call(monkeypatch, capsys, tmp_path / "no images", "--out", tmp_path / "file/run")
    assert code == 2 and "cannot write into" in err


def test_kill_9_and_resume_is_as_if_nothing_had_been(dataset, tmp_path, monkeypatch, capsys):
    arguments = [dataset.path, *MODEL, *FAST, "--ema", "0.9", "--flip"]
    script = (
        "import os, signal, sys, torch; sys.path.insert(0, sys.argv.pop(1)); torch.set_num_threads(1)\n"
        "import pytest, tiny; from igpt_fast.cli import main\n"
        "tiny.raise_at(pytest.MonkeyPatch(), 9, lambda: os.kill(os.getpid(), signal.SIGKILL)); main()\n"
    )
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": f"{Path(tests).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", script, tests, "train", *map(str, arguments), "--out", str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, timeout=300).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "killed")][-1] == 8, (
        "it was killed after its last checkpoint, of step 6"
    )
    assert call(monkeypatch, capsys, dataset.path, "--out", tmp_path / "killed", "--resume")[0] == 0
    assert call(monkeypatch, capsys, *arguments, "--out", tmp_path / "straight")[0] == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "straight"))
    picture = "samples/step-000009.png"
    assert (tmp_path / "killed" / picture).read_bytes() == (tmp_path / "straight" / picture).read_bytes()


def test_help_shows_an_example_and_every_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0 and "Example: igpt-fast train" in out
    for option in ("--accumulate", "--activation-checkpointing", "--ema", "--val-every", "--palette", "--precision"):
        assert option in out
    assert "1000" in out and "3e-3" in out
