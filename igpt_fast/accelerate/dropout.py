"""Causal attention with dropout on its weights, tile by tile in torch: no kernel of ours draws random numbers there.

A tile holds a block of queries of some heads and the keys that these see. Nothing of it outlives it: the backward pass
makes it again, and draws the same numbers from the same seed. So memory grows with T, not with T², and what a causal
mask hides is not computed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

QUERIES = 256  # in a tile
# Weights in a tile. On a CPU they should stay in its caches, on a GPU fill the device.
MOST = {"cpu": 1 << 19}
MOST_ELSEWHERE = 1 << 25
LEVELS = 1 << 16  # a weight is dropped where a 16-bit number is below p times this


def attention_with_dropout(qkv: Tensor, p: float, scale: float) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v, with the gradient of qkv.   qkv [B, T, 3, H, D] → [B, T, H, D]

    The seed is drawn from torch's generator of the CPU. p is taken to the nearest 1 / 65536. Weights have qkv's dtype.
    """
    return _AttentionWithDropout.apply(qkv, p, scale, int(torch.randint(1 << 62, ())))


class _AttentionWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, p, scale, seed):
        B, T, _, H = qkv.shape[:4]
        q, k, v = _heads(qkv, scale)
        o = torch.empty_like(q)
        tiles = _Tiles(p, seed, qkv.device)
        for heads, rows, seen in tiles.over(B * H, T):
            _, kept = tiles.weights(q[heads, rows], k[heads, seen])
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
        q, k, v = _heads(qkv, scale)
        do, o = (t.transpose(1, 2).reshape(B * H, T, D) for t in (do, o))
        wide = torch.promote_types(qkv.dtype, torch.float32)
        sums = (do.to(wide) * o).sum(-1, keepdim=True).to(qkv.dtype)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        tiles = _Tiles(p, seed, qkv.device)
        for heads, rows, seen in tiles.over(B * H, T):
            weights, kept = tiles.weights(q[heads, rows], k[heads, seen])
            dv[heads, seen] += torch.bmm(kept.mT, do[heads, rows])
            # d softmax: w · (d kept · mask - sum), and w · mask is `kept`
            ds = torch.bmm(do[heads, rows], v[heads, seen].mT).mul_(kept).sub_(weights.mul_(sums[heads, rows]))
            torch.bmm(ds, k[heads, seen], out=dq[heads, rows])
            dk[heads, seen] += torch.bmm(ds.mT, q[heads, rows])
        grads = torch.stack([t.to(qkv.dtype).unflatten(0, (B, H)).transpose(1, 2) for t in (dq * scale, dk, dv)], 2)
        return grads, None, None, None


def _heads(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q · scale, k and v, each [B · H, T, D] and contiguous."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in qkv.unbind(2))
    return q * scale, k.contiguous(), v.contiguous()


class _Tiles:
    """The tiles of one call, in the order in which their random numbers are drawn."""

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self._dropped = round(p * LEVELS)  # of LEVELS
        self._generator = torch.Generator(device).manual_seed(seed)
        self._most = MOST.get(device.type, MOST_ELSEWHERE)

    def over(self, heads: int, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
        """(heads, queries, keys) of each tile."""
        step = max(1, self._most // (min(QUERIES, tokens) * max(1, tokens)))
        for head in range(0, heads, step):
            for row in range(0, tokens, QUERIES):
                stop = min(row + QUERIES, tokens)
                yield slice(head, head + step), slice(row, stop), slice(0, stop)

    def weights(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(q kᵀ) of a tile whose last query is its last key's, and the same after dropout."""
        scores = torch.bmm(q, k.mT)
        queries, keys = scores.shape[1:]
        hidden = torch.ones(queries, queries, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., keys - queries :].masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, -1)
        if self._dropped == 0:
            return weights, weights.clone()
        if self._dropped == LEVELS:
            return weights, torch.zeros_like(weights)
        count = scores.numel()
        # Four 16-bit numbers from each draw of the generator. In int16 the levels begin at -LEVELS / 2.
        drawn = torch.empty((count + 3) // 4, dtype=torch.int64, device=q.device).random_(
            -(1 << 63), None, generator=self._generator
        )
        keep = drawn.view(torch.int16)[:count].view(scores.shape) >= self._dropped - LEVELS // 2
        return weights, (weights * keep).mul_(LEVELS / (LEVELS - self._dropped))
