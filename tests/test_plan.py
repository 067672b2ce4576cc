"""What a run would take: counts are those of the model, figures in proportion, no machine is run into the ground."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from igpt_fast import plan as module
from igpt_fast.cached import KVCache
from igpt_fast.config import Config
from igpt_fast.device import memory_of
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.ops import attention
from igpt_fast.options import Options
from igpt_fast.plan import forward_flop, parameters, plan

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Config(layers=2, width=32, heads=4, colors=16, size=(4, 6))
CPU = torch.device("cpu")


@pytest.mark.parametrize("fields", [{}, {"bias": True, "classes": 3}, {"positions": "axial"}, {"objective": "bert"}])
def test_parameters_are_counted_without_a_model(fields):
    config = Config.from_dict({**SMALL.to_dict(), **fields})
    assert parameters(config) == ImageGPT(config).num_parameters()


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_flop_are_those_of_the_products(objective):
    """Torch's own count of a model whose attention is a dense product, all pairs counted, with the products of S."""
    config = Config(layers=3, width=32, heads=2, colors=64, size=(8, 8), mlp_width=96, objective=objective)
    c, model, tokens = config, ImageGPT(config), torch.randint(64, (1, 64))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(tokens)
    number = {str(name).removeprefix("aten."): n for name, n in counted.get_flop_counts()["Global"].items()}
    all_pairs = number.pop("bmm")
    assert all_pairs == c.layers * 4 * c.width * c.tokens**2
    seen = 1 if objective == "bert" else (c.tokens + 1) / (2 * c.tokens)
    assert forward_flop(c) == sum(number.values()) + all_pairs * seen


def test_flop_of_a_pattern_are_those_of_its_pairs():
    texts = [["row", "column"], "dense"]
    config = Config(layers=4, width=24, heads=3, colors=16, size=(4, 6), pattern=texts)
    tokens, seen = config.tokens, {}
    for text in ("row", "column"):
        mask = module.compiled(text, config.size).dense()
        q = torch.randn(1, 1, tokens, 8)
        assert attention(q, q, q, mask=module.compiled(text, config.size)).isfinite().all()
        seen[text] = int(mask.sum())
    pairs = 2 * (2 * seen["row"] + seen["column"]) + 2 * 3 * tokens * (tokens + 1) / 2
    dense = Config(layers=4, width=24, heads=3, colors=16, size=(4, 6))
    assert forward_flop(dense) - forward_flop(config) == 4 * 8 * (4 * 3 * tokens * (tokens + 1) / 2 - pairs)


def test_flop_of_a_pattern_that_looks_both_ways():
    config = Config(layers=1, width=24, heads=3, colors=16, size=(4, 6), pattern="row", objective="bert")
    dense = Config(layers=1, width=24, heads=3, colors=16, size=(4, 6), objective="bert")
    pairs = int(module.compiled("row", config.size, False).dense().sum())
    assert pairs > module.compiled("row", config.size).pairs
    assert forward_flop(dense) - forward_flop(config) == 4 * 24 * (24**2 - pairs)


def test_a_plan_draws_from_no_random_numbers_of_others():
    before = torch.get_rng_state()
    plan(SMALL, Options(batch=1), "cpu", seconds=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_plan_adds_up():
    options = Options(steps=50, batch=24, accumulate=2, ema=0.9)
    found = plan(SMALL, options, "cpu", seconds=20)
    assert (found.part, found.measured, found.steps, found.batch) == (12, 12, 50, 24)
    assert found.parameters == ImageGPT(SMALL).num_parameters() and found.flop_per_image == 3 * forward_flop(SMALL)
    assert 0 < found.step_seconds < 10 and found.seconds == 50 * found.step_seconds
    assert 10**7 < found.peak_bytes < found.free_bytes <= found.device_bytes and found.fits > 12
    assert found.checkpoint_bytes == 16 * found.parameters
    assert found.cache_bytes == KVCache(SMALL, 1, torch.bfloat16, CPU).data.nbytes
    values = json.loads(json.dumps(found.to_dict()))
    assert values["images_per_second"] == pytest.approx(24 / found.step_seconds)
    assert values["seconds"] == found.seconds and values["device_bytes"] == memory_of(CPU)
    assert values["flop_per_second"] == pytest.approx(24 * found.flop_per_image / found.step_seconds)


def test_what_cannot_be_measured_is_in_proportion(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))  # whatever is timed takes a second
    found = plan(SMALL, Options(batch=64), "cpu", seconds=5)
    assert found.measured == 1 and found.step_seconds == 64 + 1
    assert found.image_bytes == module._image_bytes(SMALL, Options(), CPU)


