"""Files that Pillow does not read, or not in full, by the libraries of their fields: TIFF of many bands or of other
numbers than bytes, colours of 16 bits (tifffile, imagecodecs), DICOM (pydicom). They are extras of the package.

These serve where Pillow cannot, never instead of it: no pixel depends on which of them are installed.
"""

import hashlib
import importlib
import io
import logging
import warnings
from itertools import islice, takewhile
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from igpt_fast.values import Values

TIFF_MAGIC = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"  # how one begins; the last two are BigTIFF
DICOM_HEAD = 132  # bytes by which one knows it
DICOM_SUFFIXES = (".dcm", ".dicom")  # which it often has, and often not
NODATA = 42113  # the TIFF tag by which GDAL says which value stands for none

ORIENTATION = 274  # the tag of EXIF and of TIFF
_WHITE_IS_0 = 0  # photometric
_PLAIN = (0, 1, 2)  # photometric: gray, from white or black on, and RGB
_ALPHA = 2  # of a TIFF's extra samples: opacity, by which the colours are not multiplied
_SIZES = 0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8  # bytes of each of TIFF's types, by its number
_BASELINE = 532  # the last of the TIFF tags that are not of one maker alone …
_WORDS = 269, 270, 271, 272, 285, 305, 306, 315, 316, 333, 337  # … and those that only describe
_PIXEL = 16  # bytes of one at Pillow's limit of pixels, beyond which many bands would fill the memory

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it warns of has no file's name
logging.getLogger("pydicom").addHandler(logging.NullHandler())


class MissingLibrary(Exception):
    """What an extra of the package brings is not installed. args: the message, the extra."""


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are those of a DICOM file."""
    return data[128:DICOM_HEAD] == b"DICM"


def patient_of(head: bytes) -> str:
    """Whom a DICOM file shows, by its first bytes: a digest of PatientID, which is nobody else's to read; "" where they
    do not say.
    """
    if not is_dicom(head):
        return ""
    try:
        _library("pydicom", "dicom")
        filereader, tag = importlib.import_module("pydicom.filereader"), importlib.import_module("pydicom.tag").Tag
        wanted = [tag(0x0008, 0x0005), tag(0x0010, 0x0020)]  # the character set, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd in the file, without its name
            # No further: behind it, what goes on beyond `head` would be an error.
            found = filereader.read_partial(io.BytesIO(head), lambda at, *_: at > wanted[1], specific_tags=wanted)
            patient = str(found.get("PatientID", None) or "").strip()
    except Exception:  # what is wrong with the file, or is not installed, is told when its pixels are read
        return ""
    return hashlib.blake2b(patient.encode(), digest_size=6).hexdigest() if patient else ""


def refuse_cut_tags(data: bytes) -> None:
    """ValueError where a TIFF is cut in its first page's tags, or in the value of one by which pixels may be others:
    Pillow goes on without those, and takes colours for shades.
    """
    order, big = "little" if data[:2] == b"II" else "big", 43 in data[2:4]

    def number(at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], order)

    wide, entry = (8, 20) if big else (4, 12)
    at = number(8 if big else 4, wide)
    count, begin = number(at, 8 if big else 2), at + (8 if big else 2)
    if begin + count * entry > len(data):
        raise ValueError("its tags are cut short")
    for at in range(begin, begin + count * entry, entry):
        tag, kind = number(at, 2), number(at + 2, 2)
        size = number(at + 4, wide) * (_SIZES[kind] if kind < len(_SIZES) else 0)
        if size > wide and number(at + 4 + wide, wide) + size > len(data) and _says_of_pixels(tag):
            raise ValueError(f"the value of its tag {tag} is cut short")


def _says_of_pixels(tag: int) -> bool:
    return tag == NODATA or (tag <= _BASELINE and tag not in _WORDS)


def read_tiff(data: bytes) -> tuple[Values, bool]:
    """The first page of a TIFF, and whether there are more that are no smaller copies of it. Raises anything."""
    with _library("tifffile", "tiff").TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        if page.dtype is not None and page.dtype.kind == "c":
            raise ValueError("complex numbers are no brightness, convert the image to 8-bit RGB")
        refuse_bomb(page.imagewidth, page.imagelength, page.samplesperpixel * ((page.bitspersample + 7) // 8))
        if page.photometric not in _PLAIN or page.bitspersample not in (1, 8, 16, 32, 64):
            kind = f"{page.photometric.name} of {page.bitspersample} bits"
            raise ValueError(f"a TIFF of {kind} is not read in full, convert it to 8-bit RGB")
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"a TIFF of {page.axes}, where an image has YX and bands")
        numbers = page.asarray()
        numbers = numbers[..., None] if page.axes == "YX" else numbers
        numbers = numbers.transpose(1, 2, 0) if page.axes == "SYX" else numbers
        values = Values(
            upright(numbers, _turn_of(page)),
            alpha=tuple(page.extrasamples)[-1:] == (_ALPHA,) and numbers.dtype.kind == "u",
            white_is_0=page.photometric == _WHITE_IS_0,
            nodata=nodata_of(page.tags[NODATA].value) if NODATA in page.tags else None,
            seen=_mask(tiff),
        )
        more = any(not (other.is_reduced or other.is_mask) for other in islice(tiff.pages, 1, None))
    return values, more


def read_mask(data: bytes) -> np.ndarray | None:
    """What the mask of a TIFF's first page shows, bool [H, W], upright; None where there is none. Raises anything."""
    with _library("tifffile", "tiff").TiffFile(io.BytesIO(data)) as tiff:
        return _mask(tiff)


