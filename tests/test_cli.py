"""What every command has in common: how it ends when it is interrupted, or for want of memory, and where it prints."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_tokens

from igpt_fast.cli import app, info, train
from igpt_fast.cli import sample as commands


def python(script: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    paths = f"{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", f"from igpt_fast.cli import main, sample\n{script}\nmain()", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONPATH": paths, **environment}, timeout=120
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 149. GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_want_of_memory_is_one_line_with_a_way_out(igpt, tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(commands, "open_model", fail)
    code, _, said = igpt("sample", tmp_path, "-o", tmp_path / "s.png")
    assert code == 2 and said.count("\n") == 1
    assert said.startswith("error: sample: there is not enough memory: a smaller -n or --batch")


def test_other_errors_of_torch_keep_their_traceback(igpt, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(commands, "open_model", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        igpt("sample", tmp_path, "-o", tmp_path / "s.png")


def test_one_process_is_enough_for_most_commands(igpt, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    words = {"plan": 0, "demo": 0, "sample": 1, "palette": 1, "pattern": 1}
    for command in [*words, "tokenize", "complete", "convert"]:
        code, printed, said = igpt(command, *["x"] * words.get(command, 2))
        wanted = f"error: {command} runs in one process, of several only train, finetune, eval, classify, probe, info"
        alone = "; --first gives each machine a share" if command == "sample" else ""
        assert code == 2 and not printed and said == f"{wanted}: start it without torchrun{alone}\n"
    for text in ("many", "0", "²"):
        monkeypatch.setenv("WORLD_SIZE", text)
        code, _, said = igpt("plan")
        assert code == 2 and f"WORLD_SIZE is '{text}', not a number of processes" in said
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "WORLD_SIZE" not in igpt("plan", "--layers", "0")[2]


def test_a_model_that_no_memory_holds(igpt, tmp_path):
    data = write_tokens(tmp_path)
    code, _, said = igpt("train", data.path, "--out", tmp_path / "run", "--width", 10**5, "--layers", 10**3)
    assert code == 2 and "not enough memory: a smaller --batch, --width, --layers" in said


@pytest.mark.parametrize(
    ("which", "code", "said"), [(signal.SIGINT, 130, b"interrupted\n"), (signal.SIGTERM, 143, b"")]
)
def test_a_signal_ends_a_command_with_its_code(tmp_path, which, code, said):
    # Whoever starts the tests may have had Ctrl-C ignored; a signal is seen between two instructions, not at the next.
    script = "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += f"sample.open_model = lambda *_: (os.kill(os.getpid(), {int(which)}), time.sleep(60))"
    done = python(script, "sample", tmp_path, "-o", tmp_path / "s.png")
    assert (done.returncode, done.stderr) == (code, said)


def test_ctrl_c_before_there_is_a_command():
    """Typer takes a moment to read what all of them are called."""
    done = python("import signal, typer.main\ntyper.main.get_command = lambda _: signal.default_int_handler(2, None)")
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_characters_that_stdout_lacks_are_replaced():
    done = python("", "info", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stderr == b"" and b"?" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "x"), "--size 'x' is not a size"),
        (("--seed", 2**64), "--seed is 18446744073709551616"),
        (("--layers", 10**20), "layers is 100000000000000000000; use at most 10,000"),
        (("--device", "meta"), "device 'meta' is not supported"),
    ],
)
def test_absurd_options_of_train(igpt, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(train, "open_tokens", None)
    code, _, said = igpt("train", tmp_path, "--out", tmp_path / "run", *words)
    assert code == 2 and message in said and said.count("\n") == 1


def test_absurd_options_of_sample(igpt, tmp_path):
    code, _, said = igpt("sample", tmp_path, "-n", 10**8)
    assert code == 2 and "n is 100000000; ask for at most 1,000,000" in said


def test_a_word_of_nothing_is_no_place():
    done = python("", "palette", "", "-o", "x.npy")
    assert done.returncode == 2 and b"one of the words is empty, perhaps a variable that is not set" in done.stderr


def test_info_says_which_extras_are_there(monkeypatch):
    optional = ['numpy; extra == "a"', "no-such>=2; extra == 'b'", 'numpy; extra == "b"', 'nor-this; extra == "test"']
    wanted = ["numpy", *optional]
    monkeypatch.setattr(info.metadata, "requires", lambda _: wanted)
    assert info.extras() == "a; b lacks no-such"

    def gone(_: str) -> None:
        raise info.metadata.PackageNotFoundError

    monkeypatch.setattr(info.metadata, "requires", gone)
    assert info.extras().startswith("unknown")


def test_help_leaves_the_breaks_of_lines_to_the_terminal():
    for command in app.registered_commands:
        assert "Example:" in command.help and "\n" not in command.help.replace("\n\n", "")


def test_a_full_disk_behind_stdout_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        out = str(tmp_path / "row.png")
        command = [sys.executable, "-m", "igpt_fast", "pattern", "row", "--size", "4", "-o", out, "--json"]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2 and done.stderr.endswith(b"error: No space left on device: stdout\n")


def test_closed_streams_are_no_error(tmp_path):
    data = write_tokens(tmp_path)
    words = [sys.executable, "-m", "igpt_fast.cli", "palette", str(data.path.parent / "images.npy"), "--colors", "4"]
    for number, closed in enumerate(("2>&-", ">&-", "2>&- >&-")):
        out = tmp_path / f"{number}.npy"
        done = subprocess.run(
            ["sh", "-c", f'"$@" {closed}', "sh", *words, "--size", "4x6", "-o", str(out)], check=False
        )
        assert done.returncode == 0 and out.exists()
