"""Whole-image likelihoods: every pixel scored, as the definition says, with an interval that holds what it promises."""

import math

import numpy as np
import pytest
import torch
from definition import cross_entropy, transcript
from published import make
from tiny import write_tokens

from igpt_fast import InputError
from igpt_fast.evaluate import evaluate
from igpt_fast.over_images import over_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("evaluate"))


def model(**fields):
    torch.manual_seed(0)
    return make(colors=16, size=(4, 6), **fields)


@pytest.mark.parametrize("bias", [False, True])
def test_every_pixel_is_scored_as_the_definition_says(dataset, bias):
    chosen, found = [7, 0, 12, 3], model(bias=bias)
    tokens = dataset.batch(np.array(chosen))
    want = cross_entropy(transcript(found, tokens)[0], tokens).mean(1)
    result = evaluate(found, dataset, chosen, batch=3)
    assert np.abs(result.per_image - want).max() <= 1e-5 * want.max()
    assert result.nats_per_pixel == pytest.approx(want.mean(), rel=1e-5)
    assert result.nats_per_pixel == pytest.approx(found.loss(tokens).item(), rel=1e-5)
    reach = 3.182 * want.std(ddof=1) / 2
    assert (result.low, result.high) == pytest.approx((want.mean() - reach, want.mean() + reach), rel=1e-4)


def test_what_json_holds(dataset):
    values = evaluate(model(), dataset).to_dict()
    assert values["images"] == 40 and values["pixels_per_image"] == 24 and values["colors"] == 16
    for name in ("per_pixel", "low", "high"):
        assert values[f"bits_{name}"] == pytest.approx(values[f"nats_{name}"] / math.log(2))
    assert values["bits_per_dim"] == values["bits_per_pixel"]
    fresh = model()
    torch.nn.init.zeros_(fresh.wtet)
    values = evaluate(fresh, dataset).to_dict()
    assert values["nats_per_pixel"] == pytest.approx(values["nats_chance"]) == math.log(16)
    alone = evaluate(fresh, dataset, [2]).to_dict()
    assert alone["nats_low"] is None and alone["bits_high"] is None


def test_bf16_is_near(dataset):
    exact, near = (evaluate(model(), dataset, amp=amp).nats_per_pixel for amp in (False, True))
    assert near == pytest.approx(exact, rel=0.02) and near != exact


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(dataset, value):
    options = {"batch": 8, "processes": None, "amp": False, "doing": "scoring", "what": "scores"}
    with pytest.raises(InputError, match="the model's scores are not finite"):
        over_images(
            lambda tokens: torch.full((len(tokens),), value), np.zeros(9), model(), dataset, np.arange(9), **options
        )


def test_what_cannot_be_scored(dataset):
    with pytest.raises(InputError, match="objective='bert' model gives whole images no likelihood"):
        evaluate(model(objective="bert"), dataset)
    with pytest.raises(InputError, match="the images are 4x6 in 16 colours, the model is made for 4x4 in 11"):
        evaluate(make(), dataset)
    with pytest.raises(InputError, match="no image is left to score"):
        evaluate(model(), dataset, [])
    for batch in (0, -1):
        with pytest.raises(InputError, match=f"batch is {batch}; use at least 1"):
            evaluate(model(), dataset, batch=batch)
    broken = model()
    broken.wtet.data[0, 0] = math.nan
    with pytest.raises(InputError, match="likelihoods are not finite"):
        evaluate(broken, dataset)
