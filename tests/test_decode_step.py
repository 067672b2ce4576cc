"""The decoding step: right, and the same bits whatever stands in the batch, whatever the number of threads."""

from functools import partial

import pytest
import torch
from check import backends, check
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast import BlockMask, InputError, ops, reference
from igpt_fast.ops._native import use_backend
from igpt_fast.ops.decode_step import StepMasks, StepWeights
from igpt_fast.patterns import compiled
from igpt_fast.reference.decode_step import LayerWeights

FIELDS = len(LayerWeights._fields)
DTYPES = [torch.float32, torch.bfloat16]


def draw(layers=2, batch=3, heads=2, head_dim=8, inner=20, tokens=6, colors=7, bias=True, seed=0):
    """cache [L, B, 2, H, T, D], pixels [B], then every weight in the order of a call, the layers' flat."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    d = heads * head_dim
    wide, maybe = d**-0.5, normal if bias else lambda *_: None
    flat = []
    for _ in range(layers):
        flat += [1 + normal(d) / 4, normal(3 * d, d) * wide, maybe(3 * d), normal(d, d) * wide, maybe(d)]
        flat += [1 + normal(d) / 4, normal(inner, d) * wide, maybe(inner), normal(d, inner) * inner**-0.5, maybe(d)]
    cache = normal(layers, batch, 2, heads, tokens, head_dim)
    pixels = torch.randint(colors, (batch,), generator=generator)
    return [cache, pixels, normal(colors, d), normal(tokens, d), *flat, normal(d), normal(colors, d)]


def grouped(flat):
    return [LayerWeights(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)]


def ours(slot, cache, pixels, wte, wpe, *rest, masks=(), prefix=None):
    """Logits, and the cache with its new slot, so that both are compared."""
    *flat, ln_f, wtet = rest
    cache = cache.clone()
    weights = StepWeights(wte, wpe, grouped(flat), ln_f, wtet)
    return ops.decode_step(cache, pixels, weights, slot, masks=masks, prefix=prefix), cache


def meaning(slot, cache, pixels, wte, wpe, *rest, seen=(), prefix=None):
    *flat, ln_f, wtet = rest
    cache = cache.clone()
    step = partial(reference.decode_step.decode_step, cache, pixels, wte, wpe, grouped(flat), ln_f, wtet, slot)
    return step(seen=seen, prefix=prefix), cache


@pytest.mark.parametrize("backend", backends("decode_step"))
@given(
    layers=st.integers(1, 3),
    batch=st.integers(1, 6),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 24, 64, 96, 128]),
    inner=st.integers(1, 70),
    tokens=st.integers(1, 40),
    last=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_step(backend, layers, batch, heads, head_dim, inner, tokens, last, bias, dtype):
    args = draw(layers, batch, heads, head_dim, inner, tokens, bias=bias)
    slot = tokens - 1 if last else tokens // 2
    check(partial(ours, slot), partial(meaning, slot), args, backend, dtype, grads=False)


def draw_masks(shape, tokens, seed):
    """Of each layer so many random masks or None, as the op takes them, and as the reference does."""
    generator = torch.Generator().manual_seed(seed)
    masks, seen = [], []
    for count in shape:
        densities = torch.tensor([0.0, 0.1, 0.6, 1.0])[torch.randint(4, (count,), generator=generator)].tolist()
        dense = [torch.rand(tokens, tokens, generator=generator) < p if p else None for p in densities]
        masks.append([None if s is None else BlockMask.from_dense(s) for s in dense])
        seen.append(dense)
    return masks, seen


@pytest.mark.parametrize("backend", backends("decode_step"))
@settings(max_examples=25)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 24, 64]),
    tokens=st.integers(1, 30) | st.integers(60, 200),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_masks(backend, batch, heads, head_dim, tokens, shape, last, dtype):
    """Of layers and heads; what a head does not see may be NaN."""
    cache, *rest = draw(len(shape), batch, heads, head_dim, 20, tokens, seed=tokens)
    slot = tokens - 1 if last else tokens // 2
    masks, seen = draw_masks(shape, tokens, tokens)
    for layer, groups in zip(cache, seen, strict=True):
        for head in range(heads):
            if groups[head % len(groups)] is not None:
                layer[:, :, head, ~groups[head % len(groups)][slot]] = torch.nan

    def new(fn):
        return lambda *args: (lambda logits, cache: (logits, cache[..., slot, :]))(*fn(slot, *args))

    step = new(partial(ours, masks=StepMasks(masks)))
    check(step, new(partial(meaning, seen=seen)), [cache, *rest], backend, dtype, grads=False)


@pytest.mark.parametrize("backend", backends("decode_step")[1:])
def test_masks_that_show_all_change_no_bit(backend):
    args, every = draw(tokens=70), BlockMask.from_dense(torch.ones(70, 70, dtype=torch.bool).tril())
    with use_backend(backend):
        results = [ours(68, *args, masks=masks) for masks in ((), [every, (None, every)], [None, None])]
    for logits, cache in results[1:]:
        assert torch.equal(logits, results[0][0]) and torch.equal(cache, results[0][1])


def test_masks_reach_the_single_ops():
    """Which serve a step that the one native call refuses, here for its cache."""
    args, masks = draw(heads=3, tokens=70), [compiled("row", (7, 10)), (compiled("column", (7, 10)), None)]
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    seen = [[m if m is None else m.dense() for m in (row if isinstance(row, tuple) else (row,))] for row in masks]
    for got, wanted in zip(ours(50, *args, masks=masks), meaning(50, *args, seen=seen), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", backends("decode_step")[1:])  # torch's products know their batch
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "head_dim", "inner"), [(5, 24, 70), (20, 32, 96)])  # what AMX does not and does take
def test_images_do_not_know_their_batch_nor_the_threads(backend, dtype, masked, batch, head_dim, inner):
    args = [a.to(dtype) if a.is_floating_point() else a for a in draw(2, batch, 3, head_dim, inner, 20)]
    one_step = partial(ours, 11, masks=draw_masks([1, 2], 20, 0)[0] if masked else ())
    before = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(1)
            logits, cache = one_step(*args)
            torch.set_num_threads(3)
            again = one_step(*args)
            assert torch.equal(again[0], logits) and torch.equal(again[1], cache)
            for i in range(0, batch, 3):
                alone = one_step(args[0][:, i : i + 1].contiguous(), args[1][i : i + 1], *args[2:])
                assert torch.equal(alone[0][0], logits[i]) and torch.equal(alone[1][:, 0], cache[:, i])
    finally:
        torch.set_num_threads(before)


def test_nothing_but_its_slot_is_written():
    args = draw()
    cache = ours(3, *args)[1]
    elsewhere = [t for t in range(6) if t != 3]
    assert torch.equal(cache[..., elsewhere, :], args[0][..., elsewhere, :])
    assert not torch.equal(cache[..., 3, :], args[0][..., 3, :])


def test_bad_arguments():
    cache, pixels, wte, wpe, *flat, ln_f, wtet = draw()
    weights = StepWeights(wte, wpe, grouped(flat), ln_f, wtet)
    with pytest.raises(InputError, match="does not fit 2 layers"):
        ops.decode_step(cache[:1], pixels, weights, 0)
    with pytest.raises(InputError, match="slot is 6"):
        ops.decode_step(cache, pixels, weights, 6)
    row = compiled("row", (2, 3))
    for masks, message in (
        ([row], "masks for 1 layers were given to 2"),
        ([row, compiled("row", (1, 3))], "slot is 4; a mask was compiled for 3 tokens"),
        ([row, "row"], "masks must be"),
        ([row, ()], "masks must be"),
    ):
        with pytest.raises(InputError, match=message):
            ops.decode_step(cache, pixels, weights, 4, masks=masks)
    with pytest.raises(ValueError, match="pixel 7 is outside"):
        ops.decode_step(cache, pixels + 7 - pixels, weights, 0)
    with pytest.raises(ValueError, match="fc's bias"):
        layers = [weights.layers[0]._replace(fc_bias=ln_f), weights.layers[1]]
        ops.decode_step(cache, pixels, StepWeights(wte, wpe, layers, ln_f, wtet), 0)


def test_why_not():
    cache, pixels, wte, wpe, *flat, ln_f, wtet = draw(head_dim=12)
    assert ops.decode_step(cache, pixels, StepWeights(wte, wpe, grouped(flat), ln_f, wtet), 0).shape == (3, 7)
    mixed = StepWeights(wte, wpe.double(), grouped(flat), ln_f, wtet)
    assert mixed.refusal == "the weights differ in dtype or device"
    assert StepWeights(wte, wpe.t().contiguous().t(), grouped(flat), ln_f, wtet).refusal == "a weight is not contiguous"
