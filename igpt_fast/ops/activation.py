"""Activations: checks, which backend runs, and how the gradient is attached."""

from functools import partial

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._again import remember
from igpt_fast.ops._native import backend_for, empty, multiprocessors, needs_grad, same_device, stream_of


def bias_quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """z · sigmoid(1.702 z) with z = x (+ bias).   x [..., C]   bias [C] or None   → [..., C] in x's dtype.

    Raises InputError when the bias does not fit. Source: the activation of Image GPT.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise InputError(
            f"bias_quick_gelu: bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}; give one a column"
        )
    same_device("bias_quick_gelu", x=x, bias=bias)
    if torch.compiler.is_compiling():
        return torch.ops.igpt.bias_quick_gelu(x, bias)
    native = _native(x, bias)
    if native is None:
        return reference.activation.bias_quick_gelu(x, bias)
    if needs_grad(x, bias):
        y = _BiasQuickGelu.apply(native, x, bias)
        remember(y, partial(_forward, native), x, bias)
        return y
    return _forward(native, x, bias)


def _native(x: Tensor, bias: Tensor | None):
    return backend_for("bias_quick_gelu_fwd", (x,) if bias is None else (x, bias))


def _forward(native, x, bias):
    x = x.contiguous()
    y = empty(x.shape, x)
    native.bias_quick_gelu_fwd(y, x, None if bias is None else bias.contiguous(), stream_of(x))
    return y


def _backward(native, dy, x, bias):
    columns = max(1, x.shape[-1:].numel())
    groups = min(
        2 * multiprocessors(x) * 1024 // columns, 1024, x.numel() // columns // 32
    )  # of rows, each with room for its own dbias
    dx = empty(x.shape, x)
    dbias = None if bias is None else empty((max(1, groups), x.size(-1)), x, torch.float32)
    bias_in = None if bias is None else bias.contiguous()
    native.bias_quick_gelu_bwd(dx, dbias, dy.contiguous(), x.contiguous(), bias_in, stream_of(x))
    return dx, None if bias is None else dbias[0].to(bias.dtype, copy=True)


class _BiasQuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, x, bias):
        ctx.native = native
        ctx.save_for_backward(x, bias)
        return _forward(native, x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return None, *_backward(ctx.native, dy, *ctx.saved_tensors)


@torch.library.custom_op("igpt::bias_quick_gelu", mutates_args=())
def _bias_quick_gelu_op(x: Tensor, bias: Tensor | None) -> Tensor:
    native = _native(x, bias)
    return reference.activation.bias_quick_gelu(x, bias).contiguous() if native is None else _forward(native, x, bias)


@_bias_quick_gelu_op.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("igpt::bias_quick_gelu_backward", mutates_args=())
def _bias_quick_gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    native = _native(x, bias)
    if native is None:
        dx, db = reference.activation.bias_quick_gelu_backward(dy, x, bias)
    else:
        dx, db = _backward(native, dy, x, bias)
    return dx.contiguous(), x.new_empty(0) if db is None else db


@_bias_quick_gelu_backward_op.register_fake
def _(dy, x, bias):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    ctx.has_bias = inputs[1] is not None
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    dx, db = torch.ops.igpt.bias_quick_gelu_backward(dy, *ctx.saved_tensors)
    return dx, db if ctx.has_bias else None


_bias_quick_gelu_op.register_autograd(_autograd, setup_context=_setup)
