"""The head with its loss: a linear map and cross-entropy without the logits between them, where a kernel can."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._native import fused_backend_for
from igpt_fast.ops._tensors import empty, needs_grad, rows, same_device, stream_of
from igpt_fast.ops.cross_entropy import cross_entropy
from igpt_fast.ops.projection import projection

ROWS = 128  # of a kernel's tile
# Bytes of dlogits at a time: of 512 colours and 16 bits 32,768 rows, 32 images of 32 x 32. Where they are all, the
# weight's gradient is one product; halves would have to be added up (benchmarks/results/PLAN.md, 6).
WORKSPACE = 32 << 20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the logits hidden weightᵀ, in nats, one value a row, with gradients for hidden and weight.

    hidden [..., C] float   weight [V, C]   target [...] int64 in 0..V-1   → [...] float32, float64 for float64
    The fused kernels (on a GPU, where C is a multiple of 8) never write the logits: the backward pass makes them again,
    for 32 MB of their gradient at a time. Elsewhere it is cross_entropy(projection(hidden, weight), target), logits and
    all. Under autocast the product is in autocast's dtype. Raises InputError for shapes, dtypes or devices that do not
    fit, or a target out of range; on a GPU asking would make the host wait: such a row's loss and gradient are NaN
    there, and so is the gradient of the weight.
    """
    if weight.ndim != 2 or not len(weight) or hidden.ndim < 1 or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"weight {list(weight.shape)} does not fit hidden {list(hidden.shape)}"
        raise InputError(f"linear_cross_entropy: {shapes}; expected [V, C] and [..., C]")
    if target.shape != hidden.shape[:-1] or target.dtype is not torch.int64:
        raise InputError(
            f"linear_cross_entropy: target is {target.dtype} {list(target.shape)}; give int64 {list(hidden.shape[:-1])}"
        )
    kind = hidden.device.type
    same_device("linear_cross_entropy", hidden=hidden, weight=weight, target=target)
    dtype = hidden.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif weight.dtype is not dtype:
        raise InputError(f"linear_cross_entropy: weight is {weight.dtype}, hidden {dtype}; convert one of them")
    compiling = torch.compiler.is_compiling()
    native = None if compiling else _native(hidden, dtype)
    if not hidden.is_cuda if compiling else native is None:
        return cross_entropy(projection(hidden, weight), target, reduction="none")
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if compiling:
        return torch.ops.igpt.linear_cross_entropy(hidden, weight, target)[0]
    return (_with_gradient if needs_grad(hidden, weight) else _forward)(hidden, weight, target)[0]


def _native(hidden: Tensor, dtype: torch.dtype):
    """The backend with a kernel for hidden, and a weight like it, in `dtype`; None where the op is composed."""
    columns = hidden.shape[-1]
    refusal = f"{columns} columns are no multiple of 8" if columns % 8 or not columns else None
    return fused_backend_for("linear_cross_entropy_fwd", (hidden.new_empty(0, dtype=dtype),), refusal)


def _rows(t: Tensor) -> Tensor:
    """`t` as [rows, C], copied only where rows do not begin at multiples of 16 bytes."""
    return rows(t.reshape(-1, t.shape[-1]), sixteens=True)


def _forward(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """loss, lse"""
    native = _native(hidden, hidden.dtype)
    if native is None:
        loss = reference.linear_cross_entropy.linear_cross_entropy(hidden, weight, target)
        return loss, torch.zeros_like(loss)  # the reference's gradient needs no lse
    loss, lse = (empty(target.shape, hidden, torch.float32) for _ in range(2))
    inputs = _rows(hidden), _rows(weight), target.reshape(-1).contiguous()
    native.linear_cross_entropy_fwd(loss.view(-1), lse.view(-1), *inputs, stream_of(hidden))
    return loss, lse


def _backward(dloss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    native = _native(hidden, hidden.dtype)
    if native is None:
        return reference.linear_cross_entropy.linear_cross_entropy_backward(dloss, hidden, weight, target)
    x, weight, target = _rows(hidden), _rows(weight), target.reshape(-1).contiguous()
    dloss, lse, stream = dloss.reshape(-1).contiguous(), lse.view(-1), stream_of(hidden)
    width = (len(weight) + 7) // 8 * 8
    step = max(1, WORKSPACE // (ROWS * width * x.element_size())) * ROWS
    room = empty((min(step, len(x)), width), x)
    dx = empty(x.shape, x)
    dweight = None
    with torch.autocast(x.device.type, enabled=False):
        for begin in range(0, len(x), step):
            part = slice(begin, begin + step)
            dlogits = room[: len(x[part])]
            native.linear_cross_entropy_dlogits(dlogits, dloss[part], x[part], weight, target[part], lse[part], stream)
            dlogits = dlogits[:, : len(weight)]
            torch.mm(dlogits, weight, out=dx[part])
            share = dlogits.t() @ x[part]
            if step < len(x):
                share = share.to(torch.promote_types(x.dtype, torch.float32))
            dweight = share if dweight is None else dweight.add_(share)
    if dweight is None:
        dweight = torch.zeros_like(weight)
    return dx.view(hidden.shape), dweight.to(weight.dtype)


def _like(hidden, weight, target):
    loss = hidden.new_empty(target.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(loss)


def _like_backward(dloss, hidden, weight, target, lse):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (hidden, weight))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, backward, dloss, _):
    return *backward(dloss, *ctx.saved_tensors), None


_with_gradient = differentiable("linear_cross_entropy", _forward, _like, _backward, _like_backward, _setup, _gradient)