def test_a_step_is_its_parts_and_one_update(monkeypatch):
    def upto(self, part, seconds, bar):
        self.sizes, self.times, self.peaks, self.update = [part], [1.0], [10**9], 0.25
        return self

    monkeypatch.setattr(module._Measure, "upto", upto)
    assert plan(SMALL, Options(batch=24, accumulate=3), "cpu").step_seconds == 3.25


def test_the_average_takes_its_share_of_memory(monkeypatch):
    need = 16 * parameters(SMALL) + module._image_bytes(SMALL, Options(), CPU)
    monkeypatch.setattr(module, "free_memory_of", lambda device: round((need + 2 * parameters(SMALL)) / module.ENOUGH))
    assert plan(SMALL, Options(batch=1), "cpu", seconds=0).parameters == parameters(SMALL)
    with pytest.raises(InputError, match="use a smaller model"):
        plan(SMALL, Options(batch=1, ema=0.9), "cpu", seconds=0)


def test_what_has_no_room_is_told_in_numbers(monkeypatch):
    monkeypatch.setattr(module, "_image_bytes", lambda config, options, device: 5 * 10**9)
    monkeypatch.setattr(module, "free_memory_of", lambda device: 2 * 10**9)
    monkeypatch.setattr(module, "parameters", lambda config: 10**9)
    with pytest.raises(InputError, match=r"take 16\.0 GB, an image about 5\.0 GB, and cpu has 2\.0 GB free: use a"):
        plan(SMALL, Options(batch=1), "cpu", seconds=0)


def test_memory_ends_it_before_it_ends_the_machine(monkeypatch):
    peaks = iter([10**9, 2 * 10**9, 4 * 10**9])
    monkeypatch.setattr(module, "peak_of", lambda device: next(peaks))
    monkeypatch.setattr(module, "free_memory_of", lambda device: 6 * 10**9)
    found = plan(SMALL, Options(batch=64), "cpu", seconds=60)
    assert found.measured == 4 and found.image_bytes == 10**9
    assert found.peak_bytes == 64 * 10**9 and found.fits == 4 + 1
    monkeypatch.setattr(module, "free_memory_of", lambda device: 10**5)
    with pytest.raises(InputError, match=r"parameters, their gradients .* GB free: use a smaller model"):
        plan(SMALL, Options(batch=64), "cpu")
    monkeypatch.setattr(module, "free_memory_of", lambda device: 6 * 10**9)

    def full(self, size):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module._Measure, "_timed", lambda self, run: run() or 1.0)
    passes, real = [], module._Measure._passes
    monkeypatch.setattr(
        module._Measure, "_passes", lambda self, n: passes.append(n) or (full if n > 1 else real)(self, n)
    )
    monkeypatch.setattr(module, "peak_of", lambda device: 10**9)
    assert plan(SMALL, Options(batch=8), "cpu").measured == 1 and 2 in passes
    monkeypatch.setattr(
        module._Measure, "_passes", lambda self, n: passes.append(n) or (full if len(passes) > 1 else real)(self, n)
    )
    passes.clear()
    with pytest.raises(InputError, match="no memory for one image side by side"):
        plan(SMALL, Options(batch=8), "cpu")
    monkeypatch.setattr(module._Measure, "_passes", full)
    with pytest.raises(InputError, match="no memory for one image side by side"):
        plan(SMALL, Options(batch=8), "cpu")


