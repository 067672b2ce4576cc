"""Checkpoints come back to the bit; one that was cut short or changed is named; the previous one always survives."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpt_fast import checkpoint as module
from igpt_fast.checkpoint import (
    find_best,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
    update_state,
)
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.weights import open_model

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "palette.npy", "state.json")


def make_model(seed: int = 0, **fields) -> ImageGPT:
    torch.manual_seed(seed)
    model = ImageGPT(Config(**{"layers": 2, "width": 32, "heads": 4, "colors": 16, "size": (4, 4), **fields}))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def save(run: Path, step: int, seed: int = 0, **more) -> Path:
    palette = Palette(torch.linspace(-1, 1, 48).reshape(16, 3))
    model = make_model(seed)
    moments = {f"exp_avg.{name}": p.detach() * 0.5 for name, p in model.named_parameters()}
    return save_checkpoint(run, step, model, palette, {"seen": step}, moments, **more)


def equal(a: ImageGPT, b: ImageGPT) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("fields", [{}, {"objective": "bert", "bias": True, "classes": 3, "size": (2, 6)}])
def test_what_is_saved_comes_back(tmp_path, fields):
    model = make_model(1, **fields)
    palette = Palette(torch.linspace(-1, 1, 48).reshape(16, 3))
    moments = {"exp_avg.wte": torch.randn(16, 32), "step": torch.tensor(7.0)}
    path = save_checkpoint(tmp_path, 500, model, palette, {"elapsed": 0.1 + 0.2, "nested": {"a": [1, None]}}, moments)
    assert path == tmp_path / "checkpoints/step-00000500" and sorted(os.listdir(path)) == sorted(FILES)
    assert len({(path / name).stat().st_mode for name in FILES}) == 1, "whoever may read one file may read all"
    before = torch.random.get_rng_state()
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state()), "loading must not draw random numbers"
    assert loaded.step == 500 and loaded.path == path and loaded.model.config == model.config
    assert equal(loaded.model, model) and torch.equal(loaded.palette.centers, palette.centers)
    assert loaded.state == {"elapsed": 0.1 + 0.2, "nested": {"a": [1, None]}}
    assert all(p.requires_grad and p.data_ptr() % 64 == 0 for p in loaded.model.parameters())
    back = loaded.optimizer_tensors()
    assert back.keys() == moments.keys() and all(torch.equal(back[name], moments[name]) for name in moments)


def test_palette_state_and_optimizer_may_be_absent(tmp_path):
    save_checkpoint(tmp_path, 1, make_model())
    loaded = load_checkpoint(tmp_path)
    assert loaded.palette is None and loaded.state == {} and loaded.optimizer_tensors() == {}


def test_the_newest_are_kept_and_counted_as_numbers(tmp_path):
    for step in (5, 99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, step, seed=step % 7, keep=2)
    assert names(tmp_path) == ["step-100000000", "step-100000001"]
    save(tmp_path, 100_000_002, keep=3)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["0", "1", "2"]
    with pytest.raises(InputError, match="at least 1"):
        save(tmp_path, 6, keep=0)


def test_the_best_stays_beside_the_newest_or_as_one_of_them(tmp_path):
    for step, best, kept in ((1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 2, 3]), (4, 4, [3, 4]), (5, 4, [4, 5])):
        save(tmp_path, step, keep=2, best=best)
        assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == kept
        assert load_checkpoint(find_best(tmp_path)).step == best


def test_another_best_can_be_noted_afterwards(tmp_path):
    for step in (1, 2):
        newest = save(tmp_path, step, best=1)
    update_state(newest, {}, best=2)
    assert find_best(tmp_path) == newest and read_record(newest)["state"] == {"seen": 2}
    update_state(newest, {"seen": 3}, best=None)  # it is gone: the newest is meant, and not one that is missing
    assert "best" not in read_record(newest) and find_best(tmp_path) == newest
    assert load_checkpoint(tmp_path).state == {"seen": 3}


def test_found_by_run_by_folder_and_by_name(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(second) == second
    assert load_checkpoint(first).step == 1
    for path, what in ((tmp_path / "none", "is not there"), (first.parent.parent / "checkpoints/x", "is not there")):
        with pytest.raises(InputError, match=what):
            load_checkpoint(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "empty")


def test_a_step_is_not_saved_twice(tmp_path):
    path = save(tmp_path, 3, seed=1)
    with pytest.raises(InputError, match="already there"):
        save(tmp_path, 3, seed=2)
    assert equal(load_checkpoint(path).model, make_model(1))


def test_leftovers_are_ignored_and_then_removed(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints/.tmp-step-00000009-1234"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_leftover_that_somebody_still_reads_ends_nothing(tmp_path, monkeypatch, caplog):
    """As a server's files do: the folder cannot go while one of them is open."""
    save(tmp_path, 1, keep=1)

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as served:
        served.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2, keep=1)
        save(tmp_path, 3, keep=1)
    assert "cannot be removed yet (Directory not empty)" in caplog.text
    assert load_checkpoint(tmp_path).step == 3 and len(names(tmp_path)) == 3
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_full_disk_at_any_moment_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, seed=1)
    calls, real, failed = [0], os.fsync, 0

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == failed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        failed, calls[0] = failed + 1, 0
        try:
            save(tmp_path, 1 + failed, seed=2, keep=9)
        except InputError as error:
            # The very last sync comes after the rename: the new checkpoint is then whole, and the message says so.
            assert "No space left on device" in str(error) and "is intact" in str(error) and "--resume" in str(error)
            assert load_checkpoint(tmp_path).step in (1, 1 + failed)
        else:
            break
    assert failed > len(FILES), "each file, the directory and its parent are synced"
    assert not [name for name in names(tmp_path) if name.startswith(".tmp")]


