"""Attention: checks, which backend runs, and how the gradient is attached."""

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._gradient import why_plain_gradient
from igpt_fast.ops._heads import one_dtype, readable, refusal, slices
from igpt_fast.ops._native import (
    backend_for,
    constant_for_compilers,
    has_cuda_kernels,
    is_reference,
    say_slower,
    why_plain,
)
from igpt_fast.ops._tensors import empty, floats, needs_grad, stream_of
from igpt_fast.patterns import FIELDS, BlockMask, unpack


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    causal: bool | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, as torch's scaled_dot_product_attention with is_causal=causal.

    q [B, H, Tq, D]   k, v [B, H, Tk, D], of one dtype, any strides   scale: 1/sqrt(D) when None
    mask: a compiled pattern, which then decides alone   causal: None: as the mask was compiled for, without one True
    → [B, H, Tq, D] in q's dtype, laid out as [B, Tq, H, D], so that transpose(1, 2).flatten(2) copies nothing.
    Raises InputError for shapes that do not fit, and integers. Source: Image GPT; rows that see nothing give zeros.
    """
    causal = _is_causal(causal, (mask,))
    _check(q, k, v, mask, causal)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        # index: torch.compile then takes a head dim for a constant, also where sizes are dynamic.
        plain = mask is None and one_dtype(q, k, v) and scale > 0
        if plain and _goes_without_kernel(q.device, q.dtype, operator.index(q.size(-1))):
            return _plain(q, k, v, None, causal, scale)
        tables = [] if mask is None else list(mask.to(q.device).tensors)
        return torch.ops.igpt.attention(q, k, v, tables, causal, scale)[0]
    native = native_for(q, k, v, "attention_fwd", scale)
    if native is None:
        return _plain(q, k, v, mask, causal, scale)
    tables = _tables(mask, q.device)
    if needs_grad(q, k, v):
        return _Attention.apply(native, q, k, v, tables, causal, scale)
    return forward_by(native, q, k, v, tables, causal, scale)[0]


def attention_packed(
    qkv: Tensor,
    mask: BlockMask | Sequence[BlockMask | None] | None = None,
    causal: bool | None = None,
    scale: float | None = None,
) -> Tensor:
    """attention() on one fused buffer: the gradient comes back as one fused buffer too. Nothing is stacked or copied,
    but in a compiled graph, where the three gradients are put together.

    qkv [B, T, 3, H, D]: what the fused projection gives, viewed   → [B, T, H, D], contiguous
    mask: one for all heads, or several that are cycled over them; heads of one mask share a call, on strided slices.
    Errors as attention().
    """
    if qkv.ndim != 5 or qkv.size(2) != 3:
        raise InputError(f"attention_packed: expected qkv [B, T, 3, H, D], got {tuple(qkv.shape)}")
    q, k, v = slices(qkv)
    masks = mask if isinstance(mask, Sequence) else (mask,)
    groups, causal = head_groups(masks, q.size(1)), _is_causal(causal, masks)
    for _, each in groups:
        _check(q, k, v, each, causal)
    if not torch.compiler.is_compiling():
        factor = q.size(-1) ** -0.5 if scale is None else scale
        native = native_for(q, k, v, "attention_fwd", factor)
        if native is not None:
            placed = [(heads, _tables(each, qkv.device)) for heads, each in groups]
            if needs_grad(qkv):
                return _AttentionPacked.apply(native, qkv, placed, causal, factor)
            return _forward_packed(native, qkv, placed, causal, factor)[0]
    parts = [attention(*slices(qkv[..., h, :]), each, causal, scale).transpose(1, 2) for h, each in groups]
    if len(parts) == 1:
        return parts[0]
    o = qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
    for (heads, _), part in zip(groups, parts, strict=True):
        o[:, :, heads] = part
    return o


def head_groups(masks: Sequence[BlockMask | None], heads: int) -> list[tuple[slice, BlockMask | None]]:
    """Which heads attend together: slices that share out all of them, each with its mask. Head h has mask h % len."""
    if not masks:
        raise InputError("attention_packed: no mask was given to cycle over the heads; leave it out for none")
    alike = [next(i for i, other in enumerate(masks) if other is mask) for mask in masks]
    groups = []
    for at in dict.fromkeys(alike):
        found = [head for head in range(heads) if alike[head % len(masks)] == at]
        steps = {b - a for a, b in pairwise(found)} or {1}
        if len(steps) == 1:
            each = [slice(found[0], found[-1] + 1, steps.pop())] if found else []
        else:  # evenly apart they are at least from one round of the cycle to the next
            each = [slice(first, heads, len(masks)) for first in dict.fromkeys(h % len(masks) for h in found)]
        groups += [(part, masks[at]) for part in each]
    return groups


def _is_causal(causal: bool | None, masks: Sequence[BlockMask | None]) -> bool:
    if causal is None:
        return next((mask.causal for mask in masks if mask is not None), True)
    if not isinstance(causal, bool):  # torch's own function has dropout's share in this place
        raise InputError(f"attention: causal is {causal!r}; use True or False, or leave it out")
    return causal


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, causal: bool) -> None:
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise InputError(f"attention: expected q [B, H, Tq, D] and k, v [B, H, Tk, D], got {shapes}")
    if (causal or mask is not None) and q.size(2) != k.size(2):
        raise InputError(
            f"attention: causal or masked attention needs as many keys ({k.size(2)}) as queries ({q.size(2)})"
        )
    floats("attention", q=q, k=k, v=v)
    if mask is not None and (mask.tokens != q.size(2) or mask.causal != causal):
        kind = f"{mask.tokens} tokens, causal={mask.causal}"
        raise InputError(
            f"attention: the mask was compiled for {kind}, the call has {q.size(2)} tokens, causal={causal}"
        )


def native_for(q: Tensor, k: Tensor, v: Tensor, op: str, scale: float = 1.0):
    """Who serves `op`. A forward pass whose gradient will be wanted goes where that can be had."""
    if op == "attention_fwd" and needs_grad(q, k, v):
        op = "attention_bwd"
    refused = refusal(q.dtype, q.size(-1), scale) if one_dtype(q, k, v) else "q, k and v differ in dtype"
    return backend_for(op, (q, k, v), refused)


@constant_for_compilers
def _goes_without_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether plain torch is the best for such heads, asked while torch.compile traces a call."""
    if is_reference():
        return False
    with _disable_current_modes():  # torch.export would make it a fake one, which no kernel serves
        like = torch.empty(0, dtype=dtype, device=device)
    return backend_for("attention_bwd", (like,), refusal(dtype, head_dim)) is None


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, causal: bool, scale: float) -> Tensor:
    """torch's own kernels where they mean the same, though not where it transforms what it is given: some have neither
    tangents nor rules for batches. The reference keeps a matrix of all pairs.
    """
    alike = not (is_reference() or why_plain() or q.is_meta)
    seen, all_see = None, True
    if mask is not None:  # what is made while somebody watches is not to be kept
        seen, all_see = mask.dense_on(q.device) if alike else (mask.dense().to(q.device), False)
    if not (alike and scale > 0 and one_dtype(q, k, v) and all_see):
        o = reference.attention.attention(q, k, v, seen, causal, scale)[0]
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal and seen is None, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def _tables(mask: BlockMask | None, device: torch.device) -> tuple[Tensor, ...] | None:
    return None if mask is None else mask.to(device).tensors


