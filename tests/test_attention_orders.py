"""Attention under masks in token orders other than the raster's, whole and in parts, against the dense reference."""

import dataclasses

import pytest
import torch
from check import BENCH, CUDA_KERNELS, check, served
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import dense, heads

from igpt_fast import BlockMask, ops
from igpt_fast.ops._native import CPU_TABLES, use_backend
from igpt_fast.patterns import compiled
from igpt_fast.patterns.orders import ORDERS

CASES = [
    (backend, dtype)
    for backend, dtype in served("attention_bwd", torch.float32, torch.bfloat16)
    if not (dtype is torch.float32 and backend in CUDA_KERNELS)
]


def shuffled(tokens, seed):
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))


def in_parts(seen, seed):
    """A mask of two parts that share out its pairs at random, each in an order of its own."""
    whole = BlockMask.from_dense(seen)
    first = torch.rand(seen.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    parts = [BlockMask.from_dense(seen & first), BlockMask.from_dense(seen & ~first)]
    parts = [part.in_order("shuffled", shuffled(len(seen), seed + i)) for i, part in enumerate(parts)]
    return dataclasses.replace(whole, tensors=parts[0].tensors + parts[1].tensors, in_raster=whole)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("name", [name for name in ORDERS if name != "raster"])
@pytest.mark.parametrize("causal", [True, False])
def test_patterns_in_every_order(backend, dtype, name, causal):
    mask = BlockMask.compile("column | local(5)", (13, 11), causal, name)
    assert mask.order == name and len(mask.parts[0].order) == 143
    op = lambda q, k, v: ops.attention(q, k, v, mask, causal)  # noqa: E731
    check(op, dense(mask.dense()), heads(1, 2, 143, 32), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("parts", [1, 2])
@settings(max_examples=8)
@given(
    tokens=st.integers(16, 300),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    density=st.sampled_from([0.02, 0.1, 0.7, 1.0]),
)
def test_any_mask_in_any_order(backend, dtype, parts, tokens, head_dim, density):
    """Random masks, also with queries that see nothing in one part or in any: those give zeros."""
    whole = backend in CUDA_KERNELS or (backend, dtype) == ("amx", torch.bfloat16)  # whose tiles are of 32 columns
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(tokens)) < density
    mask = BlockMask.from_dense(seen).in_order("shuffled", shuffled(tokens, 1)) if parts == 1 else in_parts(seen, 1)
    args = heads(1, 2, tokens, head_dim if whole else 16, seed=tokens)
    check(lambda q, k, v: ops.attention(q, k, v, mask), dense(seen), args, backend, dtype)
    q, k, v = (t.to(dtype).requires_grad_() for t in args)
    with use_backend(backend, poison=True):
        out = ops.attention(q, k, v, mask)
        out.sum().backward()
    assert out[:, :, ~seen.any(1)].eq(0).all() and q.grad[:, :, ~seen.any(1)].eq(0).all()
    assert k.grad[:, :, ~seen.any(0)].eq(0).all() and v.grad[:, :, ~seen.any(0)].eq(0).all()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_what_is_not_a_number_shows_whatever_part_it_is_in(backend, dtype):
    # torch's own bf16 product on AMX reads behind the end of a row that is no multiple of 32, where the next NaN are.
    tokens = 96 if backend == "reference" else 70
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    q, k, v = (t.to(dtype) for t in heads(1, 2, tokens, 32))
    k[:, :, 13] = torch.nan
    with use_backend(backend, poison=True):
        out = ops.attention(q, k, v, in_parts(seen, 1), False)
    assert torch.equal(out.isnan().all(-1), seen[:, 13].expand(1, 2, tokens)) and out[:, :, :13].isfinite().all()


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] not in BENCH])
def test_the_order_that_a_pattern_takes_changes_nothing_but_rounding(backend, dtype):
    """At sizes where the compiler chooses: one order for all, and one for each part of a union."""
    for text, chosen in (("column", "transposed"), ("axial", "raster + transposed")):
        mask, raster = compiled(text, (64, 64)), BlockMask.compile(text, (64, 64), order="raster")
        assert mask.order == chosen and mask.tiles() < 0.2 * raster.tiles()
        q, k, v = (t.to(dtype).requires_grad_() for t in heads(1, 1, 4096, 16))
        found = []
        with use_backend(backend, poison=True):
            for each in (mask, raster, mask):
                out = ops.attention(q, k, v, each)
                found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for a, b, again in zip(*found, strict=True):
            assert torch.equal(a, again)
            assert (a - b).abs().max() <= (1e-5 if dtype is torch.float32 else 0.02) * b.abs().max()


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] in CPU_TABLES])
@pytest.mark.parametrize("kind", ["causal", "more queries", "more keys", "pattern", "blind", "parts"])
def test_heads_that_threads_share_out_have_the_same_gradients(backend, dtype, kind):
    """The backward pass divides a head where there are fewer of them than threads: the same sums, to the bit."""
    queries, keys = {"more queries": (500, 300), "more keys": (300, 500)}.get(kind, (300, 300))
    seen = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.3
    seen[70:200], seen[:, 60:140] = False, False
    masks = {"pattern": compiled("column | local(5)", (15, 20)), "blind": BlockMask.from_dense(seen)}
    mask = in_parts(seen, 1) if kind == "parts" else masks.get(kind)
    q, dout = (torch.cat(heads(1, 1, queries, 32, seed)[:2], 0).to(dtype) for seed in (1, 2))
    k, v = (torch.cat(heads(1, 1, keys, 32, seed)[:2], 0).to(dtype) for seed in (3, 4))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    before, found = torch.get_num_threads(), []
    try:
        with use_backend(backend, poison=True):
            for threads in (1, 2, 3, 9):  # of two heads: whole twice, then in shares
                torch.set_num_threads(threads)
                out = ops.attention(q, k, v, mask, kind in ("causal", "pattern"))
                found.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
