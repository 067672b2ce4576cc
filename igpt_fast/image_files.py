"""One image from the bytes of a file, whatever its kind, to 8-bit RGB.

Grayscale is repeated; alpha (RGBA, LA, palettes and colours with transparency) is composited on a background; CMYK,
YCbCr and HSV are converted; 1-bit is black and white; 16-bit grayscale is divided by 257 and rounded, or stretched from
the values that are to be black and white, in a TIFF also where 0 is white; 16-bit colour is cut to its high byte by
Pillow, unless it is stretched or has a value for no data; an EXIF rotation is applied; of several pages or frames the
first counts; colour profiles are not applied. TIFFs of several bands, of floats and of signed or 32-bit numbers, and
DICOM, are read by the libraries of their fields (igpt_fast.scientific). Where nothing was measured (NaN, GDAL's value
for no data) an image is transparent. LAB is refused by name, as are images larger than Pillow's limit against
decompression bombs, and what Pillow would read in silence though it can be seen to be damaged: PNGs by their checksums,
TIFFs cut in their tags.
"""

import contextlib
import io
import logging
import os
import string
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
from PIL import Image, ImageOps

from igpt_fast import scientific
from igpt_fast.errors import InputError
from igpt_fast.images import parse_background
from igpt_fast.values import DIM, Values, to_8_bits

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tga", ".jp2", ".j2k"}
    | {".avif", ".ppm", ".pgm", ".pbm", ".pnm", *scientific.DICOM_SUFFIXES}
)
# Pillow tries these and no other: some of its readers start programs (EPS), which a picture has no business to do.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
DARK, OUTSIDE, BYTES, PAGES = "dark", "outside", "bytes", "pages"  # keys of what read_image notes in `.info`

REMEDY = "mend or remove the file"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or else its words stand on stderr, without a file's name

_PHOTOMETRIC = 262  # the TIFF tag; 0: white is 0
_SAMPLES = 277  # the TIFF tag; how many a pixel
_FORMAT, _SIGNED = 339, 2  # the TIFF tag of what kind of numbers they are
_SUBFILE = 254  # the TIFF tag of what a page is
_ALONE, _COPY, _MASK = 0, 1, 4  # by its bits: to itself, a smaller copy of another page, a mask of it
_DEPTH = 32997  # the TIFF tag; slices of a volume, of which the first is read
_PLANAR = 284  # the TIFF tag; 2: bands one behind the other
_BITS = 258  # the TIFF tag; of each number
_EXTRA, _OPACITY = 338, 2  # the TIFF tag of what bands behind the colours are


