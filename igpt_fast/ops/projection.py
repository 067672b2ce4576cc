"""The linear maps of whole images: torch's own product, kept away from the one case in which torch has no fast one."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.ops._again import recipe_of
from igpt_fast.ops._gradient import why_plain_gradient
from igpt_fast.ops._native import why_plain
from igpt_fast.ops._tensors import needs_grad

ROWS = 1024  # converted at a time: their floats stay in the cache


def projection(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ (+ bias), with gradients, as torch.nn.functional.linear: also in its dtypes and under autocast.

    x [..., K]   weight [M, K]   bias [M] or None   → [..., M]
    On a CPU without bf16 instructions torch multiplies bf16 far slower than float32. There the product of bf16 numbers
    is float32's, rounded at the end; float32 weights under autocast then keep all their bits.
    Raises InputError for shapes that do not fit.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"projection: weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"projection: bias {list(bias.shape)} does not fit weight {list(weight.shape)}")
    recipe = recipe_of(x) if weight.requires_grad else None  # else x is not wanted for the backward pass
    if (recipe is None and not _in_float32(x)) or why_plain():
        return F.linear(x, weight, bias)
    if not torch.compiler.is_compiling() and needs_grad(x, weight, bias):
        again = (None, None, x) if recipe is None else (recipe.make, recipe.plain, *recipe.parts)
        return _Projection.apply(x, weight, bias, *again)
    return _forward(x, weight, bias)


def bf16_is_slow() -> bool:
    """Whether torch's own bf16 products are slow on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


_SLOW = bf16_is_slow()


def _in_float32(x: Tensor) -> bool:
    if not _SLOW or x.device.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled("cpu") and x.is_floating_point() and x.dtype is not torch.float64
    return (torch.get_autocast_dtype("cpu") if autocast else x.dtype) is torch.bfloat16


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _in_float32(x):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        weight = weight.float()
        bias = None if bias is None else bias.float()
        if torch.compiler.is_compiling():  # the compiler cuts and fuses as it likes
            return F.linear(x.float(), weight, bias).bfloat16()
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(weight), dtype=torch.bfloat16)
        for out, part in zip(y.split(ROWS), rows.split(ROWS), strict=True):
            out.copy_(F.linear(part.float(), weight, bias))
        return y.view(*x.shape[:-1], len(weight))


class _Projection(torch.autograd.Function):
    """Keeps what x can be made of: make(*parts), in torch's own ops plain(*parts); where these are None, x itself."""

    @staticmethod
    def forward(ctx, x, weight, bias, make, plain, *parts):
        ctx.save_for_backward(weight, *parts)
        ctx.make, ctx.plain, ctx.in_float32 = make, plain, _in_float32(x)
        ctx.given = weakref.ref(x), x._version
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        y = _forward(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be changed in place

    @staticmethod
    def backward(ctx, dy):
        weight, *parts = ctx.saved_tensors
        plain = bool(why_plain_gradient((dy,)))
        with torch.autocast("cpu", enabled=False):
            given = ctx.given[0]() if plain else None
            version = ctx.given[1]
            if given is not None and given._version == version:
                x = given  # whoever asks for its derivatives holds it
            else:
                make = ctx.plain if plain else ctx.make
                x = make(*parts) if make else parts[0]
            backward = _backward_in_float32 if ctx.in_float32 and not plain else _backward
            found = backward(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), weight, ctx.needs_input_grad)
        dx, *rest = (None if t is None else t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True))
        return None if dx is None else dx.view(x.shape), *rest, None, None, *(None for _ in parts)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, in dy's dtype.   dy [N, M]   x [N, K]"""
    dweight = dy.t() @ x.to(dy.dtype) if wanted[1] else None
    return dy @ weight.to(dy.dtype) if wanted[0] else None, dweight, dy.sum(0) if wanted[2] else None


def _backward_in_float32(dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    wide = weight.float()
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.zeros_like(wide)
    dbias = wide.new_zeros(len(wide))
    for begin in range(0, len(x), ROWS):
        part = slice(begin, begin + ROWS)
        g = dy[part].float()
        if dx is not None:
            dx[part] = g @ wide
        if wanted[1]:
            dweight.addmm_(g.t(), x[part].float())
        if wanted[2]:
            dbias += g.sum(0)
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None
