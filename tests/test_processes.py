"""Several processes: torchrun starts two, and they learn what one would, to the bit, and measure what one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled import write_tokens as write_labelled
from tiny import CLASSES, FAST, FEW, VARIANTS, rows, same, variant, weights, write_tokens

from igpt_fast.checkpoint import find_best, list_checkpoints, load_checkpoint, save_checkpoint
from igpt_fast.finetune import finetune
from igpt_fast.metrics import read_metrics
from igpt_fast.model import ImageGPT
from igpt_fast.over_images import over_images
from igpt_fast.run import locked
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MODEL = ["--layers", "2", "--width", "32", "--heads", "4", "--batch", "6", "--sample-every", "5", "--log-every", "1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


def start(*words: object) -> subprocess.Popen:
    """Two processes of a script or a module."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks(process: subprocess.Popen) -> dict[str, int]:
    """The ids of torchrun's two processes, by their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return {value.removeprefix("RANK="): int(p) for p, e in environments.items() for value in e if value[:5] == "RANK="}


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def flat(value: object) -> list:
    """The values in nested lists and dicts, one after another."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for each in inner for leaf in flat(each)]
    return [value]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> TokenDataset:
    return write_labelled(tmp_path_factory.mktemp("labelled"), np.arange(60) % 3)


@pytest.fixture(scope="module")
def trained(dataset, labelled, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    code, _, err = finish(start(HERE / "two_processes.py", dataset.path, labelled.path, out))
    assert code == 0, err
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_learn_what_one_would_in_twice_as_many_parts(dataset, trained, tmp_path, name):
    config, options = variant(name)
    train(dataset, tmp_path, config, device="cpu", **options)
    alone, both = ([row for row in rows(run) if "loss" in row] for run in (tmp_path, trained / name))
    if options["accumulate"] == 2:
        assert same(weights(tmp_path), weights(trained / name))
        assert alone == both and len(alone) == 3
    else:  # (a + b) + (c + d) for ((a + b) + c) + d
        assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in both], rel=1e-5)
    pictures = [sorted(p.name for p in (run / "samples").glob("*")) for run in (tmp_path, trained / name)]
    assert pictures[0] == pictures[1]
    # Validation goes in parts of a process's size, and its sum in another order.
    values = [[row["val_loss"] for row in rows(run) if "val_loss" in row] for run in (tmp_path, trained / name)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_two_processes_learn_classes_as_one_would(labelled, trained, tmp_path):
    torch.manual_seed(0)
    alone = finetune(ImageGPT(FEW), labelled, tmp_path, device="cpu", accumulate=2, **CLASSES)
    assert same(weights(tmp_path), weights(trained / "classes"))
    learned = [[row for row in rows(run) if "class_loss" in row] for run in (tmp_path, trained / "classes")]
    assert learned[0] == learned[1] and len(learned[0]) == 3
    measured = [
        [row["val_accuracy"] for row in rows(run) if "val_accuracy" in row] for run in (tmp_path, trained / "classes")
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    assert find_best(trained / "classes").name == alone.checkpoint.name


@pytest.mark.parametrize("command", ["eval", "classify", "probe"])
def test_two_processes_measure_what_one_does(igpt, labelled, trained, tmp_path, command):
    def words(place: str) -> list:
        ending = {"eval": [], "classify": ["-o", tmp_path / f"{place}.csv"], "probe": ["-o", tmp_path / f"{place}.png"]}
        return [command, trained / "classes", labelled.path, "--batch", "7", *ending[command], "--json"]

    code, out, err = finish(start("-m", "igpt_fast.cli", *words("two")))
    assert code == 0 and err.count("images/s") == 1, err  # the last line of one bar
    alone, both = json.loads(igpt(*words("one"))[1]), json.loads(out)
    for found in (alone, both):
        for name in ("seconds", "out", "figure"):
            found.pop(name, None)
    numbers, texts = ([[v for v in flat(f) if isinstance(v, kind)] for f in (alone, both)] for kind in (float, str))
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5) and texts[0] == texts[1] and alone.keys() == both.keys()
    assert len(numbers[0]) >= 3


def test_processes_with_different_models_say_so(labelled, trained, tmp_path):
    """Each process looks at a run of its own, as where a copy of one is out of date."""
    script = tmp_path / "mixed.py"
    runs = [trained / "classes", tmp_path / "other"]
    save_checkpoint(runs[1], 3, ImageGPT(FEW), labelled.palette)
    script.write_text(
        "import os, sys\nfrom igpt_fast.cli import main\n"
        f"sys.argv = ['igpt-fast', 'eval', {list(map(str, runs))}[int(os.environ['RANK'])], {str(labelled.path)!r}]\n"
        "main()\n"
    )
    code, out, err = finish(start(script))
    assert code and not out and "process 1 has another sight of the model than process 0" in err


def test_a_process_looks_at_its_share_alone(labelled):
    model, looked = ImageGPT(FEW), []
    alone = SimpleNamespace(rank=1, count=2, refuse_differences=looked.append, fill=lambda found: found)
    found = np.full(7, -1.0)
    how = {"processes": alone, "amp": False, "doing": "looking", "what": "numbers"}
    over_images(lambda tokens: tokens.flatten(1)[:, 0].double(), found, model, labelled, np.arange(7), 2, **how)
    wanted = labelled.batch(np.array([1, 3, 5])).flatten(1)[:, 0]
    assert found[1::2].tolist() == wanted.tolist() and (found[::2] == -1).all() and len(looked) == 1


def test_images_are_not_shared(labelled, trained):
    folder = labelled.path.parent
    code, out, err = finish(start("-m", "igpt_fast.cli", "eval", trained / "classes", folder))
    assert code and not out and err.count("error: ") == 1 and "several processes share tokens; make them once" in err


def test_two_processes_end_early_at_one_step(trained):
    run = trained / "early"
    assert [row["step"] for row in rows(run) if "val_accuracy" in row] == [2, 4, 6]
    assert load_checkpoint(run).step == 6 and find_best(run).name.endswith("2")


def test_processes_that_were_given_different_things_say_so(trained):
    for rank in (0, 1):
        words = ("seed", "lr", "pattern", "sight")
        seed, lr, pattern, sight = ((trained / f"{what}-{rank}.txt").read_text() for what in words)
        assert "process 1 has another lr than process 0, 0.002 for 0.001: all must be given" in lr
        assert "process 1 has another pattern of the model than process 0, row for None" in pattern
        assert "process 1 has another seed than process 0, 1 for 0: all must be given" in seed
        assert "process 1 has another sight of the run than process 0, False for True" in sight


def test_the_command_line_speaks_once_and_goes_on_after_ctrl_c(dataset, tmp_path):
    images = dataset.path.parent / "images.npy"
    words = ["-m", "igpt_fast.cli", "train", images, *MODEL, "--size", "4x6", "--resize", "none", "--colors", "16"]
    run = tmp_path / "stopped"
    process = start(*words, "--out", run, "--steps", "100000")
    wait_for(run, 3, process)
    process.send_signal(signal.SIGINT)
    _, _, err = finish(process)
    found = re.search(r"stopped at step (\d+) of 100000: saved in", err)
    assert found, err
    stopped = int(found[1])
    assert err.count("go on with") == 1 and list_checkpoints(run)[-1].name == f"step-{stopped:08d}"
    more = stopped + 4
    code, out, err = finish(start(*words[:4], "--out", run, "--resume", "--steps", more, "--lr", "1e-3", "--json"))
    assert code == 0 and json.loads(out)["step"] == more, err
    assert err.count("going on from") == err.count("2 processes (cpu)") == err.count(f"step {more}: loss") == 1
    assert "processes" not in err.split("changed since")[1].split("\n")[0]
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, more + 1))
    code, _, err = finish(start(*words, "--out", run))
    assert code and err.count("error: ") == 1 and f"{run} already holds" in err


