"""The tables that the kernels read: lists of 64 × 64 tiles and the bits of those that are not full."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

TILE = 64

# row_start [tiles + 1], row_tile, row_mask [entries]; the same by columns; bits, bits_t int64 [masks, 64]; order [T].
Tables = tuple[Tensor, ...]


def build(rows: Iterable[np.ndarray], tokens: int, order: Tensor | None = None) -> tuple[Tables, int]:
    """The tables of a mask, and how many pairs it has.

    rows: for each 64 queries bool [64, keys], and behind those keys nothing is seen; order: int [T], the slot that
    stands at each place, where that is not the raster's
    """
    tiles = (tokens + TILE - 1) // TILE
    at, others, masks, pairs = [], [], [], 0
    known: dict[bytes, int] = {}  # a tile's words → its mask's number; full tiles have -1
    for i, block in enumerate(rows):
        pairs += int(np.count_nonzero(block))
        words = np.packbits(block, axis=1, bitorder="little").view("<i8")
        found = np.flatnonzero(words.any(0))
        full = (words[:, found] == _whole(i, words.shape[1], tokens)[:, found]).all(0)
        for j, is_full in zip(found.tolist(), full.tolist(), strict=True):
            at.append(i), others.append(j)
            masks.append(-1 if is_full else known.setdefault(words[:, j].tobytes(), len(known)))
    bits = np.frombuffer(b"".join(known), np.int64).reshape(-1, TILE)
    by_column = np.lexsort((at, others)).tolist()
    tables = (
        *_lists(at, others, masks, tiles),
        *_lists(*([part[e] for e in by_column] for part in (others, at, masks)), tiles),
        torch.from_numpy(bits.copy()),
        torch.from_numpy(_transposed(bits)),
        torch.empty(0, dtype=torch.int32) if order is None else order.int(),
    )
    return tables, pairs


def block_of(i: int, tokens: int, keys: int) -> tuple[slice, np.ndarray]:
    """The queries of row i of tiles, and an empty block for what they see of the first so many keys."""
    queries = slice(i * TILE, min(tokens, (i + 1) * TILE))
    return queries, np.zeros((TILE, (keys + TILE - 1) // TILE * TILE), bool)


def permuted(tables: Sequence[Tensor], tokens: int, order: Tensor) -> tuple[Tables, int]:
    """The tables of a mask in raster order, for queries and keys in another."""
    place = torch.argsort(order).numpy()
    found = [(place[q].astype(np.int32), place[k].astype(np.int32)) for q, k in pairs_of(tables, tokens)]
    q, k = (np.concatenate(part) for part in zip(*found, strict=True))
    row = (q // TILE).astype(np.uint16 if tokens < TILE << 16 else np.int64)  # of 16 bits: numpy then sorts by digits
    by_row = np.argsort(row, kind="stable")
    ends = np.cumsum(np.bincount(row, minlength=(tokens + TILE - 1) // TILE))

    def rows() -> Iterator[np.ndarray]:
        for i, end in enumerate(ends):
            _, block = block_of(i, tokens, tokens)
            here = by_row[ends[i - 1] if i else 0 : end]
            block[q[here] % TILE, k[here]] = True
            yield block

    return build(rows(), tokens, order)


def pairs_of(tables: Sequence[Tensor], tokens: int, at_once: int = 1 << 20) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys that see each other, about so many at once, from tables in raster order."""
    start, tile, mask = (t.numpy() for t in tables[:3])
    row = np.repeat(np.arange(len(start) - 1), np.diff(start))
    for number in np.unique(mask):
        q, k = np.nonzero(np.ones((TILE, TILE), bool) if number < 0 else _unpacked(tables[6][number].numpy()))
        entries = np.flatnonzero(mask == number)
        for at in np.array_split(entries, -(-len(entries) * len(q) // at_once)):
            queries, keys = (row[at, None] * TILE + q).ravel(), (tile[at, None].astype(np.int64) * TILE + k).ravel()
            there = (queries < tokens) & (keys < tokens)  # a full tile at the end is full of what there is
            yield (queries, keys) if there.all() else (queries[there], keys[there])


def unpack(tables: Sequence[Tensor], tokens: int) -> Tensor:
    """The dense mask bool [tokens, tokens] that tables describe, by slots."""
    start, tile, mask, _, _, _, bits, _, order = (t.cpu() for t in tables)
    tiles = len(start) - 1
    whole = torch.ones(TILE, TILE, dtype=torch.bool)
    found = [whole if m < 0 else torch.from_numpy(_unpacked(bits[m].numpy())) for m in mask.tolist()]
    seen = torch.zeros(tiles, tiles, TILE, TILE, dtype=torch.bool)
    if found:
        seen[torch.repeat_interleave(torch.arange(tiles), start.long().diff()), tile.long()] = torch.stack(found)
    seen = seen.transpose(1, 2).reshape(tiles * TILE, tiles * TILE)[:tokens, :tokens]
    if order.numel():
        place = torch.argsort(order)
        seen = seen[place][:, place]
    return seen


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
