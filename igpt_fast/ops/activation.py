"""Activations: checks, which backend runs, and how the gradient is attached."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._again import remember
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._native import backend_for
from igpt_fast.ops._tensors import empty, floats, multiprocessors, needs_grad, stream_of


def bias_quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """z · sigmoid(1.702 z) with z = x (+ bias).   x [..., C]   bias [C] or None   → [..., C] in x's dtype.

    Raises InputError when the bias does not fit, or for integers. Source: the activation of Image GPT.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise InputError(
            f"bias_quick_gelu: bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}; give one a column"
        )
    floats("bias_quick_gelu", x=x, bias=bias)
    if torch.compiler.is_compiling():
        return torch.ops.igpt.bias_quick_gelu(x, bias)
    native = _native(x, bias)
    if native is None:
        return reference.activation.bias_quick_gelu(x, bias)
    if not needs_grad(x, bias):
        return _run(native, x, bias)
    y = _with_gradient(x, bias)
    remember(y, _forward, reference.activation.bias_quick_gelu, x, bias)
    return y


def _native(x: Tensor, bias: Tensor | None):
    return backend_for("bias_quick_gelu_fwd", (x,) if bias is None else (x, bias))


def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return _run(_native(x, bias), x, bias)


def _run(native, x: Tensor, bias: Tensor | None) -> Tensor:
    if native is None:
        return reference.activation.bias_quick_gelu(x, bias).contiguous()
    x = x.contiguous()
    y = empty(x.shape, x)
    native.bias_quick_gelu_fwd(y, x, None if bias is None else bias.contiguous(), stream_of(x))
    return y


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    native = _native(x, bias)
    if native is None:
        dx, dbias = reference.activation.bias_quick_gelu_backward(dy, x, bias)
        return dx.contiguous(), x.new_empty(0) if dbias is None else dbias
    columns = max(1, x.shape[-1:].numel())
    # Groups of rows, each with room for its own dbias.
    groups = min(2 * multiprocessors(x) * 1024 // columns, 1024, x.numel() // columns // 32)
    dx = empty(x.shape, x)
    dbias = None if bias is None else empty((max(1, groups), x.size(-1)), x, torch.float32)
    bias_in = None if bias is None else bias.contiguous()
    native.bias_quick_gelu_bwd(dx, dbias, dy.contiguous(), x.contiguous(), bias_in, stream_of(x))
    return dx, x.new_empty(0) if bias is None else dbias[0].to(bias.dtype, copy=True)


def _like(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_backward(dy, x, bias):
    return _like(x, bias), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, backward, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = backward(dy, x, bias)
    return dx, None if bias is None else dbias


_with_gradient = differentiable("bias_quick_gelu", _forward, _like, _backward, _like_backward, _setup, _gradient)
