"""Cross-entropy: checks, which backend runs, and how the gradient is attached."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._native import backend_for
from igpt_fast.ops._tensors import check_range, empty, needs_grad, same_device, stream_of


def cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of integer targets, in nats.

    logits [..., V] float   target [...] int64 in 0..V-1   reduction "mean" → float32 scalar, "none" → float32 [...]
    (float64 for float64)
    Raises InputError for other shapes or dtypes, another reduction, or a target out of range. On a GPU asking would
    make the host wait: such a row's loss and gradient are NaN there instead (IGPT_DEBUG=1 asks).
    """
    if not logits.ndim or target.shape != logits.shape[:-1]:
        raise InputError(f"cross_entropy: target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}")
    if target.dtype is not torch.int64:
        raise InputError(f"cross_entropy: target is {target.dtype}; give int64")
    if reduction not in ("mean", "none"):
        raise InputError(f'cross_entropy: reduction {reduction!r} is not known; use "mean" or "none"')
    same_device("cross_entropy", logits=logits, target=target)
    if torch.compiler.is_compiling():
        loss = torch.ops.igpt.cross_entropy(logits, target)[0]
        return loss.mean() if reduction == "mean" else loss
    check_range("cross_entropy", "target", target, logits.shape[-1])
    if backend_for("cross_entropy_fwd", (logits,)) is None:
        check_range("cross_entropy", "target", target, logits.shape[-1], on_cpu=True)
        return reference.cross_entropy.cross_entropy(logits, target, reduction)
    try:
        loss, _ = (_with_gradient if needs_grad(logits) else _forward)(logits, target)
    except ValueError as error:  # the kernel's own check of the targets
        raise InputError(str(error)) from None
    return loss.mean() if reduction == "mean" else loss


def _forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """loss, lse"""
    native = backend_for("cross_entropy_fwd", (logits,))
    if native is None:
        return reference.cross_entropy.cross_entropy(logits, target, "none"), torch.logsumexp(logits.float(), -1)
    logits, target = logits.contiguous(), target.contiguous()
    loss, lse = empty(target.shape, logits, torch.float32), empty(target.shape, logits, torch.float32)
    native.cross_entropy_fwd(loss, lse, logits, target, stream_of(logits))
    return loss, lse


def _backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor) -> Tensor:
    native = backend_for("cross_entropy_bwd", (logits,))
    if native is None:
        return reference.cross_entropy.cross_entropy_backward(dloss, logits, target)
    logits = logits.contiguous()
    dlogits = empty(logits.shape, logits)
    native.cross_entropy_bwd(dlogits, dloss.contiguous(), logits, target.contiguous(), lse, stream_of(logits))
    return dlogits


def _like(logits, target):
    loss = logits.new_empty(target.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, torch.empty_like(loss, dtype=torch.float32)


def _like_backward(dloss, logits, target, lse):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, backward, dloss, _):
    return backward(dloss, *ctx.saved_tensors), None


_with_gradient = differentiable("cross_entropy", _forward, _like, _backward, _like_backward, _setup, _gradient)
