"""Norms: checks, which backend runs, and how the gradient is attached."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._again import remember
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._native import backend_for, has_cuda_kernels
from igpt_fast.ops._tensors import empty, floats, multiprocessors, needs_grad, stream_of

FORWARD, BACKWARD = 12288, 4096  # columns that the kernels of csrc/cuda/norm.cu take


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, with an optional residual added first (see reference.norm for the formula).

    x [..., C]   weight [C]   residual [..., C], of x's shape and maybe another dtype
    → y [..., C] in `dtype` (x's when None), or (y, residual + x) when a residual is given.
    Raises InputError for shapes that do not fit, and integers. Source: SPEC of Image GPT: no mean, no bias, eps inside
    the root.
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; give one weight a column"
        )
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"rms_norm: residual {tuple(residual.shape)} is not shaped like x {tuple(x.shape)}")
    floats("rms_norm", x=x, weight=weight, residual=residual)
    dtype = dtype or x.dtype
    if torch.compiler.is_compiling():
        y, s, _ = torch.ops.igpt.rms_norm(x, weight, residual, eps, dtype)
        return y if residual is None else (y, s)
    native = _native(x, weight, residual, dtype)
    if native is None:
        return reference.norm.rms_norm(x, weight, eps, residual, dtype)
    if needs_grad(x, weight, residual):
        x = x.contiguous()  # here, so that nobody keeps what it is a view of
        y, s, _ = _with_gradient(x, weight, residual, eps, dtype)
        of = x if residual is None else s
        if residual is None or s.dtype is torch.float32:  # a sum that was rounded has lost what y was made of
            plain = partial(reference.norm.rms_norm, eps=eps, dtype=dtype)
            remember(y, lambda of, by: _forward(of, by, None, eps, dtype)[0], plain, of, weight)
    else:
        y, s, _ = _run(native, x, weight, residual, eps, dtype)
    return y if residual is None else (y, s)


def _native(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype):
    if not weight.numel():
        return None  # rows of nothing
    given = (x, weight) if residual is None else (x, weight, residual)
    given = given if dtype is x.dtype else (*given, x.new_empty(0, dtype=dtype))
    return backend_for("rms_norm_fwd", given, _wider_than(FORWARD, weight))


def _wider_than(most: int, weight: Tensor) -> Callable[[str], str | None]:
    """Why a backend's kernels do not serve rows as long as the weight, of its name; None where they do."""

    def refused(name: str) -> str | None:
        wide = has_cuda_kernels(name) and len(weight) > most
        return f"rows of {len(weight)} columns are longer than {most}" if wide else None

    return refused


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, residual + x or nothing, rstd"""
    return _run(_native(x, weight, residual, dtype), x, weight, residual, eps, dtype)


def _run(native, x, weight, residual, eps, dtype):
    if native is None:
        out = reference.norm.rms_norm(x, weight, eps, residual, dtype)
        y, s = (out, x.new_empty(0)) if residual is None else out
        rstd = torch.rsqrt((x if residual is None else s).float().square().mean(-1) + eps)
        return y.contiguous(), s.contiguous(), rstd
    x = x.contiguous()
    y, rstd = empty(x.shape, x, dtype), empty(x.shape[:-1], x, torch.float32)
    residual = None if residual is None else residual.contiguous()
    s = None if residual is None else empty(residual.shape, residual)
    native.rms_norm_fwd(y, s, rstd, x, residual, weight.contiguous(), eps, stream_of(x))
    return y, x.new_empty(0) if s is None else s, rstd


def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, eps: float, dtype: torch.dtype, apart: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in `dtype`, dweight, and, where the residual's is apart for its dtype is another, that in s's dtype."""
    given = (dy, s, weight, s.new_empty(0, dtype=dtype))
    native = backend_for("rms_norm_bwd", given, _wider_than(BACKWARD, weight))
    if native is None:
        wide, dweight = reference.norm.rms_norm_backward(dy, ds, s, weight, eps, s.dtype if apart else dtype)
        return wide.to(dtype).contiguous(), dweight, wide.contiguous() if apart else s.new_empty(0)
    s, rows = s.contiguous(), s.numel() // max(1, s.size(-1))
    groups = max(1, min(2 * multiprocessors(s), rows // 32))  # of rows, each with room for its own dweight
    dx, dweight = empty(s.shape, s, dtype), empty((groups, s.size(-1)), s, torch.float32)
    dresidual = empty(s.shape, s) if apart else None
    ds = None if ds is None else ds.contiguous()
    native.rms_norm_bwd(dx, dresidual, dweight, dy.contiguous(), ds, s, weight.contiguous(), rstd, stream_of(s))
    return dx, dweight[0].to(weight.dtype, copy=True), dresidual if apart else s.new_empty(0)


def _like(x, weight, residual, eps, dtype):
    s = x.new_empty(0) if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, s, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _like_backward(dy, ds, s, weight, rstd, eps, dtype, apart):
    dx = torch.empty_like(s, dtype=dtype, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(dx, dtype=s.dtype) if apart else s.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, residual, ctx.eps, _ = inputs
    _, s, rstd = output
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(*([rstd] if ctx.has_residual else [s, rstd]))
    ctx.set_materialize_grads(False)


def _gradient(ctx, backward, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    apart = ctx.has_residual and s.dtype is not ctx.dtype
    dx, dweight, dresidual = backward(dy, ds, s, weight, rstd, ctx.eps, ctx.dtype, apart)
    # One tensor serves both inputs of the sum where their dtypes agree.
    return dx, dweight, (dresidual if apart else dx) if ctx.has_residual else None, None, None


_with_gradient = differentiable("rms_norm", _forward, _like, _backward, _like_backward, _setup, _gradient)
