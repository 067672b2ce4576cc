"""Config: every number that fixes an Image GPT's shape, checked once, here."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from igpt_fast.errors import InputError, whole
from igpt_fast.patterns import described, normalised, of_layer

OBJECTIVES = ("ar", "bert")
POSITIONS = ("learned", "axial")
# Least and most: of more, no machine holds a model, and to find that out by trying takes long.
WHOLE = (("layers", 1, 10**4), ("width", 1, 10**5), ("heads", 1, 10**5), ("colors", 2, 10**6), ("classes", 0, 10**6))

PRESETS: dict[str, dict[str, Any]] = {
    "S": {"layers": 24, "width": 512, "heads": 8, "size": (32, 32)},
    "M": {"layers": 36, "width": 1024, "heads": 8, "size": (32, 32)},
    "L": {"layers": 48, "width": 1536, "heads": 16, "size": (32, 32)},
    # XL's head count was never published: 24 (head dim 128) is our assumption. The parameter count is the same for any.
    "XL": {"layers": 60, "width": 3072, "heads": 24, "size": (64, 64)},
}


@dataclass(frozen=True)
class Config:
    """The shape of an Image GPT. Impossible values raise InputError at construction: a Config in hand is a valid one.

    `width` must be a multiple of `heads`. Head dims that are multiples of 8 up to 128 are served by the CPU's attention
    kernels, 32, 64, 96 and 128 in 16 bits by the GPU's; any other runs on torch's own attention.
    """

    layers: int
    width: int
    heads: int
    colors: int = 512  # palette size = number of token values, at least 2
    size: tuple[int, int] = (32, 32)  # the pixel grid: (height, width); one number means a square
    objective: str = "ar"  # "ar": predict the next pixel; "bert": predict masked pixels from all others
    bias: bool = False  # biases on qkv, attention output and both MLP matrices; the published models have none
    classes: int = 0  # outputs of the classifier head; 0: no head
    mlp_width: int | None = None  # inner width of the MLP; None becomes 4 * width
    eps: float = 1e-5  # inside the root of the norms
    # Who sees whom: None (all that the objective lets them), a text of igpt_fast.patterns, or a list, cycled over the
    # layers, of None, texts and lists, cycled over the heads. Kept in the one form that `patterns.normalised` gives.
    pattern: Any = None
    # "learned": an embedding a pixel; "axial": the sum of one of its row and one of its column
    positions: str = "learned"

    def __post_init__(self) -> None:
        for name, least, most in WHOLE:
            self._set(name, whole(name, getattr(self, name), least, most))
        if self.width % self.heads:
            width, heads = _nearest_multiple(self.width, self.heads), _nearest_divisor(self.width, self.heads)
            raise InputError(
                f"width {self.width} does not divide into {self.heads} heads (head dim {self.width / self.heads:.4g}); "
                f"use width {width} or heads {heads}"
            )
        size = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        if len(size) != 2:
            raise InputError(f"size is {self.size!r}; give (height, width) in pixels, such as (32, 32)")
        height, width = whole("size (height)", size[0], 1, 10**5), whole("size (width)", size[1], 1, 10**5)
        self._set("size", (height, width))
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective is {self.objective!r}; use one of {', '.join(map(repr, OBJECTIVES))}")
        if not isinstance(self.bias, bool):
            raise InputError(f"bias is {self.bias!r}; use true or false")
        mlp_width = 4 * self.width if self.mlp_width is None else self.mlp_width
        self._set("mlp_width", whole("mlp_width", mlp_width, 1, 10**6))
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not number or not 0 < self.eps <= sys.float_info.max:
            raise InputError(f"eps is {self.eps!r}; use a small positive number such as 1e-5")
        self._set("eps", float(self.eps))
        self._set("pattern", normalised(self.pattern, self.layers, self.heads))
        if self.positions not in POSITIONS:
            raise InputError(f"positions is {self.positions!r}; use one of {', '.join(map(repr, POSITIONS))}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one way to normalise a field of a frozen dataclass

    @property
    def tokens(self) -> int:
        """Pixels of one image = positions of the sequence."""
        return self.size[0] * self.size[1]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def patterns(self, layer: int) -> tuple[str | None, ...]:
        """The patterns of one layer, cycled over its heads; None stands for dense attention."""
        return of_layer(self.pattern, layer)

    @property
    def shape_text(self) -> str:
        """`8 layers, width 256, 4 heads, 32×32 pixels of 512 colours`."""
        grid = f"{self.size[0]}×{self.size[1]} pixels of {self.colors} colours"
        return f"{self.layers} layers, width {self.width}, {self.heads} heads, {grid}"

    @property
    def pattern_text(self) -> str:
        """The pattern for a person: layers apart by commas, heads by slashes."""
        return described(self.pattern)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "Config":
        """One of the published shapes "S", "M", "L", "XL" (XL's 24 heads are our assumption), with any field replaced.

        Raises InputError for an unknown preset or field.
        """
        if name not in PRESETS:
            raise InputError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` brings the same Config back."""
        return {**asdict(self), "size": list(self.size), "pattern": _lists(self.pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The Config that `to_dict` wrote. Raises InputError that names every unknown or missing field."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            raise InputError(f"unknown config field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
        if missing := [name for name in ("layers", "width", "heads") if name not in values]:
            raise InputError(f"the config lacks {', '.join(missing)}; layers, width and heads have no default")
        return cls(**values)


def _lists(value: Any) -> Any:
    """Tuples, within tuples too, as the lists that JSON makes of them."""
    return [_lists(element) for element in value] if isinstance(value, tuple) else value


def _nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, never 0; the larger of two equally near."""
    return max(step, (2 * value + step) // (2 * step) * step)


def _nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` nearest to `wanted`; the smaller of two equally near."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return min((*small, *(value // d for d in reversed(small))), key=lambda d: abs(d - wanted))