def forward_by(native, q, k, v, tables, causal, scale, o=None):
    B, H, T, D = q.shape
    o = empty((B, T, H, D), q).transpose(1, 2) if o is None else o
    lse = empty((B, H, T), q, torch.float32)
    native.attention_fwd(o, lse, *readable(native, q, k, v), tables, causal, scale, stream_of(q))
    return o, lse


def _forward_packed(native, qkv, groups, causal, scale):
    """o [B, T, H, D], each group's heads written where they belong, and the groups' lse."""
    B, T, _, H, D = qkv.shape
    o, lses = empty((B, T, H, D), qkv), []
    for heads, tables in groups:
        part = o[:, :, heads].transpose(1, 2)
        lses.append(forward_by(native, *slices(qkv[..., heads, :]), tables, causal, scale, part)[1])
    return o, lses


def backward_by(native, dqkv, dout, q, k, v, o, lse, tables, causal, scale):
    """Fills the three gradients given as dqkv."""
    several = tables is not None and len(tables) > FIELDS and has_cuda_kernels(native.name)
    room = empty((*lse.shape, 4), q) if several else None
    native.attention_bwd(*dqkv, *readable(native, dout, q, k, v), o, lse, room, tables, causal, scale, stream_of(q))


def grads_like(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Three gradients laid out as [B, T, H, D] in memory."""
    return tuple(empty((t.size(0), t.size(2), t.size(1), t.size(3)), t).transpose(1, 2) for t in (q, k, k))


def seen_by(tables: Sequence[Tensor] | None, q: Tensor) -> Tensor | None:
    """Who sees whom by a mask's tables: bool [T, T] where q is; None for no mask."""
    return unpack(tables, q.size(2)).to(q.device) if tables else None


def _plain_gradient(reason, dout, q, k, v, tables, causal, scale):
    """The three gradients, where no kernel can give them."""
    say_slower(f"the gradient of attention runs on plain torch: {reason}")
    return reference.attention.attention_backward(dout, q, k, v, seen_by(tables, q), causal, scale)


def _plain_packed(reason, dout, qkv, groups, causal, scale):
    """The same for one buffer."""
    parts, places = [], []
    for heads, tables in groups:
        of = torch.tensor(range(qkv.size(3))[heads], device=qkv.device)
        given = dout.index_select(2, of).transpose(1, 2), *slices(qkv.index_select(3, of)), tables
        parts.append(torch.stack([t.transpose(1, 2) for t in _plain_gradient(reason, *given, causal, scale)], 2))
        places.append(of)
    return torch.cat(parts, 3).index_select(3, torch.cat(places).argsort())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, q, k, v, tables, causal, scale):
        o, lse = forward_by(native, q, k, v, tables, causal, scale)
        ctx.native, ctx.rest = native, (tables, causal, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, dout):
        q, k, v, o, lse = ctx.saved_tensors
        if reason := why_plain_gradient((dout,)):
            return None, *_plain_gradient(reason, dout, q, k, v, *ctx.rest), None, None, None
        grads = grads_like(q, k)
        backward_by(ctx.native, grads, dout, q, k, v, o, lse, *ctx.rest)
        return None, *grads, None, None, None


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, native, qkv, groups, causal, scale):
        o, lses = _forward_packed(native, qkv, groups, causal, scale)
        ctx.native, ctx.groups, ctx.rest = native, groups, (causal, scale)
        ctx.save_for_backward(qkv, o, *lses)
        return o

    @staticmethod
    def backward(ctx, dout):
        qkv, o, *lses = ctx.saved_tensors
        if reason := why_plain_gradient((dout,)):
            return None, _plain_packed(reason, dout, qkv, ctx.groups, *ctx.rest), None, None, None
        dqkv = empty(qkv.shape, qkv)
        for (heads, tables), lse in zip(ctx.groups, lses, strict=True):
            grads, given = slices(dqkv[..., heads, :]), slices(qkv[..., heads, :])
            done, found = (t[:, :, heads].transpose(1, 2) for t in (dout, o))
            backward_by(ctx.native, grads, done, *given, found, lse, tables, *ctx.rest)
        return None, dqkv, None, None, None
