"""Tensors that few users have: NaNs of other bits, five dimensions, other strides under torch.compile, tangents."""

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from check import backends
from test_backends import step_call
from torch.library import opcheck

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import BACKENDS, CPU_TABLES, use_backend
from igpt_fast.ops.decode_step import StepWeights
from igpt_fast.reference.decode_step import LayerWeights

TABLES = [name for name in backends("cross_entropy_fwd") if name in CPU_TABLES]
NAN = torch.from_numpy(np.array([0x7FFFFFFF, 0x7FC00001, 0x7FC00080, 0xFFC00100], np.uint32).view(np.float32))


@pytest.mark.parametrize("backend", TABLES)
@pytest.mark.parametrize("at", range(len(NAN)))
def test_a_nan_of_any_bits_stays_one(backend, at):
    logits, q = torch.randn(3, 512), torch.randn(1, 1, 70, 32)
    logits[1, 100] = NAN[at]
    k = q.clone()
    k[0, 0, 0, 0] = NAN[at]
    with use_backend(backend):
        assert ops.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), "none").isnan().tolist() == [0, 1, 0]
        assert ops.attention(q, k, q).isnan().all()
        assert ops.bias_quick_gelu(logits).isnan().sum() == 1


@pytest.mark.parametrize("op", ["rms_norm", "bias_quick_gelu", "dropout", "cross_entropy"])
def test_five_dimensions(op):
    x = torch.randn(2, 1, 3, 2, 8)
    run = {
        "rms_norm": lambda x: ops.rms_norm(x, torch.ones(8)),
        "bias_quick_gelu": lambda x: ops.bias_quick_gelu(x, torch.ones(8)),
        "dropout": lambda x: ops.dropout(x, 0.5, 1),
        "cross_entropy": lambda x: ops.cross_entropy(x, torch.ones(x.shape[:-1], dtype=torch.int64), "none"),
    }[op]
    many, flat = x.clone().requires_grad_(), x.flatten(0, 3).requires_grad_()
    y, want = run(many), run(flat)
    assert torch.equal(y.flatten(), want.flatten())
    y.sum().backward(), want.sum().backward()
    assert torch.equal(many.grad.flatten(), flat.grad.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of a kernel, of plain torch
def test_compilers_know_dtypes_and_strides(dtype):
    x, w, t = torch.randn(8, 6).to(dtype).t(), torch.rand(8).to(dtype), torch.arange(6)
    for args in ((x, w, None, 1e-5, dtype), (x, w, x, 1e-5, dtype)):
        opcheck(torch.ops.igpt.rms_norm.default, args)
    opcheck(torch.ops.igpt.bias_quick_gelu.default, (x, w))
    opcheck(torch.ops.igpt.cross_entropy.default, (x, t))
    for run in (lambda x: ops.rms_norm(x, w).sum(), lambda x: ops.cross_entropy(x, t)):
        grads = []
        for f in (torch.compile(run, backend="aot_eager"), run):
            leaf = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(f(leaf), leaf)[0])
        assert torch.allclose(*grads)


@pytest.mark.parametrize("run", [
    lambda x: ops.rms_norm(x, torch.ones(8, dtype=x.dtype)),
    lambda x: ops.bias_quick_gelu(x),
    lambda x: ops.cross_entropy(x, torch.zeros(4, dtype=torch.int64)),
    lambda x: ops.attention_packed(x.view(1, 1, 1, 1, -1).expand(1, 4, 3, 1, 32)),
    lambda x: ops.dropout(x, 0.3, 1),
    lambda x: ops.projection(x, torch.arange(24, dtype=x.dtype).view(3, 8).sin()),
])  # fmt: skip
def test_tangents_are_those_of_plain_torch(run):
    x, along, h = torch.randn(4, 8), torch.randn(4, 8), 1e-3
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, along))).tangent
    with use_backend("reference"):
        exact = (run(x.double() + h * along) - run(x.double() - h * along)) / (2 * h)
    assert (tangent - exact).abs().max() <= 1e-3 * (1 + exact.abs().max())