def _mask(tiff: Any) -> np.ndarray | None:
    first = tiff.pages[0]
    # Copies and masks follow the page that they are of.
    for page in takewhile(lambda page: page.is_reduced or page.is_mask, islice(tiff.pages, 1, None)):
        if not page.is_reduced and (page.imagelength, page.imagewidth) == (first.imagelength, first.imagewidth):
            return upright(page.asarray().astype(bool)[..., None], _turn_of(first))[..., 0]
    return None


def _turn_of(page: Any) -> int:
    return page.tags[ORIENTATION].value if ORIENTATION in page.tags else 1


def read_deep_png(data: bytes) -> Values:
    """The colours of a PNG in all of their 16 bits. Raises anything."""
    numbers = _library("imagecodecs", "tiff").png_decode(data)
    return Values(numbers, alpha=numbers.shape[2] in (2, 4))


def read_dicom(data: bytes) -> tuple[Values, bool]:
    """The first frame of a DICOM file in the units of its modality (Hounsfield's in a CT), and whether there are more.

    Its black and white are its own window, else all that its bits hold. Raises anything.
    """
    pydicom = _library("pydicom", "dicom")
    pixels = importlib.import_module("pydicom.pixels")
    file = pydicom.dcmread(io.BytesIO(data))
    refuse_bomb(file.Columns, file.Rows, file.get("SamplesPerPixel", 1) * file.BitsAllocated // 8)
    numbers, frames = pixels.pixel_array(file, index=0), int(file.get("NumberOfFrames", None) or 1)
    if file.PhotometricInterpretation == "PALETTE COLOR":
        numbers = pixels.apply_color_lut(numbers, file)
    if numbers.ndim == 3:
        return Values(numbers), frames > 1
    _flatten(file)
    white_is_0 = file.PhotometricInterpretation == "MONOCHROME1"
    window = _window_of(file)
    if (
        window is None
        and numbers.dtype == np.uint8
        and "RescaleSlope" not in file
        and "ModalityLUTSequence" not in file
    ):
        return Values(numbers[..., None], white_is_0=white_is_0), frames > 1
    signed = int(file.PixelRepresentation)
    ends = np.array([-signed << (file.BitsStored - 1), (1 << (file.BitsStored - signed)) - 1])
    numbers, ends = (pixels.apply_modality_lut(given, file) for given in (numbers, ends))
    bounds = float(min(ends)), float(max(ends))
    if bounds[0] == bounds[1]:
        raise ValueError("its rescale slope is 0, which makes all values one")
    values = np.asarray(numbers, np.float64)[..., None]
    return Values(values, white_is_0=white_is_0, window=window, bounds=bounds), frames > 1


def _flatten(file: Any) -> None:
    """Puts what an enhanced DICOM file says of its first frame's values where others have it; empty entries go."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (file.get(groups) or [])[:1]:
            for kind in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in (group.get(kind) or [])[:1]:
                    file.update(item)
    for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if name in file and file.get(name) in (None, ""):
            del file[name]


def _window_of(file: Any) -> tuple[float, float] | None:
    """The values of black and white by a DICOM file's window, of several by the first; None where it has none."""
    if "WindowCenter" not in file or "WindowWidth" not in file:
        return None
    centre, width = (float(np.atleast_1d(file[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    half = (max(width, 2.0) - 1) / 2  # DICOM PS3.3, C.11.2.1.2: from c - 0.5 - (w - 1)/2 on
    return centre - 0.5 - half, centre - 0.5 + half


def nodata_of(text: object) -> float | None:
    """The number in GDAL's tag; None where it holds none, or NaN, which needs no saying."""
    try:
        value = float(str(text).strip(" \0"))
    except ValueError:
        return None
    return None if np.isnan(value) else value


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] turned and mirrored as EXIF's orientation, 1 to 8, asks for."""
    pixels = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def refuse_bomb(width: int, height: int, pixel: int = 1) -> None:
    """Pillow's limit against files that would fill the memory, for who reads without it. pixel: bytes of one."""
    most, pixels = Image.MAX_IMAGE_PIXELS, width * height
    if most is not None and pixels > most:
        raise Image.DecompressionBombError(f"{pixels:,} pixels are more than the {most:,} that are read")
    if most is not None and pixels * pixel > most * _PIXEL:
        raise Image.DecompressionBombError(
            f"{pixels * pixel:,} bytes are more than the {most * _PIXEL:,} that are read"
        )


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(f"{name} reads such files, and is not here ({error})", extra) from error
