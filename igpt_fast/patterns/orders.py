"""Token orders: in which of them the pairs of a pattern fill the fewest tiles."""

from collections.abc import Callable

import torch
from torch import Tensor

from igpt_fast.patterns.block_mask import TILE, BlockMask

Size = tuple[int, int]


def _by_tiles(high: int, wide: int) -> Callable[[Size], Tensor]:
    """Tiles of high × wide pixels, each in raster order."""

    def order(size: Size) -> Tensor:
        row, col = _grid(size)
        across = (size[1] + wide - 1) // wide
        tile = torch.div(row, high, rounding_mode="floor") * across + torch.div(col, wide, rounding_mode="floor")
        return torch.argsort((tile * high + row % high) * wide + col % wide)

    return order


def _hilbert(size: Size) -> Tensor:
    """Hilbert's curve on the smallest square of a power of two that holds the grid."""
    row, col = _grid(size)
    side = 1 << (max(size) - 1).bit_length()
    x, y, at = col.clone(), row.clone(), torch.zeros_like(row)
    step = side // 2
    while step:
        right, down = (x & step) > 0, (y & step) > 0
        at += step * step * ((3 * right.long()) ^ down.long())
        # The quarter's own curve is turned: mirrored where x is right and y is not down, then x and y trade places.
        mirror = ~down & right
        x, y = torch.where(mirror, side - 1 - x, x), torch.where(mirror, side - 1 - y, y)
        x, y = torch.where(~down, y, x), torch.where(~down, x, y)
        step //= 2
    return torch.argsort(at)


def _grid(size: Size) -> tuple[Tensor, Tensor]:
    index = torch.arange(size[0] * size[1])
    return torch.div(index, size[1], rounding_mode="floor"), index % size[1]


# Name → size → int64 [T]: the slot that stands at each place.
ORDERS: dict[str, Callable[[Size], Tensor]] = {
    "raster": lambda size: torch.arange(size[0] * size[1]),
    "transposed": lambda size: torch.arange(size[0] * size[1]).view(size).t().flatten(),
    "4x4 tiles": _by_tiles(4, 4),
    "8x8 tiles": _by_tiles(8, 8),
    "8x16 tiles": _by_tiles(8, 16),
    "Hilbert": _hilbert,
}


def tiles_by_order(mask: BlockMask, size: Size) -> dict[str, int]:
    """How many 64 × 64 tiles have a pair of the mask in them when queries and keys stand in each of the ORDERS."""
    n, tiles = mask.tokens, (mask.tokens + TILE - 1) // TILE
    orders = {name: order(size) for name, order in ORDERS.items()}
    tile_of = {name: torch.argsort(order) // TILE for name, order in orders.items()}
    found = {name: torch.zeros(tiles, tiles, dtype=torch.int32) for name in orders}
    block = torch.zeros(TILE, tiles * TILE, dtype=torch.bool)
    for first in range(0, n, TILE):
        queries = torch.arange(first, min(n, first + TILE))
        seen = mask.seen(queries, n)
        for name, order in orders.items():
            block[: len(queries), :n] = seen[:, order]
            by_tile = block[: len(queries)].view(-1, tiles, TILE).any(2)
            found[name].index_add_(0, tile_of[name][queries], by_tile.int())
    return {name: int((pairs > 0).sum()) for name, pairs in found.items()}
