"""One decoding step of an accelerated model: one native call in place of all modules, on transformers' own cache.

The cache stays a DynamicCache with plain layers. At its first step its keys and values move into one buffer with room
for the steps to come, and its layers' tensors become views of that: a step then writes one slot and copies nothing.
When somebody else has changed the layers (beam search reorders, a user crops), they move into a new buffer. On a GPU a
buffer's steps are one CUDA graph, replayed with another pixel and slot.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.accelerate.plain import State, exchanged, why_not_plain
from igpt_fast.accelerate.theirs import theirs
from igpt_fast.ops._heads import refusal, refused_head_dim
from igpt_fast.ops._native import fused_backend_for, say_slower, serves
from igpt_fast.ops.decode_step import LayerWeights, StepWeights
from igpt_fast.replay import Replayed

ROOM = 256  # slots of the smallest buffer

# The arguments that a step may have.
_READ = {
    "self",
    "input_ids",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "cache_position",
}

_buffers: "weakref.WeakKeyDictionary[Any, _Buffer]" = weakref.WeakKeyDictionary()


def decode(model: nn.Module, given: Mapping[str, Any]) -> Any:
    """The output of an ImageGPTForCausalImageModeling for one token more of a cache; None: it is not such a call.

    given: the arguments by name.
    """
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    if ids is None or ids.ndim != 2 or ids.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if not isinstance(cache, theirs().Cache) or ids.dtype not in (torch.int32, torch.int64):
        return None
    own = cache.self_attention_cache if isinstance(cache, theirs().EncoderDecoderCache) else cache
    past = int(own.get_seq_length())
    if not past or torch.compiler.is_compiling():  # the first token makes the cache's layers
        return None
    reason, buffer = _why_not(model, given, own, past), None
    if reason is None:
        reason, buffer = _buffer_of(own, model, past)
    if reason is not None:
        say_slower(f"a decoding step runs module by module: {reason}")
    if buffer is None:
        return None
    logits = buffer.step(ids[:, 0].long(), past)[:, None]
    buffer.show(own, past + 1)
    wanted, config = given.get("return_dict"), model.config
    if wanted is None:
        wanted = config.return_dict and not (theirs().knows_torchscript and config.torchscript)
    if not wanted:
        return logits, cache
    return theirs().CausalLMOutput(logits=logits, past_key_values=cache)


def _why_not(model: nn.Module, given: Mapping[str, Any], cache: Any, past: int) -> str | None:
    """Why this call is more, or other, than one plain step; None when it is one."""
    for name, value in given.items():
        if name not in _READ and value is not None and value is not False and value != {}:
            return f"{name} was given"
    ids, config = given["input_ids"], model.config
    if type(cache) is not theirs().DynamicCache or getattr(cache, "offloading", False):
        return f"the cache is a {type(cache).__name__}, or offloads"
    if exchanged(cache):
        return "somebody has exchanged the cache's update"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on; a model in bfloat16 itself is faster"
    if config.output_attentions or config.output_hidden_states:
        return "the config asks for attentions or hidden states"
    if past >= len(model.transformer.wpe.weight):
        return "the cache is full"
    mask, places = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and (mask.shape != (len(ids), past + 1) or not bool((mask == 1).all())):
        return "the attention mask hides something"
    if places is not None and not bool((places == past).all()):
        return "position_ids are not the next ones"
    return None


class _Buffer:
    """A cache's keys and values, [L, B, 2, H, room, D], and the model's weights as decode_step reads them.

    Their Conv1D weights are [in, out], so the step's are transposed copies. They live as long as a cache of them does.
    """

    def __init__(self, model: nn.Module, weights: StepWeights, data: Tensor) -> None:
        self.data, self.all_weights = data, weights
        self.weights = replace(weights, wpe=weights.wpe[: data.shape[4]])
        self._eps = model.transformer.ln_f.eps
        self._model, self._state = weakref.ref(model), State(model)
        self._shown: list[tuple[Tensor, ...]] = []
        self._counted = _CountedSteps(self) if counts_on_device(data) else None

    def step(self, pixels: Tensor, slot: int) -> Tensor:
        """One token more.   pixels int64 [B] → logits [B, V]"""
        return (self._counted or self.step_at)(pixels, slot)

    def step_at(self, pixels: Tensor, slot: int | Tensor) -> Tensor:
        """The same at a slot that the host, or the device alone, knows."""
        return ops.decode_step(self.data, pixels, self.weights, slot, self._eps)

    def show(self, cache: Any, length: int) -> None:
        """Makes the first `length` slots the cache's."""
        self._shown = [layer.unbind(1) for layer in self.data[..., :length, :].unbind(0)]
        for layer, shown in zip(cache.layers, self._shown, strict=True):
            layer.keys, layer.values = shown

    def holds(self, cache: Any) -> bool:
        """Whether the cache's tensors are still the ones that it was shown."""
        return len(cache.layers) == len(self._shown) and all(
            layer.keys is shown[0] and layer.values is shown[1]
            for layer, shown in zip(cache.layers, self._shown, strict=True)
        )

    def serves(self, model: nn.Module) -> bool:
        """Whether this is the model that it was made for, and as it was then."""
        return self._model() is model and self._state.holds()


