"""Colours to tokens and back, and what k-means needs to make palettes: checks, and which backend runs. No gradients."""

import numpy as np
import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for
from igpt_fast.ops._tensors import empty, stream_of

MAX_COLORS = 4096
TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16)
COLORS = 1 << 24  # of 8 bits a channel
# Distances from which a table repays itself on a GPU: what the plain loop makes of them in a table's time, see 5 in
# benchmarks/results/PLAN.md.
TABLE_PAYS = 100_000_000
TILE, MOST_TILES = 1 << 14, 1 << 12  # color_histogram on a GPU: pixels that a block sorts, and tiles at a time
SORTING_PAYS = 1 << 22  # pixels; fewer are counted without


def palette_assign(pixels: Tensor, palette: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Index of the palette's nearest colour for each pixel, the lowest one on ties (see reference.palette).

    pixels [..., 3] uint8 (0..255) or float32 (in [-1, 1])   palette [K, 3] float32 in [-1, 1], K ≤ 4096
    → [...] of `dtype`: int64, int32 or int16. All backends give the same tokens to the bit.
    Raises InputError for other shapes, dtypes, or devices that differ.
    """
    if pixels.dtype not in (torch.uint8, torch.float32) or pixels.shape[-1:] != (3,):
        raise InputError(f"palette_assign: pixels are {_text(pixels)}; give uint8 or float32 [..., 3]")
    if dtype not in TOKEN_DTYPES:
        raise InputError(f"palette_assign: tokens cannot be {dtype}; use int64, int32 or int16")
    _check_palette("palette_assign", palette, pixels)
    if torch.compiler.is_compiling():
        return torch.ops.igpt.palette_assign(pixels, palette, dtype)
    return _assign(pixels, palette, dtype)


def palette_decode(tokens: Tensor, colors: Tensor) -> Tensor:
    """The colour of each token.   tokens [...] int64, int32 or int16   colors [K, 3] uint8, K ≤ 4096   → [..., 3] uint8

    Raises InputError for other shapes, dtypes, or devices that differ, and, naming the first, for a token outside
    0..K-1. On a GPU the host waits for the kernel to know; while a CUDA graph is captured it cannot, and writes black.
    """
    if tokens.dtype not in TOKEN_DTYPES:
        raise InputError(f"palette_decode: tokens are {_text(tokens)}; give int64, int32 or int16")
    shaped = colors.ndim == 2 and colors.shape[1] == 3 and 1 <= colors.shape[0] <= MAX_COLORS
    if colors.dtype is not torch.uint8 or not shaped or colors.device != tokens.device:
        wanted = f"uint8 [K, 3] with 1 ≤ K ≤ {MAX_COLORS} on {tokens.device}"
        raise InputError(f"palette_decode: the colors are {_text(colors)}; give {wanted}")
    if torch.compiler.is_compiling():
        return torch.ops.igpt.palette_decode(tokens, colors)
    return _decode(tokens, colors)


def color_histogram(pixels: Tensor) -> Tensor:
    """How many pixels each 8-bit colour has, by r << 16 | g << 8 | b.   pixels [..., 3] uint8   → [2^24] int64

    Raises InputError for other pixels.
    """
    if pixels.dtype is not torch.uint8 or pixels.shape[-1:] != (3,):
        raise InputError(f"color_histogram: pixels are {_text(pixels)}; give uint8 [..., 3]")
    if torch.compiler.is_compiling():
        return torch.ops.igpt.color_histogram(pixels)
    return count_colors(pixels, None)


def kmeans_step(colors: Tensor, weights: Tensor, palette: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Lloyd's algorithm over weighted 8-bit colours, up to the division (see reference.palette).

    colors [N, 3] uint8   weights [N] int64, none negative, 2^45 in all at most   palette [K, 3] float32, K ≤ 4096
    → sums [K, 3] int64 of weight · value (0..255), counts [K] int64 of weights, inertia float64 scalar: the sum of
    weight · squared distance to the nearest centre, in palette units ([-1, 1]).
    Integers are exact; inertia's bits do not depend on the number of threads. Raises InputError for anything else; on a
    GPU asking the weights would make the host wait, and bad ones give an inertia of NaN instead.
    """
    if colors.dtype is not torch.uint8 or colors.ndim != 2 or colors.shape[1] != 3:
        raise InputError(f"kmeans_step: colors are {_text(colors)}; give uint8 [N, 3]")
    if weights.dtype is not torch.int64 or weights.shape != colors.shape[:1] or weights.device != colors.device:
        raise InputError(f"kmeans_step: weights are {_text(weights)}; give int64 [{len(colors)}] beside the colors")
    _check_palette("kmeans_step", palette, colors)
    if torch.compiler.is_compiling():
        return torch.ops.igpt.kmeans_step(colors, weights, palette)
    return _step(colors, weights, palette)


def _check_palette(op: str, palette: Tensor, pixels: Tensor) -> None:
    shaped = palette.ndim == 2 and palette.shape[1] == 3 and 1 <= palette.shape[0] <= MAX_COLORS
    if palette.dtype is not torch.float32 or not shaped or palette.device != pixels.device:
        wanted = f"float32 [K, 3] with 1 ≤ K ≤ {MAX_COLORS} on {pixels.device}"
        raise InputError(f"{op}: the palette is {_text(palette)}; give {wanted}")


def _text(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"


def count_colors(pixels: Tensor, counts: Tensor | None) -> Tensor:
    """color_histogram, added to `counts` [2^24] int64 in place where there are some."""
    native = backend_for("color_histogram", (pixels,))
    if native is None:
        found = reference.palette.color_histogram(pixels)
        return found if counts is None else counts.add_(found)
    if counts is None:
        # On the CPU numpy's zeros are pages that nobody has touched yet: of 128 MB few pixels need few.
        on_cpu = pixels.device.type == "cpu"
        counts = torch.from_numpy(np.zeros(COLORS, np.int64)) if on_cpu else pixels.new_zeros(COLORS, dtype=torch.int64)
    if pixels.numel():  # an empty array's strides may be anything
        flat = pixels.reshape(-1, 3).contiguous()
        native.color_histogram(counts, flat, _workspace(native, flat), stream_of(pixels))
    return counts


def _workspace(native, pixels: Tensor) -> Tensor | None:
    """Where a GPU sorts pixels by colour before it counts them: at most 138 MB, where so many repay it."""
    tiles = min(-(-len(pixels) // TILE), MOST_TILES)
    if len(pixels) < SORTING_PAYS or not native.has("palette_table"):  # a GPU's: the CPU counts as it reads
        return None
    return empty((tiles, TILE + 512), pixels, torch.int16)


def _table(native, pixels: Tensor, palette: Tensor) -> Tensor | None:
    """The palette's tokens for all 2^24 colours, in the order of palette_table, where the backend can use them and so
    many pixels repay them (33.5 MB)."""
    pays = pixels.dtype is torch.uint8 and pixels.numel() // 3 * len(palette) >= TABLE_PAYS
    if not pays or not native.has("palette_table"):
        return None
    table = empty((4096, 4096), palette, torch.int16)
    native.palette_table(table, palette, 0, stream_of(palette))
    return table


def _assign(pixels: Tensor, palette: Tensor, dtype: torch.dtype) -> Tensor:
    native = backend_for("palette_assign", (pixels, palette))
    if native is None:
        return reference.palette.palette_assign(pixels, palette, dtype)
    tokens = empty(pixels.shape[:-1], pixels, dtype)
    flat, palette = pixels.reshape(-1, 3).contiguous(), palette.contiguous()
    native.palette_assign(tokens.view(-1), flat, palette, _table(native, flat, palette), stream_of(pixels))
    return tokens


def _decode(tokens: Tensor, colors: Tensor) -> Tensor:
    native = backend_for("palette_decode", (tokens, colors))
    try:
        if native is None:
            return reference.palette.palette_decode(tokens, colors)
        flat = tokens.reshape(-1).contiguous()
        pixels, bad = empty((*tokens.shape, 3), colors), empty((1,), tokens, torch.int64)
        native.palette_decode(pixels.view(-1, 3), bad, flat, colors.contiguous(), stream_of(tokens))
        captured = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and (first := int(bad)) >= 0:
            raise ValueError(f"token {int(flat[first])} is out of range")
        return pixels
    except ValueError as error:
        has = f"this palette of {len(colors)} colours has tokens 0 to {len(colors) - 1}"
        raise InputError(f"{error}: {has}; decode with the palette that encoded") from None


def _step(colors: Tensor, weights: Tensor, palette: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    native = backend_for("kmeans_step", (colors, palette))
    try:
        if native is None:
            return reference.palette.kmeans_step(colors, weights, palette)
        sums = empty(palette.shape, colors, torch.int64)
        counts, squares = (empty(palette.shape[:1], colors, torch.int64) for _ in range(2))
        inertia = empty((), colors, torch.float64)
        inputs = colors.contiguous(), weights.contiguous(), palette.contiguous()
        table = _table(native, inputs[0], inputs[2])
        native.kmeans_step(sums, counts, squares, inertia, *inputs, table, stream_of(colors))
        return sums, counts, inertia
    except ValueError as error:  # the weights' values, which only the pass over them can know
        raise InputError(str(error)) from None


_palette_assign_op = torch.library.custom_op("igpt::palette_assign", mutates_args=())(_assign)


@_palette_assign_op.register_fake
def _(pixels, palette, dtype):
    return pixels.new_empty(pixels.shape[:-1], dtype=dtype)


_kmeans_step_op = torch.library.custom_op("igpt::kmeans_step", mutates_args=())(_step)


@_kmeans_step_op.register_fake
def _(colors, weights, palette):
    counts = weights.new_empty(palette.shape[:1])
    return weights.new_empty(palette.shape), counts, weights.new_empty((), dtype=torch.float64)


_palette_decode_op = torch.library.custom_op("igpt::palette_decode", mutates_args=())(_decode)


@_palette_decode_op.register_fake
def _(tokens, colors):
    return colors.new_empty((*tokens.shape, 3))


@torch.library.custom_op("igpt::color_histogram", mutates_args=())
def _color_histogram_op(pixels: Tensor) -> Tensor:
    return count_colors(pixels, None)


@_color_histogram_op.register_fake
def _(pixels):
    return pixels.new_empty((COLORS,), dtype=torch.int64)
