"""Causal attention with dropout on its weights, tile by tile in torch: no kernel of ours draws random numbers there.

A tile holds a block of queries of some heads and the keys that these see. Nothing of it outlives it: the backward pass
makes it again, and draws the same numbers from the same seed. So memory grows with T, not with T², and what a causal
mask hides is not computed.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

QUERIES = 256  # in a tile
# Weights in a tile. On a CPU they should stay in its caches, on a GPU fill the device.
MOST = {"cpu": 1 << 19}
MOST_ELSEWHERE = 1 << 25
LEVELS = 1 << 15  # a weight is dropped where a 15-bit number is among the p · LEVELS largest
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a float of so many bytes


def attention_with_dropout(qkv: Tensor, p: float, scale: float) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v, with the gradient of qkv.   qkv [B, T, 3, H, D] → [B, T, H, D]

    The seed is drawn from torch's generator of the CPU. p is taken to the nearest 1 / 32768. Weights have qkv's dtype.
    """
    return _AttentionWithDropout.apply(qkv, p, scale, int(torch.randint(1 << 62, ())))


class _AttentionWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, p, scale, seed):
        B, T, _, H = qkv.shape[:4]
        tiles = _Tiles(p, seed, qkv.device)
        q, k, v = _heads(qkv, scale, tiles.factor)
        o = torch.empty_like(q)
        for heads, rows, seen in tiles.over(B * H, T):
            kept = tiles.drop(tiles.weights(q[heads, rows], k[heads, seen]))
            torch.bmm(kept, v[heads, seen], out=o[heads, rows])
        o = o.unflatten(0, (B, H)).transpose(1, 2)
        ctx.save_for_backward(qkv, o)
        ctx.rest = p, scale, seed
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        (qkv, o), (p, scale, seed) = ctx.saved_tensors, ctx.rest
        B, T, _, H, D = qkv.shape
        tiles = _Tiles(p, seed, qkv.device)
        q, k, v = _heads(qkv, scale, tiles.factor)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        do, o = (t.transpose(1, 2).reshape(B * H, T, D) for t in (do, o))
        sums = (do.to(wide) * o).sum(-1, keepdim=True).to(qkv.dtype)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for heads, rows, seen in tiles.over(B * H, T):
            weights = tiles.weights(q[heads, rows], k[heads, seen])
            kept = tiles.drop(weights)
            dv[heads, seen] += torch.bmm(kept.mT, do[heads, rows])
            # The softmax's gradient, w · (d(kept) · mask - sum): where w is kept, kept is w, else it is 0.
            ds = torch.bmm(do[heads, rows], v[heads, seen].mT).mul_(kept).sub_(weights.mul_(sums[heads, rows]))
            torch.bmm(ds, k[heads, seen], out=dq[heads, rows])
            dk[heads, seen] += torch.bmm(ds.mT, q[heads, rows])
        grads = [t.to(qkv.dtype).unflatten(0, (B, H)).transpose(1, 2) for t in (dq * scale, dk, dv * tiles.factor)]
        return torch.stack(grads, 2), None, None, None


def _heads(qkv: Tensor, scale: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """q · scale, k, and v · factor, each [B · H, T, D] and contiguous."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in qkv.unbind(2))
    return q * scale, k.contiguous(), v * factor


class _Tiles:
    """The tiles of one call, in the order in which their random numbers are drawn."""

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self._dropped = round(p * LEVELS)  # of LEVELS
        self.factor = LEVELS / max(1, LEVELS - self._dropped)  # what makes good for the dropped weights
        self._device = device
        on_cpu = device.type == "cpu"  # where numpy draws in half of torch's time
        self._numpy = np.random.Generator(np.random.SFC64(seed)) if on_cpu else None
        self._torch = None if on_cpu else torch.Generator(device).manual_seed(seed)
        self._most = MOST.get(device.type, MOST_ELSEWHERE)
        self._hidden = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=device).triu_(1)

    def over(self, heads: int, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
        """(heads, queries, keys) of each tile."""
        step = max(1, self._most // (min(QUERIES, tokens) * max(1, tokens)))
        for head in range(0, heads, step):
            for row in range(0, tokens, QUERIES):
                stop = min(row + QUERIES, tokens)
                yield slice(head, head + step), slice(row, stop), slice(0, stop)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q kᵀ) of a tile whose last query is its last key's."""
        scores = torch.bmm(q, k.mT)
        queries, keys = scores.shape[1:]
        scores[..., keys - queries :].masked_fill_(self._hidden[:queries, :queries], float("-inf"))
        return torch.softmax(scores, -1)

    def drop(self, weights: Tensor) -> Tensor:
        """The tile's weights with some of them 0, the others as they are."""
        if self._dropped == LEVELS:  # which 16 bits could not count
            return torch.zeros_like(weights)
        count = weights.numel()
        # Four 16-bit numbers from each draw of the generator: -LEVELS .. -1 once the sign is set. The sum is negative
        # where a weight is kept, and its sign, spread over all bits, the mask.
        mask = self._draw((count + 3) // 4).view(torch.int16)[:count].view(weights.shape).bitwise_or_(-LEVELS)
        mask = mask.add_(self._dropped).bitwise_right_shift_(15)
        bits = BITS[weights.element_size()]
        return (weights.view(bits) & mask.to(bits)).view(weights.dtype)

    def _draw(self, count: int) -> Tensor:
        """int64 [count], each of its bits random."""
        if self._numpy is not None:
            return torch.from_numpy(self._numpy.integers(-(1 << 63), (1 << 63) - 1, count, np.int64, endpoint=True))
        return torch.empty(count, dtype=torch.int64, device=self._device).random_(
            -(1 << 63), None, generator=self._torch
        )
