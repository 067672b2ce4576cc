"""One pixel more through the whole model: one native call, or else its single ops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._heads import refusal, refused_head_dim
from igpt_fast.ops._native import fused_backend_for, native_layers, native_masks, serves
from igpt_fast.ops._tensors import OptionalTensors, Tensors, empty, same_device, stream_of
from igpt_fast.ops.attention_decode import attention_decode, cache_append, check_pages
from igpt_fast.ops.linear import linear
from igpt_fast.patterns import TILE, BlockMask, parts_of, unpack
from igpt_fast.reference.decode_step import Kit, LayerWeights

_OURS = Kit(linear, cache_append, attention_decode)


@dataclass(frozen=True)
class StepWeights:
    """What a model's decoding steps read: wte [V, d], wpe [T, d], its layers, ln_f [d], wtet [V, d]."""

    wte: Tensor
    wpe: Tensor
    layers: Sequence[LayerWeights]
    ln_f: Tensor
    wtet: Tensor

    @cached_property
    def native(self):
        """The layers as the kernels read them, looked up once and not at every step."""
        return native_layers(self.layers)

    @cached_property
    def refusal(self) -> str | None:
        """Why the kernels do not read these weights; None when they do."""
        every = [self.wte, self.wpe, self.ln_f, self.wtet, *(t for w in self.layers for t in w if t is not None)]
        if any(t.dtype is not self.wte.dtype or t.device != self.wte.device for t in every):
            return "the weights differ in dtype or device"
        return None if all(t.is_contiguous() for t in every) else "a weight is not contiguous"


class StepMasks:
    """Who sees what, looked up once and not at every step.

    layers: of each layer a BlockMask, None, which shows all, or several of either: head h looks through number h %
    their count. A mask that comes twice is the same object. Raises InputError for what is no mask.
    """

    def __init__(self, layers: Sequence[BlockMask | Sequence[BlockMask | None] | None]) -> None:
        given = [tuple(masks) if isinstance(masks, Sequence) else (masks,) for masks in layers]
        if not all(given) or not all(mask is None or isinstance(mask, BlockMask) for masks in given for mask in masks):
            raise InputError("decode_step: masks must be a BlockMask, None, or a sequence of these for each layer")
        self.layers = [tuple(mask and mask.raster for mask in masks) for masks in given]
        self.distinct = list(dict.fromkeys(mask for masks in self.layers for mask in masks if mask is not None))
        self.groups = math.lcm(*map(len, self.layers))
        numbers = {mask: n for n, mask in enumerate(self.distinct)} | {None: -1}
        self.of = [numbers[masks[g % len(masks)]] for masks in self.layers for g in range(self.groups)]
        self.everywhere = -1 not in self.of  # every head has one
        self.tokens = min((mask.tokens for mask in self.distinct), default=None)
        self._there: dict[torch.device, list[tuple[BlockMask | None, ...]]] = {}

    @cached_property
    def native(self):
        """The masks as the kernels read them."""
        return native_masks([mask.to(torch.device("cpu")).tensors for mask in self.distinct], self.of, self.groups)

    def on(self, device: torch.device) -> list[tuple[BlockMask | None, ...]]:
        """The layers' masks with their tables on a device."""
        if device not in self._there:
            moved = [mask.to(device) for mask in self.distinct] + [None]
            rows = [self.of[at : at + self.groups] for at in range(0, len(self.of), self.groups)]
            counts = map(len, self.layers)
            self._there[device] = [tuple(moved[n] for n in row[:c]) for row, c in zip(rows, counts, strict=True)]
        return self._there[device]


