"""The head with its loss over a palette of 512 colours: the loss alone, and with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, gradients64, served_by
from igpt_fast import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)


def plain(hidden, weight, target):
    """What a user writes."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def widened(hidden, weight, target):
    """What autocast makes of it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def mean(hidden, weight, target):
    return ops.linear_cross_entropy(hidden, weight, target).mean()


def with_gradients(fn, hidden, weight, target):
    loss = fn(hidden, weight, target)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def head(device, quick, dtype):
    rows = 64 if quick else 32768 if device == "cuda" else 2048
    hidden, weight = torch.randn(rows, 512, device=device), torch.randn(512, 512, device=device) / 512**0.5
    return [hidden.to(dtype), weight.to(dtype), torch.randint(512, (rows,), device=device)]


def compared(compare, quick, dtype, name, products, wrap, inputs, judge):
    hidden, weight, _ = inputs
    found = {"F.linear, F.cross_entropy in float32": widened} if dtype is not torch.float32 else {}
    found |= {"F.linear, F.cross_entropy": plain, "torch.compile of them": peers.compiled(widened, quick)}
    native = served_by("linear_cross_entropy_fwd", hidden.detach()) if hidden.is_cuda else None
    compare(
        Case(
            op=name,
            shape=" × ".join(map(str, (*hidden.shape, len(weight)))),
            dtype=dtype_name(dtype),
            device=hidden.device.type,
            backend=native or served_by("cross_entropy_fwd", hidden.detach()),
            ours=peers.call(wrap, mean, *inputs),
            peers={
                peer: fn if isinstance(fn, peers.Missing) else peers.call(wrap, fn, *inputs)
                for peer, fn in found.items()
            },
            judge=judge,
            work={"GFLOP/s": products * 2 * hidden.numel() * len(weight)},
            seconds=3.0,
        )
    )


@DTYPES
@torch.no_grad()
def test_forward(compare, device, quick, dtype):
    inputs = head(device, quick, dtype)
    judge = Close(float64(plain, *inputs), dtype)
    compared(compare, quick, dtype, "linear_cross_entropy", 1, lambda fn, *args: fn(*args), inputs, judge)


@DTYPES
def test_forward_and_backward(compare, device, quick, dtype):
    inputs = [t.requires_grad_(t.is_floating_point()) for t in head(device, quick, dtype)]
    loss, gradients = float64(plain, *inputs), gradients64(plain, inputs, [torch.ones((), device=device)])
    judge = Close([*loss, *gradients], dtype)
    name = "linear_cross_entropy, forward and backward"
    compared(compare, quick, dtype, name, 3, with_gradients, inputs, judge)
