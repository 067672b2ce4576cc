"""The forward pass with a memory: prefill runs all known pixels at once, decode_one_token adds one pixel at a time.

A decoding step is many small ops, so what surrounds them counts: the weights are looked up once, every step writes into
the same workspace, and each op asks once, not at every call, which backend serves it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.ops._native import backend_for, stream_of
from igpt_fast.ops.attention import refused_head_dim

Linear = tuple[Tensor, Tensor | None]  # weight, bias


class KVCache:
    """Keys and values of the slots 0..length-1: data [layers, batch, 2, heads, T, head_dim], k before v."""

    def __init__(self, config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, batch, 2, config.heads, config.tokens, config.head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def fill(self, rows: slice, source: "KVCache") -> None:
        """Give every image of `rows` the known slots of the one image in `source`."""
        self.length = source.length
        self.data[:, rows, ..., : self.length, :] = source.data[..., : self.length, :]


@torch.inference_mode()
def prefill(model: ImageGPT, pixels: Tensor) -> tuple[Tensor, KVCache]:
    """Run K < T known pixels at once.   pixels int64 [N, K] → logits [N, colors] of pixel K, and the cache

    Raises InputError when there is no pixel left to predict, and for a BERT model.
    """
    check_order(model.config)
    slots = pixels.shape[1] + 1
    if slots > model.config.tokens:
        raise InputError(f"{slots - 1} pixels are known of {model.config.tokens}: there is none left to predict")
    cache = KVCache(model.config, len(pixels), model.wte.dtype, model.wte.device)
    h, delta = model.embed(pixels), None
    for block, kept in zip(model.blocks, cache.data, strict=True):
        h, delta = block(h, delta, kept)
    x, _ = ops.rms_norm(delta[:, -1], model.ln_f, model.config.eps, residual=h[:, -1])
    cache.length = slots
    return ops.linear(x, model.wtet), cache


class _Layer(NamedTuple):
    ln_1: Tensor
    qkv: Linear
    attn_proj: Linear
    ln_2: Tensor
    fc: Tensor
    fc_bias: Tensor | None
    mlp_proj: Linear
    k: Tensor  # of the cache, [batch, heads, T, head_dim]
    v: Tensor


class Decoder:
    """A model and a cache, ready to step: the model's own weights, no copies, as plain tensors, and a step's workspace.

    Raises InputError for a BERT model.
    """

    def __init__(self, model: ImageGPT, cache: KVCache) -> None:
        check_order(model.config)
        self.config, self.cache, c = model.config, cache, model.config
        own = {name: p.detach() for name, p in model.named_parameters()}
        self.wte, self.wpe, self.ln_f, self.wtet = own["wte"], own["wpe"], own["ln_f"], own["wtet"]
        self.layers = []
        for index, kept in enumerate(cache.data):
            at = f"blocks.{index}."
            qkv, attn_proj, fc, mlp_proj = (
                (own[f"{at}{name}.weight"], own.get(f"{at}{name}.bias"))
                for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
            )
            layer = _Layer(own[f"{at}ln_1"], qkv, attn_proj, own[f"{at}ln_2"], *fc, mlp_proj, kept[:, 0], kept[:, 1])
            self.layers.append(layer)
        batch, d = cache.data.shape[1], c.width
        self.h, self.sum, self.delta, self.x = self.wte.new_empty(4, batch, d)
        self.qkv = self.wte.new_empty(batch, 3 * d)
        split = self.qkv.view(batch, 3, c.heads, c.head_dim)
        self.q, self.kv = (
            split[:, 0].unsqueeze(2),
            split[:, 1:],
        )  # [batch, heads, 1, head_dim], [batch, 2, heads, head_dim]
        self.mixed = self.wte.new_empty(batch, d)
        self.mixed_heads = self.mixed.view(batch, c.heads, 1, c.head_dim)
        self.z, self.inner = self.wte.new_empty(2, batch, c.mlp_width)
        self.norm, self.linear, self.attend, self.gelu = _kernels(self)


@torch.inference_mode()
def decode_one_token(decoder: Decoder, pixel: Tensor) -> Tensor:
    """Put the newest pixel into the cache's next slot.   pixel int64 [batch] → logits [batch, colors] of the next pixel

    Raises InputError when the cache is full.
    """
    d, cache, slot = decoder, decoder.cache, decoder.cache.length
    if slot >= d.config.tokens:
        raise InputError(f"the cache already holds all {slot} slots of an image")
    h, other, delta = d.h, d.sum, None
    torch.add(d.wte[pixel], d.wpe[slot], out=h)
    for w, here in zip(d.layers, cache.data[..., slot, :].unbind(), strict=True):
        h, other = d.norm(d.x, other, delta, h, w.ln_1)
        d.linear(d.qkv, d.x, *w.qkv)
        here.copy_(d.kv)
        d.attend(d.mixed_heads, d.q, w.k, w.v, slot + 1)
        d.linear(d.delta, d.mixed, *w.attn_proj)
        h, other = d.norm(d.x, other, d.delta, h, w.ln_2)
        d.linear(d.z, d.x, w.fc, None)
        d.gelu(d.inner, d.z, w.fc_bias)
        d.linear(d.delta, d.inner, *w.mlp_proj)
        delta = d.delta
    d.norm(d.x, other, delta, h, d.ln_f)
    logits = d.wtet.new_empty(len(d.x), len(d.wtet))  # the caller's to keep
    d.linear(logits, d.x, d.wtet, None)
    cache.length = slot + 1
    return logits


def check_order(config: Config) -> None:
    """Raise InputError for a model that defines no order to draw pixels in."""
    if config.objective != "ar":
        raise InputError(
            f"an objective={config.objective!r} model cannot be sampled from; train one with objective='ar'"
        )


def _kernels(d: Decoder) -> tuple[Callable, Callable, Callable, Callable]:
    """norm, linear, attend, gelu, which write into their first argument: a backend's own where one serves all."""
    eps, scale, stream = d.config.eps, d.config.head_dim**-0.5, stream_of(d.x)
    natives = (
        backend_for("rms_norm_fwd", (d.x, d.ln_f)),
        backend_for("linear_fwd", (d.x, d.wtet)),
        backend_for("attention_decode", (d.q,), refused_head_dim(d.config.head_dim)),
        backend_for("bias_quick_gelu_fwd", (d.z,)),
    )
    if None in natives:
        return _through_ops(eps, scale)
    norm_op, linear_op, attend_op, gelu_op = natives
    rstd = d.x.new_empty(len(d.x), dtype=torch.float32)

    def norm(y: Tensor, total: Tensor, delta: Tensor | None, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if delta is None:
            norm_op.rms_norm_fwd(y, None, rstd, h, None, weight, eps, stream)
            return h, total
        norm_op.rms_norm_fwd(y, total, rstd, delta, h, weight, eps, stream)
        return total, h

    def linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        linear_op.linear_fwd(y, x, weight, bias, stream)

    def attend(o: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int) -> None:
        attend_op.attention_decode(o, q, k, v, length, scale, stream)

    def gelu(y: Tensor, z: Tensor, bias: Tensor | None) -> None:
        gelu_op.bias_quick_gelu_fwd(y, z, bias, stream)

    return norm, linear, attend, gelu


def _through_ops(eps: float, scale: float) -> tuple[Callable, Callable, Callable, Callable]:
    """The same four through the public ops, which fall back one by one."""

    def norm(y: Tensor, total: Tensor, delta: Tensor | None, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if delta is None:
            y.copy_(ops.rms_norm(h, weight, eps))
            return h, total
        normed, added = ops.rms_norm(delta, weight, eps, residual=h)
        y.copy_(normed)
        total.copy_(added)
        return total, h

    def linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        y.copy_(ops.linear(x, weight, bias))

    def attend(o: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int) -> None:
        o.copy_(ops.attention_decode(q, k, v, length, scale))

    def gelu(y: Tensor, z: Tensor, bias: Tensor | None) -> None:
        y.copy_(ops.bias_quick_gelu(z, bias))

    return norm, linear, attend, gelu
