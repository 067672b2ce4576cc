"""Which library multiplies float32 on a CPU: MKL, or oneDNN where it takes half the time."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from igpt_fast import Config, ImageGPT, ops
from igpt_fast.ops import _native

module = sys.modules["igpt_fast.ops._product"]


def let_onednn_multiply(monkeypatch, serves=True):
    """oneDNN multiplies float32, or MKL, whatever this processor is; what it was given, as shapes."""
    real = module._BY_ONEDNN
    if serves and real is None:
        pytest.skip("this torch has no oneDNN")
    calls = []

    def multiply(x, weight, bias, *rest):
        calls.append([x.shape, weight.shape])
        # Of other layouts oneDNN is a thousand times slower, and of a bias it looks at no strides.
        assert weight.is_contiguous() or weight.t().is_contiguous()
        assert bias is None or bias.is_contiguous()
        return real(x, weight, bias, *rest)

    monkeypatch.setattr(module, "_BY_ONEDNN", multiply)
    monkeypatch.setattr(module, "_MKL_IS_SLOW", serves)
    monkeypatch.setattr(module, "LEAST", 1)
    monkeypatch.setattr(module, "NARROW", 1)
    monkeypatch.setattr(module, "ROWS", 7)
    return calls


@pytest.mark.parametrize(("m", "k"), [(20, 24), (24, 20)])
@pytest.mark.parametrize("layout", ["as they come", "turned over", "every other", "expanded"])
def test_onednn_multiplies_forward_and_backward_whatever_the_layout(monkeypatch, m, k, layout):
    """The narrower operand of a weight's gradient is the one that is turned, seven rows at a time."""
    x, weight, bias = torch.randn(3, 10, k), torch.randn(m, k), torch.randn(m)
    dy = torch.randn(3, 10, m)
    if layout == "turned over":
        x, weight, dy = (t.mT.contiguous().mT for t in (x, weight, dy))
    elif layout == "every other":
        x, weight, bias, dy = (torch.stack((t, t + 1), -1)[..., 0] for t in (x, weight, bias, dy))
    elif layout == "expanded":
        bias = bias[:1].expand(m)
        x, dy = x[:1, :1].expand(3, 10, k), dy[:, :, :1].expand(3, 10, m)
        weight = weight[:, :1].expand(m, k)
    given = [t.requires_grad_() for t in (x, weight, bias)]
    truth = [t.detach().double().requires_grad_() for t in given]
    wanted = F.linear(*truth)
    wanted = [wanted, *torch.autograd.grad(wanted, truth, dy.double())]
    calls = let_onednn_multiply(monkeypatch)
    y = ops.projection(*given)
    found = [y, *torch.autograd.grad(y, given, dy)]
    for f, w in zip(found, wanted, strict=True):
        assert f.is_contiguous() and torch.allclose(f.double(), w, rtol=1e-5, atol=1e-5)
    narrow, wide = sorted((m, k))
    parts = [[torch.Size((narrow, rows)), torch.Size((wide, rows))] for rows in (7, 7, 7, 7, 2)]
    assert calls == [[x.shape, weight.shape], *parts, [torch.Size((30, m)), torch.Size((k, m))]]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_mkl_multiplies_where_onednn_may_not(monkeypatch):
    """Few numbers, other dtypes, autocast, whoever watches, and who does without oneDNN."""
    calls = let_onednn_multiply(monkeypatch)
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    ops.projection(x.double(), weight.double())
    ops.projection(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ops.projection(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        ops.projection(x, weight)
    torch.func.vmap(lambda row: ops.projection(row, weight))(x)
    with FlopCounterMode(display=False) as flops:
        ops.projection(x, weight)
    ops.projection(x[:0], weight)
    ops.projection(x.to("meta"), weight.to("meta"))
    ops.projection(x, weight.to_sparse_csr())
    assert isinstance(ops.projection(x, TwoTensor(weight, 2 * weight)), TwoTensor)
    assert not calls and flops.get_total_flops() == 2 * 5 * 8 * 6
    for name, least in (("LEAST", 5 * 8 * 6), ("NARROW", 5)):
        monkeypatch.setattr(module, name, least + 1)
        ops.projection(x, weight)
        assert not calls
        monkeypatch.setattr(module, name, least)
    assert torch.allclose(ops.projection(x, weight), F.linear(x, weight), atol=1e-5) and len(calls) == 1


def test_a_backward_pass_that_somebody_watches_is_torchs_own(monkeypatch):
    """Second derivatives come of it, and a counter of FLOP sees it."""
    calls = let_onednn_multiply(monkeypatch)
    given = [torch.randn(*shape, requires_grad=True) for shape in ((5, 8), (6, 8), (6,))]

    def penalised(linear):
        grads = torch.autograd.grad(linear(*given).sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given)

    for found, wanted in zip(penalised(ops.projection), penalised(F.linear), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3  # forward, and two of what comes back through it in the end
    y = ops.projection(*given)
    calls.clear()
    with FlopCounterMode(display=False) as flops:
        y.sum().backward()
    assert not calls and flops.get_total_flops() == 2 * 2 * 5 * 8 * 6


@pytest.mark.parametrize("serves", [True, False])
def test_torchs_transforms_pass_through_a_compiled_product(monkeypatch, serves):
    torch.compiler.reset()
    let_onednn_multiply(monkeypatch, serves)
    x, weight = torch.randn(5, 8), torch.randn(6, 8)

    def loss(weight):
        return ops.projection(x, weight).sin().sum()

    def both(weight):
        return torch.func.grad(loss)(weight), torch.func.jvp(loss, (weight,), (weight,))[1]

    wanted = torch.autograd.grad(loss(leaf := weight.clone().requires_grad_()), leaf)[0]
    gradient, tangent = torch.compile(both, backend="aot_eager")(weight)
    assert torch.allclose(gradient, wanted, atol=1e-5) and torch.allclose(tangent, (wanted * weight).sum(), rtol=1e-4)


def test_a_compiled_product_keeps_what_its_gradients_need(monkeypatch):
    """No input of a frozen weight, no weight below which nothing learns; and empty ones have gradients."""
    torch.compiler.reset()
    let_onednn_multiply(monkeypatch)
    run = torch.compile(ops.projection, backend="aot_eager", fullgraph=True, dynamic=False)
    for x_learns, learns in ((True, False), (False, True)):
        x, weight = torch.randn(50, 8, requires_grad=x_learns), torch.randn(6, 8, requires_grad=learns)
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.add(t.shape) or t, lambda t: t):
            y = run(x, weight)
        with torch.autocast("cpu", torch.bfloat16):  # of which the graph knows nothing
            found = torch.autograd.grad(y.sin().sum(), x if x_learns else weight)[0]
        wanted = torch.autograd.grad(F.linear(x, weight).sin().sum(), x if x_learns else weight)[0]
        assert torch.allclose(found, wanted, atol=1e-5) and ((50, 8) in kept) is learns and ((6, 8) in kept) is x_learns
    for shape, rows in (((5, 0), 6), ((0, 8), 6), ((5, 8), 0)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(rows, shape[1], requires_grad=True)
        run(x, weight).sum().backward()
        assert x.grad.shape == shape and weight.grad.shape == (rows, shape[1])


@pytest.mark.parametrize("serves", [True, False])
def test_onednn_multiplies_a_compiled_model_too(monkeypatch, serves):
    torch.compiler.reset()
    calls = let_onednn_multiply(monkeypatch, serves)
    model = ImageGPT(Config(layers=1, width=16, heads=2, colors=8, size=(3, 3), bias=True))
    torch.nn.init.normal_(model.wtet)
    model.blocks[0].mlp.fc.weight.requires_grad_(False)
    learned, tokens = [p for p in model.parameters() if p.requires_grad], torch.randint(8, (2, 9))
    loss = model.loss(tokens)
    wanted = [loss, *torch.autograd.grad(loss, learned)]
    if not serves:
        assert not calls
    calls.clear()
    loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True, dynamic=True)(tokens)
    found = [loss, *torch.autograd.grad(loss, learned)]
    assert all(torch.allclose(f, w, atol=1e-5) for f, w in zip(found, wanted, strict=True))
    forward = [shapes for shapes in calls if len(shapes[0]) == 3]
    assert len(forward) == (5 if serves else 0)  # q, k, v at once; what attention gives; the MLP's two; the head


def test_amds_processors_are_known_by_their_family():
    """From 26 on AVX-512 is twice as wide as AVX2, of which MKL makes no use there."""
    if not sys.platform.startswith("linux") or _native.WHY_NO_EXTENSION:
        pytest.skip("asks Linux, and the extension")
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text().split("\n\n")[0], re.MULTILINE))
    wide = facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) >= 26
    wide = wide and "avx512bw" in facts["flags"].split()
    assert _native._C.cpu_is_wide_amd() is wide
    there = torch.backends.mkl.is_available() and module._BY_ONEDNN is not None
    assert module.mkl_is_slow() is (wide and there)
