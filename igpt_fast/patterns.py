"""Sparse attention patterns: a predicate on two pixels, compiled into tiles that the kernels walk over.

A predicate says whether the pixel that a query predicts may look at the pixel that a key holds. In the shifted,
autoregressive sequence slot i predicts pixel i, slot j holds pixel j - 1, and slot 0 holds sos, which every query sees.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from igpt_fast.errors import InputError

TILE = 64


@dataclass(frozen=True)
class Pixels:
    """Pixels of a grid, as integer tensors that broadcast against each other."""

    row: Tensor
    col: Tensor
    index: Tensor


Predicate = Callable[[Pixels, Pixels], Tensor]  # (pixel to predict, pixel seen) → bool, elementwise


def row() -> Predicate:
    """The pixel's own row."""
    return lambda q, k: q.row == k.row


def column() -> Predicate:
    """The pixel's own column."""
    return lambda q, k: q.col == k.col


def local(window: int = 128) -> Predicate:
    """The last `window` pixels in raster order."""
    return lambda q, k: (q.index - k.index).abs() <= window


def neighborhood(side: int = 7) -> Predicate:
    """The square of `side` × `side` pixels around the pixel (its causal half, in a causal sequence)."""
    reach = side // 2
    return lambda q, k: ((q.row - k.row).abs() <= reach) & ((q.col - k.col).abs() <= reach)


