"""The linear maps of whole images: torch's own product, kept away from the one case in which torch has no fast one."""

import typing
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.ops._again import recipe_of
from igpt_fast.ops._gradient import differentiable, why_plain_gradient
from igpt_fast.ops._native import why_plain
from igpt_fast.ops._product import by_onednn, for_onednn, outer, product
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
    if torch.compiler.is_compiling() and for_onednn(x, weight, bias):
        return torch.ops.igpt.projection(x, weight, bias)
    if why_plain():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or not needs_grad(x, weight, bias):
        return _forward(x, weight, bias)
    own = x if weight.requires_grad else None  # else x is not wanted for the backward pass
    recipe = None if own is None else recipe_of(x)
    if recipe:
        return _Projection.apply(x, weight, bias, recipe.make, recipe.plain, *recipe.parts)
    if _in_float32(x) or by_onednn(x, weight, bias):
        return _Projection.apply(x, weight, bias, None, None, own)
    return F.linear(x, weight, bias)


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
        return product(x, weight, bias)
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
    """Keeps what x can be made of: make(*parts), in torch's own ops plain(*parts); where these are None, x itself, or
    None where the weight wants no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, make, plain, *parts):
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *parts)
        ctx.make, ctx.plain, ctx.in_float32 = make, plain, _in_float32(x)
        ctx.given = (weakref.ref(x), x._version) if make else None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        y = _forward(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be changed in place

    @staticmethod
    def backward(ctx, dy):
        weight, *parts = ctx.saved_tensors
        plain = bool(why_plain_gradient((dy,)))
        with torch.autocast("cpu", enabled=False):
            given = ctx.given[0]() if plain and ctx.given else None
            if given is not None and given._version == ctx.given[1]:
                x = given  # whoever asks for its derivatives holds it
            else:
                make = ctx.plain if plain else ctx.make
                x = make(*parts) if make else parts[0]
            what = _rows(dy), None if x is None else _rows(x), weight, ctx.needs_input_grad
            in_float32 = ctx.in_float32 and not plain
            found = _backward_in_float32(*what, ctx.dtypes[0]) if in_float32 else _backward(*what)
        dx, *rest = (None if t is None else t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True))
        dx = None if dx is None else dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, *rest, None, None, *(None for _ in parts)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias, in dy's dtype.   dy [N, M]   x [N, K], for dweight alone   weight [M, K], for dx alone"""
    dweight = outer(dy, x.to(dy.dtype)) if wanted[1] else None
    return product(dy, weight.to(dy.dtype).t()) if wanted[0] else None, dweight, dy.sum(0) if wanted[2] else None


def _backward_in_float32(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """As _backward; dx is rounded to `dtype` part by part."""
    wide = weight.float() if wanted[0] else None
    dx = dy.new_empty(len(dy), wide.shape[1], dtype=dtype) if wanted[0] else None
    dweight = dy.new_zeros(dy.shape[1], x.shape[1], dtype=torch.float32) if wanted[1] else None
    dbias = dy.new_zeros(dy.shape[1], dtype=torch.float32) if wanted[2] else None
    for begin in range(0, len(dy), ROWS):
        part = slice(begin, begin + ROWS)
        g = dy[part].float()
        if wanted[0]:
            dx[part] = g @ wide
        if wanted[1]:
            dweight.addmm_(g.t(), x[part].float())
        if wanted[2]:
            dbias += g.sum(0)
    return dx, dweight, dbias


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


def _compiled_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, wanted: typing.Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        found = _backward(_rows(dy), None if x is None else _rows(x), weight, wanted)
    dx, dweight, dbias = (dy.new_empty(0) if t is None else t for t in found)
    return dx.view(*dy.shape[:-1], dx.shape[-1]) if wanted[0] else dx, dweight, dbias


def _like(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_backward(dy, x, weight, wanted):
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if wanted[0] else dy.new_empty(0)
    dweight = dy.new_empty(dy.shape[-1], x.shape[-1]) if wanted[1] else dy.new_empty(0)
    return dx, dweight, dy.new_empty(dy.shape[-1] if wanted[2] else 0)


def _setup(ctx, inputs, output):
    (x, weight, _), (for_x, for_weight) = inputs, ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None)


def _gradient(ctx, backward, dy):
    wanted = list(ctx.needs_input_grad[:3])
    found = backward(dy, *ctx.saved_tensors, wanted)
    return tuple(t if want else None for t, want in zip(found, wanted, strict=True))


# The compiler takes it where its own product would be MKL's.
differentiable("projection", _compiled, _like, _compiled_backward, _like_backward, _setup, _gradient)
