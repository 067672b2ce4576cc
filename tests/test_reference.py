"""The references' own gradients against autograd, in float64: what a compiled graph uses where no kernel serves."""

import torch

from igpt_fast.reference import activation, attention, cross_entropy, linear_cross_entropy, norm


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def close(got, wanted):
    assert all(torch.allclose(g, w, rtol=1e-10, atol=1e-12) for g, w in zip(got, wanted, strict=True))


def test_rms_norm():
    x, weight, residual = doubles(3, 4, 10), doubles(10), doubles(3, 4, 10)
    y, s = norm.rms_norm(x, weight, residual=residual)
    dy, ds = torch.randn_like(y), torch.randn_like(s)
    wanted = torch.autograd.grad((y, s), (x, weight), (dy, ds))
    close(norm.rms_norm_backward(dy, ds, s.detach(), weight, 1e-5, torch.float64), wanted)


def test_bias_quick_gelu():
    x, bias, dy = doubles(5, 7), doubles(7), torch.randn(5, 7, dtype=torch.float64)
    wanted = torch.autograd.grad(activation.bias_quick_gelu(x, bias), (x, bias), dy)
    close(activation.bias_quick_gelu_backward(dy, x, bias), wanted)


def test_cross_entropy():
    logits, targets, dloss = doubles(6, 9), torch.arange(6), torch.randn(6, dtype=torch.float64)
    wanted = torch.autograd.grad(cross_entropy.cross_entropy(logits, targets, "none"), logits, dloss)
    close([cross_entropy.cross_entropy_backward(dloss, logits, targets)], wanted)


def test_linear_cross_entropy():
    hidden, weight, target = doubles(2, 3, 8), doubles(9, 8), torch.arange(6).view(2, 3)
    loss, dloss = linear_cross_entropy.linear_cross_entropy(hidden, weight, target), torch.randn(2, 3).double()
    wanted = torch.autograd.grad(loss, (hidden, weight), dloss)
    close(linear_cross_entropy.linear_cross_entropy_backward(dloss, hidden, weight, target), wanted)


def test_attention_with_rows_that_see_nothing():
    q, k, v, dout = (
        doubles(2, 2, 9, 4),
        doubles(2, 2, 9, 4),
        doubles(2, 2, 9, 4),
        torch.randn(2, 2, 9, 4, dtype=torch.float64),
    )
    seen = torch.rand(9, 9) < 0.4
    seen[3] = False
    for mask, causal in ((None, True), (None, False), (seen, False)):
        o, _ = attention.attention(q, k, v, mask, causal)
        wanted = torch.autograd.grad(o, (q, k, v), dout)
        close(attention.attention_backward(dout, q, k, v, mask, causal, None), wanted)
