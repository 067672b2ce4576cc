"""A pattern as the kernels read it: which 64 × 64 tiles exist, and the bits of those that are not full."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.predicates import Pattern, Pixels, Predicate

TILE = 64


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
    # (query slots [n], keys) → bool [n, keys]: who sees which of the first so many slots, from the predicate. None in a
    # graph that is being traced, where nothing but the tables is of use.
    seen: Callable[[Tensor, int], Tensor] | None = field(repr=False)
    pairs: int = 0  # that see each other

    @classmethod
    def compile(cls, pattern: Pattern | Predicate | str, size: tuple[int, int], causal: bool = True) -> "BlockMask":
        """Compiles a pattern, its text or a predicate of your own for a grid of size (height, width).

        causal: the shifted autoregressive sequence; else slot j holds pixel j and all may see all. Whatever the pattern
        says, a slot sees itself (causal: the neighbour in raster order) and, in a causal sequence, slot 0 (sos). Never
        holds more than 64 rows of the mask. Raises InputError for a text that cannot be read and for a predicate of
        your own that gives no bool or, in a causal sequence, looks ahead.
        """
        pattern = parse(pattern) if isinstance(pattern, str) else pattern
        pattern = pattern if isinstance(pattern, Pattern) else Pattern.own(pattern)
        n = size[0] * size[1]
        slots = torch.arange(n, dtype=torch.int32)

        def pixels(index: Tensor) -> Pixels:
            return Pixels(torch.div(index, size[1], rounding_mode="floor"), index % size[1], index, tuple(size))

        holds = pixels(slots.unsqueeze(0) - 1 if causal else slots.unsqueeze(0))

        def seen(queries: Tensor, keys: int) -> Tensor:
            q, k = queries.int().unsqueeze(1), slots[:keys].unsqueeze(0)
            reach = keys if pattern.cut else n  # whoever may not look ahead is asked about all
            found = pattern(pixels(q), Pixels(*(t[:, :reach] for t in (holds.row, holds.col, holds.index)), holds.size))
            found = _checked(found, pattern, (len(queries), reach))
            if causal and not pattern.cut:
                _refuse_looking_ahead(found, queries, pattern, size)
            found = found[:, :keys]
            return ((found & (k <= q)) | (k == 0) | (k == q)) if causal else found | (k == q)

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
        return cls._build(lambda queries, keys: seen[queries, :keys], seen.size(0), causal)

    @classmethod
    def _build(cls, seen: Callable[[Tensor, int], Tensor], n: int, causal: bool) -> "BlockMask":
        tiles = (n + TILE - 1) // TILE
        rows, columns, masks, pairs = [], [], [], 0
        known: dict[bytes, int] = {}  # a tile's words → its mask's number; full tiles have -1
        for i in range(tiles):
            words, count = _words(seen, i, n, causal)
            pairs += count
            whole = _whole(i, words.shape[1], n)
            found = np.flatnonzero(words.any(0))
            full = (words[:, found] == whole[:, found]).all(0)
            for j, is_full in zip(found.tolist(), full.tolist(), strict=True):
                rows.append(i), columns.append(j)
                masks.append(-1 if is_full else known.setdefault(words[:, j].tobytes(), len(known)))
        bits = np.frombuffer(b"".join(known), np.int64).reshape(-1, TILE)
        by_column = np.lexsort((rows, columns)).tolist()
        tensors = (
            *_lists(rows, columns, masks, tiles),
            *_lists(*([part[e] for e in by_column] for part in (columns, rows, masks)), tiles),
            torch.from_numpy(bits.copy()),
            torch.from_numpy(_transposed(bits)),
        )
        return cls(n, causal, tensors, seen, pairs)

    def dense(self) -> Tensor:
        """The mask as bool [tokens, tokens], from the predicate, not from the tiles."""
        return self.seen(torch.arange(self.tokens), self.tokens)

    def density(self) -> float:
        """Tiles kept, as a share of the tiles of dense (causal) attention."""
        tiles = len(self.tensors[0]) - 1
        return len(self.tensors[1]) / (tiles * (tiles + 1) / 2 if self.causal else tiles * tiles)

    def pair_density(self) -> float:
        """Pairs that see each other, as a share of those of dense (causal) attention."""
        return self.pairs / (self.tokens * (self.tokens + 1) / 2 if self.causal else self.tokens**2)

    def first(self, slots: int) -> "BlockMask":
        """The mask of the first so many slots of a causal sequence. Raises InputError where there are none such."""
        if not self.causal or not 1 <= slots <= self.tokens:
            kind = f"{self.tokens} tokens, causal={self.causal}"
            raise InputError(f"BlockMask.first: {slots} slots were asked of a mask of {kind}; a causal one has a start")
        return self if slots == self.tokens else self._build(self.seen, slots, True).to(self.tensors[0].device)

    def to(self, device: torch.device) -> "BlockMask":
        """The same mask with its tables on another device."""
        if self.tensors[0].device == device:
            return self
        return BlockMask(self.tokens, self.causal, tuple(t.to(device) for t in self.tensors), self.seen, self.pairs)


def _checked(found: Tensor, pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    if not isinstance(found, Tensor) or found.dtype is not torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"the predicate {pattern.text} gives {kind}; it must give a bool tensor, elementwise")
    return found.expand(shape)


def _refuse_looking_ahead(found: Tensor, queries: Tensor, pattern: Pattern, size: tuple[int, int]) -> None:
    """found [n, T]: slot j holds pixel j - 1, so that a query may see the slots up to its own."""
    ahead = found & (torch.arange(found.shape[1]) > queries.unsqueeze(1))
    if ahead.any():
        at, slot = ahead.nonzero()[0].tolist()
        q, k = (f"({p // size[1]}, {p % size[1]})" for p in (int(queries[at]), slot - 1))
        raise InputError(
            f"the predicate {pattern.text} looks ahead: pixel {q} may not see pixel {k}, which is drawn later or is "
            "itself; add `& (k.index < q.index)`"
        )


def _words(seen: Callable[[Tensor, int], Tensor], i: int, n: int, causal: bool) -> tuple[np.ndarray, int]:
    """int64 [64, tiles]: bit k of [q, j] says that query 64 i + q sees key 64 j + k; and how many bits are set.

    In a causal sequence the tiles behind the row's own, which are empty, are left out.
    """
    queries = torch.arange(i * TILE, min(n, (i + 1) * TILE))
    keys = min(n, (i + 1) * TILE) if causal else n
    block = np.zeros((TILE, (keys + TILE - 1) // TILE * TILE), bool)
    block[: len(queries), :keys] = seen(queries, keys).numpy()
    return np.packbits(block, axis=1, bitorder="little").view("<i8"), int(np.count_nonzero(block))


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


def compiled(pattern: Pattern | str, size: tuple[int, int], causal: bool = True) -> BlockMask:
    """A pattern, or its text, compiled for a grid of size (height, width); what it says is compiled once and kept."""
    return _compiled(parse(pattern) if isinstance(pattern, str) else pattern, tuple(size), causal)


@lru_cache(maxsize=64)
def _compiled(pattern: Pattern, size: tuple[int, int], causal: bool) -> BlockMask:
    return BlockMask.compile(pattern, size, causal)
