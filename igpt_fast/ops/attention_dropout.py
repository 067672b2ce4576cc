"""Causal attention with dropout on its weights, as GPTs are often trained: checks, which backend, the gradient."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for, empty, fused_backend_for, needs_grad, rows
from igpt_fast.ops.attention import refused_head_dim, slices
from igpt_fast.ops.dropout import checked


def attention_dropout(qkv: Tensor, p: float, seed: int, scale: float | None = None) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v on one fused buffer, with its gradient.

    qkv [B, T, 3, H, D], as attention_packed   p in [0, 1)   seed 0 to 2^63 - 1   scale: 1/sqrt(D) when None
    → [B, T, H, D], contiguous. The seed and a weight's place decide whether it is kept, see the reference: no mask is
    stored, and the same seed keeps the same weights anywhere. p is taken down to a multiple of 2^-24.
    Raises InputError for shapes that do not fit, and p or a seed out of range.
    """
    if qkv.ndim != 5 or qkv.size(2) != 3:
        raise InputError(f"attention_dropout: expected qkv [B, T, 3, H, D], got {tuple(qkv.shape)}")
    p = checked("attention_dropout", p, seed)
    scale = qkv.size(-1) ** -0.5 if scale is None else scale
    compiling = torch.compiler.is_compiling()
    native = None if compiling else backend_for("attention_dropout_fwd", (qkv,), refused_head_dim(qkv.size(-1)))
    if native is None:
        q, k, v = slices(qkv)
        out = reference.attention_dropout.attention_dropout(q, k, v, scale, p, seed)
        return out.transpose(1, 2).contiguous()
    if needs_grad(qkv):
        return _AttentionDropout.apply(native, qkv, scale, p, seed)
    return _forward(native, qkv, scale, p, seed)[0]


def has_dropout_kernel(qkv: Tensor) -> bool:
    """Whether attention_dropout would be served by a kernel; nothing is logged where no backend has one."""
    return fused_backend_for("attention_dropout_fwd", (qkv,), refused_head_dim(qkv.size(-1))) is not None


def _forward(native, qkv, scale, p, seed):
    B, T, _, H, D = qkv.shape
    o, lse = empty((B, T, H, D), qkv), empty((B, H, T), qkv, torch.float32)
    inputs = [rows(t) for t in slices(qkv)]
    native.attention_dropout_fwd(o.transpose(1, 2), lse, *inputs, scale, p, seed, 0)
    return o, lse


class _AttentionDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, qkv, scale, p, seed):
        o, lse = _forward(native, qkv, scale, p, seed)
        ctx.native, ctx.rest = native, (scale, p, seed)
        ctx.save_for_backward(qkv, o, lse)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        qkv, o, lse = ctx.saved_tensors
        dqkv = empty(qkv.shape, qkv)
        inputs = [rows(t) for t in (dout.transpose(1, 2), *slices(qkv))]
        ctx.native.attention_dropout_bwd(*slices(dqkv), *inputs, o.transpose(1, 2), lse, *ctx.rest, 0)
        return None, dqkv, None, None, None