def test_a_signal_to_one_process_stops_all_at_the_same_step(dataset, tmp_path):
    words = ["-m", "igpt_fast.cli", "train", dataset.path, "--out", tmp_path, *MODEL, "--steps", "100000"]
    process = start(*words)
    wait_for(tmp_path, 3, process)
    os.kill(ranks(process)["1"], signal.SIGTERM)
    code, _, err = finish(process)
    found = re.search(r"stopped at step (\d+) of 100000: saved in", err)
    assert code and found, err
    assert list_checkpoints(tmp_path)[-1].name == f"step-{int(found[1]):08d}"


def test_a_process_that_is_killed_takes_nothing_with_it(dataset, tmp_path):
    words = ["-m", "igpt_fast.cli", "train", dataset.path, "--out", tmp_path, *MODEL, "--save-every", "2"]
    process = start(*words, "--steps", "100000")
    wait_for(tmp_path, 5, process)
    os.kill(ranks(process)["1"], signal.SIGKILL)
    code, _, err = finish(process)
    assert code and err.count("error: another of the processes has ended") == 1
    with locked(tmp_path):
        step = int(list_checkpoints(tmp_path)[-1].name[5:])
    assert train(dataset, tmp_path, resume=True, **{**FAST, "steps": step + 2, "log_every": 1}).step == step + 2
