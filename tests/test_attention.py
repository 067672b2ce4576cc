"""Attention forward and backward on every backend, dense and by pattern, against the dense reference."""

import copies
import pytest
import torch
from check import BENCH, CUDA_KERNELS, backends, check, served
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from igpt_fast import BlockMask, InputError, ops, reference
from igpt_fast.ops import _native
from igpt_fast.ops._native import use_backend
from igpt_fast.patterns import TILE, compiled

CASES = [  # on the GPU's kernels 16-bit dtypes only
    (backend, dtype)
    for backend, dtype in served("attention_bwd", torch.float32, torch.bfloat16, torch.float16)
    if not (dtype is torch.float32 and backend in CUDA_KERNELS)
]
# On the bench, which is slow, float16 as well only where the dtype is the question.
FEW = [c for c in CASES if not (c[1] is torch.float16 and c[0] in BENCH)]
# About a tile, a block of two tiles, and three blocks and a rest; fewer on the bench, where test_shapes draws more.
LENGTHS = [1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 3 * TILE + 5, 401]
ON_THE_BENCH = {torch.bfloat16: [1, TILE, 2 * TILE + 1, 401], torch.float16: [TILE + 1]}


def dense(seen=None, causal=True, scale=None):
    return lambda q, k, v: reference.attention.attention(q, k, v, seen, causal, scale)[0]


def heads(B, H, T, D, seed=0):
    """q, k, v as slices of one fused buffer, as the model has them."""
    generator = torch.Generator().manual_seed(seed)
    return [t.transpose(1, 2) for t in torch.randn(B, T, 3, H, D, generator=generator).unbind(2)]


def served_dim(backend, head_dim):
    """The GPU's kernels know multiples of 32 only."""
    return -(-head_dim // 32) * 32 if backend in CUDA_KERNELS else head_dim


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_dense(backend, dtype, head_dim, causal):
    for tokens in ON_THE_BENCH[dtype] if backend in BENCH else LENGTHS:
        args = heads(1, 2, tokens, head_dim, seed=tokens)
        check(lambda q, k, v: ops.attention(q, k, v, causal=causal), dense(causal=causal), args, backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 3),
    tokens=st.integers(16, 150),  # of fewer, torch's own error is now and then tiny by luck; test_dense has them
    head_dim=st.integers(1, 16).map(lambda n: 8 * n),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_shapes(backend, dtype, batch, count, tokens, head_dim, causal, scale):
    args = heads(batch, count, tokens, served_dim(backend, head_dim), seed=tokens)
    check(lambda q, k, v: ops.attention(q, k, v, None, causal, scale), dense(None, causal, scale), args, backend, dtype)


# On the bench, which has 4 multiprocessors and 384 KB of L2: blocks take a place of a head after another, of all heads
# or by head; at head dim 64 a warpgroup has one line, or two.
@pytest.mark.parametrize(("backend", "dtype"), FEW)
@pytest.mark.parametrize(
    ("count", "tokens", "head_dim"), [(6, 65, 64), (12, 65, 64), (6, 300, 64), (7, 200, 96), (1, 700, 96), (9, 65, 128)]
)
def test_small_calls_and_large_ones(backend, dtype, count, tokens, head_dim):
    count = count if backend in BENCH else 40 * count  # a GPU has so many more multiprocessors
    args = heads(1, count, tokens, head_dim, seed=tokens)
    check(lambda q, k, v: ops.attention(q, k, v), dense(), args, backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), FEW)
@settings(max_examples=5)
@given(queries=st.integers(16, 150), keys=st.integers(16, 150), head_dim=st.sampled_from([32, 96]))
def test_more_or_fewer_keys_than_queries(backend, dtype, queries, keys, head_dim):
    q, k, v = heads(2, 2, max(queries, keys), head_dim)
    args = [q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]
    check(lambda q, k, v: ops.attention(q, k, v, causal=False), dense(causal=False), args, backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), FEW)
@pytest.mark.parametrize("name", ["row", "column", "local", "neighborhood", "row | dilated(3)"])
@pytest.mark.parametrize("causal", [True, False])
def test_patterns(backend, dtype, name, causal):
    mask = compiled(name, (13, 11), causal)
    op = lambda q, k, v: ops.attention(q, k, v, mask, causal)  # noqa: E731
    check(op, dense(mask.dense()), heads(1, 2, 143, 32), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), FEW)
@settings(max_examples=12)
@given(
    tokens=st.integers(16, 300),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.7, 1.0]),  # of a handful of pairs torch's own error is tiny by luck
)
def test_any_mask(backend, dtype, tokens, head_dim, density):
    """Random masks, with queries that see nothing at all: those give zeros, and so do their gradients."""
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(tokens)) < density
    mask = BlockMask.from_dense(seen)
    args = heads(1, 2, tokens, head_dim if backend in CUDA_KERNELS else 16, seed=tokens)
    check(lambda q, k, v: ops.attention(q, k, v, mask), dense(seen), args, backend, dtype)
    q, k, v = (t.to(dtype).requires_grad_() for t in args)
    with use_backend(backend, poison=True):
        out = ops.attention(q, k, v, mask)
        out.sum().backward()
    assert out[:, :, ~seen.any(1)].eq(0).all() and q.grad[:, :, ~seen.any(1)].eq(0).all()
    assert k.grad[:, :, ~seen.any(0)].eq(0).all() and v.grad[:, :, ~seen.any(0)].eq(0).all()


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[1] is torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_neighbours_of_whom_one_waits_long(backend, dtype, head_dim):
    """Three rows of tiles, and three columns, of which the first has the two ends and the second all between."""
    tiles = 10
    seen = torch.zeros(tiles, tiles, dtype=torch.bool)
    seen[0, [0, -1]] = seen[1] = seen[2, ::4] = True
    seen = (seen | seen.T).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    mask = BlockMask.from_dense(seen)
    args = heads(1, 1, len(seen), head_dim)
    check(lambda q, k, v: ops.attention(q, k, v, mask), dense(seen), args, backend, dtype)


