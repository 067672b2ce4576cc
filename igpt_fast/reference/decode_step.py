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
    slot: int,
    eps: float = 1e-5,
    kit: Kit = Kit(),
    seen: Sequence[Sequence[Any]] = (),
    pages: Tensor | None = None,
) -> Tensor:
    """Put the newest pixels into the cache's slot → logits of the next ones.

    cache [L, B, 2, H, T, D], k before v, holds the slots below `slot` and receives `slot`   pixels [B]   wte [V, d]
    wpe [T, d]   ln_f [d]   wtet [V, d]   → [B, V]
    seen: of each layer one or more masks as the kit's attention takes them, here bool [T, T], or None, which shows all;
    head h looks through the entry h % their number. The queries are row `slot`.
    pages [tiles]: slot t of the sequence is at pages[t // 64] * 64 + t % 64 of the cache, without it at t
    """
    place = torch.full((1,), slot, device=cache.device)
    if pages is not None:  # as a tensor: a GPU would have to be waited for to make it a number
        place = pages[slot // PAGE].long().view(1) * PAGE + slot % PAGE
    h = wte[pixels] + wpe[slot]
    for index, (w, kept) in enumerate(zip(layers, cache, strict=True)):
        qkv = kit.linear(kit.rms_norm(h, w.ln_1, eps), w.qkv, w.qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, kept.shape[2], -1)).unsqueeze(-2).unbind(1)  # [B, H, 1, D]
        kept.index_copy_(3, place, torch.stack((k, v), 1).to(kept.dtype))
        mixed = _attention(kit, q, *kept.unbind(1), slot + 1, seen[index] if seen else (None,), pages)
        h = h + kit.linear(mixed.flatten(1), w.attn_proj, w.attn_proj_bias)
        z = kit.linear(kit.rms_norm(h, w.ln_2, eps), w.fc)
        h = h + kit.linear(kit.bias_quick_gelu(z, w.fc_bias), w.mlp_proj, w.mlp_proj_bias)
    return kit.linear(kit.rms_norm(h, ln_f, eps), wtet)


def _attention(
    kit: Kit, q: Tensor, k: Tensor, v: Tensor, length: int, seen: Sequence[Any], pages: Tensor | None
) -> Tensor:
    """A head's own mask: those that share one are a slice of the heads."""
    count = len(seen)
    if count == 1:
        return kit.attention_decode(q, k, v, length, None, None, seen[0], pages=pages)
    mixed = torch.empty_like(q)
    for first in range(min(count, q.size(1))):
        some = slice(first, None, count)
        parts = q[:, some], k[:, some], v[:, some]
        mixed[:, some] = kit.attention_decode(*parts, length, None, None, seen[first], pages=pages)
    return mixed
