"""Which elements a dropout keeps, and what it makes of them."""

import torch
from torch import Tensor

LEVELS = 1 << 24  # p counts in these
RUN = 1 << 16  # elements of a tensor that share a query
_LOW = 0xFFFFFFFF


def keeps(p: float, seed: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """bool: whether a weight is kept. A hash of the seed and its place decides; p is taken down to a multiple of 2^-24.

    head, query, key: int64, of shapes that broadcast; an element that is no weight has a place among them, too.
    """
    query = _mix64(_mix64(torch.tensor(seed, device=key.device)) ^ ((head << 32) | query))
    x = (key * 0x9E3779B1 + (query & _LOW)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x ^= (query >> 32) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return (x >> 8) >= int(p * LEVELS)


def factor(p: float) -> float:
    """By what the elements that are kept are multiplied."""
    return LEVELS / (LEVELS - int(p * LEVELS))


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where an element is kept, else 0.   x [...] → [...]"""
    index = torch.arange(x.numel(), device=x.device)
    kept = keeps(p, seed, torch.zeros_like(index), index // RUN, index % RUN).view(x.shape)
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * (kept * factor(p))).to(x.dtype)


def _mix64(z: Tensor) -> Tensor:
    """splitmix64's finaliser on the 64 bits of an int64."""
    z = (z ^ _down(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _down(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _down(z, 31)


def _down(z: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
