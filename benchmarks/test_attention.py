"""Attention: forward, backward, both on one fused buffer, and sparse patterns.

FLOP are those of the pairs that are seen: half of the square for causal attention, 2.5 times that backward.
"""

import pytest
import torch

from benchmarks import attention_peers, peers
from benchmarks.harness import Case, Close, Score, dtype_name, float64, gradients64, served_by
from igpt_fast import ops, patterns
from igpt_fast.reference.attention import attention as reference

SDPA = peers.SDPA

# batch, heads, head dim: a small model's batch of 4, and one image of the published S, M and L.
SIZES = pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "dtype"),
    [
        (4, 4, 64, torch.float32),
        (4, 4, 64, torch.bfloat16),
        (1, 8, 64, torch.bfloat16),
        (1, 8, 128, torch.bfloat16),
        (1, 16, 96, torch.bfloat16),
    ],
    ids=dtype_name,
)
GRID = (32, 32)


def side(quick):
    return 8 if quick else GRID[0]


def qkv_of(batch, tokens, heads, head_dim, dtype, device):
    """The fused buffer [B, T, 3, H, D] that a model's projection writes."""
    return torch.randn(batch, tokens, 3, heads, head_dim, device=device).to(dtype)


def views(qkv):
    """q, k, v [B, H, T, D] where they lie in the fused buffer: how our model calls attention."""
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def copies(qkv):
    """q, k, v [B, H, T, D], contiguous: SDPA's best layout."""
    return [t.contiguous() for t in views(qkv)]


def rivals(args, compiler, dout=None):
    """Who runs on these inputs, by name; with dout, backward too."""
    everybody = attention_peers.causal(args[0].shape[2], args[0].device.type, compiler)
    return {name: attention_peers.tried(fn, dout, *args) for name, fn in everybody.items()}


def moved(qkv, tensors):
    """Bytes of that many tensors of q's size, each once, and of lse."""
    return tensors * qkv.numel() // 3 * qkv.element_size() + 4 * qkv.numel() // (3 * qkv.shape[-1])


def truth(q, k, v):
    return reference(q, k, v)[0]


def pairs(tokens):
    return tokens * (tokens + 1) / 2


def case(op, field, qkv, ours, others, judge, flop, bytes_=0, **more):
    batch, tokens, _, heads, head_dim = qkv.shape
    return Case(
        op=op,
        shape=f"{batch} × {heads} heads × {tokens} × {head_dim}",
        dtype=dtype_name(qkv.dtype),
        device=qkv.device.type,
        backend=served_by(field, qkv.detach()),
        ours=ours,
        peers=others,
        judge=judge,
        work={"GFLOP/s": batch * heads * head_dim * flop, **({"GB/s": bytes_} if bytes_ else {})},
        **more,
    )


@torch.no_grad()
def forward(compare, qkv, compiler=False, **more):
    ours, args = peers.call(ops.attention, *views(qkv)), copies(qkv)
    others = {name: peers.call(fn, *args) for name, fn in rivals(args, compiler).items()}
    flop = 4 * pairs(qkv.shape[1])
    judge = Close(float64(truth, *args), qkv.dtype)
    compare(case("attention, causal", "attention_fwd", qkv, ours, others, judge, flop, moved(qkv, 4), **more))


def backward(compare, qkv, compiler=False, **more):
    mine, args = ([t.requires_grad_() for t in found] for found in (views(qkv), copies(qkv)))
    dout = torch.randn_like(args[0])
    ours = peers.backward(peers.call(ops.attention, *mine), mine, dout)
    others = {n: peers.backward(peers.call(fn, *args), args, dout) for n, fn in rivals(args, compiler, dout).items()}
    flop = 10 * pairs(qkv.shape[1])
    judge = Close(gradients64(truth, args, [dout]), qkv.dtype)
    name = "attention, causal, backward"
    compare(case(name, "attention_bwd", qkv, ours, others, judge, flop, moved(qkv, 8), **more))


@SIZES
def test_forward(compare, device, quick, batch, heads, head_dim, dtype):
    if device == "cuda" and dtype is torch.float32:
        pytest.skip("the GPU's kernels are of 16 bits")
    forward(compare, qkv_of(batch, side(quick) ** 2, heads, head_dim, dtype, device))


@SIZES
def test_backward(compare, device, quick, batch, heads, head_dim, dtype):
    if device == "cuda" and dtype is torch.float32:
        pytest.skip("the GPU's kernels are of 16 bits")
    backward(compare, qkv_of(batch, side(quick) ** 2, heads, head_dim, dtype, device))


