"""Everybody who computes causal attention, each given its best settings, as callables of q, k, v [B, H, T, D].

On a CPU that is torch's SDPA. On a GPU also SDPA told to take each of its kernels, FlexAttention compiled, and what is
installed of flash-attn 4, flash-attn and xformers. Who fails on a shape is reported with the reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.harness import Missing

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal(tokens: int, device: str, compiler: bool) -> dict[str, Callable | Missing]:
    """Name → a function of q, k, v [B, H, tokens, D], or why there is none. compiler: is there time for one?"""
    found: dict[str, Callable | Missing] = {"torch SDPA": sdpa}
    if device == "cuda":
        found |= {f"torch SDPA, {name}": functools.partial(_told, kernel) for name, kernel in KERNELS.items()}
        found["FlexAttention, compiled"] = _flex(tokens, compiler)
        found["flash-attn 4"] = _by_tokens("flash_attn.cute", "flash_attn_func", causal=True)
        found["flash-attn"] = _by_tokens("flash_attn", "flash_attn_func", causal=True)
        found["xformers"] = _xformers()
    return found


def tried(fn: Callable | Missing, grads: Tensor | None, *qkv: Tensor) -> Callable | Missing:
    """fn when it runs on these inputs, with its backward pass where `grads` are given; else the reason as Missing."""
    if isinstance(fn, Missing):
        return fn
    try:
        out = fn(*qkv)
        if grads is not None:
            torch.autograd.grad(out, qkv, grads)
        return fn
    except Exception as error:  # a shape that it does not serve, in whatever words: that costs the others nothing
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "  # torch's own are sentences
        return Missing(f"{kind}{next(iter(str(error).splitlines()), '')}"[:200])


def _told(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v)


def _flex(tokens: int, compiler: bool) -> Callable | Missing:
    if not compiler:
        return Missing("takes part in the benchmarks of a GPU's batches, for it is compiled for each shape")
    flex = peers.optional("torch.nn.attention.flex_attention")
    attention = flex if isinstance(flex, Missing) else peers.compiled(flex.flex_attention, quick=False)
    if isinstance(attention, Missing):
        return attention
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
    return lambda q, k, v: attention(q, k, v, block_mask=mask)


def _by_tokens(module: str, name: str, **options: Any) -> Callable | Missing:
    """A function of [B, T, H, D], which may give more than its output."""
    fn = getattr(peers.optional(module), name, None)
    if fn is None:
        return Missing(f"{module}.{name} is not installed")

    def run(*qkv: Tensor) -> Tensor:
        out = fn(*(t.transpose(1, 2) for t in qkv), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _xformers() -> Callable | Missing:
    module = peers.optional("xformers.ops")
    if isinstance(module, Missing):
        return module
    return _by_tokens("xformers.ops", "memory_efficient_attention", attn_bias=module.LowerTriangularMask())