def is_image(name: str, read: Callable[[int], bytes]) -> bool:
    """Whether a file is to be read as an image: by its suffix, or, as scanners name DICOM files by numbers without one,
    by its first bytes. read: the first so many, none where they cannot be had.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return True
    listing = os.path.basename(name).upper().partition(";")[0] == "DICOMDIR"  # of a disk's files
    numbered = not suffix.strip("." + string.digits) and not listing
    return numbered and scientific.is_dicom(read(scientific.DICOM_HEAD))


def read_image(
    data: bytes | np.ndarray,
    where: str,
    background: str = "white",
    value_range: tuple[float, float] | None = None,
    bands: tuple[int, ...] | None = None,
) -> Image.Image:
    """Decodes one image to Pillow's RGB mode, as the head of this module says.

    data: the bytes of an image file, or numbers [H, W] or [H, W, C]. where: names the image in errors. background,
    value_range, bands: as in Preprocessing; without bands, C is 1 (gray) or 3 (RGB), of bytes also 2 or 4 (with alpha).
    `.info` has PAGES where there are several, DARK for 16 bits of which few are used, OUTSIDE where value_range makes
    one of all, and BYTES where it had nothing to stretch. Raises InputError when it cannot be decoded.
    """
    colour = parse_background(background)
    if not len(data):
        raise InputError(f"{where}: the file is empty (0 bytes); {REMEDY}")
    try:
        # Between its limit and twice its limit Pillow only warns.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL|pydicom|tifffile")  # they name no file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found, notes = _from_array(data, bands) if isinstance(data, np.ndarray) else _open(data, value_range, bands)
        if value_range is not None and (isinstance(found, Image.Image) or found.numbers.dtype == np.uint8):
            notes[BYTES] = True
        if isinstance(found, Values):
            found, dim = to_8_bits(found, bands, value_range)
            notes |= {DARK if value_range is None else OUTSIDE: True} if dim else {}
        image = _to_rgb(found, colour)
        image.info = notes
        return image
    except InputError as error:  # the options' fault, and not the file's
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # a damaged file makes decoders raise nearly anything, and all of it is this file's
        raise InputError(f"{where}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """What is wrong with a file, and what to do."""
    reason, remedy = " ".join(str(error).split()) or type(error).__name__, REMEDY
    if isinstance(error, scientific.MissingLibrary):
        reason, extra = error.args
        remedy = f"pip install 'igpt-fast[{extra}]', or convert the file to 8-bit RGB"
    elif isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        remedy = "cut it into smaller ones, or remove the file"
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image that can be read"
    return f"{reason}; {remedy}"


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(
    data: bytes, value_range: tuple[float, float] | None, bands: tuple[int, ...] | None
) -> tuple[Image.Image | Values, dict[str, bool]]:
    """The image in a file by whoever reads all of it that matters here, and what is to be noted."""
    if scientific.is_dicom(data):
        return _with_pages(*scientific.read_dicom(data))
    tiff = bytes(data[:4]) in scientific.TIFF_MAGIC
    if tiff:
        scientific.refuse_cut_tags(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        if not tiff:
            raise
        return _with_pages(*scientific.read_tiff(data))
    deep = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[-1]) for tile in image.tile)
    nodata = scientific.nodata_of(image.tag_v2.get(scientific.NODATA, "")) if image.format == "TIFF" else None
    found = _beyond_pillow(image, data, deep, nodata, value_range is not None, bands)
    return found or _by_pillow(image, data, deep, nodata, bands)


def _beyond_pillow(
    image: Image.Image, data: bytes, deep: bool, nodata: float | None, stretch: bool, bands: tuple[int, ...] | None
) -> tuple[Values, dict[str, bool]] | None:
    """What Pillow would not read in full; None where it does. deep: of 16 bits a colour. stretch: all of them count."""
    # A transparent colour has 16 bits, too, of which Pillow keeps 8 on one side only.
    stretched = deep and (stretch or (image.format == "PNG" and "transparency" in image.info))
    masked = image.mode.startswith("I;16") and _MASK in _behind(image, data)
    if image.format == "TIFF" and (stretched or masked or _is_beyond_pillow(image, bands)):
        return _with_pages(*scientific.read_tiff(data))
    alpha = image.mode != "RGB" and nodata is not None and image.tag_v2.get(_EXTRA, ())[-1:] == (_OPACITY,)
    if deep and nodata is not None and (image.mode == "RGB" or alpha):  # which the high bytes of Pillow do not tell
        values, more = scientific.read_tiff(data)
        return _with_pages(values if alpha else replace(values, numbers=values.numbers[..., :3]), more)
    if image.format == "PNG" and stretched:
        values, turn = scientific.read_deep_png(data), image.getexif().get(scientific.ORIENTATION, 1)
        return _with_pages(
            replace(values, numbers=scientific.upright(values.numbers, turn)), _ALONE in _behind(image, data)
        )
    return None


def _by_pillow(
    image: Image.Image, data: bytes, deep: bool, nodata: float | None, bands: tuple[int, ...] | None
) -> tuple[Image.Image | Values, dict[str, bool]]:
    """What Pillow reads, upright, as numbers where they are more than 8-bit colours."""
    kind, mode = image.format, image.mode
    image.load()
    if kind == "PNG":
        _refuse_changed_png(data)
    behind = _behind(image, data)
    seen = scientific.read_mask(data) if mode in ("L", "RGB", "P") and _MASK in behind else None
    notes = {PAGES: True} if _ALONE in behind else {}
    if deep and max(high for _, high in image.getextrema()[: 1 if mode == "LA" else 3]) < DIM >> 8:
        notes[DARK] = True  # Pillow has kept the high bytes
    white_is_0 = kind == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0
    if nodata is not None and mode in ("1", "L"):  # Pillow spreads fewer bits over a byte, and turns shades over
        nodata *= 255 / (2 ** image.tag_v2.get(_BITS, (1,))[0] - 1)
        nodata = 255 - nodata if white_is_0 else nodata
    if kind == "PNG" and mode == "L" and "transparency" in image.info:  # Pillow has spread the shades of fewer bits
        image.info["transparency"] = image.info["transparency"] * 255 // ((1 << data[24]) - 1)
    elif mode == "P" and nodata is not None:  # of the numbers of its colours
        shown = Image.fromarray(255 * (np.asarray(image) != nodata).astype(np.uint8))
        image = image.convert("RGB")
        image.putalpha(shown)
    # "I" is 16-bit in Pillow's PGM, and before Pillow 11 in its PNG.
    wide = mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM"))
    if image.getexif().get(scientific.ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if wide:
        nothing = image.info.get("transparency") if nodata is None else nodata
        values = Values(np.asarray(image).astype(np.uint16)[..., None], False, white_is_0, nothing)
        # A PGM says itself what its largest value is, and Pillow has stretched it to that.
        return (values if kind != "PPM" else to_8_bits(values)[0]), notes
    if bands or seen is not None or (nodata is not None and mode in ("1", "L", "LA", "RGB", "RGBA")):
        if image.mode not in ("L", "LA", "RGB", "RGBA") or "transparency" in image.info:
            _refuse(image.mode)
            colours = "L" if image.mode in ("1", "L") else "RGB"
            image = image.convert(f"{colours}A" if "transparency" in image.info else colours)
        nodata = None if mode == "P" else nodata  # which is a number of a colour, and transparent already
        alpha = image.mode in ("LA", "RGBA")
        return Values(np.atleast_3d(np.asarray(image)), alpha, nodata=nodata, seen=seen), notes
    return image, notes


def _refuse_changed_png(data: bytes) -> None:
    """ValueError where a PNG's pixels are not those of its checksums, which Pillow leaves out for these alone."""
    at, view = 8, memoryview(data)
    while len(kind := data[at + 4 : at + 8]) == 4 and kind != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            raise ValueError("it is cut short")
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("it was changed: a checksum of its pixels does not match")
        at = end + 4


