"""What one pixel more means: the whole model for one slot, with a cache of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igpt_fast.reference import activation, attention_decode, linear, norm
from igpt_fast.reference.attention_decode import PAGE


class LayerWeights(NamedTuple):
    """One block: norms [d], qkv [3 d, d] with q before k before v, attn_proj [d, d], fc [m, d], mlp_proj [d, m]."""

    ln_1: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    attn_proj: Tensor
    attn_proj_bias: Tensor | None
    ln_2: Tensor
    fc: Tensor
    fc_bias: Tensor | None
    mlp_proj: Tensor
    mlp_proj_bias: Tensor | None


class Kit(NamedTuple):
    """The ops that a step is made of."""

    rms_norm: Callable = norm.rms_norm
    linear: Callable = linear.linear
    attention_decode: Callable = attention_decode.attention_decode
    bias_quick_gelu: Callable = activation.bias_quick_gelu


def decode_step(
    cache: Tensor,
    pixels: Tensor,
    wte: Tensor,
    wpe: Tensor,
    layers: Sequence[LayerWeights],
    ln_f: Tensor,
    wtet: Tensor,
    slot: int | Tensor,
    eps: float = 1e-5,
    kit: Kit = Kit(),
    seen: Sequence[Sequence[Any]] = (),
    pages: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Put the newest pixels into the cache's slot → logits of the next ones.

    cache [L, B, 2, H, T, D], k before v, holds the slots below `slot` and receives `slot`   pixels [B]   wte [V, d]
    wpe [T, d]   ln_f [d]   wtet [V, d]   → [B, V]
    seen: of each layer one or more masks as the kit's attention takes them, here bool [T, T], or None, which shows all;
    head h looks through the entry h % their number. The queries are row `slot`.
    pages [tiles]: slot t of the sequence is at pages[t // 64] * 64 + t % 64 of the cache, without it at t
    slot: a number, or int64 [1] on the cache's device, which is then never waited for
    prefix [L, M, 2, H, P, D]: stands before the slots of each B / M neighbours, whose cache then begins with slot P
    """
    P = 0 if prefix is None else prefix.shape[4]
    if isinstance(slot, Tensor):
        at, length = slot, cache.shape[4] if pages is None else len(wpe)
        lengths = (slot + 1 - P).int().expand(len(pixels))
    else:
        at, length, lengths = torch.full((1,), slot, device=cache.device), slot + 1 - P, None
    place = at - P if pages is None else pages[at // PAGE].long() * PAGE + at % PAGE
    h, delta = wte[pixels] + wpe[at], None
    for index, (w, kept) in enumerate(zip(layers, cache, strict=True)):
        shared = () if prefix is None else prefix[index].unbind(1)
        x, h = _norm(kit, h, delta, w.ln_1, eps)
        qkv = kit.linear(x, w.qkv, w.qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, kept.shape[2], -1)).unsqueeze(-2).unbind(1)  # [B, H, 1, D]
        kept.index_copy_(3, place, torch.stack((k, v), 1).to(kept.dtype))
        mixed = _attention(kit, q, *kept.unbind(1), length, lengths, seen[index] if seen else (None,), pages, shared)
        x, h = _norm(kit, h, kit.linear(mixed.flatten(1), w.attn_proj, w.attn_proj_bias), w.ln_2, eps)
        delta = kit.linear(kit.bias_quick_gelu(kit.linear(x, w.fc), w.fc_bias), w.mlp_proj, w.mlp_proj_bias)
    return kit.linear(_norm(kit, h, delta, ln_f, eps)[0], wtet)


def _norm(kit: Kit, h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of h + delta, and h + delta."""
    return (kit.rms_norm(h, weight, eps), h) if delta is None else kit.rms_norm(delta, weight, eps, h)


def _attention(
    kit: Kit,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    lengths: Tensor | None,
    seen: Sequence[Any],
    pages: Tensor | None,
    shared: Sequence[Tensor],
) -> Tensor:
    """A head's own mask: those that share one are a slice of the heads."""
    count = len(seen)
    if count == 1:
        return kit.attention_decode(q, k, v, length, None, lengths, seen[0], shared, pages=pages)
    mixed = torch.empty_like(q)
    for first in range(min(count, q.size(1))):
        some = slice(first, None, count)
        parts = q[:, some], k[:, some], v[:, some]
        before = [x[:, some] for x in shared]
        mixed[:, some] = kit.attention_decode(*parts, length, None, lengths, seen[first], before, pages=pages)
    return mixed
