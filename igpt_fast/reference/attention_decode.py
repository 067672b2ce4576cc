"""What one decoding step's attention over a cache means, and what it means to put a step's keys and values there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igpt_fast.reference.attention import attention

PAGE = 64  # slots that stand together, and share a scale in a cache of 8 bits
SMALLEST_SCALE = 2.0**-60


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    scale: float | None = None,
    lengths: Tensor | None = None,
    seen: Tensor | None = None,
    prefix: Sequence[Tensor] = (),
    scales: tuple[Tensor, ...] = (),
    pages: Tensor | None = None,
) -> Tensor:
    """One query a head over the first slots of a cache.   q [B, H, 1, D]   k, v [B, H, Tmax, D]   → [B, H, 1, D]

    lengths [B]: how many slots image b has, at most `length`; all have `length` without it
    prefix: k, v [M, H, P, D] that stand before the slots of each B / M neighbours
    seen bool [T, T], or what gives its rows alike: the query is row P + lengths[b] - 1; what sees nothing gives zeros
    scales [B, H, pages] of k, v (and of the prefix): what the elements of an e4m3 cache are multiplied with
    pages [tiles]: slot t of the sequence is at pages[t // 64] * 64 + t % 64 of k and v
    """
    if scales:
        k, v = dequantized(k, scales[0], q.dtype), dequantized(v, scales[1], q.dtype)
        if prefix:
            prefix = tuple(dequantized(x, s, q.dtype) for x, s in zip(prefix, scales[2:], strict=True))
    if pages is None:
        k, v = k[:, :, :length], v[:, :, :length]
    else:
        slots = torch.arange(length, device=q.device)
        k, v = (x[:, :, pages.long()[slots // PAGE] * PAGE + slots % PAGE] for x in (k, v))
    P = 0
    if prefix:
        P, n = prefix[0].size(2), len(q) // len(prefix[0])
        k, v = (torch.cat((p.repeat_interleave(n, 0), x), 2) for p, x in zip(prefix, (k, v), strict=True))
    if lengths is None and seen is None:
        return attention(q, k, v, causal=False, scale=scale)[0]
    counts = torch.full((len(q),), length, device=q.device) if lengths is None else lengths.long().clamp(0, length)
    visible = torch.arange(P + length, device=q.device) < P + counts.unsqueeze(1)  # [B, slots]
    if seen is not None:
        visible &= seen[(P + counts - 1).clamp(min=0), : P + length]
    v = v.masked_fill(~visible[:, None, :, None], 0)  # what is not seen may be anything, where it is not yet written
    return attention(q, k, v, visible[:, None, None], False, scale)[0]


def dequantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 [B, H, T, D] times its pages' scales [B, H, pages], with 32 bits at least, then rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale.repeat_interleave(PAGE, 2)[:, :, : x.size(2), None]).to(dtype)


def scale_of(largest: Tensor) -> Tensor:
    """The least power of two by which values up to `largest` fit into e4m3; NaN where they are not finite."""
    mantissa, exponent = torch.frexp(largest.float())  # largest = mantissa 2^exponent, mantissa in [1/2, 1)
    exponent = exponent - 9 + (mantissa > 0.875).int()  # 448 is 0.875 2^9
    scale = torch.ldexp(torch.ones_like(mantissa), exponent).clamp(min=SMALLEST_SCALE)
    scale = torch.where(largest == 0, SMALLEST_SCALE, scale)
    return torch.where(largest.isfinite(), scale, torch.nan)


def cache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slot: int = 0,
    lengths: Tensor | None = None,
    scales: tuple[Tensor, ...] = (),
) -> None:
    """Puts k, v [B, H, n, D] into the slots from `slot` on, or of image b from lengths[b] on.

    Without scales nobody reads `lengths` on the host, so that a CUDA graph may go on counting them.

    scales [B, H, pages] float32, of k and of v: what the elements of an e4m3 cache are to be multiplied with. A page's
    is the power of two that its largest element asks for. Where it grows, what the page holds is rounded anew.
    """
    if not scales:
        images = torch.arange(len(k), device=k.device).unsqueeze(1)
        first = torch.full_like(images, slot) if lengths is None else lengths.long().unsqueeze(1)
        slots = first + torch.arange(k.size(2), device=k.device)  # [B, n]
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[images, :, slots] = new.transpose(1, 2).to(cache.dtype)
        return
    for at, (cache, new) in enumerate(((k_cache, k), (v_cache, v))):
        for b in range(len(new)):
            first = slot if lengths is None else int(lengths[b])
            for page in range(first // PAGE, -(-(first + new.size(2)) // PAGE)):
                begin = max(first, page * PAGE)
                rows = new[b, :, begin - first : (page + 1) * PAGE - first].float()  # [H, rows of this page, D]
                old, held = scales[at][b, :, page], slice(page * PAGE, begin)
                scale = scale_of(rows.abs().amax((1, 2)))
                if begin > page * PAGE:
                    scale = torch.where(scale.isnan() | old.isnan(), torch.nan, torch.maximum(scale, old))
                    kept = cache[b, :, held].float() * (old / scale)[:, None, None]
                    cache[b, :, held] = kept.to(cache.dtype)
                cache[b, :, begin : begin + rows.size(1)] = (rows / scale[:, None, None]).to(cache.dtype)
                scales[at][b, :, page] = scale
