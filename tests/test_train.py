"""Training: the steps are right, and an interruption anywhere changes nothing, to the bit."""

import itertools
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, FAST, raise_at, rows, same, weights, write_tokens

from igpt_fast import loop
from igpt_fast.batches import Batches, images_of_step
from igpt_fast.checkpoint import list_checkpoints, load_checkpoint, update_state
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.metrics import read_metrics
from igpt_fast.model import ImageGPT
from igpt_fast.options import Options
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


def test_the_first_loss_is_chance_and_the_last_is_far_below(dataset, tmp_path):
    result = train(dataset, tmp_path, CONFIG, **{**FAST, "steps": 80, "log_every": 1, "lr": 1e-2, "batch": 16})
    losses = [row["loss"] for row in result.rows if "loss" in row]
    assert len(losses) == 80 and abs(losses[0] - math.log(16)) < 1e-6
    # Each of the 4 rows begins anywhere (ln 16) and then goes up by one: 4/24 of chance is the best there is.
    assert result.loss == losses[-1] < 0.5 * math.log(16) and result.val_loss < 0.5 * math.log(16)
    assert result.step == 80 and result.checkpoint == tmp_path / "checkpoints/step-00000080"
    found = load_checkpoint(tmp_path)
    assert torch.equal(found.model.wte, result.model.wte) and torch.equal(
        found.palette.centers, dataset.palette.centers
    )
    assert result.model.palette is dataset.palette


