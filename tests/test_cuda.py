"""Ops on tensors of a real GPU: their values, CUDA graphs, other streams, mixed devices.

The ops' tests proper run on a GPU by check.backends(), on copies of CPU tensors.
"""

import pytest
import torch
from test_backends import calls

from igpt_fast import Config, ImageGPT, InputError, ops
from igpt_fast.ops._native import BACKENDS, use_backend

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS, reason="no GPU here, or built without CUDA")


def on(device, x):
    """x, or what is in it, as tensors on `device`."""
    if isinstance(x, tuple | list):
        return type(x)(on(device, y) for y in x)
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [o for o in out if o.numel()]


@pytest.mark.parametrize("name", calls())
def test_values_are_the_cpus(name):
    for args in calls()[name]:
        with use_backend("reference"):
            want = flat(getattr(torch.ops.igpt, name)(*args))
        got = flat(getattr(torch.ops.igpt, name)(*on("cuda", args)))
        for w, g in zip(want, got, strict=True):
            assert g.is_cuda and torch.allclose(g.cpu(), w, rtol=1e-4, atol=1e-5)


# Forward and backward of what has a CUDA kernel, on two inputs each: functions of (random tensors) → results.
def norm(x, y):
    return ops.rms_norm(x, torch.ones_like(x[0]), residual=y)


def gelu(x, y):
    return (ops.bias_quick_gelu(x, y[0].clone()),)


def loss(x, y):
    return (ops.cross_entropy(x, y.argmax(1)),)


def draw(x, y):
    return (ops.sample_tokens(x.detach(), y[:, 0].detach().double().sigmoid(), 0.9, 20, 0.9),)


def nearest(x, y):
    return (ops.palette_assign(x.detach()[:, :3].contiguous(), y.detach()[:, :3].contiguous()),)


def lloyd(x, y):
    colors = (x.detach()[:, :3].sigmoid() * 255).to(torch.uint8)
    return ops.kmeans_step(
        colors, torch.ones(len(x), dtype=torch.int64, device=x.device), y.detach()[:, :3].contiguous()
    )


FUNCTIONS = [norm, gelu, loss, draw, nearest, lloyd]


def both_passes(fn, x, y):
    out = list(fn(x, y))
    if out[0].requires_grad:
        out += torch.autograd.grad([o for o in out if o.requires_grad], [x], [torch.ones_like(o) for o in out])
    return [o.detach() for o in out]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_cuda_graph_replays_it(fn):
    static = [torch.randn(64, 128, device="cuda", requires_grad=i == 0) for i in range(2)]
    with use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both_passes(fn, *static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both_passes(fn, *static)
        fresh = [torch.randn_like(t).requires_grad_(t.requires_grad) for t in static]
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both_passes(fn, *fresh), strict=True))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_it_runs_on_torchs_current_stream(fn):
    x, y = (torch.randn(4096, 512, device="cuda", requires_grad=i == 0) for i in range(2))
    with use_backend("cuda"):
        want = both_passes(fn, x, y)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            late = torch.zeros_like(x).requires_grad_()
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                late.copy_(x)  # whoever runs on another stream reads zeros
            got = both_passes(fn, late, y)
        side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_mixed_devices_are_named():
    with pytest.raises(InputError, match="weight is on cpu, x on cuda:0"):
        ops.rms_norm(torch.ones(2, 4, device="cuda"), torch.ones(4))


def test_a_model_learns_the_same_there():
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=2, width=64, heads=2, colors=16, size=(4, 4), bias=True))
    torch.nn.init.normal_(model.wtet)
    tokens = torch.randint(16, (2, 16))
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        value = model.loss(tokens.to(device))
        grads = torch.autograd.grad(value, list(model.parameters()))
        results.append([value.cpu(), *(g.cpu() for g in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
