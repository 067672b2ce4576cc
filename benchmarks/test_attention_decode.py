"""One decoding step's attention over a cache: of 16 bits, of 8 bits, with a prefix that completions share.

GB/s are those of the keys and values that a step must read once.
"""

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, served_by
from igpt_fast import ops
from igpt_fast.reference.attention import attention as reference

SDPA = peers.SDPA
# Heads, head dim: the published S, M and L.
MODELS = pytest.mark.parametrize(("heads", "head_dim"), [(8, 64), (8, 128), (16, 96)], ids=["S", "M", "L"])
BATCHES = pytest.mark.parametrize("batch", [16, 64, 128])


def exact(q, k, v):
    return reference(q, k, v, causal=False)[0]


def cache_of(batch, heads, slots, head_dim, dtype, device):
    """q [B, H, 1, D] and the keys and values [2, B, H, T, D] of one layer."""
    cache = torch.randn(2, batch, heads, slots, head_dim, device=device).to(dtype)
    return torch.randn(batch, heads, 1, head_dim, device=device).to(dtype), cache


def case(name, q, used, ours, others, judge, read, shape, dtype=None):
    """used [2, B, H, length, D]: what is attended to; read: the bytes of it that are read."""
    return Case(
        op=name,
        shape=shape,
        dtype=dtype or dtype_name(q.dtype),
        device=q.device.type,
        backend=served_by("attention_decode", q),
        ours=ours,
        peers=others,
        judge=judge,
        work={"GB/s": read, "GFLOP/s": 2 * used.numel()},
        seconds=1.0 if q.is_cuda else 2.0,
    )


def step(compare, q, cache, length):
    k, v = cache
    used = cache[:, :, :, :length]
    others = {"torch SDPA on the cache's slice": peers.call(SDPA, q, *used)}
    judge = Close(float64(exact, q, *used), q.dtype)
    shape = f"{len(q)} × {q.size(1)} heads × {length} of {cache.size(3)} × {q.size(3)}"
    ours = peers.call(ops.attention_decode, q, k, v, length)
    read = used.numel() * used.element_size()
    compare(case("attention, one decoding step", q, used, ours, others, judge, read, shape))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "dtype"),
    [
        (4, 4, 512, torch.float32),
        (4, 4, 512, torch.bfloat16),
        (1, 8, 1024, torch.float32),
        (16, 8, 1024, torch.bfloat16),
    ],
    ids=dtype_name,
)
@torch.no_grad()
def test_decode(compare, device, quick, batch, heads, length, dtype):
    if device == "cuda":
        pytest.skip("a CPU's batches")
    q, cache = cache_of(batch, heads, 64 if quick else 1024, 64, dtype, device)
    step(compare, q, cache, 48 if quick else length)


@pytest.mark.parametrize("batch", [1, 4, 16, 64, 128])
@MODELS
@torch.no_grad()
def test_batches_of_a_gpu(compare, device, quick, batch, heads, head_dim):
    if device != "cuda":
        pytest.skip("a GPU's batches")
    q, cache = cache_of(batch, heads, 64 if quick else 1024, head_dim, torch.bfloat16, device)
    step(compare, q, cache, cache.size(3))


@BATCHES
@MODELS
@torch.no_grad()
def test_cache_of_bytes(compare, device, quick, batch, heads, head_dim):
    """Against SDPA on the same numbers in bf16: twice the bytes."""
    if device != "cuda":
        pytest.skip("the CPU has no kernel for float8")
    q, cache = cache_of(batch, heads, 64 if quick else 1024, head_dim, torch.bfloat16, device)
    length = cache.size(3)
    kept = torch.zeros_like(cache, dtype=torch.float8_e4m3fn)
    scales = torch.full((2, batch, heads, -(-length // 64)), torch.nan, device=device)
    ops.cache_append(*kept, *cache, 0, None, [*scales])
    same = (kept.float() * scales.repeat_interleave(64, 3)[:, :, :, :length, None]).bfloat16()
    others = {"torch SDPA, the same cache in bf16": peers.call(SDPA, q, *same)}
    judge = Close(float64(exact, q, *same), q.dtype)
    ours = peers.call(ops.attention_decode, q, *kept, length, None, None, None, (), [*scales])
    shape = f"{batch} × {heads} heads × {length} × {head_dim}"
    read = kept.numel() + 4 * scales.numel()
    compare(case("attention, one decoding step, 8 bits", q, same, ours, others, judge, read, shape, "e4m3"))


@MODELS
@torch.no_grad()
def test_shared_prefix(compare, device, quick, heads, head_dim):
    """64 completions of the upper half of one image, in the middle of the rest."""
    if device != "cuda":
        pytest.skip("the CPU has no kernel for prefixes")
    count, before, length = 64, 32 if quick else 512, 16 if quick else 256
    q, cache = cache_of(count, heads, length, head_dim, torch.bfloat16, device)
    prefix = torch.randn(2, 1, heads, before, head_dim, device=device).bfloat16()
    whole = torch.cat((prefix.expand(-1, count, -1, -1, -1), cache), 3)
    others = {
        "torch SDPA, a copy for each": peers.call(SDPA, q, *whole),
        "ours, a copy for each": peers.call(ops.attention_decode, q, *whole, before + length),
    }
    judge = Close(float64(exact, q, *whole), q.dtype)
    ours = peers.call(ops.attention_decode, q, *cache, length, None, None, None, [*prefix])
    shape = f"{count} × {heads} heads × {before} + {length} × {head_dim}"
    read = 2 * (cache.numel() + prefix.numel())
    compare(case("attention, one decoding step, shared prefix", q, whole, ours, others, judge, read, shape))
