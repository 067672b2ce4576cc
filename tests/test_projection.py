"""projection: torch's linear, and on a CPU without bf16 instructions float32's product for bf16 numbers."""

import io
import sys

import pytest
import torch
import torch.nn.functional as F
from test_product import let_onednn_multiply

from igpt_fast import Config, ImageGPT, InputError, ops
from igpt_fast.ops import _again

module = sys.modules["igpt_fast.ops.projection"]


@pytest.fixture(params=["bf16 instructions", "none", "oneDNN"])
def slow(request, monkeypatch):
    """Who multiplies: torch, float32 in bf16's place, or oneDNN instead of MKL."""
    monkeypatch.setattr(module, "_SLOW", request.param == "none")
    monkeypatch.setattr(module, "ROWS", 7)
    let_onednn_multiply(monkeypatch, request.param == "oneDNN")


def draw(rows=(3, 10), k=24, m=20, dtype=torch.float32):
    return [t.to(dtype).requires_grad_() for t in (torch.randn(*rows, k), torch.randn(m, k), torch.randn(m))]


def results(linear, args, autocast):
    given = [a.detach().clone().requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(*given)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given, probe)]


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 10), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_equals_torch_in_dtype_and_within_twice_its_error(slow, rows, bias, dtype, autocast):
    args = draw(rows, dtype=dtype)[: 3 if bias else 2]
    got, again = (results(ops.projection, args, autocast) for _ in range(2))
    plain = results(F.linear, args, autocast)
    truth = results(F.linear, [a.double() for a in args], False)
    for g, h, p, t in zip(got, again, plain, truth, strict=True):
        assert g.dtype is p.dtype and g.shape == p.shape
        assert torch.equal(g, h)
        if g.numel():
            limit = 2 * (p.double() - t).abs().max() + 4 * torch.finfo(p.dtype).eps * t.abs().max()
            assert (g.double() - t).abs().max() <= limit


def test_float32_weights_keep_their_bits_under_autocast(monkeypatch):
    monkeypatch.setattr(module, "_SLOW", True)
    x, weight, _ = draw()
    x = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.projection(x, weight)
    assert torch.equal(y, (x.float() @ weight.t()).bfloat16())


def test_only_what_is_asked_for_gets_a_gradient(slow):
    x, weight, bias = draw(dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(ops.projection(x, weight.detach(), bias.detach()).sum(), x)
    assert torch.allclose(dx.float(), weight.float().sum(0).expand(dx.shape), atol=0.05, rtol=0.02)
    (dw,) = torch.autograd.grad(ops.projection(x.detach(), weight).sum(), weight)
    assert torch.allclose(dw.float(), x.float().sum((0, 1)).expand(dw.shape), atol=0.1, rtol=0.02)
    assert dx.dtype is dw.dtype is torch.bfloat16


PRODUCERS = {  # of x, from leaves of its shape and of its columns
    "gelu": lambda z, _, w: ops.bias_quick_gelu(z, w),
    "gelu without a bias": lambda z, _, w: ops.bias_quick_gelu(z) + 0 * w.sum(),
    "norm": lambda z, _, w: ops.rms_norm(z, w),
    "norm of a sum": lambda z, r, w: ops.rms_norm(z, w, residual=r)[0],
    "norm in bfloat16": lambda z, r, w: ops.rms_norm(z, w, residual=r, dtype=torch.bfloat16)[0],
}


def gradients(producer, linear, leaves, autocast):
    """y and all gradients; and how many tensors were kept for them."""
    kept = set()
    leaves = [t.detach().requires_grad_() for t in leaves]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, residual, w, weight, bias = leaves
        y = linear(producer(z, residual, w), weight, bias)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, probe, allow_unused=True, materialize_grads=True)
    return [y, *grads], len(kept)


@pytest.mark.parametrize("name", PRODUCERS)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_what_can_be_made_again_is_not_kept(slow, name, dtype, autocast):
    x, weight, bias = draw(dtype=dtype)
    leaves = [x, torch.randn_like(x), torch.randn(x.shape[-1]).to(dtype), weight, bias]
    if name == "norm in bfloat16" and not autocast:
        leaves[3:] = weight.bfloat16(), bias.bfloat16()
    ours, kept = gradients(PRODUCERS[name], ops.projection, leaves, autocast)

    def forgetful(x, weight, bias):
        return ops.projection(x.view_as(x), weight, bias)  # a view does not know what it was made of

    theirs, kept_by_all = gradients(PRODUCERS[name], forgetful, leaves, autocast)
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(ours, theirs, strict=True))
    rounded = "norm " in name and dtype is torch.bfloat16  # the sum has lost what y was made of
    assert kept == kept_by_all if rounded or "without" in name else kept < kept_by_all


