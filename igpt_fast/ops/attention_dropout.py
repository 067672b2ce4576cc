"""Causal attention with dropout on its weights, as GPTs are often trained: checks, which backend, the gradient."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._heads import readable, refusal, slices
from igpt_fast.ops._native import backend_for, serves
from igpt_fast.ops._tensors import empty, floats, needs_grad, stream_of
from igpt_fast.ops.dropout import checked


def attention_dropout(qkv: Tensor, p: float, seed: int, scale: float | None = None) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v on one fused buffer, with its gradient.

    qkv [B, T, 3, H, D], as attention_packed   p in [0, 1)   seed 0 to 2^63 - 1   scale: 1/sqrt(D) when None
    → [B, T, H, D], contiguous. The seed and a weight's place decide whether it is kept, see the reference: no mask is
    stored, and the same seed keeps the same weights anywhere, as each replay of a CUDA graph does. p is taken down to a
    multiple of 2^-24.
    Raises InputError for shapes that do not fit, integers, and p or a seed out of range.
    """
    if qkv.ndim != 5 or qkv.size(2) != 3:
        raise InputError(f"attention_dropout: expected qkv [B, T, 3, H, D], got {tuple(qkv.shape)}")
    floats("attention_dropout", qkv=qkv)
    p = checked("attention_dropout", p, seed)
    scale = qkv.size(-1) ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        return torch.ops.igpt.attention_dropout(qkv, scale, p, seed)[0]
    if needs_grad(qkv) and _native(qkv, scale) is not None:  # the reference has torch's own gradient
        return _with_gradient(qkv, scale, p, seed)[0]
    return _forward(qkv, scale, p, seed)[0]


def has_attention_dropout_kernel(qkv: Tensor, scale: float) -> bool:
    """Whether attention_dropout would be served by a kernel; nothing is logged where it would not."""
    return serves("attention_dropout_fwd", (qkv,), refusal(qkv.dtype, qkv.size(-1), scale))


def _native(qkv: Tensor, scale: float):
    return backend_for("attention_dropout_fwd", (qkv,), refusal(qkv.dtype, qkv.size(-1), scale))


def _forward(qkv: Tensor, scale: float, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """o, lse"""
    native, (B, T, _, H, D) = _native(qkv, scale), qkv.shape
    if native is None:
        o, lse = reference.attention_dropout.attention_dropout(*slices(qkv), scale, p, seed)
        return o.transpose(1, 2).contiguous(), lse.float()
    o, lse = empty((B, T, H, D), qkv), empty((B, H, T), qkv, torch.float32)
    inputs = readable(native, *slices(qkv))
    native.attention_dropout_fwd(o.transpose(1, 2), lse, *inputs, scale, p, seed, stream_of(qkv))
    return o, lse


def _backward(dout: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, p: float, seed: int) -> Tensor:
    native, dout = _native(qkv, scale), dout.transpose(1, 2)
    if native is None:
        grads = reference.attention_dropout.attention_dropout_backward(dout, *slices(qkv), scale, p, seed)
        return torch.stack([t.transpose(1, 2) for t in grads], 2)
    dqkv = empty(qkv.shape, qkv)
    given = readable(native, dout, *slices(qkv))
    native.attention_dropout_bwd(*slices(dqkv), *given, o.transpose(1, 2), lse, scale, p, seed, stream_of(qkv))
    return dqkv


def _like(qkv, scale, p, seed):
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


def _like_backward(dout, qkv, o, lse, scale, p, seed):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    qkv, *ctx.rest = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, o, lse)


def _gradient(ctx, backward, dout, _):
    return backward(dout, *ctx.saved_tensors, *ctx.rest), None, None, None


_with_gradient = differentiable("attention_dropout", _forward, _like, _backward, _like_backward, _setup, _gradient)