def test_the_second_image_is_measured_only_where_there_is_room(monkeypatch):
    monkeypatch.setattr(module, "_image_bytes", lambda config, options, device: 10**8)
    monkeypatch.setattr(module, "peak_of", lambda device: 9 * 10**8)
    monkeypatch.setattr(module, "free_memory_of", lambda device: 10**9)
    found = plan(SMALL, Options(batch=8), "cpu", seconds=20)
    assert found.measured == found.fits == 1 and found.peak_bytes == 16 * 10**8
    monkeypatch.setattr(module, "peak_of", lambda device: 5 * 10**8)
    found = plan(SMALL, Options(batch=2), "cpu", seconds=20)
    assert (found.measured, found.fits, found.image_bytes) == (2, 6, 10**8), "what did not grow is estimated"
    peaks = iter([5 * 10**8, 5 * 10**8 + 10**7])
    monkeypatch.setattr(module, "peak_of", lambda device: next(peaks))
    assert plan(SMALL, Options(batch=2), "cpu", seconds=20).image_bytes == 10**8, "and what grew by noise"


def test_the_estimate_of_an_image_is_near_what_is_measured():
    config = Config(layers=8, width=256, heads=4, size=(32, 32))
    for options in (
        Options(batch=8),
        Options(batch=8, precision="fp32"),
        Options(batch=8, activation_checkpointing=True),
    ):
        found = plan(config, options, "cpu", seconds=60)
        assert found.measured == 8
        assert found.image_bytes / 2.5 < module._image_bytes(config, options, CPU) < 2.5 * found.image_bytes, options


def test_the_command(igpt, tmp_path):
    words = ["--layers", "2", "--width", "32", "--heads", "4", "--colors", "16", "--size", "4x6", "--batch", "6"]
    code, printed, said = igpt("plan", *words, "--steps", "7", "--pattern", "row", "--seconds", "5", "--json")
    found = json.loads(printed)
    assert code == 0 and found["steps"] == 7 and found["config"]["pattern"] == "row" and found["batch"] == 6
    for word in ("2 layers, width 32, 4 heads, 4×6 pixels of 16 colours", "for 7 steps", "are free", "on disk"):
        assert word in said, word
    assert not list(tmp_path.iterdir()) and math.isfinite(found["step_seconds"])
    code, printed, _ = igpt("plan", *words, "--objective", "bert", "--seconds", "1", "--json")
    assert code == 0 and json.loads(printed)["cache_bytes"] == 0
    ImageGPT(SMALL).save_pretrained(tmp_path / "model")
    for wrong, message in (
        (["--layers", "0"], "layers is 0"),
        (["--batch", "6", "--accumulate", "4"], "--accumulate is 4; use a divisor of the batch (6)"),
        (["--preset", "XL", "--size", "64"], "6,810,875,904 parameters, their gradients"),
        (["--init", tmp_path / "none"], "is not there"),
        (["--init", tmp_path / "model", "--layers", "3"], "the weights to begin with have layers 2, not 3"),
        (["--init", tmp_path / "model", "--preset", "S"], "--preset changes nothing with --init"),
    ):
        code, printed, said = igpt("plan", *wrong)
        assert code == 2 and not printed and message in said, said


def test_the_shape_of_a_model(igpt, tmp_path):
    ImageGPT(SMALL).save_pretrained(tmp_path / "model")
    code, printed, said = igpt("plan", "--init", tmp_path / "model", "--size", "8", "--seconds", "1", "--json")
    config = json.loads(printed)["config"]
    assert code == 0 and config["size"] == [8, 8] and config["width"] == 32 and "shaped as" in said
