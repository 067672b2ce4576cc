"""Attention as torch.compile sees it: two registered ops, whose insides it leaves alone."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.ops._tensors import Tensors
from igpt_fast.ops.attention import backward_by, forward_by, grads_like, native_for, seen_by


@torch.library.custom_op("igpt::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensors, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    native = native_for(q, k, v, "attention_fwd", scale)
    if native is not None:
        return forward_by(native, q, k, v, tuple(mask) or None, causal, scale)
    o, lse = reference.attention.attention(q, k, v, seen_by(mask, q), causal, scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2), lse.float()


@_attention_op.register_fake
def _(q, k, v, mask, causal, scale):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("igpt::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensors,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    native = native_for(q, k, v, "attention_bwd", scale)
    grads = grads_like(q, k)
    if native is not None:
        backward_by(native, grads, dout, q, k, v, o, lse, tuple(mask) or None, causal, scale)
        return grads
    found = reference.attention.attention_backward(dout, q, k, v, seen_by(mask, q), causal, scale)
    return tuple(g.copy_(f) for g, f in zip(grads, found, strict=True))


@_attention_backward_op.register_fake
def _(dout, q, k, v, o, lse, mask, causal, scale):
    return tuple(t.new_empty(t.size(0), t.size(2), t.size(1), t.size(3)).transpose(1, 2) for t in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, *mask)


def _autograd(ctx, dout, _):
    q, k, v, o, lse, *mask = ctx.saved_tensors
    grads = torch.ops.igpt.attention_backward(dout, q, k, v, o, lse, mask, ctx.causal, ctx.scale)
    return *grads, [None] * len(mask), None, None


_attention_op.register_autograd(_autograd, setup_context=_setup)
