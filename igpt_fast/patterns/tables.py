"""The tables that the kernels read: lists of 64 × 64 tiles and the bits of those that are not full."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE = 64


class Tables(NamedTuple):
    """One part of a mask. The parts of a mask, of which no two have a pair in common, follow each other."""

    row_start: Tensor  # int32 [tiles + 1]: where each row of tiles begins in the two that follow
    row_tile: Tensor  # int32 [entries]: the column of each tile
    row_mask: Tensor  # int32 [entries]: which of `bits` it has; -1: it is full
    col_start: Tensor  # the same by columns
    col_tile: Tensor
    col_mask: Tensor
    bits: Tensor  # int64 [masks, 64]: bit k of bits[m, q] says that query q sees key k
    bits_t: Tensor  # int64 [masks, 64]: so does bit q of bits_t[m, k]
    order: Tensor  # int32 [T]: the slot that stands at each place of the tiles; empty: the raster's


FIELDS = len(Tables._fields)


class Builder:
    """Builds a mask's tables, one row of tiles after another: `add` takes the bool block [64, keys] of the next 64
    queries, who see nothing behind those keys. pairs: how many (query, key) see each other."""

    def __init__(self, tokens: int, order: Tensor | None = None) -> None:
        """order: int [T], the slot that stands at each place, where that is not the raster's."""
        self.tokens, self.order, self.pairs = tokens, order, 0
        self._row = 0
        self._at: tuple[list[int], list[int], list[int]] = ([], [], [])  # rows, columns, masks
        self._known: dict[bytes, int] = {}  # a tile's words → its mask's number; full tiles have -1

    def add(self, block: np.ndarray) -> None:
        self.pairs += int(np.count_nonzero(block))
        words = np.packbits(block, axis=1, bitorder="little").view("<i8")
        found = np.flatnonzero(words.any(0))
        full = (words[:, found] == _whole(self._row, words.shape[1], self.tokens)[:, found]).all(0)
        rows, columns, masks = self._at
        for j, is_full in zip(found.tolist(), full.tolist(), strict=True):
            rows.append(self._row), columns.append(j)
            masks.append(-1 if is_full else self._known.setdefault(words[:, j].tobytes(), len(self._known)))
        self._row += 1

    def tables(self) -> Tables:
        rows, columns, masks = self._at
        bits = np.frombuffer(b"".join(self._known), np.int64).reshape(-1, TILE)
        by_column = np.lexsort((rows, columns)).tolist()
        return Tables(
            *_lists(rows, columns, masks, self._row),
            *_lists(*([part[e] for e in by_column] for part in (columns, rows, masks)), self._row),
            torch.from_numpy(bits.copy()),
            torch.from_numpy(_transposed(bits)),
            torch.empty(0, dtype=torch.int32) if self.order is None else self.order.int(),
        )