@pytest.mark.parametrize(("batch", "tokens"), [(32, 1024), (16, 2304), (8, 4096)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("direction", [forward, backward], ids=lambda f: f.__name__)
def test_batches_of_a_gpu(compare, device, quick, direction, head_dim, batch, tokens):
    if device != "cuda":
        pytest.skip("a GPU's batches")
    qkv = qkv_of(batch, tokens // 16 if quick else tokens, 8, head_dim, torch.bfloat16, device)
    direction(compare, qkv, compiler=not quick, seconds=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_fused_buffer(compare, device, quick, dtype):
    """What a training step does: from the projection's output to its gradient, through one buffer."""
    qkv = qkv_of(4, side(quick) ** 2, 4, 64, dtype, device).requires_grad_()
    dout = torch.randn(*qkv.shape[:2], 4, 64, device=device).to(dtype)

    def packed():
        return torch.autograd.grad(ops.attention_packed(qkv), qkv, dout)

    def theirs(fn=attention_peers.sdpa):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return torch.autograd.grad(fn(q, k, v).transpose(1, 2), qkv, dout)

    grads = gradients64(lambda x: truth(*x.permute(2, 0, 3, 1, 4)).transpose(1, 2), [qkv], [dout])
    name, flop = "attention on fused qkv, forward and backward", 14 * pairs(qkv.shape[1])
    others = {"torch SDPA": theirs}
    compare(case(name, "attention_bwd", qkv, packed, others, Close(grads, dtype), flop))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (96, torch.bfloat16)], ids=dtype_name
)
def test_dropout(compare, device, quick, head_dim, dtype, backward):
    """Weights dropped as GPTs are trained, p = 0.1. Each side draws its own: judged is how far it is from no dropout.

    Of values that know nothing of each other the difference is sqrt(p / (1 - p)) of the output, a third.
    """
    if device == "cuda" and dtype is torch.float32:
        pytest.skip("the GPU's kernels are of 16 bits")
    p, batch = 0.1, 32 if device == "cuda" and not quick else 2
    qkv = qkv_of(batch, side(quick) ** 2, 8, head_dim, dtype, device).requires_grad_(backward)
    args = [t.detach().requires_grad_(backward) for t in copies(qkv)]
    dout = torch.randn_like(args[0])
    with torch.no_grad():
        whole = float64(truth, *args)[0]
    ours = peers.call(lambda x: ops.attention_dropout(x, p, 7).transpose(1, 2), qkv)
    theirs = peers.call(lambda q, k, v: SDPA(q, k, v, is_causal=True, dropout_p=p), *args)

    def apart(outs):
        dropped = (outs if isinstance(outs, torch.Tensor) else outs[-1]).double()  # o, or v's gradient: mixes, too
        return abs(float((dropped - whole).norm() / whole.norm()) / (p / (1 - p)) ** 0.5 - 1)

    if backward:
        mine = peers.backward(ours, [qkv], dout)
        ours, theirs = lambda: [mine()[0][:, :, 2].transpose(1, 2)], peers.backward(theirs, args, dout)
        whole = gradients64(truth, args, [dout])[2]
    flop = (10 if backward else 4) * pairs(qkv.shape[1])
    name, field = "attention, causal, dropout 0.1" + ", backward" * backward, "attention_dropout_fwd"
    compare(case(name, field, qkv, ours, {"torch SDPA": theirs}, Score(apart, 0.2, 0.2), flop, seconds=2.0))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("pattern", ["row", "column", "local", "neighborhood", "row | neighborhood(7)"])
def test_pattern(compare, device, quick, pattern, backward):
    """Against SDPA with the same mask as a matrix, so that it computes every pair."""
    grid = (side(quick), side(quick))
    mask = patterns.compiled(pattern, grid)
    seen = mask.dense().to(device)
    qkv = qkv_of(4, len(seen), 4, 64, torch.bfloat16, device)
    added = torch.zeros(seen.shape, dtype=qkv.dtype, device=device).masked_fill(~seen, float("-inf"))
    mine, args = views(qkv), copies(qkv)
    sides = {
        "ours": lambda q, k, v: ops.attention(q, k, v, mask),
        "torch SDPA, boolean mask": lambda q, k, v: SDPA(q, k, v, attn_mask=seen),
        "torch SDPA, mask to add": lambda q, k, v: SDPA(q, k, v, attn_mask=added),
    }

    def masked(q, k, v):
        return reference(q, k, v, seen)[0]

    if backward:
        mine, args = ([t.requires_grad_() for t in found] for found in (mine, args))
        dout = torch.randn_like(args[0])
        judge = Close(gradients64(masked, args, [dout]), qkv.dtype)
        others = {n: peers.backward(peers.call(f, *args), args, dout) for n, f in sides.items() if n != "ours"}
        ours = peers.backward(peers.call(sides["ours"], *mine), mine, dout)
    else:
        judge = Close(float64(masked, *args), qkv.dtype)
        others = {n: peers.call(f, *args) for n, f in sides.items() if n != "ours"}
        ours = peers.call(sides["ours"], *mine)
    name = f"attention, {pattern} pattern" + ", backward" * backward
    field = "attention_bwd" if backward else "attention_fwd"
    flop, note = (10 if backward else 4) * float(seen.sum()), f"{mask.density():.0%} of the causal tiles"
    compare(case(name, field, qkv, ours, others, judge, flop, seconds=2.0, note=note))
