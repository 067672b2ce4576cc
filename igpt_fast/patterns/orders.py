"""Token orders: in which of them the pairs of a pattern fill the fewest tiles."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from igpt_fast.patterns.tables import TILE, Tables, pairs_of

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


WORTH = 0.6  # in other orders kernels look up where each row lies, and Hopper's own are for the raster alone
PART = 1  # what another part costs, in tiles a row of tiles: q, k, v are read again, o and the gradients added to
WORTH_PARTS = 0.7  # of the tiles in one part

# Name → size → int64 [T]: the slot that stands at each place.
ORDERS: dict[str, Callable[[Size], Tensor]] = {
    "raster": lambda size: torch.arange(size[0] * size[1]),
    "transposed": lambda size: torch.arange(size[0] * size[1]).view(size).t().flatten(),
    "4x4 tiles": _by_tiles(4, 4),
    "8x8 tiles": _by_tiles(8, 8),
    "8x16 tiles": _by_tiles(8, 16),
    "Hilbert": _hilbert,
}


def tiles_by_order(tables: Sequence[Tensor], size: Size, most: int | None = None) -> dict[str, int]:
    """How many 64 × 64 tiles have a pair in them when queries and keys stand in each of the ORDERS.

    tables: a mask's, in raster order   most: orders with more tiles than that are left out, as soon as that is known
    """
    n = size[0] * size[1]
    tiles = (n + TILE - 1) // TILE
    tile_of = {name: torch.argsort(order(size)).numpy() // TILE for name, order in ORDERS.items() if name != "raster"}
    met = {name: np.zeros(tiles * tiles, bool) for name in tile_of}
    for q, k in pairs_of(tables, n):
        for name, found in list(met.items()):
            at = tile_of[name]
            found[at[q] * tiles + at[k]] = True
            if most is not None and np.count_nonzero(found) > most:
                del met[name]
    counts = {
        "raster": len(Tables._make(tables).row_tile),
        **{name: int(np.count_nonzero(found)) for name, found in met.items()},
    }
    return {name: count for name, count in counts.items() if most is None or count <= most}


def fewest_tiles(tables: Sequence[Tensor], size: Size, pairs: int = 0) -> tuple[str, int]:
    """The order to take, and its tiles: another than the raster where that leaves WORTH of the raster's or fewer.

    pairs: of the mask, if known: then a mask whose tiles are filled well is not looked at further
    """
    raster = len(Tables._make(tables).row_tile)
    most = int(WORTH * raster)
    if pairs > most * TILE * TILE:
        return "raster", raster
    counts = tiles_by_order(tables, size, most)
    name = min(counts, key=counts.get, default="raster")
    return name, counts.get(name, raster)