def test_a_step_reads_the_weights_that_it_was_given():
    cache, pixels, wte, wpe, layers, ln_f, wtet, *_ = step_call()
    weights = [torch.nn.Parameter(t.clone()) if t is not None else None for t in layers]
    fields = len(LayerWeights._fields)
    listed = [LayerWeights(*weights[at : at + fields]) for at in range(0, len(weights), fields)]
    with torch.no_grad():
        steps = StepWeights(wte, wpe, listed, ln_f, wtet)
        before = ops.decode_step(cache.clone(), pixels, steps, 3)
        for p in weights:
            if p is not None:
                p.data = p.data.double().float() * 2  # elsewhere
        assert torch.equal(ops.decode_step(cache.clone(), pixels, steps, 3), before)
        assert ops.decode_step(cache[:, :0], pixels[:0], steps, 3).shape == (0, len(wtet))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_a_residual_of_integers_is_refused(dtype):
    x, residual = torch.randn(4, 100), torch.zeros(4, 100, dtype=dtype)
    with pytest.raises(InputError, match="residual"):
        ops.rms_norm(x, torch.ones(100), residual=residual)
    for name in TABLES:
        out = torch.empty_like(x), residual.clone(), torch.empty(4)
        with pytest.raises(ValueError, match=r"float32 or bfloat16|dtype"):
            BACKENDS[name].rms_norm_fwd(*out, x, residual, torch.ones(100), 1e-5, 0)


@pytest.mark.parametrize("name", TABLES)
def test_kernels_refuse_tensors_that_do_not_fit(name):
    x, t, table = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), BACKENDS[name]
    q, o = torch.randn(1, 1, 1, 8), torch.empty(1, 1, 1, 8)
    calls = [
        lambda: table.cross_entropy_fwd(torch.empty(4), None, x, t, 0),
        lambda: table.cross_entropy_fwd(torch.empty(4, dtype=torch.uint8), torch.empty(1), x, t, 0),
        lambda: table.cross_entropy_bwd(torch.empty(4, 8), torch.ones(4), x, t, None, 0),
        lambda: table.rms_norm_bwd(torch.empty(4, 8), None, torch.empty(1, 8), x, None, x, torch.ones(8), None, 0),
        lambda: table.rms_norm_fwd(x.clone(), x.bfloat16(), torch.empty(4), x, x, torch.ones(8), 1e-5, 0),
        lambda: table.rms_norm_bwd(x.clone(), None, x[:1].clone(), x, x.bfloat16(), x, x[0], torch.ones(4), 0),
        lambda: table.rms_norm_bwd(x.clone(), x.bfloat16(), x[:1].clone(), x, x, x, x[0], torch.ones(4), 0),
        lambda: table.attention_fwd(o, None, q, q, q, None, False, 1.0, 0),
        lambda: table.attention_bwd(o, o, o, q, q, q, q, q, None, None, None, False, 1.0, 0),
        lambda: table.dropout(None, x, 0.5, 1, 0),
        lambda: table.bias_quick_gelu_fwd(None, x, None, 0),
        lambda: table.linear_fwd(None, x, torch.ones(3, 8), None, None, None, 1e-5, False, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_nothing_times_something():
    for n, k, m in ((2, 0, 3), (2, 3, 0), (0, 3, 2)):
        x, w = torch.ones(n, k), torch.ones(m, k)
        assert torch.equal(ops.linear(x, w), reference.linear.linear(x, w))
    assert ops.rms_norm(torch.ones(3, 0), torch.ones(0)).shape == (3, 0)


def test_a_single_number_has_a_gradient():
    x = torch.tensor(0.5, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.bias_quick_gelu(x), x)
    (wanted,) = torch.autograd.grad(reference.activation.bias_quick_gelu(x, None), x)
    assert torch.allclose(dx, wanted)


def test_dropout_of_integers_is_refused():
    with pytest.raises(InputError, match=r"dropout: x is torch\.int64; use a floating dtype"):
        ops.dropout(torch.ones(3, dtype=torch.int64), 0.5, 0)
