"""A pattern as the kernels read it: which 64 × 64 tiles exist, and the bits of those that are not full."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.patterns.orders import ORDERS, PART, WORTH_PARTS, fewest_tiles
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.predicates import Pattern, Pixels, Predicate
from igpt_fast.patterns.tables import FIELDS, TILE, Builder, Rows, Tables, empty_block, parts_of, reordered


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A compiled pattern over `tokens` slots: which 64 × 64 tiles exist, and the bits of those that are not full.

    Made by `BlockMask.compile` or `BlockMask.from_dense`. `tensors` is what the kernels read: the fields of
    `tables.Tables`, which are lists of tiles by rows and by columns (CSR) and the bits of those that are not full. A
    mask in several parts, each with its own order, has as many times these; no pair is in two parts.
    """

    tokens: int
    causal: bool
    tensors: tuple[Tensor, ...] = field(repr=False)
    # (query slots [n], keys) → bool [n, keys]: who sees which of the first so many slots, from the predicate. None in a
    # graph that is being traced, where nothing but the tables is of use.
    seen: Callable[[Tensor, int], Tensor] | None = field(repr=False)
    pairs: int = 0  # that see each other
    order: str = "raster"  # the name of the token order, or of each part's
    in_raster: "BlockMask | None" = field(default=None, repr=False)  # the same mask; None: it is that itself
    _kept: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # what is made of it, once

    @classmethod
    def compile(
        cls,
        pattern: Pattern | Predicate | str,
        size: tuple[int, int],
        causal: bool = True,
        order: str | None = None,
    ) -> "BlockMask":
        """Compiles a pattern, its text or a predicate of your own for a grid of size (height, width).

        causal: the shifted autoregressive sequence; else slot j holds pixel j and all may see all. Whatever the pattern
        says, a slot sees itself (causal: the neighbour in raster order) and, in a causal sequence, slot 0 (sos). Never
        holds more than 64 rows of the mask. order: a name of ORDERS for the tiles; None: the one with clearly the
        fewest, or one for each part of a union where that leaves fewer. Raises InputError for a text that cannot be
        read, an unknown order, and for a predicate of your own that gives no bool or, in a causal sequence, looks
        ahead.
        """
        if order is not None and order not in ORDERS:
            raise InputError(f"there is no token order {order!r}; use one of {', '.join(ORDERS)}")
        pattern = parse(pattern) if isinstance(pattern, str) else pattern
        pattern = pattern if isinstance(pattern, Pattern) else Pattern.own(pattern)
        parts = pattern.parts or (pattern,)
        n = size[0] * size[1]
        slots = torch.arange(n, dtype=torch.int32)

        def pixels(index: Tensor) -> Pixels:
            return Pixels(torch.div(index, size[1], rounding_mode="floor"), index % size[1], index, tuple(size))

        holds = pixels(slots.unsqueeze(0) - 1 if causal else slots.unsqueeze(0))

        def added(queries: Tensor, keys: int) -> Iterator[Tensor]:
            """bool [n, keys]: what each part of the pattern shows that those before it do not."""
            q, k = queries.int().unsqueeze(1), slots[:keys].unsqueeze(0)
            always = (k == q) | (k == 0) if causal else k == q
            before = None
            for part in parts:
                reach = keys if part.cut else n  # whoever may not look ahead is asked about all
                asked = Pixels(*(t[:, :reach] for t in (holds.row, holds.col, holds.index)), holds.size)
                found = _checked(part(pixels(q), asked), part, (len(queries), reach))
                if causal and not part.cut:
                    _refuse_looking_ahead(found, queries, part, size)
                found = (found[:, :keys] & (k <= q) if causal else found) | always
                yield found if before is None else found & ~before
                before = found if before is None else found | before

        def seen(queries: Tensor, keys: int) -> Tensor:
            return reduce(torch.bitwise_or, added(queries, keys))

        builders = [Builder(n) for _ in range(len(parts) + 1)]
        for queries, keys in _rows(n, causal):
            blocks = [_block(found) for found in added(queries, keys)]
            for builder, block in zip(builders, [reduce(np.bitwise_or, blocks), *blocks], strict=False):
                builder.add(block)
        whole, *parts_built = builders
        mask = cls(n, causal, whole.tables(), seen, whole.pairs)
        if order is None:
            return mask._arranged(size, [part.tables() for part in parts_built if part.pairs])
        return mask if order == "raster" else mask.in_order(order, ORDERS[order](size))

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
        builder = Builder(n)
        for queries, keys in _rows(n, causal):
            builder.add(_block(seen(queries, keys)))
        return cls(n, causal, builder.tables(), seen, builder.pairs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the predicate, which no file can name, and what was made of it: the tables say the same."""
        return {**self.__dict__, "seen": self.seen and True, "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.seen:
            self.__dict__["seen"] = _seen_by(self.raster.tensors)

    def in_order(self, name: str, order: Tensor) -> "BlockMask":
        """This mask, which is in raster order, with tiles in another. order: int [tokens], the slot at each place."""
        tables = reordered(self.tensors, self.tokens, order)
        return dataclasses.replace(self, tensors=tables, order=name, in_raster=self)

    def _arranged(self, size: tuple[int, int], parts: list[Tables]) -> "BlockMask":
        """This mask, in raster order, in the order that has the fewest tiles, or in parts that each have their own."""
        name, together = fewest_tiles(self.tensors, size, self.pairs)
        by_order: dict[str, Tables] = {}
        apart = 0
        for tables in parts if len(parts) > 1 else ():
            own, count = fewest_tiles(tables, size)
            by_order[own] = by_order.get(own, ()) + tables
            apart += count
        apart += PART * self.rows * (len(by_order) - 1)
        if len(by_order) < 2 or apart > WORTH_PARTS * together:
            return self if name == "raster" else self.in_order(name, ORDERS[name](size))
        split, names = (), [name for name in ORDERS if name in by_order]
        for name in names:
            tables = by_order[name]
            order = None if name == "raster" else ORDERS[name](size)
            alone = order is None and len(tables) == FIELDS
            split += tables if alone else reordered(tables, self.tokens, order)
        return dataclasses.replace(self, tensors=split, order=" + ".join(names), in_raster=self)

    @property
    def parts(self) -> tuple[Tables, ...]:
        """`tensors` by name, of each part."""
        return tuple(parts_of(self.tensors))

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.tokens // TILE)

    @property
    def raster(self) -> "BlockMask":
        """The same mask with tiles in raster order, which is what decoding reads."""
        return self.in_raster or self

    def dense(self) -> Tensor:
        """The mask as bool [tokens, tokens], from the predicate, not from the tiles."""
        return self.seen(torch.arange(self.tokens), self.tokens)

    def dense_on(self, device: torch.device) -> tuple[Tensor, bool]:
        """`dense()` on a device, made once, and whether every slot sees something."""
        if ("dense", device) not in self._kept:
            with torch.inference_mode(False):  # a tensor of that mode could not be used in a graph of autograd
                seen = self.dense()
                self._kept["dense", device] = seen.to(device), bool(seen.any(-1).all())
        return self._kept["dense", device]

    def tiles(self) -> int:
        """How many tiles the kernels walk over."""
        return sum(len(part.row_tile) for part in self.parts)

    def density(self) -> float:
        """Tiles kept, as a share of the tiles of dense (causal) attention."""
        tiles = self.rows
        return self.tiles() / (tiles * (tiles + 1) / 2 if self.causal else tiles * tiles)

    def pair_density(self) -> float:
        """Pairs that see each other, as a share of those of dense (causal) attention."""
        return self.pairs / (self.tokens * (self.tokens + 1) / 2 if self.causal else self.tokens**2)

    def first(self, slots: int) -> "BlockMask":
        """The mask of the first so many slots of a causal sequence. Raises InputError where there are none such."""
        if not self.causal or not 1 <= slots <= self.tokens:
            kind = f"{self.tokens} tokens, causal={self.causal}"
            raise InputError(f"BlockMask.first: {slots} slots were asked of a mask of {kind}; a causal one has a start")
        if slots == self.tokens:
            return self
        start = self._build(self.seen, slots, True)
        if self.in_raster is not None:
            tables = ()
            for part in parts_of([t.cpu() for t in self.tensors]):
                order = part.order.long()
                tables += reordered(part, slots, order[order < slots] if len(order) else None)
            start = dataclasses.replace(start, tensors=tables, order=self.order, in_raster=start)
        return start.to(self.tensors[0].device)

    def to(self, device: torch.device) -> "BlockMask":
        """The same mask with its tables on another device, copied once."""
        if self.tensors[0].device == device:
            return self
        if device in self._kept:
            return self._kept[device]
        raster = self.in_raster and self.in_raster.to(device)
        with torch.inference_mode(False):
            tensors = tuple(t.to(device) for t in self.tensors)
        made = dataclasses.replace(self, tensors=tensors, in_raster=raster)
        # A tracer's tensors are of use to nobody behind it.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return made if traced else self._kept.setdefault(device, made)


def _seen_by(tables: Sequence[Tensor]) -> Callable[[Tensor, int], Tensor]:
    """A mask's `seen`, from its tables in raster order."""
    return lambda queries, keys: Rows([t.cpu() for t in tables])[queries, :keys]


def _rows(n: int, causal: bool) -> Iterator[tuple[Tensor, int]]:
    """Each tile's queries, and how many keys they may see: in a causal sequence, tiles behind their own are empty."""
    for first in range(0, n, TILE):
        end = min(n, first + TILE)
        yield torch.arange(first, end), end if causal else n


def _block(found: Tensor) -> np.ndarray:
    """bool [n <= 64, keys] → the same in whole tiles."""
    block = empty_block(found.shape[1])
    block[: len(found), : found.shape[1]] = found.numpy()
    return block


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


def compiled(pattern: Pattern | str, size: tuple[int, int], causal: bool = True) -> BlockMask:
    """A pattern, or its text, compiled for a grid of size (height, width); what it says is compiled once and kept."""
    return _compiled(parse(pattern) if isinstance(pattern, str) else pattern, tuple(size), causal)


@lru_cache(maxsize=64)
def _compiled(pattern: Pattern, size: tuple[int, int], causal: bool) -> BlockMask:
    return BlockMask.compile(pattern, size, causal)
