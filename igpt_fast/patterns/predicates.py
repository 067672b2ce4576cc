"""The registry of sparse attention patterns: predicates on two pixels, by name, and what | and & make of them.

A predicate says whether the pixel that a query predicts may look at the pixel that a key holds. In the shifted,
autoregressive sequence slot i predicts pixel i and slot j holds pixel j - 1: there a predicate is cut to the pixels
before the predicted one, and whatever it says, a pixel sees sos and its neighbour in raster order.
"""

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce

import torch
from torch import Tensor

from igpt_fast.errors import InputError


@dataclass(frozen=True)
class Pixels:
    """Pixels of a grid of size (height, width), as int32 tensors that broadcast against those of other pixels."""

    row: Tensor
    col: Tensor
    index: Tensor  # row * width + col; -1 for sos
    size: tuple[int, int]


Predicate = Callable[[Pixels, Pixels], Tensor]  # (pixel to predict, pixel seen) → bool, elementwise


@dataclass(frozen=True)
class Pattern:
    """A predicate and its name. a | b sees what either sees, a & b what both see. Equal keys, equal patterns."""

    text: str = field(compare=False)
    sees: Predicate = field(compare=False, repr=False)
    key: Hashable = field(repr=False)
    cut: bool = field(default=True, compare=False, repr=False)  # whether looking ahead is cut off, or an error
    parts: tuple["Pattern", ...] = field(default=(), compare=False, repr=False)  # of a union

    def __call__(self, q: Pixels, k: Pixels) -> Tensor:
        return self.sees(q, k)

    def __or__(self, other: "Pattern") -> "Pattern":
        union = self._with(other, "|", lambda q, k: self.sees(q, k) | other.sees(q, k))
        parts = (self.parts or (self,)) + (other.parts or (other,)) if isinstance(other, Pattern) else ()
        return replace(union, parts=parts) if parts else union

    def __and__(self, other: "Pattern") -> "Pattern":
        return self._with(other, "&", lambda q, k: self.sees(q, k) & other.sees(q, k))

    def _with(self, other: "Pattern", sign: str, sees: Predicate) -> "Pattern":
        if not isinstance(other, Pattern):
            return NotImplemented
        texts = [f"({p.text})" if sign == "&" and "|" in p.text else p.text for p in (self, other)]
        return Pattern(f" {sign} ".join(texts), sees, (self.key, sign, other.key), self.cut and other.cut)

    @classmethod
    def own(cls, predicate: Predicate) -> "Pattern":
        """A pattern of the caller's: one function of (pixel to predict, pixel seen). It must not look ahead."""
        return cls(getattr(predicate, "__qualname__", repr(predicate)), predicate, predicate, cut=False)


PATTERNS: dict[str, Callable[..., Pattern]] = {}


def registered(make: Callable[..., Predicate | tuple[Predicate, ...]]) -> Callable[..., Pattern]:
    """Registers a function of whole numbers → predicate, or several whose union it is, under its name: it gives a
    Pattern."""
    name = make.__name__

    def pattern(*args: int, **options: int) -> Pattern:
        said = [*map(str, args), *(f"{k}={v}" for k, v in options.items())]
        text = f"{name}({', '.join(said)})" if said else name
        try:
            made = make(*args, **options)
        except TypeError:
            raise InputError(f"{text}: {name} takes {_parameters(make)}") from None
        if not isinstance(made, tuple):
            return Pattern(text, made, text)
        parts = tuple(Pattern(text, sees, (text, i)) for i, sees in enumerate(made))
        return Pattern(text, lambda q, k: reduce(operator.or_, (part(q, k) for part in parts)), text, parts=parts)

    pattern.__name__, pattern.__doc__ = name, make.__doc__
    PATTERNS[name] = pattern
    return pattern


def _parameters(make: Callable) -> str:
    code = make.__code__
    names = code.co_varnames[: code.co_argcount]
    defaults = make.__defaults__ or ()
    if not names:
        return "no numbers"
    return ", ".join(f"{n} ({'the width' if d is None else d})" for n, d in zip(names, defaults, strict=True))


MOST = 2**31 - 1  # what pixels are counted in, int32, can be compared with


