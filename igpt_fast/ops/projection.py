"""The linear map of whole images: torch's own product, except for bf16 numbers on a CPU, where we know a faster one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.ops._native import empty, fused_backend_for, needs_grad

ROWS = 1024  # converted to float32 at a time: they stay in the cache
FEWEST = 64  # rows for which the kernel packs the weights; fewer wait for memory alone


def projection(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ (+ bias), with gradients, as torch.nn.functional.linear: also in its dtypes and under autocast.

    x [..., K]   weight [M, K]   bias [M] or None   → [..., M]
    On a CPU the product of bf16 numbers is a kernel's where there is one (csrc/cpu/matmul.cpp): float32 weights under
    autocast are rounded as they are read, and their gradients are not. Without bf16 instructions, where torch multiplies
    bf16 up to a hundred times slower than float32, it is float32's product, rounded at the end.
    Raises InputError for shapes that do not fit.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"projection: weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if not _in_bfloat16(x, weight):
        return F.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    many = not torch.compiler.is_compiling() and x.numel() >= FEWEST * x.shape[-1]
    native = fused_backend_for("matmul", given) if many else None
    if native is None and not _SLOW:
        return F.linear(x, weight, bias)
    if not torch.compiler.is_compiling() and needs_grad(*given):
        return _Projection.apply(native, x, weight, bias)
    return _forward(native, x, weight, bias)


def bf16_is_slow() -> bool:
    """Whether torch's own bf16 products are slow on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


_SLOW = bf16_is_slow()


def _in_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would multiply in bf16 on a CPU."""
    if x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") and x.is_floating_point() and x.dtype is not torch.float64:
        return torch.get_autocast_dtype("cpu") is torch.bfloat16
    return x.dtype is weight.dtype is torch.bfloat16


def _matmul(native, a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a b (+ bias)   a [M, K]   b [K, N]   → [M, N]; either may be a transposed view."""
    c = empty((a.shape[0], b.shape[1]), a, dtype)
    (a, across), (b, down) = (_as_stored(t) for t in (a, b))
    native.matmul(c, a, b, None if bias is None else bias.contiguous(), across, down, 0)
    return c


def _as_stored(t: Tensor) -> tuple[Tensor, bool]:
    """A matrix, or its transpose, with contiguous rows, and whether it is the transpose."""
    if t.stride(1) == 1 or t.stride(0) != 1:
        return t if t.stride(1) == 1 else t.contiguous(), False
    return t.t(), True


def _forward(native, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if native is not None:
        y = _matmul(native, x.reshape(-1, x.shape[-1]), weight.t(), torch.bfloat16, bias)
        return y.view(*x.shape[:-1], len(weight))
    with torch.autocast("cpu", enabled=False):
        return _forward_in_float32(x, weight, bias)


def _forward_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.float(), None if bias is None else bias.float()
    if torch.compiler.is_compiling():  # the compiler cuts and fuses as it likes
        return F.linear(x.float(), weight, bias).bfloat16()
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(len(rows), len(weight), dtype=torch.bfloat16)
    for out, part in zip(y.split(ROWS), rows.split(ROWS), strict=True):
        out.copy_(F.linear(part.float(), weight, bias))
    return y.view(*x.shape[:-1], len(weight))


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, x, weight, bias):
        ctx.native = native
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(native, x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        backward = _backward_in_float32 if ctx.native is None else _backward
        with torch.autocast("cpu", enabled=False):
            dx, dweight, dbias = backward(ctx.native, grads, rows, weight, ctx.needs_input_grad[1:])
        dx = None if dx is None else dx.view(x.shape)
        return None, dx, dweight, None if dbias is None else dbias.to(ctx.bias_dtype)


def _backward(native, grads: Tensor, rows: Tensor, weight: Tensor, wanted):
    dx = dweight = dbias = None
    if wanted[0]:
        dx = _matmul(native, grads, weight, rows.dtype)
    if wanted[1] and weight.stride(1) == 1:
        dweight = _matmul(native, grads.t(), rows, weight.dtype)
    elif wanted[1]:  # in the layout of the weights, else autograd copies it
        dweight = _matmul(native, rows.t(), grads, weight.dtype).t()
    if wanted[2]:
        dbias = grads.sum(0)
    return dx, dweight, dbias


def _backward_in_float32(_, grads: Tensor, rows: Tensor, weight: Tensor, wanted):
    wide = weight.float()
    dx = torch.empty_like(rows) if wanted[0] else None
    dweight, dbias = torch.zeros_like(wide), torch.zeros(len(wide))
    for begin in range(0, len(rows), ROWS):
        part = slice(begin, begin + ROWS)
        g = grads[part].float()
        if dx is not None:
            dx[part] = g @ wide
        if wanted[1]:
            dweight.addmm_(g.t(), rows[part].float())
        if wanted[2]:
            dbias += g.sum(0)
    return dx, dweight.to(weight.dtype) if wanted[1] else None, dbias if wanted[2] else None
