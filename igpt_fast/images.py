"""One image from RGB to pixels of the size that the model sees, and `Preprocessing`, how images are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from igpt_fast.errors import InputError

RESIZES = ("paper", "hf", "none")
SHORT_SIDE = 224  # pixels: the paper's crop
TRAINED_SIDES = (256, 384)  # pixels: the short sides of which the paper's training crops
MOST_VIEWS = 100  # of an image
NOTED = ("resize", "background", "value_range", "bands")  # of a Preprocessing: what is kept with tokens and models


@dataclass(frozen=True)
class Preprocessing:
    """How image files become pixels. Raises InputError for what is impossible."""

    size: tuple[int, int] = (32, 32)  # (height, width)
    resize: str = "paper"  # "paper", "hf" or "none", see resize_image
    background: str = "white"  # a colour name or #rrggbb, seen behind transparent pixels
    on_error: str = "raise"  # or "skip", which leaves corrupt files out
    value_range: tuple[float, float] | None = None  # the values of black and white in images of more than 8 bits
    bands: tuple[int, ...] | None = None  # those that become gray, or red, green and blue; the first is 1
    views: int = 0  # random crops of each image, see random_view; 0: the one of the evaluation

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in self.size):
            raise InputError(f"size {self.size!r} is not a size; give (height, width) in pixels, each at least 1")
        object.__setattr__(self, "size", tuple(map(int, self.size)))
        if self.resize not in RESIZES:
            raise InputError(f"resize {self.resize!r} is not known; give one of {', '.join(RESIZES)}")
        if self.on_error not in ("raise", "skip"):
            raise InputError(f"on_error {self.on_error!r} is not known; give raise or skip")
        if (ends := self.value_range) is not None:
            two = _is_list(ends) and len(ends) == 2 and all(map(_is_finite, ends))
            if not two or not 0 < 510 * (float(ends[1]) - float(ends[0])) < math.inf:
                raise InputError(
                    f"value_range {ends!r} is not two numbers: the value of black, then a larger one of white"
                )
            object.__setattr__(self, "value_range", tuple(ends))
        if (bands := self.bands) is not None:
            whole = _is_list(bands) and all(type(b) is not bool and isinstance(b, Integral) and b >= 1 for b in bands)
            if not whole or len(bands) not in (1, 3):
                raise InputError(f"bands {bands!r} are not one band or three, of which the first of an image is 1")
            object.__setattr__(self, "bands", tuple(map(int, bands)))
        if not isinstance(self.views, int | np.integer) or not 0 <= self.views <= MOST_VIEWS:
            raise InputError(
                f"views is {self.views}; use 0 for the evaluation's crop, or up to {MOST_VIEWS} random ones"
            )
        if self.views and self.resize != "paper":
            raise InputError(f"views are crops of the paper's; resize {self.resize!r} crops nothing: leave one out")
        parse_background(self.background)

    @property
    def each(self) -> int:
        """How many pictures an image becomes."""
        return self.views or 1

    def rows(self, images: np.ndarray) -> np.ndarray:
        """The places of what images become, where each takes `each` of them: int64 [N] → [N · each]."""
        return (images[:, None] * self.each + np.arange(self.each)).reshape(-1)


def in_todays_words(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """How images were read, also where it was noted as `gray_bits`, those that 16-bit grayscale held."""
    words = dict(preprocessing)
    bits = words.pop("gray_bits", 16)
    if type(bits) is not int or not 8 <= bits <= 16:
        raise InputError(f"gray_bits is {bits!r}, not 8 to 16")
    return words if bits == 16 else {**words, "value_range": [0, (1 << bits) - 1]}


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def parse_background(text: str) -> tuple[int, int, int]:
    """Reads a colour name or #rrggbb as (red, green, blue), 0..255. Raises InputError on anything else."""
    try:
        colour = ImageColor.getrgb(text) if isinstance(text, str) else ()
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise InputError(f"background {text!r} is not an opaque colour; give a name such as white, or #rrggbb")
    return colour


