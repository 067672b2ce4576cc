"""rms_norm: alone, with the residual added on the way, and backward."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, gradients64, served_by
from igpt_fast import ops

EPS = 1e-5

# A small model's batch of 4 images; and 32 MB, more than caches hold. On a GPU its training batch, and as much as fills
# the memory's pipes.
CPU = [(4096, 256, torch.float32), (4096, 256, torch.bfloat16), (16384, 1024, torch.bfloat16)]
GPU = [(32768, 512, torch.bfloat16), (131072, 1024, torch.bfloat16)] if torch.cuda.is_available() else []
SIZES = pytest.mark.parametrize(("rows", "columns", "dtype"), CPU + GPU, ids=dtype_name)


def norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def added(x, residual, weight):
    total = residual + x
    return F.rms_norm(total, weight.shape, weight, EPS), total


def ours_added(x, residual, weight):
    return ops.rms_norm(x, weight, EPS, residual=residual)


def tensors(rows, columns, dtype, device, quick):
    x, residual = torch.randn(2, 64 if quick else rows, columns, device=device).to(dtype)
    return x, residual, torch.randn(columns, device=device).to(dtype)


def case(op, field, x, ours, others, judge, crossings):
    """crossings: of memory, by tensors of x's size, at the least."""
    return Case(
        op=op,
        shape=" × ".join(map(str, x.shape)),
        dtype=dtype_name(x.dtype),
        device=x.device.type,
        backend=served_by(field, x),
        ours=ours,
        peers=others,
        judge=judge,
        work={"GB/s": crossings * x.numel() * x.element_size()},
        seconds=3.0,
    )


@SIZES
@torch.no_grad()
def test_forward(compare, device, quick, rows, columns, dtype):
    x, _, weight = tensors(rows, columns, dtype, device, quick)
    others = {
        "F.rms_norm": peers.call(norm, x, weight),
        "F.rms_norm, torch.compile": peers.call(peers.compiled(norm, quick), x, weight),
    }
    if device == "cuda":
        others["Liger"] = peers.call(peers.liger("rms_norm"), x, weight, EPS)
    judge = Close(float64(norm, x, weight), dtype)
    compare(case("rms_norm", "rms_norm_fwd", x, lambda: ops.rms_norm(x, weight, EPS), others, judge, 2))


@SIZES
@torch.no_grad()
def test_forward_with_residual(compare, device, quick, rows, columns, dtype):
    args = tensors(rows, columns, dtype, device, quick)
    others = {
        "F.rms_norm": peers.call(added, *args),
        "F.rms_norm, torch.compile": peers.call(peers.compiled(added, quick), *args),
    }
    judge = Close(float64(added, *args), dtype)
    ours = peers.call(ours_added, *args)
    compare(case("rms_norm, residual added", "rms_norm_fwd", args[0], ours, others, judge, 4))


@SIZES
def test_backward(compare, device, quick, rows, columns, dtype):
    args = [t.requires_grad_() for t in tensors(rows, columns, dtype, device, quick)]
    grads = torch.randn_like(args[0]), torch.randn_like(args[0])
    sides = ours_added, added, peers.compiled(added, quick)
    ours, plain, fused = (peers.backward(peers.call(side, *args), args, grads) for side in sides)
    others = {"F.rms_norm": plain, "F.rms_norm, torch.compile": fused}
    judge = Close(gradients64(added, args, grads), dtype)
    op = "rms_norm, residual added, backward"
    compare(case(op, "rms_norm_bwd", grads[0], ours, others, judge, 4))