def test_an_output_may_be_saved_and_forgotten():
    y = ops.rms_norm(torch.randn(3, 8, requires_grad=True), torch.ones(8))
    torch.save(y, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), y)
    many = len(_again._recipes)
    del y
    assert len(_again._recipes) == many - 1


def test_what_was_changed_in_place_is_kept_as_it_is(slow):
    x, weight, _ = draw()
    y = ops.bias_quick_gelu(x).detach().requires_grad_()  # detached, it knows nothing
    made = ops.bias_quick_gelu(x)
    made.mul_(2)
    (expected,) = torch.autograd.grad(ops.projection(2 * y, weight).sum(), weight)
    (found,) = torch.autograd.grad(ops.projection(made, weight).sum(), weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", [ops.bias_quick_gelu, lambda h: ops.rms_norm(h, torch.ones(24))])
def test_what_was_made_of_something_that_changed_since_is_kept_as_it_is(slow, op):
    x, weight, _ = draw()
    h = x.detach() * 1
    h.requires_grad_()
    y = op(h)
    wanted = torch.autograd.grad(ops.projection(y.detach(), weight).sum(), weight)
    with torch.no_grad():
        h.add_(1)
    assert torch.equal(*torch.autograd.grad(ops.projection(y, weight).sum(), weight), *wanted)


def test_a_frozen_weight_asks_for_no_input(monkeypatch):
    x, weight, _ = draw()
    calls = []
    y = ops.bias_quick_gelu(x)
    forward = sys.modules["igpt_fast.ops.activation"]._forward
    monkeypatch.setattr(sys.modules["igpt_fast.ops.activation"], "_forward", lambda *a: calls.append(1) or forward(*a))
    torch.autograd.grad(ops.projection(y, weight.detach()).sum(), x)
    assert not calls


def test_a_steps_activations_take_a_third_less():
    model = ImageGPT(Config(layers=2, width=64, heads=2, colors=16, size=(8, 8)))
    tokens = torch.randint(16, (4, 64))
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.loss(tokens)
    # Of a pixel and a layer: q, k, v, attention's output, two sums, and what the activation reads.
    floats = 2 * 4 * 64 * 64 * (3 + 1 + 2 + 4)
    assert sum(count for at, count in kept.items() if at not in weights) < 1.1 * 4 * floats


def test_the_model_compiles_under_autocast(slow):
    model = ImageGPT(Config(layers=1, width=16, heads=2, colors=8, size=(3, 3)))
    torch.nn.init.normal_(model.wtet)
    tokens = torch.randint(8, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.loss(tokens)
        loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(tokens)
    assert torch.allclose(loss, expected, atol=2e-2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_the_flag_says_what_torch_can_do():
    assert module.bf16_is_slow() is not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_frozen_weights_input_is_not_kept(slow):
    """Nor may it matter that it changes, as in torch itself."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, _ = (t.detach() for t in draw(dtype=dtype))
        bias = torch.zeros(20, dtype=dtype, requires_grad=True)
        y = ops.projection(x, weight, bias)
        x.zero_()
        (dbias,) = torch.autograd.grad(y.sum(), bias)
        assert (dbias == 30).all()
        h = torch.randn(3, 10, 24, dtype=dtype, requires_grad=True)
        dx = torch.autograd.grad(ops.projection(h, weight).sum(), h)[0]
        wide = torch.zeros(20, 24, dtype=dtype)
        y = ops.projection(x, wide, bias)
        wide.add_(1)  # nor what x, which does not learn, was multiplied by
        assert (torch.autograd.grad(y.sum(), bias)[0] == 30).all()
        assert dx.dtype is dtype and torch.allclose(dx.float(), weight.float().sum(0).expand_as(dx), atol=0.1)


def test_bad_shapes():
    with pytest.raises(InputError, match="does not fit"):
        ops.projection(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match="bias"):
        ops.projection(torch.ones(2, 3), torch.ones(4, 3), torch.ones(5))
