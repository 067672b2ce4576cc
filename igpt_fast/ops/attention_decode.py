"""One decoding step's attention over a cache of keys and values, and how they get there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._heads import refused_heads
from igpt_fast.ops._native import backend_for, has_cuda_kernels, why_plain
from igpt_fast.ops._tensors import Tensors, check_range, empty, multiprocessors, rows, same_device, stream_of
from igpt_fast.patterns import TILE, BlockMask, Rows

CHUNK = 2 * TILE  # slots whose part of the output is made by itself, as kDecodeChunk in csrc/ops.h
BYTES = torch.float8_e4m3fn  # a cache's dtype beside the query's own


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: BlockMask | None = None,
    prefix: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    pages: Tensor | None = None,
) -> Tensor:
    """One query a head over the first `length` slots of a cache; no gradient. An image's bits do not depend on others.

    q [B, H, 1, D]   k, v [B, H, Tmax, D], any strides, of q's dtype or float8_e4m3fn   → [B, H, 1, D]
    lengths int32 [B], on q's device: image b has lengths[b] slots of 0..length. A CUDA graph may go on counting them.
    prefix: k, v [M, H, P, D] that stand before the slots of each B / M neighbours and are read once for eight of them
    mask: the query is row P + lengths[b] - 1 of it (it need not be causal: there is nothing later); what sees nothing
    gives zeros. On a GPU a prefix under a mask ends at a multiple of 64 slots.
    scales float32 [B, H, pages of 64 slots] of k and v, then of the prefix's: what a float8 cache is multiplied with
    pages int32 [tiles]: slot t is at pages[t // 64] * 64 + t % 64 of k, v and their scales, which hold the pages that
    the mask still shows (`igpt_fast.patterns.pages_of`)
    Raises InputError for shapes that do not fit, a length outside 1..Tmax, or pages without a mask or outside k and v.
    """
    _check(q, k, v, length, lengths, mask, prefix, scales, pages)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    tables = [] if mask is None else list(mask.raster.to(q.device).tensors)
    run = torch.ops.igpt.attention_decode if torch.compiler.is_compiling() else _decode
    return run(q, k, v, length, scale, lengths, tables, list(prefix), list(scales), pages)


def cache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slot: int = 0,
    lengths: Tensor | None = None,
    scales: Sequence[Tensor] = (),
) -> None:
    """Put keys and values into a cache's slots from `slot` on, or from lengths[b] on; no gradient.

    k, v [B, H, n, D] float   k_cache, v_cache [B, H, Tmax, D], of k's dtype or float8_e4m3fn   lengths int32 [B]
    scales float32 [B, H, pages of 64 slots] of a float8 cache's k and v: updated too. A page's scale is the least power
    of two that its largest element fits, NaN where that is not finite; where it grows, what the page holds is rounded
    anew. Slots are the cache's own, by whatever pages it is read; on a GPU those outside are left out. Raises
    InputError for shapes that do not fit.
    """
    B, H, Tmax, D = k_cache.shape if k_cache.ndim == 4 else (0,) * 4
    if v_cache.shape != k_cache.shape or k.shape != v.shape or k.ndim != 4 or (*k.shape[:2], k.size(3)) != (B, H, D):
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}, caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        raise InputError(f"cache_append: expected k, v [B, H, n, D] and caches [B, H, Tmax, D], got {shapes}")
    if slot < 0 or (lengths is None and slot + k.size(2) > Tmax):
        raise InputError(f"cache_append: slots {slot} to {slot + k.size(2)} were asked of a cache of {Tmax}")
    _check_parts("cache_append", k, k_cache, v_cache, lengths, scales, 2)
    if lengths is not None:
        check_range("cache_append", "lengths", lengths, Tmax - k.size(2) + 1, on_cpu=True)
    same_device("cache_append", k_cache=k_cache, v_cache=v_cache, k=k, v=v, lengths=lengths, **_named(scales))
    run = torch.ops.igpt.cache_append if torch.compiler.is_compiling() else _append
    run(k_cache, v_cache, k, v, slot, lengths, list(scales))


def _check(q, k, v, length, lengths, mask, prefix, scales, pages) -> None:
    B, H, room, D = tuple(k.shape) if k.ndim == 4 else (0,) * 4
    if q.ndim != 4 or k.shape != v.shape or tuple(q.shape) != (B, H, q.size(2), D):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise InputError(f"attention_decode: expected q [B, H, 1, D] and k, v [B, H, Tmax, D], got {shapes}")
    most = room if pages is None else pages.numel() * TILE
    if q.size(2) != 1 or not 1 <= length <= most:
        raise InputError(f"attention_decode: one query and 1..{most} keys, got {q.size(2)} and length {length}")
    check_pages("attention_decode", pages, length, room, mask is not None)
    if len(prefix) not in (0, 2):
        raise InputError(f"attention_decode: expected a prefix's k and v, got {len(prefix)} tensors")
    if prefix:
        pk, pv = prefix
        fits = pk.ndim == 4 and pk.shape == pv.shape and pk.shape[1:2] == k.shape[1:2] and pk.shape[3:] == k.shape[3:]
        if not fits or not pk.numel() or len(q) % len(pk) or pk.dtype is not k.dtype or pv.dtype is not k.dtype:
            raise InputError(
                f"attention_decode: expected prefix k, v [M, H, P, D] like the cache {tuple(k.shape)} {k.dtype}, M "
                f"dividing its batch, got {tuple(pk.shape)} {pk.dtype}, {tuple(pv.shape)} {pv.dtype}"
            )
    _check_parts("attention_decode", q, k, v, lengths, scales, 4 if prefix else 2, *prefix)
    slots = length + (prefix[0].size(2) if prefix else 0)
    if mask is not None and mask.tokens < slots:
        raise InputError(
            f"attention_decode: the mask was compiled for {mask.tokens} tokens, the call has {slots} slots"
        )
    named = dict(zip(("prefix_k", "prefix_v"), prefix, strict=False)) | _named(scales)
    same_device("attention_decode", q=q, k=k, v=v, lengths=lengths, pages=pages, **named)


def check_pages(op: str, pages: Tensor | None, slots: int, room: int, masked: bool) -> None:
    """Raises InputError unless pages give so many slots places in a cache of `room`, and masks say what is seen."""
    if pages is None:
        return
    if pages.dtype is not torch.int32 or pages.ndim != 1 or len(pages) * TILE < slots:
        raise InputError(
            f"{op}: expected pages int32 [{-(-slots // TILE)} or more], one for each {TILE} of {slots} slots, got "
            f"{pages.dtype} {tuple(pages.shape)}"
        )
    if not masked:
        raise InputError(
            f"{op}: a cache of pages holds what masks show, and a head without a mask sees every slot; give a mask to "
            "every head, or a whole cache and no pages"
        )
    count = room // TILE
    check_range(op, "pages", pages, count)
    if pages.is_cpu and not torch.compiler.is_compiling() and why_plain() is None:
        low, high = (int(end) for end in pages.aminmax())
        if low < 0 or high >= count:
            bad = low if low < 0 else high
            raise InputError(f"{op}: page {bad} is outside a cache of {room} slots, which has {count} pages of {TILE}")


def _check_parts(op: str, q, k, v, lengths, scales, count: int, *prefix: Tensor) -> None:
    """Dtypes, lengths, and that float8 caches, and no others, have their scales."""
    if k.dtype is not v.dtype:
        raise InputError(f"{op}: k is {k.dtype}, v {v.dtype}; give both in one dtype")
    if lengths is not None and (lengths.dtype is not torch.int32 or lengths.shape != q.shape[:1]):
        raise InputError(f"{op}: expected lengths int32 [{len(q)}], got {lengths.dtype} {tuple(lengths.shape)}")
    if not scales and k.dtype is not BYTES:
        return
    wanted = count if k.dtype is BYTES else 0
    pages = [(*x.shape[:2], -(-x.size(2) // TILE)) for x in (k, v, *prefix)][:wanted]
    if [tuple(s.shape) for s in scales] != pages or any(s.dtype is not torch.float32 for s in scales):
        got = ", ".join(f"{s.dtype} {tuple(s.shape)}" for s in scales)
        raise InputError(f"{op}: a cache of {k.dtype} needs float32 scales of shapes {pages}, got [{got}]")


def _named(scales: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("k_scale", "v_scale", "prefix_k_scale", "prefix_v_scale"), scales, strict=False))


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    scale: float,
    lengths: Tensor | None,
    mask: Tensors,
    prefix: Tensors,
    scales: Tensors,
    pages: Tensor | None = None,
) -> Tensor:
    P = prefix[0].size(2) if prefix else 0

    def refused(name: str) -> str | None:
        if k.dtype is not BYTES and q.dtype is not k.dtype:
            return "q, k and v differ in dtype"
        if (lengths is not None or prefix or scales) and not has_cuda_kernels(name):
            return f"{name} has no lengths, prefixes or float8"
        if mask and P % TILE:
            return f"under a mask a prefix of {P} slots does not end where a tile of {TILE} does"
        return refused_heads(name, q.dtype, q.size(-1), scale)

    native = backend_for("attention_decode", (q,), refused)
    if native is None:
        seen = Rows(mask) if mask else None
        return reference.attention_decode.attention_decode(
            q, k, v, length, scale, lengths, seen, tuple(prefix) or None, tuple(scales), pages
        )
    o = empty(q.shape, q)
    on_gpu = has_cuda_kernels(native.name)
    q, k, v, *prefix = [rows(t, on_gpu) for t in (q, k, v, *prefix)]
    B, H, _, D = q.shape
    chunks, prefix_chunks = -(-length // CHUNK), -(-P // CHUNK)
    # Few heads leave most of a GPU idle, unless each is shared out; a second kernel then adds up what blocks found.
    split = on_gpu and chunks > 1 and multiprocessors(q) >= 4 * B * H
    room = prefix_chunks + chunks * split
    partials = empty((B, H, room, D + 2), q, torch.float32) if room else None
    k_scale, v_scale, *prefix_scales = [rows(s) for s in scales] or (None, None)
    starts = None if lengths is None else lengths.contiguous()
    tables = tuple(mask) or None
    stream = stream_of(q)
    if prefix:
        shared = *prefix, *(prefix_scales or (None, None))
        native.attention_prefix(partials, q, *shared, starts, tables, length, scale, stream)
    places = None if pages is None else pages.contiguous()
    native.attention_decode(o, partials, q, k, v, k_scale, v_scale, starts, places, tables, length, P, scale, stream)
    return o


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot: int, lengths: Tensor | None, scales: Tensors
) -> None:
    def refused(name: str) -> str | None:
        if k.dtype is not v.dtype or (k_cache.dtype is not BYTES and k_cache.dtype is not k.dtype):
            return "k, v and the cache differ in dtype"
        aligned = all(t is rows(t, sixteens=True) for t in (k_cache, v_cache))
        unaligned = None if aligned else "rows of the cache do not begin at multiples of 16 bytes"
        return unaligned or refused_heads(name, k.dtype, k.size(-1))

    native = backend_for("cache_append", (k, v), refused)
    if native is None:
        reference.attention_decode.cache_append(k_cache, v_cache, k, v, slot, lengths, tuple(scales))
    else:
        k, v = (rows(t, sixteens=True) for t in (k, v))
        starts = None if lengths is None else lengths.contiguous()
        native.cache_append(k_cache, v_cache, *(scales or (None, None)), k, v, starts, slot, stream_of(k))


_attention_decode_op = torch.library.custom_op("igpt::attention_decode", mutates_args=())(_decode)


@_attention_decode_op.register_fake
def _(q, k, v, length, scale, lengths, mask, prefix, scales, pages=None):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_cache_append_op = torch.library.custom_op("igpt::cache_append", mutates_args=("k_cache", "v_cache", "scales"))(_append)


@_cache_append_op.register_fake
def _(k_cache, v_cache, k, v, slot, lengths, scales):
    return None
