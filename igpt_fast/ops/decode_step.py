"""One pixel more through the whole model: one native call, or else its single ops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import OptionalTensors, backend_for, empty, native_layers, same_device, stream_of
from igpt_fast.ops.activation import bias_quick_gelu
from igpt_fast.ops.attention import refused_head_dim
from igpt_fast.ops.attention_decode import attention_decode
from igpt_fast.ops.linear import linear
from igpt_fast.ops.norm import rms_norm
from igpt_fast.reference.decode_step import Kit, LayerWeights

_OURS = Kit(rms_norm, linear, attention_decode, bias_quick_gelu)


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


def decode_step(cache: Tensor, pixels: Tensor, weights: StepWeights, slot: int, eps: float = 1e-5) -> Tensor:
    """Put the newest pixels into the cache's slot → logits [B, V] of the next ones, in the weights' dtype; no gradient.

    cache [L, B, 2, H, T, D], contiguous, k before v: it holds the slots below `slot` and receives `slot`   pixels [B]
    A row's bits do not depend on the other rows. Raises InputError for shapes that do not fit or a slot outside 0..T-1.
    """
    if cache.ndim != 6 or cache.shape[2] != 2 or len(cache) != len(weights.layers) or pixels.shape != cache.shape[1:2]:
        raise InputError(
            f"decode_step: cache {list(cache.shape)} does not fit {len(weights.layers)} layers and pixels "
            f"{list(pixels.shape)}; expected [layers, B, 2, heads, T, head_dim] and [B]"
        )
    if not 0 <= slot < cache.shape[4]:
        raise InputError(f"decode_step: slot is {slot}; the cache has the slots 0 to {cache.shape[4] - 1}")
    same_device("decode_step", cache=cache, pixels=pixels, wte=weights.wte)
    if torch.compiler.is_compiling():
        flat = [t for layer in weights.layers for t in layer]
        return torch.ops.igpt.decode_step(
            cache, pixels, weights.wte, weights.wpe, flat, weights.ln_f, weights.wtet, slot, eps
        )
    return _decode_step(cache, pixels, weights, slot, eps)


def _decode_step(cache: Tensor, pixels: Tensor, w: StepWeights, slot: int, eps: float) -> Tensor:
    refusal = w.refusal or refused_head_dim(cache.shape[-1])
    if cache.dtype is not w.wte.dtype or not cache.is_contiguous():
        refusal = "the cache is not contiguous or differs from the weights in dtype"
    native = backend_for("decode_step", (cache, w.wte), refusal)
    if native is None:
        return reference.decode_step.decode_step(
            cache, pixels, w.wte, w.wpe, w.layers, w.ln_f, w.wtet, slot, eps, kit=_OURS
        )
    logits = empty((len(pixels), len(w.wtet)), w.wtet)
    flat = cache.view(len(cache), -1, *cache.shape[-2:])
    native.decode_step(
        logits, flat, pixels.contiguous(), w.wte, w.wpe, w.native, w.ln_f, w.wtet, slot, eps, stream_of(cache)
    )
    return logits


@torch.library.custom_op("igpt::decode_step", mutates_args=("cache",))
def _decode_step_op(
    cache: Tensor,
    pixels: Tensor,
    wte: Tensor,
    wpe: Tensor,
    layers: OptionalTensors,
    ln_f: Tensor,
    wtet: Tensor,
    slot: int,
    eps: float,
) -> Tensor:
    fields = len(LayerWeights._fields)
    listed = [LayerWeights(*layers[i : i + fields]) for i in range(0, len(layers), fields)]
    return _decode_step(cache, pixels, StepWeights(wte, wpe, listed, ln_f, wtet), slot, eps)


@_decode_step_op.register_fake
def _(cache, pixels, wte, wpe, layers, ln_f, wtet, slot, eps):
    return wtet.new_empty(len(pixels), len(wtet))
