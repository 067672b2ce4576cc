"""Gradients that are differentiated again, or asked for many at a time: plain torch gives them, and it is said."""

import logging
import threading

import pytest
import torch
from torch.autograd import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import igpt_fast as igpt
from igpt_fast import ops
from igpt_fast.ops import _native
from igpt_fast.ops._native import use_backend
from igpt_fast.patterns import BlockMask


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


MASK = BlockMask.compile("row|local(3)", (3, 4))
TARGETS = torch.tensor([[1, 4, 0], [2, 2, 6]])
# Of each op: a function of tensors, and these.
CALLS = {
    "rms_norm": (ops.rms_norm, tensors((2, 5, 8), (8,))),
    "rms_norm, residual": (
        lambda x, w, r: sum(t.sin().sum(1) for t in ops.rms_norm(x, w, residual=r)), tensors((5, 8), (8,), (5, 8))),
    "bias_quick_gelu": (ops.bias_quick_gelu, tensors((5, 8), (8,))),
    "quick_gelu": (ops.bias_quick_gelu, tensors((5, 8))),
    "cross_entropy": (lambda x: ops.cross_entropy(x, TARGETS, "none"), tensors((2, 3, 7))),
    "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, TARGETS), tensors((2, 3, 8), (7, 8))),
    "dropout": (lambda x: ops.dropout(x.sin(), 0.3, 5), tensors((4, 6))),
    "attention": (ops.attention, tensors(*[(2, 2, 12, 8)] * 3)),
    "attention of one tensor": (lambda x: ops.attention(x, x, x), tensors((1, 2, 6, 8))),
    "attention, mask": (lambda q, k, v: ops.attention(q, k, v, MASK), tensors(*[(1, 2, 12, 8)] * 3)),
    "attention_packed": (lambda x: ops.attention_packed(x, [None, MASK, MASK]), tensors((2, 12, 3, 4, 8))),
    "attention_dropout": (lambda x: ops.attention_dropout(x, 0.2, 3), tensors((1, 6, 3, 2, 8))),
    "norm, projection": (lambda x, w, m: ops.projection(ops.rms_norm(x, w), m), tensors((5, 8), (8,), (6, 8))),
    "GELU, projection": (
        lambda x, b, m, c: ops.projection(ops.bias_quick_gelu(x, b), m, c), tensors((5, 8), (8,), (6, 8), (6,))),
}  # fmt: skip
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged, all of it once more."""
    monkeypatch.setattr(_native, "_said", set())
    caplog.set_level(logging.WARNING, "igpt_fast")
    return caplog


def loss_of(call, weights):
    return lambda *inputs: (call(*inputs) * weights).sum()


def both(call, inputs, derive):
    """What `derive` makes of the op by kernels and of the op in plain torch, in float64."""
    with use_backend("reference"):
        weights = torch.randn_like(call(*inputs))
        wide = derive(loss_of(call, weights.double()), tuple(t.double() for t in inputs))
    return derive(loss_of(call, weights), inputs), wide


def close(found, truth):
    for ours, exact in zip(found, truth, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).abs().max() <= 1e-4 * (1 + exact.abs().max())


@each_call
def test_second_derivatives_are_those_of_plain_torch(name, said):
    call, inputs = CALLS[name]
    directions = tensors(*(t.shape for t in inputs), seed=1)

    def products(loss, given):
        along = tuple(d.to(g.dtype) for d, g in zip(directions, given, strict=True))
        return functional.hvp(loss, given, along)[1]

    found, truth = both(call, inputs, products)
    close(found, truth)
    assert any(exact.abs().max() > 1e-3 for exact in truth) or name == "dropout"
    assert "runs on plain torch: it is to be differentiated again" in said.text


@each_call
def test_a_penalty_on_gradients_has_its_gradient(name):
    """As for a learned prompt: the incoming gradient is a constant, which depends on no input."""
    call, inputs = CALLS[name]

    def penalised(loss, given):
        given = tuple(t.clone().requires_grad_() for t in given)
        grads = torch.autograd.grad(loss(*given), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given, materialize_grads=True)

    close(*both(call, inputs, penalised))


@pytest.mark.parametrize("name", [name for name in CALLS if "projection" in name])
def test_what_a_product_read_has_its_derivatives(name, said):
    """A norm's or an activation's output, which the product makes again, and not its inputs alone."""
    _, inputs = CALLS[name]

    def penalised(op, product):
        x, w, m, *rest = (t.clone().requires_grad_() for t in inputs)
        y = op(x, w)
        gradient = torch.autograd.grad(product(y, m, *rest).sin().sum(), m, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), (y, m))

    op = ops.rms_norm if "norm" in name else ops.bias_quick_gelu
    found = penalised(op, ops.projection)
    with use_backend("reference"):
        truth = penalised(op, torch.nn.functional.linear)
    close(found, truth)


@pytest.mark.parametrize("name", [name for name in CALLS if "projection" in name])
def test_what_changes_behind_a_product_changes_no_derivative(name):
    """What a norm or an activation gave is made again where it is no longer what the product read."""
    _, inputs = CALLS[name]
    op = ops.rms_norm if "norm" in name else ops.bias_quick_gelu

    def penalised(change):
        x, w, m, *rest = (t.clone().requires_grad_() for t in inputs)
        y = op(x, w)
        out = ops.projection(y, m, *rest)
        if change:
            with torch.no_grad():
                y.zero_()
        gradient = torch.autograd.grad(out.sin().sum(), m, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), (x, w, m))

    close(penalised(True), penalised(False))


def test_other_threads_keep_their_backend():
    x, stop, seen = torch.randn(64, 64, requires_grad=True), threading.Event(), []

    def look():
        while not stop.is_set():
            seen.append(_native.backend_for("rms_norm_fwd", (x,)) is not None)

    def derive():
        for _ in range(30):
            grad = torch.autograd.grad(ops.bias_quick_gelu(x).sum(), x, create_graph=True)[0]
            grad.square().sum().backward()

    before = _native.backend_for("rms_norm_fwd", (x,)) is not None
    threads = [threading.Thread(target=run) for run in (look, derive, derive, derive)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert set(seen) == {before} and (_native.backend_for("rms_norm_fwd", (x,)) is not None) is before


@each_call
def test_many_gradients_at_once(name, said):
    call, inputs = CALLS[name]

    def rows(loss, given):
        given = tuple(t.clone().requires_grad_() for t in given)
        out = torch.stack([loss(*given), loss(*(2 * t for t in given))])
        return torch.autograd.grad(out, given, torch.eye(2, dtype=out.dtype), is_grads_batched=True)

    close(*both(call, inputs, rows))
    assert "runs on plain torch: many are asked for at once" in said.text


def test_a_model_has_them_and_says_so(said, monkeypatch):
    torch.manual_seed(0)
    model = igpt.ImageGPT(igpt.Config(layers=2, width=16, heads=2, colors=8, size=(3, 4)))
    torch.nn.init.normal_(model.wtet, std=0.3)
    tokens = torch.randint(8, (2, 3, 4))

    def derive(double):
        used = model.double() if double else model

        def last(table):
            return torch.func.functional_call(used, {"wpe": table}, (tokens,))[:, -1].sin().sum(0)

        table = used.wpe.detach()
        return functional.jvp(last, table, torch.ones_like(table))[1], functional.jacobian(last, table, vectorize=True)

    found = derive(False)
    with use_backend("reference"):
        truth = derive(True)
    close(found, truth)
    assert truth[0].abs().max() > 0.01 and "the gradient of rms_norm" in said.text
    monkeypatch.setattr(_native, "_strict", True)
    model.float()
    with pytest.raises(RuntimeError, match=r"differentiated again \(IGPT_STRICT=1\)"):
        derive(False)


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float64), (12, torch.float32)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_attention_that_no_kernel_serves_has_them_by_torchs_plain_one(head_dim, dtype, mask):
    """As the README says; its fast ones have none."""
    inputs = tuple(t.to(dtype) for t in tensors(*[(2, 2, 12, head_dim)] * 3))

    def penalised(loss, given):
        given = tuple(t.clone().requires_grad_() for t in given)
        grads = torch.autograd.grad(loss(*given), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given)

    with sdpa_kernel(SDPBackend.MATH):
        close(*both(lambda q, k, v: ops.attention(q, k, v, mask), inputs, penalised))


@each_call
def test_first_derivatives_are_by_kernels(name, said):
    call, inputs = CALLS[name]
    given = tuple(t.clone().requires_grad_() for t in inputs)
    call(*given).sum().backward()
    assert all(t.grad is not None for t in given) and "plain torch" not in said.text