def _is_beyond_pillow(image: Image.Image, bands: tuple[int, ...] | None) -> bool:
    """Whether a TIFF has numbers that Pillow takes for others, or bands that count here and it leaves out."""
    tags = image.tag_v2
    if image.mode in ("I", "F") or _SIGNED in tags.get(_FORMAT, ()):
        return True
    apart = tags.get(_PLANAR) == 2
    if apart and max(tags.get(_BITS, (1,))) > 8 and any(tile[0] == "raw" for tile in image.tile):
        return True  # which Pillow takes for twice as many bytes
    lacks = tags.get(_SAMPLES, 1) > len(image.getbands())
    # Of gray ones, and of those that lie one behind the other, Pillow reads the first, and is silent about the rest.
    return lacks and (bands is not None or image.mode == "L" or apart)


def _with_pages(values: Values, more: bool) -> tuple[Values, dict[str, bool]]:
    return values, {PAGES: True} if more else {}


def _behind(image: Image.Image, data: bytes) -> set[int]:
    """What lies behind the page or frame that was read, MPO's pictures of the same aside: of a TIFF's pages what
    `_subfile` says, up to one that is _ALONE.
    """
    if image.format == "TIFF" and image.tag_v2.get(_DEPTH, 1) > 1:
        return {_ALONE}
    kinds: set[int] = set()
    try:
        if image.format == "MPO" or not getattr(image, "is_animated", False):
            return kinds
        if image.format != "TIFF":
            return {_ALONE}
        pages, page = Image.open(io.BytesIO(data), formats=["TIFF"]), count(1)
        while _ALONE not in kinds:
            kinds.add(_subfile(pages, next(page)))
    except EOFError:
        pass
    except Exception:  # what lies behind the first frame is damaged, and nobody has asked for it
        kinds.add(_ALONE)
    return kinds


def _subfile(pages: Image.Image, page: int) -> int:
    """What a page of a TIFF is to others: _ALONE, a _COPY, a _MASK, or both."""
    with contextlib.suppress(SyntaxError):  # of a mask Pillow knows the tags, and not the pixels
        pages.seek(page)
    return pages.tag_v2.get(_SUBFILE, 0) & (_COPY | _MASK)


def _from_array(data: np.ndarray, bands: tuple[int, ...] | None) -> tuple[Values, dict[str, bool]]:
    numbers = np.atleast_3d(data)
    return Values(numbers, alpha=bands is None and numbers.dtype == np.uint8 and numbers.shape[2] in (2, 4)), {}


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB; alpha is composited: round((alpha·colour + (255 - alpha)·background) / 255)."""
    _refuse(image.mode)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _refuse(mode: str) -> None:
    """ValueError for what Pillow would clip or take for other colours."""
    if kind := {"I": "32-bit integers", "F": "32-bit floats", "LAB": "colours in LAB"}.get(mode):
        where = " but in a TIFF" if mode != "LAB" else ""
        raise ValueError(f"{kind} are not read{where}, convert the image to 8-bit RGB")
