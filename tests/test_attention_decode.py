"""A decoding step's attention over a cache, and what puts keys and values there, on every backend."""

import copies
import pytest
import torch
from check import CUDA_KERNELS, check, served
from hypothesis import example, given, settings
from hypothesis import strategies as st

from igpt_fast import BlockMask, InputError, ops, reference
from igpt_fast.ops._native import BACKENDS, use_backend
from igpt_fast.ops.attention_decode import BYTES, CHUNK
from igpt_fast.patterns import TILE, compiled

plain = reference.attention_decode.attention_decode
CASES = [
    (backend, dtype)
    for backend, dtype in served("attention_decode", torch.float32, torch.bfloat16, torch.float16)
    if not (dtype is torch.float32 and backend in CUDA_KERNELS)
]
# The CPU's kernel serves plain caches only, and masks of them.
HOST = [c for c in CASES if c[0] not in CUDA_KERNELS]
EXTRAS = [c for c in CASES if c[0] in ("reference", *CUDA_KERNELS)]
GPU = [b for b, dtype in CASES if b in CUDA_KERNELS and dtype is torch.bfloat16]
DIMS = [32, 64, 96, 128]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(B, H, T, D, seed=0):
    """q of one slot, k and v, as slices of buffers that hold more."""
    k, v = randn(B, 2, H, T, D, seed=seed).unbind(1)
    return randn(B, 1, 3, H, D, seed=seed + 1)[:, :, 0].transpose(1, 2), k, v


