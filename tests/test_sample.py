"""Sampling: cached equals uncached, a seed means the same images whatever the batch, drawn from the model."""

import itertools
import math

import numpy as np
import pytest
import torch
from definition import opinionated, pixels

from igpt_fast.cached import Decoder, decode_one_token, prefill
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.ops.sampling import sample_tokens
from igpt_fast.sample import complete, sample


def make(dtype=torch.float32, seed=0, **fields) -> ImageGPT:
    torch.manual_seed(seed)
    sizes = {"layers": 2, "width": 32, "heads": 4, "colors": 13, "size": (5, 7), **fields}
    return opinionated(ImageGPT(Config(**sizes)), std=0.25).to(dtype)


def uniforms(seed, image, completion, count):
    """The documented stream. It is written out here so that a seed keeps its meaning from version to version."""
    bits = np.random.Philox(key=np.array([seed, image], np.uint64), counter=np.array([0, 0, completion, 0], np.uint64))
    return torch.from_numpy(np.random.Generator(bits).random(count))


@pytest.mark.parametrize("known", [0, 1, 17, 34])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cached_logits_equal_uncached_ones(dtype, bias, known):
    model = make(dtype, bias=bias)
    tokens = pixels(model, 3)
    flat = tokens.flatten(1)
    plain = model(tokens).double()
    logits, cache = prefill(model, flat[:, :known])
    rows, decoder = [logits], Decoder(model, cache)
    for at in range(known, model.config.tokens - 1):
        rows.append(decode_one_token(decoder, flat[:, at]))
    got = torch.stack(rows, dim=1).double()
    truth = model.double()(tokens)
    # In float64 the uncached path is the truth itself and grants nothing: as many ulps as there are slots instead of 4.
    ulps = model.config.tokens if dtype == torch.float64 else 4
    limit = 2 * (plain - truth).abs().max() + ulps * torch.finfo(dtype).eps * truth.abs().max()
    assert (got - truth[:, known:]).abs().max() <= limit
    with pytest.raises(InputError, match="all 35 slots"):
        decode_one_token(decoder, flat[:, -1])


SPARSE = {  # patterns of all layers, of layers and of heads, on grids that end within a tile of 64 slots
    "one": {"pattern": "row|neighborhood(3)"},
    "layers": {"pattern": ["column", None], "size": (9, 11)},
    "heads": {"pattern": [["row", "local(9)", "row"], "blocks(4)"], "size": (9, 11)},
    "heads, 130 slots": {"pattern": [[None, "row"], ["column", "row"]], "size": (10, 13), "positions": "axial"},
}