def decode_step(
    cache: Tensor,
    pixels: Tensor,
    weights: StepWeights,
    slot: int | Tensor,
    eps: float = 1e-5,
    masks: StepMasks | Sequence[BlockMask | Sequence[BlockMask | None] | None] = (),
    pages: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Put the newest pixels into the cache's slot → logits [B, V] of the next ones, in the weights' dtype; no gradient.

    cache [L, B, 2, H, T, D], contiguous, k before v: it holds the slots below `slot` and receives `slot`   pixels [B]
    masks: empty, or what StepMasks takes; give a StepMasks itself to have them looked up once. The queries are row
    `slot`, and only what they see is read. A row's bits do not depend on the other rows.
    slot: a number; or int64 [1] on a GPU, where nobody looks at it: so a CUDA graph may go on counting it
    pages int32 [tiles]: slot t is at pages[t // 64] * 64 + t % 64 of a cache of fewer slots, and every head has a mask,
    of which none shows a page whose place another has taken (`igpt_fast.patterns.pages_of`)
    prefix [L, M, 2, H, P, D], contiguous, without pages: the slots that each B / M neighbours share. It stands before
    their cache, which then has the slots P..T-1. On a GPU P is a multiple of 64 where there are masks.
    Raises InputError for shapes, masks and pages that do not fit or a slot outside P..T-1.
    """
    if cache.ndim != 6 or cache.shape[2] != 2 or len(cache) != len(weights.layers) or pixels.shape != cache.shape[1:2]:
        raise InputError(
            f"decode_step: cache {list(cache.shape)} does not fit {len(weights.layers)} layers and pixels "
            f"{list(pixels.shape)}; expected [layers, B, 2, heads, T, head_dim] and [B]"
        )
    shared = _shared(cache, prefix, pages)
    slots = shared + cache.shape[4] if pages is None else min(pages.numel() * TILE, len(weights.wpe))
    counted = None
    if isinstance(slot, Tensor):
        if slot.shape != (1,) or slot.dtype is not torch.int64 or torch.compiler.is_compiling():
            raise InputError(
                f"decode_step: slot is {slot.dtype} {list(slot.shape)}; give a number, or int64 [1], which "
                "torch.compile does not take"
            )
        counted, slot = slot, slots - 1
    if not shared <= slot < slots:
        raise InputError(f"decode_step: slot is {slot}; the cache has the slots {shared} to {slots - 1}")
    same_device("decode_step", cache=cache, pixels=pixels, wte=weights.wte, pages=pages, prefix=prefix, slot=counted)
    masks = _checked(masks, len(cache), slot)
    check_pages("decode_step", pages, slot + 1, cache.shape[4], masks is not None and masks.everywhere)
    if counted is not None:
        return _by_single_ops(cache, pixels, weights, masks, counted, eps, pages, prefix)
    if torch.compiler.is_compiling():
        flat = [t for layer in weights.layers for t in layer]
        tables = [t for mask in masks.distinct for t in mask.to(cache.device).tensors] if masks else []
        of = masks.of if masks else []
        return torch.ops.igpt.decode_step(
            cache, pixels, weights.wte, weights.wpe, flat, weights.ln_f, weights.wtet, tables, of, slot, eps, pages,
            prefix,
        )  # fmt: skip
    return _decode_step(cache, pixels, weights, masks, slot, eps, pages, prefix)


def reads_prefixes(weight: Tensor, head_dim: int) -> bool:
    """Whether kernels read what images share where it is; plain torch would put it before each cache at every step."""
    on_gpu = serves("attention_prefix", (weight,), refusal(weight.dtype, head_dim))
    return on_gpu or serves("decode_step", (weight,), refused_head_dim(head_dim))


def _shared(cache: Tensor, prefix: Tensor | None, pages: Tensor | None) -> int:
    """How many slots stand before the cache."""
    if prefix is None:
        return 0
    fits = prefix.ndim == 6 and prefix.dtype is cache.dtype and pages is None and prefix.numel()
    like = fits and prefix.shape[::5] == cache.shape[::5] and prefix.shape[2:4] == cache.shape[2:4]
    if not like or cache.shape[1] % prefix.shape[1]:
        raise InputError(
            f"decode_step: expected a prefix [L, M, 2, H, P, D] like the cache {list(cache.shape)} {cache.dtype}, M "
            f"dividing its images, and no pages beside it; got {list(prefix.shape)} {prefix.dtype}"
        )
    return prefix.shape[4]


def _checked(masks, layers: int, slot: int) -> StepMasks | None:
    """None where no head has a mask."""
    if not isinstance(masks, StepMasks):
        if not len(masks):
            return None
        masks = StepMasks(masks)
    if len(masks.layers) != layers:
        raise InputError(f"decode_step: masks for {len(masks.layers)} layers were given to {layers}")
    if masks.tokens is not None and slot >= masks.tokens:
        raise InputError(f"decode_step: slot is {slot}; a mask was compiled for {masks.tokens} tokens")
    return masks if masks.distinct else None


def _decode_step(
    cache: Tensor,
    pixels: Tensor,
    w: StepWeights,
    masks: StepMasks | None,
    slot: int,
    eps: float,
    pages: Tensor | None,
    prefix: Tensor | None,
) -> Tensor:
    refusal = w.refusal or refused_head_dim(cache.shape[-1])
    if cache.dtype is not w.wte.dtype or not all(t.is_contiguous() for t in (cache, prefix) if t is not None):
        refusal = "the cache or its prefix is not contiguous or differs from the weights in dtype"
    native = fused_backend_for("decode_step", (cache, w.wte), refusal)
    if native is None:
        return _by_single_ops(cache, pixels, w, masks, slot, eps, pages, prefix)
    logits = empty((len(pixels), len(w.wtet)), w.wtet)
    flat, before = (t if t is None else t.view(len(t), -1, *t.shape[-2:]) for t in (cache, prefix))
    seen = masks.native if masks else None
    stream = stream_of(cache)
    places = None if pages is None else pages.contiguous()
    ends = w.ln_f, w.wtet, places, seen, slot, eps, stream
    native.decode_step(logits, flat, before, pixels.contiguous(), w.wte, w.wpe, w.native, *ends)
    return logits


def _by_single_ops(
    cache: Tensor,
    pixels: Tensor,
    w: StepWeights,
    masks: StepMasks | None,
    slot: int | Tensor,
    eps: float,
    pages: Tensor | None,
    prefix: Tensor | None,
) -> Tensor:
    """By single ops, which read the slot where it is."""
    seen = masks.on(cache.device) if masks else ()
    heads = (w.ln_f, w.wtet)
    step = reference.decode_step.decode_step
    return step(cache, pixels, w.wte, w.wpe, w.layers, *heads, slot, eps, _OURS, seen, pages, prefix)


@torch.library.custom_op("igpt::decode_step", mutates_args=("cache",))
def _decode_step_op(
    cache: Tensor,
    pixels: Tensor,
    wte: Tensor,
    wpe: Tensor,
    layers: OptionalTensors,
    ln_f: Tensor,
    wtet: Tensor,
    masks: Tensors,
    of: Sequence[int],
    slot: int,
    eps: float,
    pages: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    fields = len(LayerWeights._fields)
    listed = [LayerWeights(*layers[i : i + fields]) for i in range(0, len(layers), fields)]
    every = [*map(_mask_of, parts_of(masks)), None]
    groups = len(of) // len(listed)
    seen = StepMasks([[every[n] for n in of[at : at + groups]] for at in range(0, len(of), groups or 1)])
    weights = StepWeights(wte, wpe, listed, ln_f, wtet)
    return _decode_step(cache, pixels, weights, seen if masks else None, slot, eps, pages, prefix)


def _mask_of(tensors: Tensors) -> BlockMask:
    """A mask of its tables alone."""
    tokens = (len(tensors[0]) - 1) * TILE
    return BlockMask(tokens, False, tuple(tensors), lambda queries, keys: unpack(tensors, tokens)[queries, :keys])


@_decode_step_op.register_fake
def _(cache, pixels, wte, wpe, layers, ln_f, wtet, masks, of, slot, eps, pages=None, prefix=None):
    return wtet.new_empty(len(pixels), len(wtet))
