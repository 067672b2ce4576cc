"""Which keys a decoding step may forget: pages of 64 slots, each kept until the last query that sees any of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from igpt_fast.patterns.block_mask import TILE, BlockMask


@dataclass(frozen=True, eq=False)
class Pages:
    """Where a cache of `count` pages of 64 slots holds a sequence: slot t at of[t // 64] * 64 + t % 64.

    of: int32 [tiles]. until: int64 [tiles], the last tile with a query that sees any of the page. From its first slot
    on, which is then written, to the end of that tile no other page has its place.
    """

    of: Tensor
    until: Tensor
    count: int

    def held(self, length: int) -> tuple[Tensor, Tensor]:
        """Of the first `length` slots those whose pages a later one still sees, and their places: int64 [n] each."""
        tiles = torch.arange(len(self.of), device="cpu")
        alive = (tiles * TILE < length) & (self.until >= length // TILE)
        slots = (tiles[alive, None] * TILE + torch.arange(TILE, device="cpu")).flatten()
        slots = slots[slots < length]
        return slots, self.of[slots // TILE].long() * TILE + slots % TILE


def pages_of(masks: Sequence[BlockMask | None]) -> Pages | None:
    """One table for a cache that all these masks look into, in as few pages as ever are alive at a time.

    None where that is all of them, and where a mask is None, which shows all slots. The masks are of as many tokens.
    """
    if not masks or any(mask is None for mask in masks):
        return None
    until = torch.stack([_last_seen(mask) for mask in masks]).amax(0)
    of, free, ends, count = [], [], {}, 0
    for tile, last in enumerate(until.tolist()):
        for page in ends.pop(tile - 1, ()):  # which the tile before was the last to see
            heappush(free, page)
        of.append(heappop(free) if free else count)
        count += of[-1] == count
        ends.setdefault(last, []).append(of[-1])
    return Pages(torch.tensor(of, dtype=torch.int32, device="cpu"), until, count) if count < len(of) else None


def _last_seen(mask: BlockMask) -> Tensor:
    """int64 [tiles]: the last tile of queries that sees any key of each tile, at least its own."""
    (part,) = mask.raster.parts
    start, rows = (t.cpu().long() for t in (part.col_start, part.col_tile))
    own = torch.arange(len(start) - 1, device="cpu")
    if not len(rows):
        return own
    last = rows[(start[1:] - 1).clamp(min=0)]  # a column lists its rows in order
    return torch.where(start[1:] > start[:-1], last, own).maximum(own)
