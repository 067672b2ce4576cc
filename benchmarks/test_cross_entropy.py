"""Cross-entropy over a palette of 512 colours: the loss alone, and with its gradient."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, gradients64, served_by
from igpt_fast import ops

ROWS = {"cpu": 4096, "cuda": 32768}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)


def widened(logits, targets):
    """What autocast makes of F.cross_entropy."""
    return F.cross_entropy(logits.float(), targets)


def with_gradient(fn, logits, targets):
    loss = fn(logits, targets)
    return loss, *torch.autograd.grad(loss, logits)


def others(quick, wrap, dtype, logits, targets):
    found = {"F.cross_entropy in float32": widened} if dtype is not torch.float32 else {}
    found |= {"F.cross_entropy": F.cross_entropy, "torch.compile of it": peers.compiled(widened, quick)}
    return {
        name: fn if isinstance(fn, peers.Missing) else peers.call(wrap, fn, logits, targets)
        for name, fn in found.items()
    }


def case(op, logits, dtype, ours, found, judge, crossings):
    return Case(
        op=op,
        shape=" × ".join(map(str, logits.shape)),
        dtype=dtype_name(dtype),
        device=logits.device.type,
        backend=served_by("cross_entropy_fwd", logits.detach()),
        ours=ours,
        peers=found,
        judge=judge,
        work={"GB/s": crossings * logits.numel() * logits.element_size()},
        seconds=3.0,
    )


@DTYPES
@torch.no_grad()
def test_forward(compare, device, quick, dtype):
    logits = torch.randn(64 if quick else ROWS[device], 512, device=device).to(dtype)
    targets = torch.randint(512, logits.shape[:1], device=device)
    found = others(quick, lambda fn, *args: fn(*args), dtype, logits, targets)
    if device == "cuda":
        found["Liger"] = peers.call(peers.liger("cross_entropy"), logits, targets)
    judge = Close(float64(F.cross_entropy, logits, targets), dtype)
    ours = peers.call(ops.cross_entropy, logits, targets)
    compare(case("cross_entropy", logits, dtype, ours, found, judge, 1))


@DTYPES
def test_forward_and_backward(compare, device, quick, dtype):
    logits = torch.randn(64 if quick else ROWS[device], 512, device=device).to(dtype).requires_grad_()
    targets = torch.randint(512, logits.shape[:1], device=device)
    found = others(quick, with_gradient, dtype, logits, targets)
    loss = float64(F.cross_entropy, logits, targets)
    gradient = gradients64(F.cross_entropy, [logits, targets], [torch.ones((), device=device)])
    ours = peers.call(with_gradient, ops.cross_entropy, logits, targets)
    judge = Close([*loss, *gradient], dtype)
    compare(case("cross_entropy, forward and backward", logits, dtype, ours, found, judge, 3))
