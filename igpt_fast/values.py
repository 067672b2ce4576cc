"""Images whose numbers are no bytes: which bands become red, green and blue, and which values black and white."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from igpt_fast.errors import InputError

DIM = 1 << 13  # an image of 16 bits with no value from here on comes out almost black

_AT_ONCE = 1 << 20  # numbers
_SHADES = 1 << 16  # whole numbers of 16 bits go through a table


@dataclass(frozen=True)
class Values:
    """One image as it was stored: numbers [H, W, C], integers or floats."""

    numbers: np.ndarray
    alpha: bool = False  # whether the last channel is opacity
    white_is_0: bool = False
    nodata: float | None = None  # stands in all channels where nothing was measured; NaN in one of them says so, too
    window: tuple[float, float] | None = None  # the values of black and white, where the file says so
    seen: np.ndarray | None = None  # bool [H, W]: where something was measured, where a mask says so
    bounds: tuple[float, float] | None = None  # those that can be stored at all, where the type does not say so


def to_8_bits(
    values: Values, bands: tuple[int, ...] | None = None, value_range: tuple[float, float] | None = None
) -> tuple[Image.Image, bool]:
    """Numbers as gray or RGB (LA, RGBA where some of it is transparent), and whether little can be seen: they use few
    of the values that they could have, by which they are scaled, or all become one by value_range.

    bands: the one that becomes gray, or three, counted from 1; None: all, where there are one or three. value_range:
    the values that become black and white, as floor(255 (v - low) / (high - low) + 1/2) has it, with those outside;
    None: the file's own, else all that an unsigned type holds. Bytes stay as they are. What nobody measured is
    transparent. Raises InputError, without the image's name, where an option has to say more.
    """
    numbers = values.numbers
    alpha = values.alpha and not (bands and max(bands) == numbers.shape[2])  # who asks for it knows what it is
    count = numbers.shape[2] - alpha
    if bands is None and count not in (1, 3):
        raise InputError(
            f"it has {count} bands: --bands (bands) says which become red, green and blue, as 4,3,2, or gray, as 1"
        )
    if bands is not None and max(bands) > count:
        raise InputError(f"it has {count} bands, so there is no band {max(bands)}, as --bands (bands) has it")
    colours = numbers[..., :count] if bands is None else numbers[..., [band - 1 for band in bands]]
    seen = _measured(colours, values.nodata, values.seen)
    dim = False
    if colours.dtype != np.uint8:
        found = colours if seen is None else colours[seen]
        window = value_range or values.window
        if window is None:
            window = values.bounds or _all_of(found)
            dim = found.size > 0 and _is_dim(found, values)
        colours = _scaled(colours, *window)
        if value_range is not None and found.size:
            shades = colours if seen is None else colours[seen]
            dim = bool(shades.min() == shades.max() and found.min() < found.max())
    colours = 255 - colours if values.white_is_0 else colours
    if alpha or seen is not None:
        opacity = _opacity(numbers[..., -1]) if alpha else np.full(colours.shape[:2], 255, np.uint8)
        opacity = opacity if seen is None else np.where(seen, opacity, 0).astype(np.uint8)
        colours = np.concatenate([colours, opacity[..., None]], 2)
    return Image.fromarray(np.ascontiguousarray(colours[..., 0] if colours.shape[2] == 1 else colours)), dim


def _measured(colours: np.ndarray, nodata: float | None, mask: np.ndarray | None) -> np.ndarray | None:
    """bool [H, W]: where something was measured; None: everywhere."""
    floats = colours.dtype.kind == "f"
    if nodata is None and mask is None and not floats:
        return None
    seen = ~np.isnan(colours).any(-1) if floats else np.ones(colours.shape[:2], bool)
    if mask is not None:
        seen &= mask
    if nodata is not None:
        seen &= (colours != nodata).any(-1)
    return None if seen.all() else seen


def _all_of(numbers: np.ndarray) -> tuple[float, float]:
    """The least and largest value of an unsigned type. InputError for others, which have no black and no white."""
    if numbers.dtype.kind in "ub" and numbers.dtype.itemsize <= 2:
        return 0, 1 if numbers.dtype.kind == "b" else np.iinfo(numbers.dtype).max
    here = f" (here they run from {numbers.min():g} to {numbers.max():g})" if numbers.size else ""
    raise InputError(
        f"values of {numbers.dtype} say of themselves neither what is black nor what is white{here}: "
        "--value-range (value_range) does, as 0,3000"
    )


def _is_dim(numbers: np.ndarray, values: Values) -> bool:
    """Whether numbers of 16 bits have no value from DIM on, or those of other bounds as small a share of them."""
    if values.bounds is not None:
        low, high = values.bounds
        return float(numbers.max()) - float(numbers.min()) < (high - low) * DIM / _SHADES
    if numbers.dtype != np.uint16:
        return False
    return (_SHADES - 1 - int(numbers.min()) if values.white_is_0 else int(numbers.max())) < DIM


def _scaled(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    """To uint8: `low` and less is 0, `high` and more 255. NaN is 0."""
    if numbers.dtype.kind in "iu" and numbers.dtype.itemsize <= 2:
        wide = np.dtype(f"{numbers.dtype.kind}2")
        return _table(wide.char, low, high)[numbers.astype(wide).view(np.uint16)]
    shades = np.empty(numbers.shape, np.uint8)
    flat, out = numbers.reshape(-1), shades.reshape(-1)
    for at in range(0, len(flat), _AT_ONCE):  # float64 of all would be eight times its bytes
        part = flat[at : at + _AT_ONCE].astype(np.float64)
        above = np.clip(np.nan_to_num(part, nan=low), low, high) - low
        out[at : at + _AT_ONCE] = (above * 510 + (high - low)) // (2 * (high - low))
    return shades


@lru_cache(8)
def _table(kind: str, low: float, high: float) -> np.ndarray:
    """What becomes of every whole number of 16 bits, by its bits."""
    return _scaled(np.arange(_SHADES, dtype=np.uint16).view(kind).astype(np.float64)[None], low, high)[0]


def _opacity(numbers: np.ndarray) -> np.ndarray:
    return numbers if numbers.dtype == np.uint8 else _scaled(numbers, 0, np.iinfo(numbers.dtype).max)