@pytest.mark.parametrize("share", [0, 0.3, 0.66, 0.98])
@pytest.mark.parametrize("fields", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cached_logits_of_sparse_models_equal_uncached_ones(dtype, fields, share):
    model = make(dtype, **SPARSE[fields])
    flat = pixels(model, 3).flatten(1)
    known, plain = int(share * flat.shape[1]), model(flat).double()
    logits, cache = prefill(model, flat[:, :known])
    rows, decoder = [logits], Decoder(model, cache)
    for at in range(known, model.config.tokens - 1):
        rows.append(decode_one_token(decoder, flat[:, at]))
    got, truth = torch.stack(rows, dim=1).double(), model.double()(flat)
    ulps = model.config.tokens if dtype == torch.float64 else 4
    limit = 2 * (plain - truth).abs().max() + ulps * torch.finfo(dtype).eps * truth.abs().max()
    assert (got - truth[:, known:]).abs().max() <= limit


def test_sparse_models_are_sampled_as_dense_ones_are():
    model = make(torch.float64, **SPARSE["heads"])
    got, count = sample(model, n=2, seed=9), model.config.tokens
    want = torch.zeros(2, count, dtype=torch.int64)
    u = torch.stack([uniforms(9, image, 0, count) for image in range(2)])
    for at in range(count):
        want[:, at] = sample_tokens(model(want)[:, at], u[:, at])
    assert torch.equal(got.flatten(1), want)
    model = make(**SPARSE["heads"])
    every, tokens = sample(model, n=5, seed=5), pixels(model, 2)
    filled = complete(model, tokens, n=3, seed=5)
    for batch in (1, 2):
        assert torch.equal(sample(model, n=5, seed=5, batch=batch), every)
        assert torch.equal(complete(model, tokens, n=3, seed=5, batch=batch), filled)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_sampling_is_the_plain_loop_over_the_whole_model(options):
    model = make(torch.float64)
    got = sample(model, n=2, seed=9, **options)
    want = torch.zeros(2, 35, dtype=torch.int64)
    u = torch.stack([uniforms(9, image, 0, 35) for image in range(2)])
    for at in range(35):
        want[:, at] = sample_tokens(model(want)[:, at], u[:, at], **options)
    assert torch.equal(got.flatten(1), want)


def test_completion_is_the_plain_loop_too():
    model = make(torch.float64)
    tokens = pixels(model, 2)
    got = complete(model, tokens, keep=0.4, n=3, seed=4)
    for image, completion in itertools.product(range(2), range(3)):
        want = tokens[image : image + 1].flatten(1).clone()
        u = uniforms(4, image, completion, 35)
        for at in range(14, 35):
            want[:, at] = sample_tokens(model(want)[:, at], u[at : at + 1])
        assert torch.equal(got[image, completion].flatten(), want[0])


@pytest.mark.parametrize("fields", [{}, {"width": 40, "heads": 2}, {"bias": True, "layers": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_the_same_images_whatever_the_batch(dtype, fields):
    model = make(dtype, **fields)
    every = sample(model, n=8, seed=5)
    assert every.shape == (8, 5, 7)
    assert every.dtype == torch.int64
    for batch in (1, 3, 8):
        assert torch.equal(sample(model, n=8, seed=5, batch=batch), every)
    assert torch.equal(sample(model, n=3, seed=5), every[:3])
    assert len({tuple(image.flatten().tolist()) for image in every}) == 8
    assert not torch.equal(sample(model, n=8, seed=6), every)

    tokens = pixels(model, 3)
    filled = complete(model, tokens, n=4, seed=5)
    for batch in (1, 3, 8, 12):
        assert torch.equal(complete(model, tokens, n=4, seed=5, batch=batch), filled)
    assert torch.equal(complete(model, tokens[:2], n=2, seed=5), filled[:2, :2])


@pytest.mark.parametrize("keep", [0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_completion_keeps_the_prefix(keep):
    model = make()
    tokens = pixels(model, 2)
    known = round(keep * 35)
    filled = complete(model, tokens, keep=keep, n=3)
    assert filled.shape == (2, 3, 5, 7)
    assert torch.equal(filled.flatten(2)[..., :known], tokens.flatten(1)[:, None, :known].expand(-1, 3, -1))
    assert filled.min() >= 0
    assert filled.max() < 13
    if known < 30:
        assert not torch.equal(filled[0, 0], filled[0, 1])


def test_samples_follow_the_models_distribution():
    """Two pixels of three colours: the nine images' probabilities are known exactly."""
    model = make(size=(1, 2), colors=3, layers=1)
    images = torch.tensor(list(itertools.product(range(3), repeat=2)))
    p = model(images).log_softmax(-1).gather(-1, images[..., None]).sum((1, 2)).exp().detach().double()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    n = 3000
    drawn = sample(model, n=n, seed=2).flatten(1)
    chi2 = sum(
        ((drawn == image).all(1).sum().item() - n * q) ** 2 / (n * q)
        for image, q in zip(images, p.tolist(), strict=True)
    )
    assert chi2 < 8 + 5 * math.sqrt(16)  # eight degrees of freedom, five sigma, fixed seeds


def test_one_pixel_images_can_be_sampled():
    model = make(size=(1, 1))
    assert sample(model, n=4).shape == (4, 1, 1)
    assert complete(model, pixels(model, 2), keep=0, n=2).shape == (2, 2, 1, 1)
    assert complete(model, pixels(model, 2)[:0], n=3).shape == (0, 3, 1, 1)


def test_autocast_outside_changes_nothing():
    model = make()
    plain = complete(model, pixels(model, 2), n=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(complete(model, pixels(model, 2), n=2), plain)


@pytest.mark.parametrize("batch", [None, 1, 2, 5])
def test_first_goes_on_and_drawn_is_given_every_image_once(batch):
    model, pieces = make(), []
    images = sample(model, n=5, seed=4)
    got = sample(model, n=3, seed=4, first=2, batch=batch, drawn=lambda at, tokens: pieces.append((at, tokens.clone())))
    assert torch.equal(got, images[2:]) and torch.equal(torch.cat([piece for _, piece in pieces]), got)
    assert [at for at, _ in pieces] == list(range(0, 3, min(batch or 3, 3)))
    for keep in (0.5, 1.0):
        pieces.clear()
        known = pixels(model, 2)
        got = complete(model, known, keep, n=3, batch=batch, drawn=lambda at, tokens: pieces.append((at, tokens)))
        for at, piece in pieces:
            assert torch.equal(piece, got.flatten(0, 1)[at : at + len(piece)])
        assert sum(len(piece) for _, piece in pieces) == 6


def test_progress_counts_pixels_up_to_the_last():
    model = make()
    seen = []
    sample(model, n=5, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5 * 35, 5 * 35)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) == 3 * 5, "once a line"
    seen.clear()
    complete(model, pixels(model, 2), keep=0.5, n=2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (4 * 17, 4 * 17)


def test_a_decoder_reads_the_models_own_weights():
    model = make()
    flat = pixels(model, 1).flatten(1)
    _, cache = prefill(model, flat[:, :3])
    decoder = Decoder(model, cache)
    with torch.no_grad():
        model.wtet.mul_(2)
    torch.testing.assert_close(decode_one_token(decoder, flat[:, 3]), model(flat)[:, 4])


@pytest.mark.parametrize(("weight", "where"), [("wtet", r"\(0, 0\)"), ("wpe", r"\(1, 2\)")])
def test_broken_weights_end_in_an_error_that_names_the_pixel(weight, where):
    model = make()
    with torch.no_grad():
        (model.wtet if weight == "wtet" else model.wpe[9]).fill_(math.nan)
    with pytest.raises(InputError, match=rf"pixel {where} of image 3 are not finite"):
        sample(model, n=2, first=3)


def test_an_error_behind_known_pixels_names_the_pixel_too():
    model = make()
    with torch.no_grad():
        model.wpe[25].fill_(math.nan)
    with pytest.raises(InputError, match=r"pixel \(3, 4\) of image 0 are not finite"):
        complete(model, pixels(model, 1), keep=0.5, n=2)


def test_a_bert_model_cannot_be_sampled():
    model = make(objective="bert")
    with pytest.raises(InputError, match="objective='ar'"):
        sample(model, n=1)
    with pytest.raises(InputError, match="objective='ar'"):
        complete(model, pixels(model, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5; use a whole number of at least 1, or leave it out"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.0}, "n is 2.0"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": "8"}, "batch is '8'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = make()
    with pytest.raises(InputError, match=message):
        sample(model, **options)
    with pytest.raises(InputError, match=message):
        complete(model, pixels(model, 1), **options)


@pytest.mark.parametrize("first", [-1, 2.5, 10**16])
def test_numbers_that_no_image_has_are_refused(first):
    with pytest.raises(InputError, match="first is"):
        sample(make(), n=1, first=first)


@pytest.mark.parametrize("keep", [-0.1, 1.1, math.nan, None, "a"])
def test_keep_outside_0_to_1_is_refused(keep):
    model = make()
    with pytest.raises(InputError, match="keep is"):
        complete(model, pixels(model, 1), keep=keep)


def test_prompts_that_do_not_fit_are_refused():
    model = make()
    with pytest.raises(InputError, match="out of range"):
        complete(model, pixels(model, 1) + 13)
    with pytest.raises(InputError, match=r"\[N, 35\]"):
        complete(model, pixels(model, 1)[:, :2])
    with pytest.raises(InputError, match="none left to predict"):
        prefill(model, pixels(model, 1).flatten(1))