def resize_image(image: Image.Image, size: tuple[int, int], resize: str, where: str) -> np.ndarray:
    """Brings an RGB image to uint8 [H, W, 3], size = (H, W), in one of three ways.

    "paper": the published evaluation. Short side to 224 (Pillow's BILINEAR, which averages over the source pixels when
    it reduces), centre crop of 224×224, then down to H×W: Pillow's `reduce`, the mean of equal blocks (7×7 for 32),
    where 224 is a whole multiple, else BILINEAR. A grid that is not square crops a window of its own shape whose short
    side is 224; a grid of more than 224 pixels a side crops H×W itself. A smaller image is enlarged to that window,
    unless its own largest window of the grid's shape is a whole multiple of H×W: the blocks' means are taken of that,
    so an image that is H×W already comes through unchanged.
    "hf": the whole image straight to H×W with BILINEAR, as Hugging Face's processor does; the shape is not kept.
    "none": the image must be H×W already. Raises InputError, naming `where`, when it is not.
    """
    height, width = size
    if resize == "none":
        if image.size != (width, height):
            has, wanted = f"{image.height}x{image.width}", f"{height}x{width}"
            way = f"give --resize paper, or, where the size is yours to choose, --size {has}"
            raise InputError(f"{where}: is {has}, not {wanted} (height x width); {way}")
        return np.asarray(image)
    if resize == "hf":
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    if resize != "paper":
        raise InputError(f"resize {resize!r} is not known; give one of {', '.join(RESIZES)}")
    high, wide = _window(size)
    factor, fit = max(high / image.height, wide / image.width), min(image.height / height, image.width / width)
    if factor < 1:
        image = image.resize(_scaled(image, (high, wide), factor), Image.Resampling.BILINEAR)
    elif factor > 1 and fit >= 1 and fit.is_integer():
        high, wide = height * int(fit), width * int(fit)
    elif factor > 1:
        across, down = _scaled(image, (high, wide), factor)
        image = _cut(image, (high, wide), factor, (across - wide) // 2, (down - high) // 2)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return _shrink(image, size, (left, top, left + wide, top + high))


def random_view(image: Image.Image, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """One view of an RGB image as the published training drew them, uint8 [H, W, 3].

    Short side to a random size in [256, 384], a random crop of 224×224, then down to H×W. Other grids crop a window of
    their own as `resize_image` says, out of the image at 256/224 to 384/224 of the scale that it has there.
    """
    high, wide = _window(size)
    larger = random.integers(*TRAINED_SIDES, endpoint=True) / SHORT_SIDE
    factor = max(high / image.height, wide / image.width) * larger
    across, down = _scaled(image, (high, wide), factor)
    left, top = random.integers(across - wide, endpoint=True), random.integers(down - high, endpoint=True)
    return _shrink(_cut(image, (high, wide), factor, left, top), size, (0, 0, wide, high))


def _window(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what is cropped before it comes down to the grid `size`."""
    scale = max(SHORT_SIDE / min(size), 1.0)
    return round(size[0] * scale), round(size[1] * scale)


def _scaled(image: Image.Image, window: tuple[int, int], factor: float) -> tuple[int, int]:
    """(width, height) of the image by that factor, which covers the window."""
    return max(window[1], round(image.width * factor)), max(window[0], round(image.height * factor))


def _cut(image: Image.Image, window: tuple[int, int], factor: float, left: int, top: int) -> Image.Image:
    """The window at (left, top) of the scaled image, whose rest is not made: of a thin one it could fill the memory."""
    across, down = _scaled(image, window, factor)
    x, y = image.width / across, image.height / down
    right, bottom = min(image.width, (left + window[1]) * x), min(image.height, (top + window[0]) * y)
    return image.resize(window[::-1], Image.Resampling.BILINEAR, (left * x, top * y, right, bottom))


def _shrink(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """A box of the image down to the grid: means of equal blocks where its sides are whole multiples."""
    across, down = box[2] - box[0], box[3] - box[1]
    if down % size[0] == 0 and across % size[1] == 0:
        return np.asarray(image.reduce((across // size[1], down // size[0]), box))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box))