PATTERNS: dict[str, Callable[..., Predicate]] = {
    "row": row,
    "column": column,
    "local": local,
    "neighborhood": neighborhood,
}


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A compiled pattern over `tokens` slots: which 64 × 64 tiles exist, and the bits of those that are not full.

    Made by `BlockMask.compile` or `BlockMask.from_dense`. `tensors` is what the kernels read: CSR lists of tiles by
    rows (row_start, row_tile, row_mask) and by columns (col_start, col_tile, col_mask), int32, a mask index of -1
    meaning a full tile; then bits and bits_t, int64 [masks, 64]: bit k of bits[m, q] and bit q of bits_t[m, k] say that
    q sees k.
    """

    tokens: int
    causal: bool
    tensors: tuple[Tensor, ...]
    seen: Callable[[Tensor], Tensor] = field(repr=False)  # query slots [n] → bool [n, tokens], from the predicate

    @classmethod
    def compile(cls, predicate: Predicate, size: tuple[int, int], causal: bool = True) -> "BlockMask":
        """Compiles a predicate for a grid of size (height, width).

        causal: the shifted autoregressive sequence; else slot j holds pixel j and nothing looks only backwards.
        Never holds more than 64 rows of the mask. Raises InputError when a query would see nothing at all.
        """
        height, width = size
        n = height * width

        def pixels(index: Tensor) -> Pixels:
            return Pixels(torch.div(index, width, rounding_mode="floor"), index % width, index)

        def seen(queries: Tensor) -> Tensor:
            keys = torch.arange(n).unsqueeze(0)
            queries = queries.unsqueeze(1)
            allowed = predicate(pixels(queries), pixels(keys - 1 if causal else keys))
            return ((allowed & (keys <= queries)) | (keys == 0)) if causal else allowed.expand(len(queries), n)

        return cls._build(seen, n, causal)

    @classmethod
    def from_dense(cls, seen: Tensor, causal: bool = False) -> "BlockMask":
        """Compiles a bool matrix [T, T]: row q says what q sees. causal: what the matrix already obeys."""
        if seen.ndim != 2 or seen.size(0) != seen.size(1) or seen.dtype != torch.bool:
            raise InputError(
                f"BlockMask.from_dense: expected a square bool matrix, got {seen.dtype} {tuple(seen.shape)}"
            )
        if causal and seen.triu(1).any():
            raise InputError("BlockMask.from_dense: causal=True, but a row sees a later slot; pass causal=False")
        return cls._build(lambda queries: seen[queries], seen.size(0), causal)

    @classmethod
    def _build(cls, seen: Callable[[Tensor], Tensor], n: int, causal: bool) -> "BlockMask":
        tiles = (n + TILE - 1) // TILE
        masks: dict[bytes, int] = {}
        words: list[Tensor] = []
        words_t: list[Tensor] = []
        entries: list[tuple[int, int, int]] = []  # (row tile, column tile, mask)
        for i in range(tiles):
            queries = torch.arange(i * TILE, min(n, (i + 1) * TILE))
            block = torch.zeros(TILE, tiles * TILE, dtype=torch.bool)
            block[: len(queries), :n] = seen(queries)
            by_tile = block.view(TILE, tiles, TILE).transpose(0, 1)  # [tiles, 64, 64]
            inside = torch.zeros_like(by_tile)
            inside[:, : len(queries)] = True
            inside.view(tiles, TILE, TILE)[-1, :, n - (tiles - 1) * TILE :] = False
            full = (by_tile == inside).flatten(1).all(1)
            for j in by_tile.flatten(1).any(1).nonzero().flatten().tolist():
                mask = -1
                if not full[j]:
                    bits, bits_t = _pack(by_tile[j]), _pack(by_tile[j].T)
                    mask = masks.setdefault(bits.numpy().tobytes(), len(masks))
                    if mask == len(words):
                        words.append(bits)
                        words_t.append(bits_t)
                entries.append((i, j, mask))
        by_column = sorted(entries, key=lambda e: (e[1], e[0]))
        empty = torch.zeros(0, TILE, dtype=torch.int64)
        tensors = (
            *_lists([e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries], tiles),
            *_lists([e[1] for e in by_column], [e[0] for e in by_column], [e[2] for e in by_column], tiles),
            torch.stack(words) if words else empty,
            torch.stack(words_t) if words_t else empty,
        )
        return cls(n, causal, tensors, seen)

    def dense(self) -> Tensor:
        """The mask as bool [tokens, tokens], from the predicate, not from the tiles."""
        return self.seen(torch.arange(self.tokens))

    def density(self) -> float:
        """Tiles kept, as a share of the tiles of dense (causal) attention."""
        tiles = len(self.tensors[0]) - 1
        return len(self.tensors[1]) / (tiles * (tiles + 1) / 2 if self.causal else tiles * tiles)

    def to(self, device: torch.device) -> "BlockMask":
        """The same mask with its tables on another device."""
        if self.tensors[0].device == device:
            return self
        return BlockMask(self.tokens, self.causal, tuple(t.to(device) for t in self.tensors), self.seen)


def _pack(tile: Tensor) -> Tensor:
    """bool [64, 64] → int64 [64], bit k of word r is tile[r, k]."""
    return (tile.long() << torch.arange(TILE)).sum(1)


def _lists(rows: list[int], others: list[int], masks: list[int], tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(torch.tensor(rows, dtype=torch.int64), minlength=tiles)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return start, torch.tensor(others, dtype=torch.int32), torch.tensor(masks, dtype=torch.int32)


def unpack(tensors: list[Tensor], tokens: int) -> Tensor:
    """The dense mask bool [tokens, tokens] that a BlockMask's tables describe."""
    row_start, row_tile, row_mask, _, _, _, bits, _ = (t.cpu() for t in tensors)
    tiles = len(row_start) - 1
    seen = torch.zeros(tiles * TILE, tiles * TILE, dtype=torch.bool)
    for i in range(tiles):
        for e in range(int(row_start[i]), int(row_start[i + 1])):
            j, m = int(row_tile[e]), int(row_mask[e])
            tile = (
                torch.ones(TILE, TILE, dtype=torch.bool)
                if m < 0
                else ((bits[m].unsqueeze(1) >> torch.arange(TILE)) & 1).bool()
            )
            seen[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE] = tile
    return seen[:tokens, :tokens]


@lru_cache(maxsize=64)
def compiled(name: str, size: tuple[int, int], causal: bool = True) -> BlockMask:
    """The registered pattern `name` with its default parameters, compiled for a grid; results are kept."""
    if name not in PATTERNS:
        raise InputError(f"no pattern named {name!r}; choose one of {', '.join(PATTERNS)}")
    return BlockMask.compile(PATTERNS[name](), size, causal)
