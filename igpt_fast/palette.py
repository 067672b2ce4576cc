"""Palettes: the few colours of which every image is made, fitted by k-means, kept in files; tokens and back.

A colour is three numbers in [-1, 1]; the 8-bit value u stands for u / 127.5 - 1.
"""

import io
import json
import logging
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.atomic import write_atomically
from igpt_fast.errors import InputError, as_input_error, whole
from igpt_fast.kmeans import cluster, histogram, unit
from igpt_fast.made import SWATCH, swatches
from igpt_fast.ops._tensors import tensor_of
from igpt_fast.ops.palette import MAX_COLORS, TOKEN_DTYPES, palette_assign, palette_decode

log = logging.getLogger("igpt_fast")

HF_CONFIG = "preprocessor_config.json"
FILES = ("palette.npy", "kmeans_centers.npy", HF_CONFIG)  # what a directory is searched for, in this order
FORM = f"a palette is float [K, 3] in [-1, 1] (8-bit value / 127.5 - 1), 1 ≤ K ≤ {MAX_COLORS}"


class Palette:
    """K colours. len(palette) is K; centers: float32 [K, 3] in [-1, 1], on the CPU.

    inertia: of a fitted palette, the mean squared distance of a pixel to its colour, in [-1, 1] units; else None.
    """

    def __init__(self, centers: np.ndarray | Tensor, inertia: float | None = None):
        """centers: float [K, 3] in [-1, 1], 1 ≤ K ≤ 4096. Raises InputError for anything else."""
        self.centers = _checked(tensor_of(centers, "the palette is"), "the palette")
        self.inertia = inertia

    def __len__(self) -> int:
        return len(self.centers)

    def equals(self, other: "Palette") -> bool:
        """Whether another has the same colours in the same order."""
        return np.array_equal(np.asarray(self.centers), np.asarray(other.centers))

    def __repr__(self) -> str:
        return f"Palette({len(self)} colours)"

    @classmethod
    def fit(
        cls,
        images: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
        colors: int = 512,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Palette":
        """The palette with (locally) least mean squared distance to the images' pixels, by k-means.

        images: uint8 [..., 3], numpy or tensor, or an iterable of such batches, which is read once. colors: 2 to 4096.
        Tensors on a GPU are counted there, and the last one's device serves the steps; no bit depends on it.
        The same pixels, colors and seed give the same bits. Fewer distinct colours than asked for give a smaller
        palette of exactly these, and a logged warning. progress: called as progress(step, most steps there can be).
        Raises InputError for images of another form, none at all, or a number of colours out of range.
        """
        if not (isinstance(colors, Integral) and 2 <= colors <= MAX_COLORS):
            raise InputError(f"a palette of {colors} colours cannot be fitted; choose from 2 to {MAX_COLORS}")
        whole("seed", seed, 0)
        batches = [images] if isinstance(images, (np.ndarray, Tensor)) else images
        found, pixels, device = histogram(_pixels(batch, "Palette.fit") for batch in batches)
        if not len(found):
            raise InputError("Palette.fit was given no pixels; give at least one image")
        if len(found) <= colors:
            if len(found) < colors:
                text = "the images have %d distinct colours, fewer than the %d asked for: the palette has just these"
                log.warning(text, len(found), colors)
            return cls(unit(found), inertia=0.0)
        centers, inertia = cluster(found, pixels, colors, seed, progress, device)
        return cls(centers, inertia / float(pixels.sum()))

    @classmethod
    def load(cls, path: str | Path) -> "Palette":
        """Reads a palette from .npy (as OpenAI's kmeans_centers.npy) or the `clusters` of Hugging Face's
        preprocessor_config.json; in a directory, from the first of FILES that is there.

        Raises InputError, naming the file, when there is none or it does not hold a palette.
        """
        path = Path(path)
        if path.is_dir():
            there = [path / name for name in FILES if (path / name).is_file()]
            if not there:
                raise InputError(f"{path} holds no palette; expected {', '.join(FILES[:-1])} or {FILES[-1]} in it")
            path = there[0]
        if not path.exists():
            raise InputError(f"there is no palette {path}; make one with `igpt-fast palette`")
        if not path.is_file():
            raise InputError(f"{path} is a pipe or a device; give a palette as .npy or {HF_CONFIG}")
        if path.suffix not in (".npy", ".npz", ".json"):
            raise InputError(f"{path} is no palette: give one as .npy or {HF_CONFIG}")
        with as_input_error(path, f"give a palette as .npy or {HF_CONFIG}"):
            values = _clusters(path) if path.suffix == ".json" else np.load(path, allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            what = f"{values.dtype} values" if isinstance(values, np.ndarray) else "an archive of arrays"
            raise InputError(f"{path} holds {what}; {FORM}")
        centers = _checked(torch.from_numpy(values.astype(np.float32)), str(path))
        if centers.min() >= 0:
            log.warning("%s: no colour is darker than mid-gray: is it in [0, 1]? a palette is 8 bits / 127.5 - 1", path)
        return cls(centers)

    def save(self, path: str | Path) -> None:
        """Writes float32 [K, 3] to a path ending in .npy, or Hugging Face's settings (32×32 images) to one ending in
        preprocessor_config.json; whole or not at all. Raises InputError for another name or an unwritable place.
        """
        path = Path(path)
        if path.name.endswith(HF_CONFIG):
            data = (json.dumps(self.to_hf(), indent=2) + "\n").encode()
        elif path.suffix == ".npy":
            file = io.BytesIO()
            np.save(file, self.centers.numpy(), allow_pickle=False)
            data = file.getvalue()
        else:
            raise InputError(f"a palette cannot be saved as {path.name}; name it something.npy or {HF_CONFIG}")
        try:
            write_atomically(path, data)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another place") from None

    def to_hf(self, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
        """Hugging Face's preprocessor_config.json with these colours, for images brought to `size` (height, width)."""
        return {"clusters": self.centers.tolist(), **_HF_SETTINGS, "size": {"height": size[0], "width": size[1]}}

    def encode(self, images: np.ndarray | Tensor, dtype: torch.dtype = torch.int64) -> np.ndarray | Tensor:
        """Tokens of the nearest colours, the lowest on ties. images: uint8 [..., H, W, 3], numpy or tensor.

        Returns [..., H, W] in int64, int32 or int16, of the same kind and device. Raises InputError for other images.
        """
        pixels = _pixels(images, "Palette.encode")
        tokens = palette_assign(pixels, self.centers.to(pixels.device), dtype)
        return tokens.numpy() if isinstance(images, np.ndarray) else tokens

    def decode(self, tokens: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Colours of tokens. tokens: integers [...], numpy or tensor. Returns uint8 [..., 3], of that kind and device.

        Raises InputError, naming it, for a token outside 0..K-1, and for tokens that are not integers.
        """
        numpy = isinstance(tokens, np.ndarray)
        if not numpy and not isinstance(tokens, Tensor):
            raise InputError(f"Palette.decode reads numpy arrays and tensors, not {type(tokens).__name__}")
        if numpy:
            integers = tokens.dtype.kind in "iu"
        else:
            integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool)
        if not integers:
            raise InputError(f"tokens are {tokens.dtype}; give integers, such as Palette.encode returns")
        index = torch.from_numpy(tokens.astype(np.int64)) if numpy else tokens
        if index.dtype not in TOKEN_DTYPES:
            index = index.long()
        pixels = palette_decode(index, self._bytes().to(index.device))
        return pixels.numpy() if numpy else pixels

    def picture(self, swatch: int = SWATCH) -> np.ndarray:
        """The colours as squares of `swatch` pixels a side: greys, then hues, each dark to light. uint8 [h, w, 3]."""
        colors = self._bytes().numpy()
        r, g, b = colors.astype(np.float64).T
        hue = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
        sector = np.where(np.ptp(colors, axis=1) < 24, -1, hue // 20)
        rows, columns = swatches(len(self))
        cells = np.full((rows * columns, 3), 255, np.uint8)
        cells[: len(self)] = colors[np.lexsort((0.299 * r + 0.587 * g + 0.114 * b, sector))]
        return cells.reshape(-1, columns, 3).repeat(swatch, 0).repeat(swatch, 1)

    def _bytes(self) -> Tensor:
        return (127.5 * (self.centers + 1)).round().clamp(0, 255).to(torch.uint8)


def _checked(values: Tensor, where: str) -> Tensor:
    """float32 [K, 3] of its own on the CPU; InputError says what is wrong with `where`."""
    values = values.detach()
    if values.ndim != 2 or values.shape[1] != 3 or not 1 <= len(values) <= MAX_COLORS or not values.is_floating_point():
        raise InputError(f"{where} is {str(values.dtype).removeprefix('torch.')} {list(values.shape)}; {FORM}")
    if not values.isfinite().all():
        raise InputError(f"{where} has a value that is not a finite number; {FORM}")
    if (most := float(values.abs().max())) > 1.001:  # a little beyond 1 is rounding
        raise InputError(f"{where} has a value of size {most:.4g}; {FORM}")
    return values.to("cpu", torch.float32, copy=True).contiguous()


def _pixels(images: Any, reader: str) -> Tensor:
    """uint8 [..., 3] as a tensor; an array is copied only where torch cannot share it."""
    if not isinstance(images, (np.ndarray, Tensor)):
        raise InputError(f"{reader} reads numpy arrays and tensors, not {type(images).__name__}")
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype != "uint8" or images.shape[-1:] != (3,):
        raise InputError(f"{reader} reads uint8 [..., 3], not {dtype} {list(images.shape)}; {_recipe(images, dtype)}")
    return images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _recipe(images: np.ndarray | Tensor, dtype: str) -> str:
    """How to make RGB bytes, colours last, of what was given instead."""
    steps, shape = [], images.shape
    if len(shape) >= 3 and shape[-1] != 3 and shape[-3] == 3:
        steps.append("channels come last: images.swapaxes(-3, -2).swapaxes(-2, -1)")
    elif shape[-1:] == (4,):
        steps.append("leave out alpha: images[..., :3]")
    elif shape[-1:] != (3,):
        steps.append("gray is repeated: np.stack([images] * 3, -1)")
    if dtype.startswith("float"):
        steps.append("values from 0 to 1 become bytes: (images * 255).round() as uint8")
    elif dtype != "uint8":
        steps.append("values become bytes: 16 bits are divided by 257")
    return "; ".join(steps)


_HF_SETTINGS = {
    "do_color_quantize": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ImageGPTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
}


def _clusters(path: Path) -> np.ndarray:
    settings = json.loads(path.read_text())
    for part in ("image_processor", "feature_extractor"):  # inside the settings of a whole processor
        if isinstance(settings, dict) and isinstance(settings.get(part), dict):
            settings = settings[part]
    if not isinstance(settings, dict) or settings.get("clusters") is None:
        raise InputError(f"{path} has no `clusters`; give the {HF_CONFIG} of an Image GPT")
    for name in ("image_mean", "image_std"):
        if settings.get(name) not in (None, 0.5, [0.5, 0.5, 0.5]):
            raise InputError(f"{path} has {name} {settings[name]}; only 0.5 maps 8-bit values to [-1, 1]")
    return np.asarray(settings["clusters"], dtype=np.float64)