def test_a_first_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_files", full)
    with pytest.raises(InputError, match=r"No space left on device; make room, then start again$"):
        save(tmp_path / "deep" / "run", 1)
    assert not list(tmp_path.iterdir())


def test_a_write_that_the_system_refuses_leaves_the_previous_checkpoint(tmp_path):
    """The real thing, in safetensors' own writer too: files may not grow beyond 20 kB."""
    save(tmp_path, 1, seed=1)
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]); import test_checkpoint as t; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try:\n    t.save(Path(sys.argv[1]), 2)\nexcept t.InputError as error:\n    print(error)\n"
    )
    done = _python(script, tmp_path)
    assert done.returncode == 0 and "cannot save step 2" in done.stdout and "File too large" in done.stdout, done
    assert names(tmp_path) == ["step-00000001"] and equal(load_checkpoint(tmp_path).model, make_model(1))


@pytest.mark.parametrize(
    ("where", "left"),
    [("json.dumps", 1), ("os.rename", 1), ("shutil.rmtree", 2)],  # files half written; not yet renamed; the old removed
)
def test_kill_9_in_the_middle_of_a_save_leaves_a_whole_checkpoint(tmp_path, where, left):
    save(tmp_path, 1, seed=1)
    script = (
        "import json, os, shutil, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "import test_checkpoint as t; from pathlib import Path\n"
        f"def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n{where} = die\n"
        "t.save(Path(sys.argv[1]), 2, seed=2, keep=1)\n"
    )
    assert _python(script, tmp_path).returncode == -signal.SIGKILL
    assert any(name.startswith(".tmp-") for name in names(tmp_path)), "the kill came too late to prove anything"
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == left and equal(loaded.model, make_model(left)) and loaded.optimizer_tensors()
    save(tmp_path, 3, seed=3)
    assert not [name for name in names(tmp_path) if name.startswith(".tmp")]
    assert load_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "grow", "empty", "gone"])
def test_a_damaged_file_is_named_with_the_way_back(tmp_path, name, damage):
    save(tmp_path, 1, seed=1)
    path = save(tmp_path, 2, seed=2) / name
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "cut": data[:middle],
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "grow": data + b" x",
        "empty": b"",
    }
    path.write_bytes(changed[damage]) if damage in changed else path.unlink()
    with pytest.raises(InputError) as caught:
        load_checkpoint(tmp_path).optimizer_tensors()
    message = str(caught.value)
    assert str(path) in message and "go on from step-00000001" in message and "\n" not in message
    assert load_checkpoint(tmp_path / "checkpoints/step-00000001").step == 1


def test_without_an_earlier_one_the_way_back_is_another(tmp_path):
    (save(tmp_path, 1) / "palette.npy").unlink()
    with pytest.raises(InputError, match=r"palette\.npy is missing; copy the checkpoint again"):
        load_checkpoint(tmp_path)


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path):
    path = save(tmp_path, 1)
    parameters = dict(make_model(width=64, objective="bert").named_parameters())
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.proj\.weight is \[32, 32\] instead of \[64, 64\]"):
        module.copy_tensors(path, parameters)
    with pytest.raises(InputError, match=r"sos is \[32\] instead of absent"):
        module.copy_tensors(path, dict(make_model(objective="bert").named_parameters()))


def test_a_later_format_is_refused(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(InputError, match=r"format 99.*update"):
        read_record(path.parent)


def _python(script: str, run: Path) -> subprocess.CompletedProcess:
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": f"{Path(tests).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", script, str(run), tests]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_run_without_a_checkpoint_is_called_that(tmp_path):
    for name in ("train.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="is a run that has saved no checkpoint yet; start it again"):
        open_model(tmp_path)