@pytest.mark.parametrize("backend", [b for b, dtype in CASES if b in CUDA_KERNELS and dtype is torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_a_head_does_not_know_how_many_there_are(backend, head_dim, masked):
    """Where there is work for many, a block of Hopper's kernels takes two places of a head, and many heads in turn.

    On a GPU keys and values of all heads are more than its L2 holds, which decides how they are shared out.
    """
    batch = 450 if backend == copies.NAME else 8
    random = torch.Generator().manual_seed(0)
    seen = torch.rand(4, 4, generator=random).lt(0.5).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:200, :200]
    mask = BlockMask.from_dense(seen & (torch.rand(200, 200, generator=random) < 0.5)) if masked else None
    inputs = [t.bfloat16().requires_grad_() for t in heads(batch, 2, 200, head_dim)]
    dout = torch.randn(batch, 2, 200, head_dim).bfloat16()

    def results(images):
        some = [t[images] for t in inputs]
        out = ops.attention(*some, mask, not masked)
        return [out, *torch.autograd.grad(out, some, dout[images])]

    with use_backend(backend, poison=True):
        for all_, few in zip(results(slice(None)), results(slice(2, 4)), strict=True):
            assert torch.equal(all_[2:4], few)


@pytest.mark.parametrize(("backend", "dtype"), FEW)
def test_packed(backend, dtype):
    """One fused buffer in, one fused gradient out, the same as three slices give."""
    qkv = torch.randn(2, 90, 3, 2, served_dim(backend, 40))

    def plain(x):
        return dense()(*(t.transpose(1, 2) for t in x.unbind(2))).transpose(1, 2)

    check(ops.attention_packed, plain, [qkv], backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), FEW)
@pytest.mark.parametrize("cycle", [("row", "column", None), ("row", "row", "column")])
def test_packed_under_a_mask_for_each_head(backend, dtype, cycle):
    """Heads of one mask are strided slices of the buffer and of its gradient, also where they are not evenly apart."""
    masks = [text and compiled(text, (9, 10)) for text in cycle]
    qkv = torch.randn(2, 90, 3, 4, served_dim(backend, 40))

    def plain(x):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        found = []
        for head in range(4):
            mask = masks[head % 3]
            seen = None if mask is None else mask.dense().to(x.device)
            found.append(dense(seen)(*(t[:, head : head + 1] for t in (q, k, v))))
        return torch.cat(found, 1).transpose(1, 2)

    check(lambda x: ops.attention_packed(x, masks), plain, [qkv], backend, dtype)


@pytest.mark.parametrize("backend", backends("attention_fwd")[1:])
def test_output_needs_no_copy(backend):
    with use_backend(backend):
        out = ops.attention(*(t.bfloat16() for t in heads(2, 3, 5, 32)))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[1] is not torch.float16])  # its scores overflow
def test_large_scores_do_not_overflow(backend, dtype):
    q, k, v = heads(1, 1, 70, 32)
    args = [(100 * t).to(dtype).to(t.dtype) for t in (q, k)]  # scores so large that rounding them would choose another
    check(lambda q, k, v: ops.attention(q, k, v), dense(), [*args, v], backend, dtype, grads=False)


def test_agrees_with_torch():
    q, k, v = heads(2, 4, 128, 64)
    theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (ops.attention(q, k, v) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "all", "pattern", "blind queries"])
def test_unserved_head_dim_takes_torchs_own_and_says_why(kind, dtype, caplog, monkeypatch):
    """Not the reference, which keeps a matrix of all pairs, but where queries see nothing and torch's may differ."""
    monkeypatch.setattr(_native, "_said", set())
    called, own = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or own(*a, **k))
    args, mask, causal = heads(1, 2, 70, 12), None, kind != "all"
    if kind == "pattern":
        mask = compiled("row", (7, 10))
    elif kind == "blind queries":
        mask = BlockMask.from_dense(torch.ones(70, 70, dtype=torch.bool).tril(-1))
    seen = None if mask is None else mask.dense()
    causal = causal if mask is None else mask.causal
    check(lambda q, k, v: ops.attention(q, k, v, mask, causal), dense(seen, causal), args, "auto", dtype)
    assert "head dim 12" in caplog.text and bool(called) is (kind != "blind queries")
    out = ops.attention(*args, mask, causal)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_word_attention_is_as_causal_as_its_mask(causal):
    q, k, v = heads(1, 2, 70, 16)
    mask = compiled("row", (7, 10), causal)
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
    assert torch.equal(ops.attention(q, k, v, mask), ops.attention(q, k, v, mask, causal))
    for masks in (mask, [None, mask], [mask, None]):
        assert torch.equal(ops.attention_packed(packed, masks), ops.attention_packed(packed, masks, causal))
    assert torch.equal(ops.attention_packed(packed), ops.attention_packed(packed, causal=True))


def test_bad_arguments():
    q, k, v = heads(1, 2, 6, 8)
    mask = compiled("row", (2, 3))
    for call in (
        lambda: ops.attention(q, k[:, :1], v),
        lambda: ops.attention(q[:, :, :3], k, v),
        lambda: ops.attention(q, k, v, mask, causal=False),
        lambda: ops.attention(q, k, v, None, 0.0, True),  # as torch's takes dropout's share and is_causal
        lambda: ops.attention(*heads(1, 2, 7, 8), mask),
        lambda: ops.attention_packed(torch.zeros(1, 2, 2, 1, 8)),
    ):
        with pytest.raises(InputError):
            call()