def counts_on_device(cache: Tensor) -> bool:
    """Whether steps count their slots on the device: on a GPU, where kernels read them there."""
    return cache.is_cuda and serves("attention_decode", (cache,), refusal(cache.dtype, cache.shape[-1]))


class _CountedSteps:
    """A buffer's steps, which differ in nothing that the host knows."""

    def __init__(self, buffer: _Buffer) -> None:
        B, V, device = buffer.data.shape[1], len(buffer.weights.wtet), buffer.data.device
        self._buffer = weakref.proxy(buffer)
        self._pixels = torch.zeros(B, dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.empty(B, V, dtype=buffer.weights.wtet.dtype, device=device)
        self._replayed = Replayed(self._step, device)

    def _step(self) -> None:
        self._logits.copy_(self._buffer.step_at(self._pixels, self._slot))

    def __call__(self, pixels: Tensor, slot: int) -> Tensor:
        self._pixels.copy_(pixels)
        self._slot.fill_(slot)
        self._replayed()
        return self._logits.clone()


def _buffer_of(cache: Any, model: nn.Module, past: int) -> tuple[str | None, _Buffer | None]:
    """A buffer that holds the cache and has a slot free; or the reason why there is none, if it is worth a word."""
    buffer = _buffers.get(cache)
    if buffer is not None and not buffer.serves(model):
        buffer = None
    reason = why_not_plain(model) if buffer is None else None
    if reason is not None:
        return reason, None
    if buffer is not None and past < buffer.data.shape[4] and buffer.holds(cache):
        return None, buffer
    reason = _unfit(cache, model, past)
    like = cache.layers[0].keys
    if reason is not None:
        return reason, None
    refusal = refused_head_dim(like.shape[3])
    if not counts_on_device(like) and fused_backend_for("decode_step", (like,), refusal) is None:  # it has said why
        return None, None
    weights = _weights_of(model) if buffer is None else buffer.all_weights
    B, H, _, D = like.shape
    shape = len(cache.layers), B, 2, H, min(len(weights.wpe), max(ROOM, 2 * past)), D
    with torch.inference_mode(False):  # what is made there can only be written there, and a cache may outlive it
        data = torch.empty(shape, dtype=like.dtype, device=like.device)
        buffer = _buffers[cache] = _Buffer(model, weights, data)
    for kept, layer in zip(data, cache.layers, strict=True):
        kept[:, 0, :, :past], kept[:, 1, :, :past] = layer.keys, layer.values
    buffer.show(cache, past)
    return None, buffer


def _unfit(cache: Any, model: nn.Module, past: int) -> str | None:
    """Why a step cannot go on with what the cache holds; None when it can."""
    wte, attn = model.transformer.wte.weight, model.transformer.h[0].attn
    shape = len(cache.layers[0].keys), attn.num_heads, past, attn.head_dim
    if len(cache.layers) != len(model.transformer.h):
        return f"the cache has {len(cache.layers)} layers"
    for layer in cache.layers:
        if type(layer) is not theirs().DynamicLayer:
            return f"a layer of the cache is a {type(layer).__name__}"
        for t in (layer.keys, layer.values):
            if t.shape != shape or t.dtype is not wte.dtype or t.device != wte.device:
                return "the cache differs from the model in shape, dtype or device"
    return None


def _weights_of(model: nn.Module) -> StepWeights:
    """A step's weights of the model as it is now: of all its caches the same, made anew with each new one."""
    shared = next((other.all_weights for other in list(_buffers.values()) if other.serves(model)), None)
    with torch.inference_mode(False):  # what is made there can only be written there
        if shared is None:
            return _step_weights(model)
        for block, layer in zip(model.transformer.h, shared.layers, strict=True):  # .data may have been written to
            attn, mlp = block.attn, block.mlp
            layer.qkv.copy_(attn.c_attn.weight.detach().t())
            layer.attn_proj.copy_(attn.c_proj.weight.detach().t())
            layer.fc.copy_(mlp.c_fc.weight.detach().t())
            layer.mlp_proj.copy_(mlp.c_proj.weight.detach().t())
    return shared


def _step_weights(model: nn.Module) -> StepWeights:
    """The model's weights under the names and in the layouts of a step."""

    def linear(module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach().t().contiguous(), module.bias.detach()

    layers = [
        LayerWeights(
            block.ln_1.weight.detach(), *linear(block.attn.c_attn), *linear(block.attn.c_proj),
            block.ln_2.weight.detach(), *linear(block.mlp.c_fc), *linear(block.mlp.c_proj),
        )
        for block in model.transformer.h
    ]  # fmt: skip
    tables = model.transformer.wte, model.transformer.wpe, model.transformer.ln_f, model.lm_head
    wte, wpe, ln_f, wtet = (module.weight.detach() for module in tables)
    return StepWeights(wte, wpe, layers, ln_f, wtet)
