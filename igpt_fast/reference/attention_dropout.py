"""What attention with dropout on its weights means, and which weights are kept."""

import torch
from torch import Tensor

LEVELS = 1 << 24  # p counts in these


def kept(heads: int, tokens: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [heads, tokens, tokens]: whether head h keeps query t's weight of key s. A hash of (seed, h, t, s) decides.

    h counts through the batch: b · H + head. p is taken down to a multiple of 2^-24.
    """
    head, query, key = (torch.arange(n, device=device) for n in (heads, tokens, tokens))
    query = _mix64(_mix64(torch.tensor(seed, device=device)) ^ ((head[:, None] << 32) | query))[..., None]
    x = (key * 0x9E3779B1 + (query & _LOW)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x ^= (query >> 32) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return (x >> 8) >= int(p * LEVELS)


def attention_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v.   q, k, v [B, H, T, D] → [B, H, T, D]

    Weights that are kept are divided by the share that is kept in the mean.
    """
    B, H, T, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = ((q @ k.transpose(-1, -2)) * scale).to(wide).masked_fill(hidden, float("-inf"))
    mask = kept(B * H, T, p, seed, q.device).view(B, H, T, T) * (LEVELS / (LEVELS - int(p * LEVELS)))
    return (torch.softmax(scores, -1) * mask.to(wide)).to(q.dtype) @ v


_LOW = 0xFFFFFFFF


def _mix64(z: Tensor) -> Tensor:
    """splitmix64's finaliser on the 64 bits of an int64."""
    z = (z ^ _down(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _down(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _down(z, 31)


def _down(z: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
