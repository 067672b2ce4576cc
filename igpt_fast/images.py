"""One image: from the bytes of a file, whatever its kind, to RGB pixels of the size that the model sees.

Every kind of image becomes 8-bit RGB: grayscale is repeated; alpha (RGBA, LA, palettes and colours with transparency)
is composited on a background; CMYK, YCbCr and HSV are converted; 1-bit is black and white; 16-bit grayscale is divided
by 257 and rounded, or by as much as the bits that it holds ask for, in a TIFF also where 0 is white (16-bit colour is
cut to its high byte by Pillow); an EXIF rotation is applied; of several pages or frames the first counts; colour
profiles are not applied. 32-bit and LAB images are refused by name, as are images larger than Pillow's limit against
decompression bombs.
"""

import io
import logging
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageColor, ImageOps

from igpt_fast.errors import InputError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tga", ".jp2", ".j2k"}
    | {".avif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
# Pillow tries these and no other: some of its readers start programs (EPS), which a picture has no business to do.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
RESIZES = ("paper", "hf", "none")
SHORT_SIDE = 224  # pixels: the paper's crop
TRAINED_SIDES = (256, 384)  # pixels: the short sides of which the paper's training crops
MOST_VIEWS = 100  # of an image
DARK, DARK_COLOUR, PAGES = "dark", "dark colour", "pages"  # keys of what read_image notes in `.info`
DIM = 1 << 13  # an image of 16 bits with no value from here on comes out almost black

REMEDY = "mend or remove the file"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or else its words stand on stderr, without a file's name

_TIFF = b"II*\0", b"MM\0*"  # how one begins
_ORIENTATION = 0x0112  # the EXIF tag
_PHOTOMETRIC = 262  # the TIFF tag; 0: white is 0
_ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels


@dataclass(frozen=True)
class Reading:
    """How image files become pixels. Raises InputError for what is impossible."""

    size: tuple[int, int] = (32, 32)  # (height, width)
    resize: str = "paper"  # "paper", "hf" or "none", see resize_image
    background: str = "white"  # a colour name or #rrggbb, seen behind transparent pixels
    on_error: str = "raise"  # or "skip", which leaves corrupt files out
    gray_bits: int = 16  # those that grayscale of 16 bits holds, 12 in most scans
    views: int = 0  # random crops of each image, see random_view; 0: the one of the evaluation

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in self.size):
            raise InputError(f"size {self.size!r} is not a size; give (height, width) in pixels, each at least 1")
        object.__setattr__(self, "size", tuple(map(int, self.size)))
        if self.resize not in RESIZES:
            raise InputError(f"resize {self.resize!r} is not known; give one of {', '.join(RESIZES)}")
        if self.on_error not in ("raise", "skip"):
            raise InputError(f"on_error {self.on_error!r} is not known; give raise or skip")
        bits = self.gray_bits
        if not isinstance(bits, int) or not 8 <= bits <= 16:
            raise InputError(f"gray_bits {bits} is not from 8 to 16, the bits that grayscale of 16 bits can hold")
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


def parse_background(text: str) -> tuple[int, int, int]:
    """Reads a colour name or #rrggbb as (red, green, blue), 0..255. Raises InputError on anything else."""
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise InputError(f"background {text!r} is not an opaque colour; give a name such as white, or #rrggbb")
    return colour


def read_image(data: bytes | np.ndarray, where: str, background: str = "white", gray_bits: int = 16) -> Image.Image:
    """Decodes one image to Pillow's RGB mode, as the head of this module says.

    data: the bytes of an image file, or uint8 [H, W] or [H, W, 1..4 channels]. where: names the image in errors.
    background: a colour name or #rrggbb, seen behind transparent pixels. gray_bits: those that grayscale of 16 bits
    holds, 12 in most scans. `.info` has PAGES where there are several, and DARK or DARK_COLOUR for 16 bits of which few
    are used.
    Raises InputError when it cannot be decoded.
    """
    colour = parse_background(background)
    if not len(data):
        raise InputError(f"{where}: the file is empty (0 bytes); {REMEDY}")
    try:
        # Between its limit and twice its limit Pillow only warns.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image, notes = (_from_array(data), {}) if isinstance(data, np.ndarray) else _from_bytes(data, gray_bits)
        image = _to_rgb(image, colour)
        image.info = notes
        return image
    except Exception as error:  # a damaged file makes decoders raise nearly anything, and all of it is this file's
        reason, remedy = " ".join(str(error).split()) or type(error).__name__, REMEDY
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            remedy = "cut it into smaller ones, or remove the file"
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image that can be read"
            if bytes(data[:4]) in _TIFF:
                reason = "a TIFF of a kind that is not read (several bands, or floats), or a damaged one"
                remedy = "make it 8-bit RGB, or remove the file"
        raise InputError(f"{where}: {reason}; {remedy}") from error


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _from_bytes(data: bytes, gray_bits: int) -> tuple[Image.Image, dict[str, bool]]:
    image = Image.open(io.BytesIO(data), formats=_formats())
    deep = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[-1]) for tile in image.tile)  # now high bytes
    image.load()
    notes = {PAGES: True} if _has_pages(image) else {}
    colours = image.getextrema()[: 1 if image.mode == "LA" else 3] if deep else ()
    if deep and max(high for _, high in colours) < DIM >> 8:
        notes[DARK_COLOUR] = True
    # "I" is 16-bit in Pillow's PGM, and before Pillow 11 in its PNG.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    kind = image.format
    white_is_0 = kind == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if wide:
        bits = 16 if kind == "PPM" else gray_bits  # a PGM says itself what its largest value is
        image, largest = _from_16_bit(image, bits, white_is_0)  # of 8 bits Pillow turns white itself
        notes |= {DARK: True} if bits == 16 and largest < DIM else {}
    return image, notes


def _has_pages(image: Image.Image) -> bool:
    """Whether there is more than the page or frame that was read; MPO has pictures of the same beside it."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # what lies behind the first frame is damaged, and nobody has asked for it
        return True


def _from_array(data: np.ndarray) -> Image.Image:
    if data.ndim == 3 and data.shape[2] in (1, 2):
        return Image.merge(_ARRAY_MODES[data.shape[2]], [Image.fromarray(data[..., c]) for c in range(data.shape[2])])
    return Image.fromarray(data)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB; alpha is composited: round((alpha·colour + (255 - alpha)·background) / 255)."""
    if image.mode in ("I", "F") or image.mode == "LAB":
        kind = {"I": "32-bit or signed integer", "F": "32-bit float", "LAB": "LAB"}[image.mode]
        raise ValueError(f"{kind} pixels are not supported, convert the image to 8-bit RGB or 16-bit grayscale")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _from_16_bit(image: Image.Image, bits: int, white_is_0: bool) -> tuple[Image.Image, int]:
    """16-bit grayscale to L (or LA where one gray value is marked transparent): the largest of so many bits gives 255,
    halves are rounded up; of 16 bits v/257. And its largest value, where 0 is black.
    """
    top, values = (1 << bits) - 1, np.asarray(image).astype(np.uint32)
    if (most := int(values.max())) > top:
        raise ValueError(f"a gray value of {most:,} takes more than {bits} bits, as --gray-bits (gray_bits) has it")
    values = top - values if white_is_0 else values
    gray = Image.fromarray(((values * 510 + top) // (2 * top)).astype(np.uint8))
    marked = image.info.get("transparency")
    if marked is not None:
        gray = Image.merge("LA", (gray, Image.fromarray(np.where(values == marked, 0, 255).astype(np.uint8))))
    return gray, int(values.max())


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