def quantized(*caches):
    """Caches as float8 and their scales."""
    found = [torch.zeros(c.shape, dtype=BYTES) for c in caches]
    scales = [torch.full((*c.shape[:2], -(-c.size(2) // TILE)), torch.nan) for c in caches]
    for i in range(0, len(caches), 2):
        pair = slice(i, i + 2)
        reference.attention_decode.cache_append(*found[pair], *caches[pair], 0, None, scales[pair])
    return found, scales


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@settings(max_examples=12)
@given(length=st.integers(1, 300), spare=st.integers(0, 20), head_dim=st.sampled_from([8, 40, *DIMS]))
def test_decode(backend, dtype, length, spare, head_dim):
    head_dim = max(32, head_dim // 32 * 32) if backend in CUDA_KERNELS else head_dim
    q, k, v = heads(2, 3, length + spare, head_dim, seed=length)
    k[:, :, length:], v[:, :, length:] = float("nan"), float("nan")  # rows not yet written must not be read
    args, more = [q, k, v], {"grads": False}
    check(
        lambda q, k, v: ops.attention_decode(q, k, v, length),
        lambda *a: plain(*a, length),
        args,
        backend,
        dtype,
        **more,
    )


@pytest.mark.parametrize(("backend", "dtype"), HOST)
@settings(max_examples=20)
@given(
    length=st.integers(1, 300),
    spare=st.integers(0, 70),
    head_dim=st.sampled_from([8, 40, *DIMS]),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.97, 1.0]),
)
def test_of_a_masks_row_only_what_it_sees_is_read(backend, dtype, length, spare, head_dim, density):
    """Everything else may be NaN, and the bits are those of a cache without it; a row that sees nothing gives zeros."""
    q, k, v = heads(2, 3, length + spare, head_dim, seed=length)
    seen = torch.rand(length + spare, length + spare, generator=torch.Generator().manual_seed(length)) < density
    mask, row = BlockMask.from_dense(seen), seen[length - 1, :length]
    unseen = ~row.new_zeros(length + spare).index_fill(0, row.nonzero().flatten(), True).view(1, 1, -1, 1)
    k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    check(
        lambda q, k, v: ops.attention_decode(q, k, v, length, mask=mask),
        lambda q, k, v: plain(q, k, v, length, seen=seen),
        [q, k, v],
        backend,
        dtype,
        grads=False,
    )
    with use_backend(backend):
        got, count = ops.attention_decode(*(t.to(dtype) for t in (q, k, v)), length, mask=mask), int(row.sum())
        if not count:
            assert not got.any()
        elif backend != "reference":
            alone = (t.to(dtype)[:, :, ~unseen.flatten()] for t in (k, v))
            assert torch.equal(got, ops.attention_decode(q.to(dtype), *alone, count))


@pytest.mark.parametrize(("backend", "dtype"), EXTRAS)
@settings(max_examples=25)
@example(1, 1, 2, TILE, 32, 0.001, True, False, None)  # an image without slots of its own: row P - 1
@given(
    images=st.integers(1, 2),
    each=st.sampled_from([1, 2, 9]),
    length=st.integers(1, 200) | st.just(4 * CHUNK + 9),
    before=st.sampled_from([0, 0, 1, TILE, 2 * CHUNK, 300]),
    head_dim=st.sampled_from(DIMS),
    density=st.sampled_from([None, None, 0.001, 0.1, 0.9]),
    counted=st.booleans(),
    in_bytes=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_everything_at_once(backend, dtype, images, each, length, before, head_dim, density, counted, in_bytes, scale):
    """Lengths on the device, shared prefixes, masks, caches of bytes: any of them with any other."""
    if density is not None and before % TILE and backend != "reference":
        before -= before % TILE  # under a mask a prefix ends where a tile does
    B, spare = images * each, 7
    q, k, v = heads(B, 2, length + spare, head_dim, seed=length)
    prefix = [t for t in heads(images, 2, before, head_dim, seed=1)[1:] if before]
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(0, length + 1, (B,), generator=generator, dtype=torch.int32) if counted else None
    mask = seen = None
    if density is not None:
        seen = torch.rand(before + length, before + length, generator=generator) < density
        mask = BlockMask.from_dense(seen)
    scales = []
    if in_bytes:
        found, scales = quantized(k, v, *prefix)
        k, v, *prefix = found
    else:
        end = length if lengths is None else lengths.view(-1, 1, 1, 1)
        unwritten = (torch.arange(length + spare).view(1, 1, -1, 1) >= end).expand(k.shape)
        k, v = k.masked_fill(unwritten, torch.nan), v.masked_fill(unwritten, torch.nan)

    def held(t, dtype):
        return t if in_bytes else t.to(dtype)

    def ours(q):
        parts = [held(t, q.dtype) for t in (k, v)], [held(t, q.dtype) for t in prefix]
        return ops.attention_decode(q, *parts[0], length, scale, lengths, mask, parts[1], scales)

    def theirs(q):
        parts = [held(t.to(dtype), q.dtype) if not in_bytes else t for t in (k, v, *prefix)]
        return plain(q, *parts[:2], length, scale, lengths, seen, tuple(parts[2:]) or None, tuple(scales))

    check(ours, theirs, [q.to(dtype).float()], backend, dtype, grads=False)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 1000, 33 * CHUNK + 5])
@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_split_changes_no_bit(backend, length, in_bytes):
    """Nor does it, that a block adds chunks up in several rounds."""
    q, k, v = (t.bfloat16() for t in heads(1, 2, length, 32))
    scales = [None, None]
    if in_bytes:
        (k, v), scales = quantized(k.float(), v.float())
    results = []
    for chunks in (0, -(-length // CHUNK)):
        o, partials = torch.full_like(q, torch.nan), torch.full((1, 2, chunks, 34), torch.nan)
        BACKENDS[backend].attention_decode(
            o, partials if chunks else None, q.contiguous(), k, v, *scales, None, None, None, length, 0, 0.2, 0
        )
        results.append(o)
    assert torch.equal(*results) and not results[0].isnan().any()


@pytest.mark.parametrize("backend", [b for b in dict(CASES) if b != "reference"])
def test_an_image_does_not_know_its_batch(backend):
    """Neither the cache's nor, on a GPU, the neighbours that share its prefix, nor who ended earlier."""
    q, k, v = (t.bfloat16() for t in heads(40, 2, 300, 32))
    prefix = [t.bfloat16() for t in heads(2, 2, 200, 32, seed=5)[1:]]
    lengths, mask = torch.arange(260, 300, dtype=torch.int32), compiled("local", (20, 20))

    def some(images, which, **more):
        return ops.attention_decode(q[images], k[images], v[images], 300, prefix=[p[which] for p in prefix], **more)

    with use_backend(backend, poison=True):
        whole = ops.attention_decode(q, k, v, 300)
        assert torch.equal(whole[3:4], ops.attention_decode(q[3:4], k[3:4], v[3:4], 300))
        masked = ops.attention_decode(q, k, v, 300, mask=mask)
        assert torch.equal(masked[3:4], ops.attention_decode(q[3:4], k[3:4], v[3:4], 300, mask=mask))
        if backend in CUDA_KERNELS:
            counted = ops.attention_decode(q, k, v, 300, lengths=lengths)
            short = torch.tensor([0, 5], dtype=torch.int32)  # of three chunks in blocks of their own
            assert torch.equal(
                ops.attention_decode(q[:2], k[:2], v[:2], 300, lengths=short)[1:],
                ops.attention_decode(q[1:2], k[1:2], v[1:2], 5),
            )
            assert torch.equal(counted[3:4], ops.attention_decode(q[3:4], k[3:4], v[3:4], 263))
            shared = some(slice(None), slice(None))
            assert torch.equal(shared[3:4], some(slice(3, 4), slice(0, 1)))
            assert torch.equal(shared[21:33], some(slice(21, 33), slice(1, 2)))
            few = some(slice(21, 33), slice(1, 2), lengths=lengths[21:33])
            assert torch.equal(some(slice(None), slice(None), lengths=lengths)[21:33], few)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("name", ["row", "column", "local"])
def test_only_what_is_seen_is_read(backend, name):
    """Steps of 64 slots at D = 32 of which the row sees none may hold anything."""
    mask, slot = compiled(name, (16, 16)), 200
    row = mask.dense()[slot, : slot + 1]
    q, k, v = (t.bfloat16() for t in heads(2, 2, 256, 32))
    for tile in range(0, slot + 1, TILE):
        if not row[tile : tile + TILE].any():
            k[:, :, tile : tile + TILE] = v[:, :, tile : tile + TILE] = torch.nan
    with use_backend(backend, poison=True):
        got = ops.attention_decode(q, k, v, slot + 1, mask=mask)
    assert (
        got.float() - plain(q.float(), k.float(), v.float(), slot + 1, seen=mask.dense()).float()
    ).abs().max() < 0.05


APPENDS = [
    (b, d) for b, d in served("cache_append", torch.bfloat16, torch.float16) if b in ("reference", *CUDA_KERNELS)
]


@pytest.mark.parametrize(("backend", "dtype"), APPENDS)
@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    counts=st.lists(st.sampled_from([1, 1, 1, 5, TILE, 2 * TILE + 3]), min_size=1, max_size=4),
    start=st.sampled_from([0, 1, TILE - 1, TILE]),
    head_dim=st.sampled_from(DIMS),
    counted=st.booleans(),
    in_bytes=st.booleans(),
    growth=st.sampled_from([1.0, 1e-3, 20.0]),
)
def test_append(backend, dtype, batch, counts, start, head_dim, counted, in_bytes, growth):
    """Appended again and again, to the bit: codes, scales, and what was there before."""
    slots = 6 + start + sum(counts)
    shape = (2, batch, 2, slots, head_dim)
    kind = BYTES if in_bytes else dtype
    before = randn(*shape).to(kind)
    pages = torch.full((2, batch, 2, -(-slots // TILE)), 2.0**-4)
    first = torch.arange(batch, dtype=torch.int32) + start if counted else None
    states = []
    for name in ("reference", backend):
        caches, scales, at, size = before.clone(), pages.clone(), start, 1.0
        where = None if first is None else first.clone()
        with use_backend(name):
            for i, count in enumerate(counts):
                new = (randn(2, batch, 2, count, head_dim, seed=i) * size).to(dtype)
                ops.cache_append(*caches, *new, at, where, [*scales] if in_bytes else [])
                at, size = at + count, size * growth
                where = None if where is None else where + count
        states.append((caches.view(torch.uint8), scales))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [b for b, d in APPENDS if d is torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 448.0, 449.0, 3e38, 1e-15, torch.inf, torch.nan])
def test_scales_at_the_ends(backend, value):
    caches, scales = torch.zeros(2, 1, 1, 3, 32).to(BYTES), torch.full((2, 1, 1, 1), torch.nan)
    with use_backend(backend):
        ops.cache_append(*caches, *torch.full((2, 1, 1, 1, 32), value).bfloat16(), 0, None, [*scales])
        ops.cache_append(*caches, *torch.ones(2, 1, 1, 1, 32).bfloat16(), 1, None, [*scales])
    assert scales.isnan().all() if not value < torch.inf else (scales.log2() % 1 == 0).all()
    got = caches.float() * scales[..., None]
    if not value < torch.inf:
        return
    assert (got[0, 0, 0, 0] - value).abs().max() <= value / 16 + scales.max() * 2.0**-10
    assert value > 1e30 or (got[0, 0, 0, 1] == 1).all()


@pytest.mark.skipif(copies.NAME not in GPU, reason="no GPU here")
def test_copies_reach_every_kernel():
    assert all(BACKENDS[copies.NAME].has(op) for op in ("attention_decode", "attention_prefix", "cache_append"))


def test_bad_arguments():
    q, k, v = heads(4, 2, 6, 8)
    mask = compiled("row", (2, 2))
    (kb, vb), scales = quantized(k, v)
    for call in (
        lambda: ops.attention_decode(q, k, v, 7),
        lambda: ops.attention_decode(q, k, v, 0),
        lambda: ops.attention_decode(q, k[:, :1], v, 6),
        lambda: ops.attention_decode(q, k, v, 6, lengths=torch.ones(4)),
        lambda: ops.attention_decode(q, k, v, 6, lengths=torch.ones(3, dtype=torch.int32)),
        lambda: ops.attention_decode(q, k, v, 6, mask=mask),
        lambda: ops.attention_decode(q, k, v, 6, prefix=[k[:3], v[:3]]),
        lambda: ops.attention_decode(q, k, v, 6, prefix=[k[:2, :, :0], v[:2, :, :0]]),
        lambda: ops.attention_decode(q, kb, vb, 6),
        lambda: ops.attention_decode(q, k, v, 6, scales=scales),
        lambda: ops.attention_decode(q, kb, vb, 6, scales=[s.half() for s in scales]),
        lambda: ops.cache_append(k, v, k, v, 1),
        lambda: ops.cache_append(k, v, k[:, :, :1], v[:, :, :1], -1),
        lambda: ops.cache_append(k, v, k[:, :, :1], v[:, :, :1], 0, torch.full((len(k),), k.shape[2]).int()),
        lambda: ops.cache_append(kb, vb, k, v),
        lambda: ops.cache_append(k, v, k[:2], v[:2]),
    ):
        with pytest.raises(InputError):
            call()
