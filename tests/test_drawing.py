"""Drawing with a slot that the device counts: the same images as by the host's number; a graph where one can be."""

import logging

import pytest
import torch
from definition import opinionated, pixels

from igpt_fast import InputError, ops
from igpt_fast.cached import Decoder, prefill
from igpt_fast.config import Config
from igpt_fast.drawing import CountedSteps, draw
from igpt_fast.model import ImageGPT
from igpt_fast.ops._native import use_backend
from igpt_fast.replay import recorded

SMALL = {"layers": 2, "width": 32, "heads": 4, "colors": 16}


def drawn(config, known, by, seed=0):
    """Images [3, T] of which `known` pixels were given, by draw() or by what draws as a GPU does."""
    torch.manual_seed(seed)
    model = opinionated(ImageGPT(config)).double()
    given = pixels(model, 3).flatten(1)[:, :known]
    logits, cache = prefill(model, given)
    images = torch.cat((given, given.new_zeros(3, config.tokens - known)), 1)
    uniforms = torch.rand(config.tokens, 3, dtype=torch.float64)
    return by(Decoder(model, cache), logits, images, uniforms, (1.0, 12, 0.9)), images


def by_counting(decoder, logits, images, uniforms, options):
    steps = CountedSteps(decoder, logits, images, uniforms, options)
    for _ in range(decoder.cache.length, images.shape[1]):
        steps.step()
    steps.draw()


@torch.inference_mode()
@pytest.mark.parametrize("known", [0, 20])
@pytest.mark.parametrize(
    "fields",
    [
        {"size": (5, 7)},
        {"size": (5, 7), "bias": True, "pattern": ["row", ["column", "row|neighborhood(3)"]]},
        {"size": (40, 8), "pattern": "neighborhood(3)"},
    ],
    ids=["dense", "patterns of layers and heads", "pages"],
)
def test_the_device_counts_as_the_host_does(fields, known):
    config = Config(**SMALL, **fields)
    with use_backend("reference"):
        said, images = drawn(config, known, lambda *args: list(draw(*args)))
        _, counted = drawn(config, known, by_counting)
    assert said == list(range(known + 1, config.tokens + 1))
    assert torch.equal(images, counted)


def test_the_device_would_take_few_pages():
    """Or the case above is none of a rolling cache."""
    torch.manual_seed(0)
    model = ImageGPT(Config(**SMALL, size=(40, 8), pattern="neighborhood(3)"))
    assert prefill(model, torch.zeros(1, 20, dtype=torch.int64))[1].pages is not None


def test_without_a_graph_steps_run_as_they_are_and_the_reason_is_logged(caplog, monkeypatch):
    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    calls = []
    with caplog.at_level(logging.WARNING, "igpt_fast"):
        step = recorded(lambda: calls.append(1), torch.device("cuda"))
    assert "one by one" in caplog.text and "not permitted" in caplog.text
    step()
    assert calls == [1]


@pytest.mark.parametrize("slot", [torch.zeros(2, dtype=torch.int64), torch.zeros(1)])
def test_a_slot_of_the_device_is_one_whole_number(slot):
    model = ImageGPT(Config(**SMALL, size=(2, 2)))
    cache = prefill(model, torch.zeros(1, 1, dtype=torch.int64))[1]
    with pytest.raises(InputError, match="slot is"):
        ops.decode_step(cache.data, torch.zeros(1, dtype=torch.int64), Decoder(model, cache).weights, slot)
