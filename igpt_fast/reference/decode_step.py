"""What one pixel more means: the whole model for one slot, with a cache of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igpt_fast.reference import attention_decode, linear
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

    linear: Callable = linear.linear
    cache_append: Callable = attention_decode.cache_append
    attention_decode: Callable = attention_decode.attention_decode


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
        at = slot
        length = cache.shape[4] if pages is None else len(wpe)
        lengths = (slot + 1 - P).int().repeat(len(pixels))
    else:
        at, length, lengths = torch.full((1,), slot, device=cache.device), slot + 1 - P, None
    place = at - P if pages is None else pages[at // PAGE] * PAGE + at % PAGE
    places, h = place.int().repeat(len(pixels)), wte[pixels] + wpe[at]
    for index, (w, kept) in enumerate(zip(layers, cache, strict=True)):
        shared = () if prefix is None else prefix[index].unbind(1)
        qkv = kit.linear(h, w.qkv, w.qkv_bias, w.ln_1, eps=eps)
        q, k, v = qkv.unflatten(-1, (3, kept.shape[2], -1)).unsqueeze(-2).unbind(1)  # [B, H, 1, D]
        kit.cache_append(*kept.unbind(1), k, v, lengths=places)
        mixed = _attention(kit, q, *kept.unbind(1), length, lengths, seen[index] if seen else (None,), pages, shared)
        h = kit.linear(mixed.flatten(1), w.attn_proj, w.attn_proj_bias, residual=h)
        z = kit.linear(h, w.fc, w.fc_bias, w.ln_2, eps=eps, gelu=True)
        h = kit.linear(z, w.mlp_proj, w.mlp_proj_bias, residual=h)
    return kit.linear(h, wtet, norm=ln_f, eps=eps)


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