def empty_block(keys: int) -> np.ndarray:
    """Room for what 64 queries see of the first so many keys, in whole tiles."""
    return np.zeros((TILE, (keys + TILE - 1) // TILE * TILE), bool)


def parts_of(tables: Sequence[Tensor]) -> Iterator[Tables]:
    """The tables of each part."""
    return map(Tables._make, zip(*[iter(tables)] * FIELDS, strict=True))


def reordered(tables: Sequence[Tensor], tokens: int, order: Tensor | None) -> Tables:
    """The tables, of one part, of a mask's first so many slots, with queries and keys in another order.

    order: int [tokens], the slot that stands at each place; None: the raster's
    """
    tiles = (tokens + TILE - 1) // TILE
    place = np.arange(tokens) if order is None else torch.argsort(order).numpy()
    tile, within = place // TILE, place % TILE
    exists = np.zeros(tiles * tiles, bool)
    for q, k in pairs_of(tables, tokens):
        exists[tile[q] * tiles + tile[k]] = True
    number = np.cumsum(exists) - 1
    cells = np.zeros(int(np.count_nonzero(exists)) * TILE * TILE, bool)
    for q, k in pairs_of(tables, tokens):
        cells[(number[tile[q] * tiles + tile[k]] * TILE + within[q]) * TILE + within[k]] = True
    cells = cells.reshape(-1, TILE, TILE)
    builder = Builder(tokens, order)
    for row in exists.reshape(tiles, tiles):
        block = empty_block(tokens)
        count = int(np.count_nonzero(row))
        block.reshape(TILE, tiles, TILE)[:, row] = cells[:count].swapaxes(0, 1)
        cells = cells[count:]
        builder.add(block)
    return builder.tables()


def pairs_of(tables: Sequence[Tensor], tokens: int, at_once: int = 1 << 20) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys among the first so many slots that see each other, int64, about so many at once."""
    for part in parts_of([t.cpu() for t in tables]):
        start, tile, mask, slot = (t.numpy() for t in (part.row_start, part.row_tile, part.row_mask, part.order))
        row = np.repeat(np.arange(len(start) - 1), np.diff(start))
        for number in np.unique(mask):
            q, k = np.nonzero(np.ones((TILE, TILE), bool) if number < 0 else _unpacked(part.bits[number].numpy()))
            entries = np.flatnonzero(mask == number)
            for at in np.array_split(entries, -(-len(entries) * len(q) // at_once)):
                queries, keys = ((x[at, None].astype(np.int64) * TILE + y).ravel() for x, y in ((row, q), (tile, k)))
                for places in (slot, None) if len(slot) else (None,):  # a full tile may reach behind the end
                    there = np.maximum(queries, keys) < (tokens if places is None else len(places))
                    if not there.all():
                        queries, keys = queries[there], keys[there]
                    if places is not None:
                        queries, keys = places[queries].astype(np.int64), places[keys].astype(np.int64)
                yield queries, keys


def unpack(tables: Sequence[Tensor], tokens: int) -> Tensor:
    """The dense mask bool [tokens, tokens] that tables describe, by slots."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q, k in pairs_of(tables, tokens):
        seen[q, k] = True
    return seen


class Rows:
    """rows[queries, :n] → bool [queries, n], of the dense mask that tables in one part and raster order describe.

    Found where the tables are, and the host waits for nothing: so a CUDA graph may hold it.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        (part,) = parts_of(tables)
        start, tile, mask, self._bits = part.row_start, part.row_tile, part.row_mask, part.bits
        tiles, device = len(start) - 1, start.device
        row = torch.searchsorted(start, torch.arange(len(tile), dtype=start.dtype, device=device), right=True) - 1
        self._masks = torch.full((tiles, tiles), -2, dtype=torch.int64, device=device)  # no tile; -1 is a full one
        self._masks[row, tile.long()] = mask.long()

    def __getitem__(self, at: tuple[Tensor, slice]) -> Tensor:
        queries, keys = at
        masks = self._masks[queries // TILE]  # [queries, tiles]
        words = -(masks == -1).long()
        if len(self._bits):
            words = torch.where(masks < 0, words, self._bits[masks.clamp(min=0), (queries % TILE).unsqueeze(1)])
        seen = words.unsqueeze(-1) >> torch.arange(TILE, device=words.device) & 1
        return seen.bool().flatten(1)[:, keys]


def _unpacked(words: np.ndarray) -> np.ndarray:
    """int64 [64] → bool [64, 64]."""
    return np.unpackbits(words.view(np.uint8).reshape(TILE, 8), axis=1, bitorder="little").view(bool)


def _whole(i: int, tiles: int, n: int) -> np.ndarray:
    """The words of row i's tiles when each query sees every key that exists."""
    exists = np.zeros(tiles * TILE, bool)
    exists[:n] = True
    words = np.packbits(exists, bitorder="little").view("<i8")
    return np.where((i * TILE + np.arange(TILE) < n)[:, None], words, 0)


def _transposed(bits: np.ndarray) -> np.ndarray:
    """int64 [masks, 64] with bit k of word r → bit r of word k."""
    matrix = np.unpackbits(bits.copy().view(np.uint8).reshape(-1, TILE, 8), axis=2, bitorder="little")
    packed = np.packbits(np.ascontiguousarray(matrix.transpose(0, 2, 1)), axis=2, bitorder="little")
    return packed.view("<i8").reshape(-1, TILE)


def _lists(rows: list[int], others: list[int], masks: list[int], tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(torch.tensor(rows, dtype=torch.int64), minlength=tiles)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return start, torch.tensor(others, dtype=torch.int32), torch.tensor(masks, dtype=torch.int32)
