"""Attention's heads: which of them the kernels serve, and how q, k and v lie in memory."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from igpt_fast.ops._native import has_cuda_kernels
from igpt_fast.ops._tensors import rows


def refused_head_dim(head_dim: int) -> str | None:
    """Why the CPU's attention kernels do not serve a head dim; None when they do."""
    return None if head_dim in range(8, 129, 8) else f"head dim {head_dim} is not a multiple of 8 up to 128"


def refused_heads(name: str, dtype: torch.dtype, head_dim: int, scale: float = 1.0) -> str | None:
    """Why a backend's attention kernels, of images and of decoding steps, do not serve such heads; None if they do."""
    if not has_cuda_kernels(name):
        return refused_head_dim(head_dim)
    if dtype is torch.float32:
        return f"{name} has no attention for float32; use bfloat16 or float16"
    if head_dim not in (32, 64, 96, 128):
        return f"head dim {head_dim} is none of 32, 64, 96 and 128"
    return None if scale > 0 else f"scale {scale} is not positive"


def refusal(dtype: torch.dtype, head_dim: int, scale: float = 1.0) -> Callable[[str], str | None]:
    """`refused_heads` of a backend's name."""
    return functools.partial(refused_heads, dtype=dtype, head_dim=head_dim, scale=scale)


def one_dtype(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels, which know one dtype at a time, could read all three."""
    return q.dtype is k.dtype and q.dtype is v.dtype


def slices(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, H, T, D] where they lie in qkv [B, T, 3, H, D]."""
    return tuple(t.transpose(1, 2) for t in qkv.unbind(2))


def readable(native, *tensors: Tensor) -> list[Tensor]:
    """Tensors as the kernels of a backend can read them: in place, else copies."""
    return [rows(t, sixteens=has_cuda_kernels(native.name)) for t in tensors]
