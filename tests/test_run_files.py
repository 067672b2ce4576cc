"""What a run's files say: options, metrics, pictures; what they cannot say is refused."""

import json
from dataclasses import asdict

import pytest
from tiny import CONFIG

from igpt_fast.checkpoint import read_record
from igpt_fast.errors import InputError
from igpt_fast.metrics import Metrics, read_metrics
from igpt_fast.options import Options
from igpt_fast.run import (
    drop_later_pictures,
    read_options,
    refuse_differences,
    refuse_idle_steps,
    refuse_unequal_shares,
    write_options,
)


@pytest.mark.parametrize(
    "images",
    [
        [],
        {"size": 3},
        {"size": [3, "4"]},
        {"size": [3, True]},
        {"size": [3, 4, 5]},
        {"colors": "8"},
        {"gray_bits": "8"},
        {"resize": 3},
        {"palette": 5},
        {"value_range": "1,2"},
        {"bands": 3},
    ],
)
def test_a_train_json_with_images_that_nobody_read(tmp_path, images):
    write_options(
        tmp_path,
        CONFIG,
        Options(),
        {},
        {"images": {"size": [4, 6], "palette": None, "value_range": None, "bands": [1], "colors": 8, "resize": "hf"}},
    )
    assert read_options(tmp_path)["command"]["images"]["resize"] == "hf"
    write_options(tmp_path, CONFIG, Options(), {}, {"images": images})
    with pytest.raises(InputError, match=r"train\.json is damaged"):
        read_options(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3},
        {"data": [1]},
        {"options": {**asdict(Options()), "batch": 0}},
        {"options": {**asdict(Options()), "generative": -1.0}},
    ],
)
def test_a_train_json_of_options_that_no_run_had(tmp_path, change):
    write_options(tmp_path, CONFIG, Options(), {}, {})
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"train\.json is damaged"):
        read_options(tmp_path)


def test_brackets_without_an_end_are_damage(tmp_path):
    nested = b"[" * 100_000
    write_options(tmp_path, CONFIG, Options(), {}, {})
    (tmp_path / "train.json").write_bytes(nested)
    with pytest.raises(InputError, match=r"train\.json is damaged"):
        read_options(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(nested + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1 is no row"):
        read_metrics(tmp_path)
    (tmp_path / "state.json").write_bytes(nested)
    with pytest.raises(InputError, match=r"state\.json is cut short or not ours"):
        read_record(tmp_path)


def test_differences(tmp_path):
    refuse_differences(tmp_path, {"a": 1, "b": None}, {"a": 1, "c": None})
    for saved, now in (({"a": 1}, {}), ({}, {"a": 1}), ({"a": 1}, {"a": 2})):
        with pytest.raises(InputError, match="--resume with another a: "):
            refuse_differences(tmp_path, saved, now)


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"warmup": 3}, {"clip": 0.5}])
def test_idle(tmp_path, change):
    old, name = Options(steps=10, warmup=2), next(iter(change))
    saved, new = asdict(old), Options(**{"steps": 10, "warmup": 2, **change})
    refuse_idle_steps(tmp_path, 9, new, saved, False)
    refuse_idle_steps(tmp_path, 10, old, saved, False)
    refuse_idle_steps(tmp_path, 7, old, saved, True)
    refuse_idle_steps(tmp_path, 9, Options(steps=12, warmup=2), saved, False)
    refuse_idle_steps(tmp_path, 10, new, {k: v for k, v in saved.items() if k != name}, False)
    with pytest.raises(InputError, match=f"--{name} changes nothing: .* has taken its 10 steps"):
        refuse_idle_steps(tmp_path, 10, new, saved, False)
    with pytest.raises(InputError, match=f"--{name} changes nothing: .* give more --patience"):
        refuse_idle_steps(tmp_path, 7, new, saved, True)
    with pytest.raises(InputError, match=r"--steps changes nothing: .* give more --patience"):
        refuse_idle_steps(tmp_path, 7, Options(steps=12, warmup=2), saved, True)
    with pytest.raises(InputError, match="has come to step 11"):
        refuse_idle_steps(tmp_path, 11, old, saved, False)


def test_shares():
    refuse_unequal_shares(Options(batch=12, accumulate=2), 3)
    for options, processes in ((Options(batch=12, accumulate=4), 2), (Options(batch=12), 5)):
        with pytest.raises(InputError, match="cannot be split evenly"):
            refuse_unequal_shares(options, processes)


def test_pictures_go_by_number(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("step-000004.png", "step-000005.png", "step-1000000.png", "step-000009-mine.png"):
        (tmp_path / "samples" / name).touch()
    drop_later_pictures(tmp_path, 4)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000004.png", "step-000009-mine.png"]


def test_metrics(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": float(step)})
    metrics.append({"step": 2, "val_loss": 5.0})
    assert (
        metrics.last("loss") == 3.0
        and metrics.of(2, "val_loss") == {"step": 2, "val_loss": 5.0}
        and metrics.of(3, "val_loss") is None
    )
    before = (tmp_path / "metrics.jsonl").read_bytes()
    reader = Metrics(tmp_path, 2, writes=False)
    reader.append({"step": 9})
    assert len(reader.rows) == 4 and (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (
        [row["step"] for row in Metrics(tmp_path, 2).rows]
        == [1, 2, 2]
        == [row["step"] for row in read_metrics(tmp_path)]
    )
    assert Metrics(tmp_path, 0).rows == [] == read_metrics(tmp_path)
    wrong = "5", "[]", '{"loss": 1}', '{"step": "a"}', '{"step": 1, "loss": null}', '{"step": 1, "val_loss": NaN}'
    for line in (f'{{"step": 1}}\n{second}\n'.encode() for second in (*wrong, '{"step": 1, "loss": [2]}')):
        (tmp_path / "metrics.jsonl").write_bytes(line)
        with pytest.raises(InputError, match="line 2 is no row"):
            read_metrics(tmp_path)
        (tmp_path / "metrics.jsonl").write_bytes(line[:-1])
        assert read_metrics(tmp_path) == [{"step": 1}], "what is no row is left out where it may be unfinished"
