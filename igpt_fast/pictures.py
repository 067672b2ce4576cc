"""Pictures for people: grids of images and curves, as PNG."""

import io
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from igpt_fast.atomic import write_atomically
from igpt_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEN = 128  # pixels a side to which an image of a grid is enlarged: a 32×32 image is a stamp otherwise
WIDEST = 2048  # pixels: a grid is enlarged no further than this
OWN_FONT = "DejaVu Sans"  # which comes with matplotlib
COLOURS = ("#2f6fde", "#d9541e", "#2e9e5b", "#8a4fc7", "#b8860b", "#555555")

log = logging.getLogger("igpt_fast")


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Puts images side by side on white, each pixel enlarged to scale×scale (nearest neighbour: pixels stay pixels).

    images: uint8 [N, H, W, 3], numpy or a CPU tensor. columns: about square when None. scale: when None, so that an
    image is about 128 pixels a side. Returns uint8 [H', W', 3]. Raises InputError when the images are not of that form.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        form = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"a grid is made of images as uint8 [N, H, W, 3] with N ≥ 1, not {form}; decode tokens first")
    count, height, width = images.shape[:3]
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    if scale is None:
        scale = max(1, min(SEEN // max(height, width), WIDEST // max(1, columns * width)))
    if columns < 1 or scale < 1:
        raise InputError(f"a grid needs at least one column and a scale of at least 1, not {columns} and {scale}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows, gap = math.ceil(count / columns), max(2, scale // 2)
    high, wide = height * scale, width * scale
    canvas = np.full((rows * (high + gap) + gap, columns * (wide + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (high + gap), gap + index % columns * (wide + gap)
        canvas[top : top + high, left : left + wide] = image
    return canvas


def to_png_bytes(image: np.ndarray) -> bytes:
    """One image, uint8 [H, W, 3], as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes `grid(images, columns)` as a PNG. images: uint8 [N, H, W, 3]. Raises InputError, OSError."""
    write_atomically(path, to_png_bytes(grid(images, columns)))


def new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """An empty figure of so many inches, and its axes."""
    # With the first figure: matplotlib takes a third of a second to import, and 30 MB.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def figure_png_bytes(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG; of fonts beside matplotlib's own those that its words want."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily([OWN_FONT, *_fonts_for(text.get_text())])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of those characters, one by one
        figure.canvas.print_png(buffer)
    return buffer.getvalue()


@cache
def _fonts_for(text: str) -> list[str]:
    """Fonts of this machine for characters that matplotlib's own lacks, as Chinese; the log names those of none."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    def lacking(characters: set[str], path: str) -> set[str]:
        try:
            there = FT2Font(path).get_charmap()
        except (OSError, RuntimeError):  # gone since matplotlib made its list, or broken
            return characters
        return {c for c in characters if ord(c) not in there}

    left, chosen = lacking(set(text), findfont(OWN_FONT)), []
    # One that has a box for whatever there is says nothing.
    for font in sorted(fontManager.ttflist, key=lambda f: (f.style != "normal", f.weight != 400, f.name)):
        if not left:
            break
        rest = left if "Last Resort" in font.name or font.name in chosen else lacking(left, font.fname)
        if rest != left:
            left, chosen = rest, [*chosen, font.name]
    if left:
        log.warning("no font of this machine has %s of %r: boxes stand for them", " ".join(sorted(left)), text)
    return chosen


def curve_png_bytes(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    markers: bool = False,
) -> bytes:
    """Curves by name, each (x values, y values), as the bytes of a PNG.

    x_label, y_label: with units, such as "loss (nats per pixel)". levels: horizontal grey dashed lines by name (chance,
    a baseline). markers: a dot on every point, for few points. A curve without points is left out; points that are not
    finite are gaps. Raises InputError when a curve's x and y differ in number.
    """
    figure, axes = new_figure(8.0, 5.0)
    for colour, (name, (x, y)) in zip(_colours(len(curves)), curves.items(), strict=True):
        if len(x) != len(y):
            raise InputError(f"curve {name!r} has {len(x)} x values and {len(y)} y values; give as many of each")
        if len(x):
            dots = markers or len(x) < 3  # a line through one point cannot be seen
            axes.plot(x, y, color=colour, label=name, linewidth=1.6, marker="o" if dots else None, markersize=4)
    for style, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color="#888888", linestyle=("--", ":", "-.")[style % 3], linewidth=1.2, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    set_title(axes, title)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure_png_bytes(figure)


def save_curve(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    markers: bool = False,
) -> None:
    """Writes `curve_png_bytes(…)`, without a title, to `path`. Raises InputError, OSError."""
    write_atomically(path, curve_png_bytes(curves, x_label, y_label, "", levels, markers))


def set_title(axes: "Axes", text: str) -> None:
    """A title as it is written: $ begins no formula, and what of a file's name is no UTF-8 shows as ?."""
    axes.set_title(text.encode("utf-8", "replace").decode(), parse_math=False)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