def _whole(name: str, value: int | None, least: int = 1, odd: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, int) and value > MOST:
        raise InputError(f"{name} is {value}; use at most {MOST:,}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (odd and value % 2 == 0):
        near = max(least, int(value)) if isinstance(value, int) else least
        raise InputError(
            f"{name} is {value!r}; use {'an odd' if odd else 'a'} whole number of at least {least}, "
            f"such as {near | 1 if odd else near}"
        )


@registered
def row() -> Predicate:
    """The pixel's own row."""
    return lambda q, k: q.row == k.row


@registered
def column() -> Predicate:
    """The pixel's own column."""
    return lambda q, k: q.col == k.col


@registered
def axial() -> tuple[Predicate, ...]:
    """The pixel's own row and its own column."""
    return lambda q, k: q.row == k.row, lambda q, k: q.col == k.col


@registered
def strided(stride: int | None = None) -> tuple[Predicate, ...]:
    """The last `stride` pixels, and each that is a multiple of it away (None: the width, so: the column above)."""
    _whole("strided: stride", stride)

    def near(q: Pixels, k: Pixels) -> Tensor:
        return (q.index - k.index).abs() < (stride or q.size[1])

    def multiples(q: Pixels, k: Pixels) -> Tensor:
        return (q.index - k.index) % (stride or q.size[1]) == 0

    return near, multiples


@registered
def fixed(block: int | None = None, summary: int = 8) -> tuple[Predicate, ...]:
    """The pixel's own stretch of `block` pixels (None: its row), and the last `summary` pixels of every other one."""
    _whole("fixed: block", block)
    _whole("fixed: summary", summary)

    def same(q: Pixels, k: Pixels) -> Tensor:
        step = block or q.size[1]
        return torch.div(q.index, step, rounding_mode="floor") == torch.div(k.index, step, rounding_mode="floor")

    def last(q: Pixels, k: Pixels) -> Tensor:
        step = block or q.size[1]
        return k.index % step >= step - summary

    return same, last


@registered
def local(window: int = 128) -> Predicate:
    """The last `window` pixels in raster order."""
    _whole("local: window", window)
    return lambda q, k: (q.index - k.index).abs() <= window


@registered
def neighborhood(side: int = 7) -> Predicate:
    """The square of `side` × `side` pixels around the pixel (its causal half, in a causal sequence)."""
    _whole("neighborhood: side", side, odd=True)
    reach = side // 2
    return lambda q, k: ((q.row - k.row).abs() <= reach) & ((q.col - k.col).abs() <= reach)


@registered
def dilated(side: int = 7, step: int = 2) -> Predicate:
    """`side` × `side` pixels around the pixel, `step` apart in both directions."""
    _whole("dilated: side", side, odd=True)
    _whole("dilated: step", step)
    reach = side // 2 * step

    def sees(q: Pixels, k: Pixels) -> Tensor:
        down, across = q.row - k.row, q.col - k.col
        return (down.abs() <= reach) & (across.abs() <= reach) & (down % step == 0) & (across % step == 0)

    return sees


@registered
def blocks(height: int = 8, width: int | None = None) -> Predicate:
    """The pixel's own block of an image cut into blocks of `height` × `width` pixels (None: as wide as high)."""
    _whole("blocks: height", height)
    _whole("blocks: width", width)
    wide = width or height

    def sees(q: Pixels, k: Pixels) -> Tensor:
        down, across = (
            torch.div(a, n, rounding_mode="floor") == torch.div(b, n, rounding_mode="floor")
            for a, b, n in ((q.row, k.row, height), (q.col, k.col, wide))
        )
        return down & across

    return sees


@registered
def global_tokens(first: int = 16) -> Predicate:
    """The first `first` pixels are seen by all, and see all (that come before them, in a causal sequence)."""
    _whole("global_tokens: first", first)
    return lambda q, k: (k.index < first) | (q.index < first)


@registered
def random_blocks(count: int = 3, block: int = 64, seed: int = 0) -> Predicate:
    """Stretches of `block` pixels: each sees `count` of those before it, drawn by `seed`, and is seen by them."""
    _whole("random_blocks: count", count)
    _whole("random_blocks: block", block)
    _whole("random_blocks: seed", seed, least=0)

    def sees(q: Pixels, k: Pixels) -> Tensor:
        table = _drawn((q.size[0] * q.size[1] + block - 1) // block, count, seed)
        a, b = (torch.div(p.index.clamp(min=0), block, rounding_mode="floor") for p in (q, k))
        return table[torch.maximum(a, b).long(), torch.minimum(a, b).long()]

    return sees


@lru_cache(maxsize=16)
def _drawn(stretches: int, count: int, seed: int) -> Tensor:
    """bool [stretches, stretches]: row i has `count` random columns below i, or all of them."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(stretches, stretches, dtype=torch.bool)
    for i in range(1, stretches):
        table[i, torch.randperm(i, generator=generator)[:count]] = True
    return table
