"""The model and attention under torch.compile."""

import pytest
import torch

from igpt_fast import Config, ImageGPT, ops
from igpt_fast.ops._native import use_backend


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_model_compiles_without_graph_breaks(backend):
    torch.compiler.reset()  # each backend that a test of this process compiled for counts against torch's limit
    model = ImageGPT(Config(layers=2, width=32, heads=2, colors=16, size=(4, 4), bias=True))
    tokens = torch.randint(16, (2, 16))
    torch.nn.init.normal_(model.wtet)
    with use_backend(backend):
        expected = model.loss(tokens)
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(tokens)
        got = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.allclose(loss, expected, atol=1e-6)
    for w, g in zip(wanted, got, strict=True):
        assert torch.allclose(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("head_dim", "dtype"), [(12, torch.float32), (16, torch.float16), (16, torch.float32)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_that_no_kernel_serves_is_torchs_own_under_compile(head_dim, dtype, causal):
    """Not the reference, which keeps a matrix of all pairs; and what a kernel serves goes there."""
    torch.compiler.reset()
    codes = []

    def keep(graph, _):
        codes.append(graph.code)
        return graph

    qkv = torch.randn(2, 9, 3, 2, head_dim).to(dtype).requires_grad_()
    run = torch.compile(ops.attention_packed, backend=keep, fullgraph=True)
    got, wanted = run(qkv, causal=causal), ops.attention_packed(qkv, causal=causal)
    served = head_dim == 16 and dtype is torch.float32
    assert ["igpt.attention" in code for code in codes] == [served]
    assert ["scaled_dot_product_attention" in code for code in codes] == [not served]
    assert torch.allclose(got, wanted, atol=1e-3)
    grads = [torch.autograd.grad(o.float().square().sum(), qkv)[0] for o in (got, wanted)]
    assert torch.allclose(*grads, atol=1e-2)


def test_head_dims_may_be_dynamic_under_compile():
    """Those of a second call are, if nobody says that they are constants."""
    torch.compiler.reset()
    run = torch.compile(ops.attention_packed, backend="aot_eager", fullgraph=True)
    for head_dim in (8, 16, 12, 24):
        qkv = torch.randn(1, 5, 3, 2, head_dim)
        assert torch.allclose(run(qkv), ops.attention_packed(qkv), atol=1e-6)
    q = torch.randn(1, 2, 5, 16)
    run = torch.compile(ops.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.allclose(run(q, q, q), ops.attention(q, q, q), atol=1e-6)
