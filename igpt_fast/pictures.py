"""Pictures for people: grids of images and curves, as PNG; and how files and directories appear whole or not at all."""

import ctypes
import fcntl
import glob
import io
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from igpt_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEN = 128  # pixels a side to which an image of a grid is enlarged: a 32×32 image is a stamp otherwise
WIDEST = 2048  # pixels: a grid is enlarged no further than this
COLOURS = ("#2f6fde", "#d9541e", "#2e9e5b", "#8a4fc7", "#b8860b", "#555555")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes `data` so that `path` holds either all of it or what it held before, whatever happens meanwhile.

    Makes the folder when it is missing. Raises OSError, naming `path` and leaving nothing behind, when the disk is full
    or read-only, or `path` is a directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def work_directory(out: Path, work: Path | None = None) -> Iterator[Path]:
    """Makes a directory, `work` or a hidden one beside `out`, to write into what then becomes `out`.

    When the block fails it goes, and so do the folders made for it; hidden ones of processes that were killed go first,
    whose locks nobody holds any more. Raises InputError when it cannot be made.
    """
    if work is None:
        folder, name = out.absolute().parent, out.absolute().name
        for old in folder.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 8}.tmp"):
            if (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        work = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    missing, lock = [above for above in work.parents if not above.exists()], None
    try:
        try:
            work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror}); choose a place that can") from error
        lock = _lock(work)
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for above in missing:
            if above.is_dir() and not any(above.iterdir()):  # another process may have come to use it
                above.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder's lock until it is closed or the process ends; None where it cannot be had."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def move_into_place(work: Path, out: Path) -> None:
    """Renames a directory of `work_directory`. At `out` is the old one or the new one, in whole, at any moment.

    Only a file system that cannot exchange two names (some of the network's) has a moment without either.
    """
    if not os.path.lexists(out):
        os.rename(work, out)
        return
    old = work
    if not _exchange(work, out):
        old = work.with_name(work.name + ".old")
        os.rename(out, old)
        try:
            os.rename(work, out)
        except BaseException:
            os.rename(old, out)
            raise
    if old.is_symlink():
        old.unlink()
    else:  # after an exchange, what a process that is killed now leaves of it goes with the next work_directory
        shutil.rmtree(old, ignore_errors=True)


def refuse_others(folder: Path, ours: str) -> None:
    """InputError where a directory that is to be replaced holds names other than `ours`, a regular expression."""
    if others := sorted(name for name in os.listdir(folder) if not re.fullmatch(ours, name)):
        raise InputError(f"{folder} holds {', '.join(others[:3])}, which would be lost; choose another place")


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


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
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    if scale is None:
        scale = max(1, min(SEEN // max(height, width), WIDEST // (columns * width)))
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


def save_grid(path: str | Path, images: np.ndarray, columns: int | None = None, scale: int | None = None) -> None:
    """Writes `grid(images, columns, scale)` as a PNG. images: uint8 [N, H, W, 3]. Raises InputError, OSError."""
    write_atomically(path, to_png_bytes(grid(images, columns, scale)))


def new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """An empty figure of so many inches, and its axes."""
    # With the first figure: matplotlib takes a third of a second to import, and 30 MB.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def figure_png_bytes(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer)
    return buffer.getvalue()


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
    title: str = "",
    levels: Mapping[str, float] | None = None,
    markers: bool = False,
) -> None:
    """Writes `curve_png_bytes(…)` to `path`. Raises InputError, OSError."""
    write_atomically(path, curve_png_bytes(curves, x_label, y_label, title, levels, markers))


def set_title(axes: "Axes", text: str) -> None:
    """A title as it is written: $ begins no formula, and what of a file's name is no UTF-8 shows as ?."""
    axes.set_title(text.encode("utf-8", "replace").decode(), parse_math=False)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