@pytest.mark.parametrize("clip", [0.1, 0.0])
def test_one_step_is_adams(dataset, tmp_path, clip):
    """Against a plain loop: the same images, clipping, learning rate and Adam."""
    options = {**FAST, "steps": 3, "precision": "fp32", "clip": clip, "warmup": 2, "log_every": 1}
    before = torch.random.get_rng_state()
    result = train(dataset, tmp_path, CONFIG, **options, seed=5)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers are left alone"
    rates = (1.5e-3, 3e-3, 3e-3)  # warm-up; the peak; the cosine begins where it is flat
    assert [row["lr"] for row in result.rows if "lr" in row] == pytest.approx(rates)
    torch.manual_seed(5)
    model = ImageGPT(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        indices = images_of_step(dataset.split("train", 0.1), 6, 5, step)
        optimizer.zero_grad()
        model.loss(dataset.batch(indices)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    for (name, ours), plain in zip(result.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("extra", [{"accumulate": 3}, {"activation_checkpointing": True}])
def test_saving_memory_does_not_change_what_is_learned(dataset, tmp_path, extra):
    options = {**FAST, "precision": "fp32", "log_every": 1}
    plain, frugal = (train(dataset, tmp_path / str(len(o)), CONFIG, **options, **o).rows for o in ({}, extra))
    for a, b in zip(plain, frugal, strict=True):
        assert math.isclose(a.get("loss", 0), b.get("loss", 0), rel_tol=1e-5)


VARIANTS = {
    "plain": {},
    "bert, flipped, averaged": {"objective": "bert", "flip": True, "ema": 0.9, "accumulate": 2},
    "sparse": {"pattern": [["row|neighborhood(3)", "column"], "dense"]},
    "fp32, tiny windows": {"precision": "fp32", "log_every": 1, "save_every": 5, "accumulate": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", ["crash", "interrupt", "terminate"])
def test_an_interruption_changes_nothing(dataset, tmp_path, monkeypatch, variant, stop):
    if stop == "crash" and variant == "plain":
        torch.set_num_threads(2)  # the bits may not depend on which thread comes first
    extra = dict(VARIANTS[variant])
    shape = {name: extra.pop(name) for name in ("objective", "pattern") if name in extra}
    config = Config.from_dict({**CONFIG.to_dict(), **shape})
    options = {**FAST, **extra, "sample_every": 4}
    train(dataset, tmp_path / "straight", config, **options)
    run = tmp_path / "stopped"

    class Crash(Exception):
        """Stands in for kill -9: nothing is saved on the way out."""

    def act() -> None:
        if stop == "crash":
            raise Crash
        os.kill(os.getpid(), signal.SIGINT if stop == "interrupt" else signal.SIGTERM)

    expected = {"crash": Crash, "interrupt": KeyboardInterrupt, "terminate": SystemExit}[stop]
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched, pytest.raises(expected) as caught:
        raise_at(patched, 9, act)
        train(dataset, run, config, **options)
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    reached = load_checkpoint(run).step
    if stop == "crash":
        assert reached == (5 if options["save_every"] == 5 else 6) and read_metrics(run)[-1]["step"] == 8
    else:
        # With one part a step the step is finished; with several, what was begun of it is forgotten.
        assert reached == (8 if options.get("accumulate", 1) > 1 else 9)
        assert getattr(caught.value, "code", None) == (143 if stop == "terminate" else None)
    train(dataset, run, config, resume=True, **options)
    assert rows(run) == rows(tmp_path / "straight") and len(rows(run)) > 3
    assert same(weights(run), weights(tmp_path / "straight"))
    names = [sorted(p.name for p in (folder / "samples").glob("*")) for folder in (run, tmp_path / "straight")]
    assert names[0] == names[1] == ([] if config.objective == "bert" else [f"step-{n:06d}.png" for n in (4, 8, 12)])


def test_lines_and_pictures_of_lost_steps_go_away(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        raise_at(patched, 12, lambda: 1 / 0)
        train(dataset, tmp_path, CONFIG, **{**FAST, "log_every": 1, "sample_every": 5})
    assert (tmp_path / "samples/step-000010.png").exists() and read_metrics(tmp_path)[-1]["step"] == 11
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')  # what kill -9 leaves of a line
    seen = []
    real = loop.Loop.go
    monkeypatch.setattr(
        loop.Loop,
        "go",
        lambda self: (seen.extend([rows(tmp_path)[-1]["step"], os.listdir(tmp_path / "samples")]), real(self))[1],
    )
    train(dataset, tmp_path, CONFIG, resume=True, **{**FAST, "log_every": 1, "sample_every": 5})
    assert seen == [6, ["step-000005.png"]]
    steps = [row["step"] for row in read_metrics(tmp_path) if "loss" in row]
    assert steps == list(range(1, 13))


def test_a_finished_run_goes_on_with_more_steps(dataset, tmp_path, capsys):
    train(dataset, tmp_path, CONFIG, **FAST)
    again = train(dataset, tmp_path, resume=True, **FAST)
    assert again.step == 12
    assert "changed" not in capsys.readouterr().err
    more = train(dataset, tmp_path, CONFIG, resume=True, **{**FAST, "steps": 16, "lr": 1e-3})
    assert "changed since the checkpoint: steps 12 → 16, lr 0.003 → 0.001\n" in capsys.readouterr().err
    assert more.step == 16 and [p.name for p in list_checkpoints(tmp_path)] == ["step-00000012", "step-00000016"]
    with pytest.raises(InputError, match=r"--steps is 8, but .* has come to step 16"):
        train(dataset, tmp_path, CONFIG, resume=True, **{**FAST, "steps": 8})


def test_what_a_run_leaves(dataset, tmp_path):
    train(dataset, tmp_path, CONFIG, **{**FAST, "sample_every": 10, "keep": 1}, command={"data": "somewhere"})
    names = ["checkpoints", "loss.png", "metrics.jsonl", "samples", "train.json"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == names
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000012"]
    assert sorted(os.listdir(tmp_path / "samples")) == ["step-000010.png", "step-000012.png"]
    with Image.open(tmp_path / "samples/step-000012.png") as picture:
        greys = np.asarray(picture)
    assert min(greys.shape[:2]) > 64 and (greys == greys[..., :1]).all(), "16 enlarged images in the palette's greys"
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 400
    saved = read_options(tmp_path)
    assert saved["command"] == {"data": "somewhere"} and Config.from_dict(saved["config"]) == CONFIG
    assert saved["options"]["keep"] == 1 and saved["data"]["images"] == 40
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics if "loss" in row] == [4, 8, 12]
    assert [row["step"] for row in metrics if "val_loss" in row] == [5, 10, 12]
    assert metrics[0].keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "elapsed"}


def test_validation_is_the_mean_over_the_held_out_images(dataset, tmp_path):
    for objective in ("ar", "bert"):
        config = Config.from_dict({**CONFIG.to_dict(), "objective": objective})
        options = {**FAST, "precision": "fp32", "val_fraction": 0.3, "val_images": 0, "batch": 4, "ema": 0.9}
        result = train(dataset, tmp_path / objective, config, **options)
        batches = Batches(dataset, Options(**options), objective)
        held_out = dataset.split("val", 0.3)
        assert np.array_equal(batches.held_out, held_out) and len(held_out) % 4
        assert not set(held_out) & set(batches.indices)
        with torch.no_grad():
            parts = [
                (result.model.loss(tokens, keep=keep).item(), len(tokens)) for tokens, keep, _ in batches.validation(4)
            ]
        assert math.isclose(result.val_loss, sum(loss * n for loss, n in parts) / len(held_out), rel_tol=1e-6)
    spread = Batches(dataset, Options(val_fraction=0.3, val_images=3), "ar").held_out
    assert list(spread) == [held_out[0], held_out[len(held_out) // 3], held_out[len(held_out) * 2 // 3]]


def test_ema_is_a_running_average(dataset, tmp_path):
    options = {**FAST, "steps": 1, "save_every": 0}
    plain = train(dataset, tmp_path / "plain", CONFIG, **options).model
    average = train(dataset, tmp_path / "ema", CONFIG, **options, ema=0.5).model
    torch.manual_seed(0)
    start = ImageGPT(CONFIG)
    for a, b, c in zip(average.parameters(), plain.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, c + (1 - 1 / 10) * (b - c))  # the first step's decay is 1/10


def test_samples_are_drawn_from_the_average_by_the_seed(dataset, tmp_path, monkeypatch):
    drawn, real = [], loop.sample

    def sample(model, *rest, seed, **more):
        drawn.append(({name: p.clone() for name, p in model.named_parameters()}, seed))
        return real(model, *rest, seed=seed, **more)

    monkeypatch.setattr(loop, "sample", sample)
    result = train(dataset, tmp_path, CONFIG, **{**FAST, "steps": 3, "sample_every": 3}, ema=0.5, seed=7)
    ((parameters, seed),) = drawn
    assert same(parameters, dict(result.model.named_parameters())) and seed == 7


def test_time_is_that_of_the_steps_and_of_all_parts_of_a_run(dataset, tmp_path, monkeypatch):
    clock = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # each step takes a second
        result = train(dataset, tmp_path, CONFIG, **FAST)
    assert [row["images_per_second"] for row in result.rows if "loss" in row] == [FAST["batch"]] * 3
    update_state(result.checkpoint, {"elapsed": 1000.0}, None)
    assert train(dataset, tmp_path, resume=True, **FAST).seconds > 1000


def test_without_held_out_images_nothing_is_validated(dataset, tmp_path):
    assert train(dataset, tmp_path, CONFIG, **FAST, val_fraction=0.0).val_loss is None
