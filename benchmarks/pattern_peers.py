"""What sparse attention by a pattern is measured against, and its truth in float64 without a matrix of all pairs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import attention_peers, peers
from benchmarks.harness import Close, Missing
from igpt_fast import ops, patterns
from igpt_fast.patterns import TILE, BlockMask, Pixels

DENSE, SDPA, MASKED, FLEX = "ours, dense", "torch SDPA, dense", "torch SDPA, boolean mask", "FlexAttention, compiled"
NO_MATRIX = "a matrix of all pairs does not fit beside the others at this size"


class Dense(NamedTuple):
    """The result of a side that sees everything, and so is right about something else."""

    outs: Any


@dataclass(frozen=True)
class Either:
    """Judges those who compute the pattern by its truth, and those who compute dense attention by dense attention's."""

    pattern: Close
    dense: Close | None

    def errors(self, result: Any) -> list[float]:
        return self.dense.errors(result.outs) if isinstance(result, Dense) else self.pattern.errors(result)

    def passes(self, errors: list[float], rivals: list[list[float]]) -> bool:
        return self.pattern.passes(errors, rivals)

    def tolerates(self, errors: list[float]) -> bool:
        return self.pattern.tolerates(errors)


def sides(text: str, mask: BlockMask, grid: tuple[int, int], device: str, quick: bool) -> dict[str, Callable | Missing]:
    """Name → a function of q, k, v [B, H, T, D], or why there is none."""
    matrix = mask.tokens <= 64 * 64 or device == "cuda"
    seen = mask.dense().to(device) if matrix else None
    return {
        MASKED: functools.partial(peers.SDPA, attn_mask=seen) if matrix else Missing(NO_MATRIX),
        FLEX: _flex(text, grid, device, quick) if matrix else Missing(NO_MATRIX),
        DENSE: lambda q, k, v: Dense(ops.attention(q, k, v)),
        SDPA: lambda q, k, v: Dense(attention_peers.sdpa(q, k, v)),
    }


def _flex(text: str, grid: tuple[int, int], device: str, quick: bool) -> Callable | Missing:
    flex = peers.optional("torch.nn.attention.flex_attention")
    attention = flex if isinstance(flex, Missing) else peers.compiled(flex.flex_attention, quick)
    if isinstance(attention, Missing):
        return attention
    pattern, tokens = patterns.parse(text), grid[0] * grid[1]

    def pixels(index: Tensor) -> Pixels:
        return Pixels(torch.div(index, grid[1], rounding_mode="floor"), index % grid[1], index, grid)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (pattern(pixels(q), pixels(k - 1)) & (k <= q)) | (k == 0) | (k == q)

    try:
        mask = flex.create_block_mask(sees, None, None, tokens, tokens, device=device)
    except Exception as error:  # tables that a predicate looks up are more than it can trace, in whatever words
        return Missing(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200])
    return lambda q, k, v: attention(q, k, v, block_mask=mask)


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: BlockMask | None) -> list[Tensor]:
    """o, dq, dk, dv in float64, 64 queries at a time over the keys that any of them sees. mask None: all before."""
    q, k, v, dout = (t.detach().double() for t in (q, k, v, dout))
    o, (dq, dk, dv), tokens = torch.empty_like(q), (torch.zeros_like(t) for t in (q, k, v)), q.shape[2]
    for first in range(0, tokens, TILE):
        rows = torch.arange(first, min(tokens, first + TILE))
        end = int(rows[-1]) + 1
        seen = torch.arange(end) <= rows[:, None] if mask is None else mask.seen(rows, end)
        keys = seen.any(0).nonzero()[:, 0]
        seen, rows, keys = seen[:, keys].to(q.device), rows.to(q.device), keys.to(q.device)
        kt, vt, qt, d = k[:, :, keys], v[:, :, keys], q[:, :, rows], dout[:, :, rows]
        scale = q.shape[-1] ** -0.5
        p = (scale * qt @ kt.mT).masked_fill(~seen, float("-inf")).softmax(-1)
        o[:, :, rows] = p @ vt
        ds = p * (d @ vt.mT - (d * o[:, :, rows]).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = ds @ kt
        dk.index_add_(2, keys, ds.mT @ qt)
        dv.index_add_(2, keys, p.mT @ d)
    return [o, dq, dk, dv]
