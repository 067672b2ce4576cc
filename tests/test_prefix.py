"""What completions of one image share: the slots of what is known stand once before the caches of all of them."""

import sys
from functools import partial

import pytest
import torch
from check import backends, check
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_step import DTYPES, draw_masks, grouped, meaning, ours
from test_decode_step import draw as weights_and_cache
from test_drawing import by_counting
from test_sample import make, pixels

from igpt_fast import InputError, ops
from igpt_fast.cached import Decoder, KVCache, shared_slots
from igpt_fast.drawing import draw
from igpt_fast.ops._native import use_backend
from igpt_fast.ops.decode_step import StepMasks, StepWeights
from igpt_fast.sample import _batches, _start, complete, default_batch


def split(cache, images, slots):
    """A whole cache → the first slots of `images` images, and what is behind them in those of as many neighbours."""
    each = cache.shape[1] // images
    shared = cache[:, ::each, ..., :slots, :].contiguous()
    whole = torch.cat((shared.repeat_interleave(each, 1), cache[..., slots:, :]), dim=4)
    return whole, shared, cache[..., slots:, :].contiguous()


@pytest.mark.parametrize("backend", backends("decode_step"))
@settings(max_examples=25)
@given(
    images=st.integers(1, 3),
    each=st.integers(1, 4),
    head_dim=st.sampled_from([8, 24, 64]),
    slots=st.integers(1, 40) | st.sampled_from([64, 128]),
    own=st.integers(1, 70),
    shape=st.sampled_from([(), [1, 1], [2, 3]]),
    last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_a_step_behind_shared_slots(backend, images, each, head_dim, slots, own, shape, last, dtype):
    args = weights_and_cache(2, images * each, 3, head_dim, 20, slots + own)
    whole, shared, rest = split(args[0], images, slots)
    slot = slots + (own - 1 if last else own // 2)
    masks, seen = draw_masks(shape, slots + own, slots)
    masks = StepMasks(masks) if shape else ()

    def step(cache, before, *rest):
        return ours(slot, cache, *rest, masks=masks, prefix=before)

    def wanted(cache, before, *rest):
        return meaning(slot, cache, *rest, seen=seen, prefix=before)

    check(step, wanted, [rest, shared, *args[1:]], backend, dtype, grads=False)
    if backend == "reference":
        return
    with use_backend(backend):  # and not a bit is other than of a whole cache
        whole, shared, rest, *others = (
            t.to(dtype) if t.is_floating_point() else t for t in (whole, shared, rest, *args[1:])
        )
        logits, cache = ours(slot, whole, *others, masks=masks)
        for got, expected in zip(step(rest, shared, *others), (logits, cache[..., slots:, :]), strict=True):
            assert torch.equal(got, expected)


FIELDS = [{}, {"pattern": "row|neighborhood(5)"}, {"pattern": [[None, "row"], "column"]}]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_completions_do_not_know_that_they_share(dtype, fields, monkeypatch):
    model = make(dtype, size=(10, 13), **fields)
    tokens = pixels(model, 2)
    assert shared_slots(model, 78) == 64
    got = [complete(model, tokens, keep=0.6, n=3, seed=5, batch=batch) for batch in (1, 2, 3, 5, 6, 64)]
    monkeypatch.setattr(sys.modules["igpt_fast.sample"], "shared_slots", lambda *_: 0)
    apart = complete(model, tokens, keep=0.6, n=3, seed=5)
    assert all(torch.equal(images, apart) for images in got)
    assert len({bytes(image.numpy()) for image in apart.flatten(0, 1)}) == 6


@torch.inference_mode()
@pytest.mark.parametrize("fields", [{}, {"pattern": ["row", [None, "column"]]}])
def test_the_device_counts_behind_shared_slots(fields, monkeypatch):
    """As the host does, which draws on a CPU."""
    monkeypatch.setattr(sys.modules["igpt_fast.sample"], "shared_slots", lambda *_: 64)
    model = make(torch.float64, size=(10, 13), **fields)
    known = pixels(model, 2).flatten(1)[:, :78]
    given = torch.cat((known, known.new_zeros(2, 52)), 1)[[0, 0, 1, 1]]
    uniforms, drawn = torch.rand(130, 4, dtype=torch.float64), []
    for by in (lambda *args: list(draw(*args)), by_counting):
        logits, decoder = _start(model, known, [0, 0, 1, 1], {})
        assert decoder.cache.shared == 64
        with use_backend("reference"):
            by(decoder, logits, images := given.clone(), uniforms, (1.0, 12, 0.9))
        drawn.append(images)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_what_is_shared():
    """Whole tiles of 64 slots, of which the first has no pixel; nothing where few slots take turns in pages, and where
    plain torch would copy them at every step.
    """
    dense, rolling = (make(size=(32, 32), pattern=p) for p in (None, "local(40)"))
    assert [shared_slots(dense, known) for known in (0, 1, 62, 63, 512, 1023)] == [0, 0, 0, 64, 512, 1024]
    assert shared_slots(rolling, 512) == 0
    assert shared_slots(dense.double(), 512) == 0
    with use_backend("reference"):
        assert shared_slots(dense.float(), 512) == 0


def test_batches():
    """Whole images with all their completions, or completions of one image."""
    assert list(_batches(3, 4, 100)) == [(0, 12)]
    assert list(_batches(3, 4, 9)) == [(0, 8), (8, 12)]
    assert list(_batches(2, 4, 4)) == [(0, 4), (4, 8)]
    assert list(_batches(2, 4, 3)) == [(0, 3), (3, 4), (4, 7), (7, 8)]
    assert list(_batches(1, 5, 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(_batches(0, 5, 2)) == []


def test_the_default_batch_grows_with_what_is_shared():
    model = make(layers=24, width=512, heads=8, size=(64, 64))  # 403 MB a whole image
    assert default_batch(model) == 2
    assert default_batch(model, 2048, 1) == 2
    assert default_batch(model, 2048, 8) == 4
    assert default_batch(model, 4000, 8) == 17
    assert default_batch(model, 3071, 45) == 9  # a share of 68.3 slots of what is shared takes 69


def test_a_cache_holds_what_is_behind():
    model = make(size=(10, 13))
    shared = torch.randn(2, 2, 2, 4, 64, 8)
    cache = KVCache(model.config, 6, torch.float32, torch.device("cpu"), shared)
    assert cache.data.shape == (2, 6, 2, 4, 66, 8) and cache.shared == 64
    assert cache.held(70) == (slice(64, 70), slice(6))


def test_prefixes_that_do_not_fit_are_refused():
    cache, pixel, wte, wpe, *flat, ln_f, wtet = weights_and_cache(batch=4, tokens=9)
    weights = StepWeights(wte, wpe, grouped(flat), ln_f, wtet)
    before, own = cache[:, :2, ..., :3, :].contiguous(), cache[..., 3:, :].contiguous()
    step = partial(ops.decode_step, own, pixel, weights)
    bad = [before[:1], before[:, :0], before[..., :0, :], before.double(), before[0], before[..., :4], before[:, :, :1]]
    for prefix in (*bad, torch.cat((before, before[:, :1]), 1)):
        with pytest.raises(InputError, match=r"expected a prefix \[L, M, 2, H, P, D\] like the cache"):
            step(5, prefix=prefix)
    with pytest.raises(InputError, match="and no pages beside it"):
        step(5, prefix=before, pages=torch.zeros(1, dtype=torch.int32))
    for slot in (2, 9):
        with pytest.raises(InputError, match=f"slot is {slot}; the cache has the slots 3 to 8"):
            step(slot, prefix=before)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_shares_too():
    model = make(size=(10, 13))
    weights = Decoder(model, KVCache(model.config, 1, torch.float32, torch.device("cpu"))).weights
    data, shared, pixel = torch.randn(2, 4, 2, 4, 66, 8), torch.randn(2, 2, 2, 4, 64, 8), torch.tensor([3, 1, 4, 1])

    def step(cache):
        return ops.decode_step(cache, pixel, weights, 70, prefix=shared)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(data.clone()), step(data.clone()))
