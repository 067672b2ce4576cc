"""Norms: checks, which backend runs, and how the gradient is attached."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._again import remember
from igpt_fast.ops._native import backend_for, empty, multiprocessors, needs_grad, same_device, stream_of


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, with an optional residual added first (see reference.norm for the formula).

    x [..., C]   weight [C]   residual [..., C], of x's shape and maybe another dtype
    → y [..., C] in `dtype` (x's when None), or (y, residual + x) when a residual is given.
    Raises InputError when the shapes do not fit. Source: SPEC of Image GPT, no mean, no bias, eps inside the root.
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; give one weight a column"
        )
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"rms_norm: residual {tuple(residual.shape)} is not shaped like x {tuple(x.shape)}")
    if residual is not None and not residual.is_floating_point():
        raise InputError(f"rms_norm: residual is {residual.dtype}; give floats")
    same_device("rms_norm", x=x, weight=weight, residual=residual)
    dtype = dtype or x.dtype
    if torch.compiler.is_compiling():
        y, s, _ = torch.ops.igpt.rms_norm(x, weight, residual, eps, dtype)
        return y if residual is None else (y, s)
    native = _native(x, weight, residual, dtype)
    if native is None:
        return reference.norm.rms_norm(x, weight, eps, residual, dtype)
    if needs_grad(x, weight, residual):
        x = x.contiguous()  # here, so that nobody keeps what it is a view of
        y, s = _RmsNorm.apply(native, x, weight, residual, eps, dtype)
        if s is None or s.dtype is torch.float32:  # a sum that was rounded has lost what y was made of
            remember(y, lambda of, by: _forward(native, of, by, None, eps, dtype)[0], x if s is None else s, weight)
    else:
        y, s, _ = _forward(native, x, weight, residual, eps, dtype)
    return y if residual is None else (y, s)


def _native(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype):
    if not weight.numel():
        return None  # rows of nothing
    given = (x, weight) if residual is None else (x, weight, residual)
    return backend_for("rms_norm_fwd", given if dtype is x.dtype else (*given, x.new_empty(0, dtype=dtype)))


def _forward(native, x, weight, residual, eps, dtype):
    x = x.contiguous()
    y, rstd = empty(x.shape, x, dtype), empty(x.shape[:-1], x, torch.float32)
    if residual is None:
        s = out = None
    else:
        residual = residual.contiguous()
        s = out = empty(residual.shape, residual)
    native.rms_norm_fwd(y, out, rstd, x, residual, weight.contiguous(), eps, stream_of(x))
    return y, s, rstd


def _backward(native, dy, ds, s, weight, rstd, x_dtype, has_residual):
    """→ dx, dweight, dresidual. One tensor serves both inputs of the sum when their dtypes agree."""
    s, rows = s.contiguous(), s.numel() // max(1, s.size(-1))
    groups = max(1, min(2 * multiprocessors(s), rows // 32))  # of rows, each with room for its own dweight
    dx, dweight = empty(s.shape, s, x_dtype), empty((groups, s.size(-1)), s, torch.float32)
    apart = has_residual and s.dtype is not x_dtype
    dresidual = empty(s.shape, s) if apart else None
    ds = None if ds is None else ds.contiguous()
    native.rms_norm_bwd(dx, dresidual, dweight, dy.contiguous(), ds, s, weight.contiguous(), rstd, stream_of(s))
    return dx, dweight[0].to(weight.dtype, copy=True), (dresidual if apart else dx) if has_residual else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, x, weight, residual, eps, dtype):
        y, s, rstd = _forward(native, x, weight, residual, eps, dtype)
        ctx.native, ctx.x_dtype, ctx.has_residual = native, x.dtype, residual is not None
        ctx.save_for_backward(x.contiguous() if s is None else s, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, ds):
        s, weight, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(s)
        dx, dweight, dresidual = _backward(ctx.native, dy, ds, s, weight, rstd, ctx.x_dtype, ctx.has_residual)
        return None, dx, dweight, dresidual, None, None


@torch.library.custom_op("igpt::rms_norm", mutates_args=())
def _rms_norm_op(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    native = _native(x, weight, residual, dtype)
    if native is not None:
        y, s, rstd = _forward(native, x, weight, residual, eps, dtype)
        return y, x.new_empty(0) if s is None else s, rstd
    out = reference.norm.rms_norm(x, weight, eps, residual, dtype)
    y, s = (out, x.new_empty(0)) if residual is None else out
    return y.contiguous(), s.contiguous(), torch.rsqrt((x if residual is None else s).float().square().mean(-1) + eps)


@_rms_norm_op.register_fake
def _(x, weight, residual, eps, dtype):
    s = x.new_empty(0) if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, s, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("igpt::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, eps: float, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    native = backend_for("rms_norm_bwd", (dy, s, weight))
    if native is not None:
        return _backward(native, dy, ds, s, weight, rstd, x_dtype, False)[:2]
    dx, dweight = reference.norm.rms_norm_backward(dy, ds, s, weight, eps, x_dtype)
    return dx.contiguous(), dweight


@_rms_norm_backward_op.register_fake
def _(dy, ds, s, weight, rstd, eps, x_dtype):
    return torch.empty_like(s, dtype=x_dtype, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, weight, residual, eps, _ = inputs
    _, s, rstd = output
    ctx.eps, ctx.x_dtype, ctx.residual_dtype = eps, x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else s, weight, rstd)
    ctx.mark_non_differentiable(*([rstd, s] if residual is None else [rstd]))
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    with_residual = ctx.residual_dtype is not None
    wide = ctx.residual_dtype or ctx.x_dtype
    dx, dw = torch.ops.igpt.rms_norm_backward(dy, ds if with_residual else None, s, weight, rstd, ctx.eps, wide)
    return dx.to(ctx.x_dtype), dw, dx if with_residual else None, None, None


_rms_norm_op.register_autograd(_autograd, setup_context=_setup)
