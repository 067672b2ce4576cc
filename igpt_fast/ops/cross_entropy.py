"""Cross-entropy: checks, which backend runs, and how the gradient is attached."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for, check_range, empty, needs_grad, same_device, stream_of


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of integer targets, in nats.

    logits [..., V] float   targets [...] int64 in 0..V-1   reduction "mean" → float32 scalar, "none" → float32 [...]
    (float64 for float64)
    Raises InputError for other shapes, another reduction, or a target out of range. On a GPU asking would make the host
    wait: such a row's loss and gradient are NaN there instead (IGPT_DEBUG=1 asks).
    """
    if not logits.ndim or targets.shape != logits.shape[:-1]:
        raise InputError(f"cross_entropy: targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    if reduction not in ("mean", "none"):
        raise InputError(f'cross_entropy: reduction {reduction!r} is not known; use "mean" or "none"')
    same_device("cross_entropy", logits=logits, targets=targets)
    if torch.compiler.is_compiling():
        loss = torch.ops.igpt.cross_entropy(logits, targets)[0]
        return loss.mean() if reduction == "mean" else loss
    check_range("cross_entropy", "targets", targets, logits.shape[-1])
    native = backend_for("cross_entropy_fwd", (logits,))
    if native is None:
        check_range("cross_entropy", "targets", targets, logits.shape[-1], on_cpu=True)
        return reference.cross_entropy.cross_entropy(logits, targets, reduction)
    try:
        if needs_grad(logits):
            loss = _CrossEntropy.apply(native, logits, targets)
        else:
            loss = _forward(native, logits, targets)[0]
    except ValueError as error:  # the kernel's own check of the targets
        raise InputError(str(error)) from None
    return loss.mean() if reduction == "mean" else loss


def _forward(native, logits, targets):
    logits, targets = logits.contiguous(), targets.contiguous()
    loss, lse = empty(targets.shape, logits, torch.float32), empty(targets.shape, logits, torch.float32)
    native.cross_entropy_fwd(loss, lse, logits, targets, stream_of(logits))
    return loss, lse


def _backward(native, dloss, logits, targets, lse):
    logits = logits.contiguous()
    dlogits = empty(logits.shape, logits)
    native.cross_entropy_bwd(dlogits, dloss.contiguous(), logits, targets.contiguous(), lse, stream_of(logits))
    return dlogits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, logits, targets):
        loss, lse = _forward(native, logits, targets)
        ctx.native = native
        ctx.save_for_backward(logits, targets, lse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return None, _backward(ctx.native, dloss, *ctx.saved_tensors), None


@torch.library.custom_op("igpt::cross_entropy", mutates_args=())
def _cross_entropy_op(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    native = backend_for("cross_entropy_fwd", (logits,))
    if native is not None:
        return _forward(native, logits, targets)
    return reference.cross_entropy.cross_entropy(logits, targets, "none"), torch.logsumexp(logits.float(), -1)


@_cross_entropy_op.register_fake
def _(logits, targets):
    loss = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, torch.empty_like(loss, dtype=torch.float32)


@torch.library.custom_op("igpt::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward_op(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    native = backend_for("cross_entropy_bwd", (logits,))
    if native is not None:
        return _backward(native, dloss, logits, targets, lse)
    return reference.cross_entropy.cross_entropy_backward(dloss, logits, targets)


@_cross_entropy_backward_op.register_fake
def _(dloss, logits, targets, lse):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dloss, _):
    return torch.ops.igpt.cross_entropy_backward(dloss, *ctx.saved_tensors), None


_cross_entropy_op.register_autograd(_autograd, setup_context=_setup)
