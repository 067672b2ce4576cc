"""What a checkpoint's files say of each other, and ways to it."""

import hashlib
import json
import math
import os

import pytest
import torch
from test_checkpoint import equal, make_model, names, save
from torch import nn

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
from igpt_fast.errors import InputError


def test_a_state_that_was_changed_is_found(tmp_path):
    """By its own digest, though it is as good a JSON as before."""
    path = save(tmp_path, 7) / "state.json"
    text = path.read_text()
    path.write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(InputError, match=r"state\.json was changed after it was saved"):
        read_record(path.parent)
    path.write_text(text)
    assert read_record(path.parent)["step"] == 7


def test_all_of_a_large_file_has_been_looked_at(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_model(width=256, layers=2)) / "model.safetensors"
    data = path.read_bytes()
    assert (
        len(data) > 2 << 20
        and read_record(path.parent)["files"][path.name]["sha256"] == hashlib.sha256(data).hexdigest()
    )
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model\.safetensors was changed after it was saved"):
        load_checkpoint(tmp_path)


def test_tensors_of_other_shapes_alone_are_named(tmp_path):
    """Also where they could be broadcast."""
    path = save(tmp_path, 1)
    with pytest.raises(InputError, match=r"ln_1 is \[32\] instead of \[64\]"):
        module.copy_tensors(path, dict(make_model(width=64).named_parameters()))
    stacked = {name: torch.zeros(2, *p.shape) if name == "ln_f" else p for name, p in make_model().named_parameters()}
    with pytest.raises(InputError, match=r"ln_f is \[32\] instead of \[2, 32\]"):
        module.copy_tensors(path, stacked)


def test_what_a_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    """In a container the numbers are the same each time."""
    left = tmp_path / f"checkpoints/.tmp-step-00000001-{os.getpid()}"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_that_is_given_is_meant_itself(tmp_path):
    first, newest = save(tmp_path, 1, best=1), save(tmp_path, 2, best=1)
    assert find_best(tmp_path) == first and find_best(newest) == newest and find_best(newest.parent) == first
    folder = tmp_path / "checkpoints"
    assert find_checkpoint(folder) == newest
    inner = save(folder, 5)  # a run of that name
    assert find_checkpoint(folder) == inner
    (folder / "checkpoints/step-00000009").touch()
    assert find_checkpoint(folder) == inner


def test_the_next_format_is_refused(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": module.FORMAT + 1}))
    with pytest.raises(InputError, match=f"format {module.FORMAT + 1}.*update"):
        read_record(path.parent)


def test_tensors_that_are_views_are_saved(tmp_path):
    model = make_model(1)
    model.wte = nn.Parameter(model.wte.detach().t().contiguous().t())
    moment = torch.arange(6.0).reshape(2, 3).t()
    save_checkpoint(tmp_path, 1, model, None, {}, {"exp_avg.wte": moment})
    found = load_checkpoint(tmp_path)
    assert equal(found.model, make_model(1)) and torch.equal(found.optimizer_tensors()["exp_avg.wte"], moment)


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, make_model(), None, {"loss": math.nan})
    assert not list_checkpoints(tmp_path)
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        update_state(path, {"loss": math.inf}, None)
    assert load_checkpoint(tmp_path).state == {"seen": 1}


def test_nothing_is_written_where_nothing_changes(tmp_path):
    path = save(tmp_path, 1, best=1)
    before = (path / "state.json").stat()
    update_state(path, {"seen": 1}, 1)
    assert (path / "state.json").stat() == before


def test_the_way_back_from_a_place_nearby(tmp_path, monkeypatch):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "palette.npy").unlink()
    for folder, path in (
        (tmp_path, "."),
        (tmp_path / "checkpoints", "step-00000002"),
        (tmp_path / "checkpoints/step-00000002", "."),
    ):
        monkeypatch.chdir(folder)
        with pytest.raises(InputError, match="to go on from step-00000001"):
            load_checkpoint(path)
