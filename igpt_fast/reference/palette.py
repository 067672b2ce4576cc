"""What the palette ops mean, in plain torch. Slow on purpose; every backend is held against this, bit for bit.

A colour u in 0..255 stands for x = u / 127.5 - 1 (float32, true division). The squared distance to a centre c is
d = (dr*dr + dg*dg) + db*db with dr = x_r - c_r and so on, in float32, every operation rounded on its own: a fused
multiply-add would move ties, and with them tokens.
"""

import torch
from torch import Tensor

MAX_WEIGHT = 1 << 45  # of all colours together: weight * (3 * 255^2) then still fits in 63 bits
_CHUNK = 1 << 20  # distances held at a time


def palette_assign(pixels: Tensor, palette: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """argmin_j d_j, the lowest j on ties; a distance that is not a number counts as infinite.

    pixels [..., 3] uint8, or float32 in [-1, 1]   palette [K, 3] float32   returns [...] of `dtype`
    """
    flat = pixels.reshape(-1, 3)
    tokens = torch.empty(flat.shape[0], dtype=dtype, device=flat.device)
    step = max(1, _CHUNK // len(palette))
    for begin in range(0, len(flat), step):
        tokens[begin : begin + step] = _nearest(flat[begin : begin + step], palette)
    return tokens.reshape(pixels.shape[:-1])


def kmeans_step(colors: Tensor, weights: Tensor, palette: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one step of Lloyd's algorithm needs to know about each centre's colours.

    colors [N, 3] uint8   weights [N] int64, none negative, MAX_WEIGHT in all at most   palette [K, 3] float32
    returns sums [K, 3] int64 of weight * uint8 value, counts [K] int64 of weights, and inertia, a float64 scalar:
    sum of weight * |x - c|^2 over each colour's nearest centre, x and c in [-1, 1], computed in float64
    """
    if weights.numel() and (int(weights.min()) < 0 or weights.double().sum() > MAX_WEIGHT):
        raise ValueError(f"kmeans_step: weights must not be negative, and not exceed {MAX_WEIGHT} in all")
    nearest = palette_assign(colors, palette)
    sums = torch.zeros(palette.shape, dtype=torch.int64, device=colors.device)
    counts = torch.zeros(len(palette), dtype=torch.int64, device=colors.device)
    sums.index_add_(0, nearest, colors.long() * weights[:, None])
    counts.index_add_(0, nearest, weights)
    offset = colors.double() / 127.5 - 1 - palette.double()[nearest]
    return sums, counts, (weights * offset.square().sum(1)).sum()


def palette_decode(tokens: Tensor, colors: Tensor) -> Tensor:
    """colors[tokens], uint8 [..., 3]. tokens integers [...] in 0..K-1   colors uint8 [K, 3]

    Raises ValueError, naming the first in reading order, for a token outside.
    """
    index = tokens.long()
    outside = ((index < 0) | (index >= len(colors))).flatten().nonzero()
    if len(outside):
        raise ValueError(f"token {int(index.flatten()[outside[0]])} is out of range")
    return colors[index]


def color_histogram(pixels: Tensor) -> Tensor:
    """How many pixels each 8-bit colour has, int64 [2^24], by r << 16 | g << 8 | b. pixels uint8 [..., 3]"""
    r, g, b = pixels.reshape(-1, 3).long().unbind(1)
    return torch.bincount(r << 16 | g << 8 | b, minlength=1 << 24)


def table_colors(first: int, boxes: int) -> Tensor:
    """uint8 [boxes, 4096, 3]: the colours of a palette's table, boxes of 16^3, in the order of csrc/cuda/palette.cuh.

    Bits of an index, highest first: r7-4, g7-4, b7-4, r3, g3, b3, r2, g2, b2, r1, g1, r0, g0, b1, b0.
    """
    index = torch.arange(first * 4096, (first + boxes) * 4096).view(boxes, 4096)
    places = (3, 5, 8, 11, *range(20, 24)), (2, 4, 7, 10, *range(16, 20)), (0, 1, 6, 9, *range(12, 16))  # lowest first
    channels = [sum((index >> place & 1) << bit for bit, place in enumerate(bits)) for bits in places]
    return torch.stack(channels, 2).to(torch.uint8)


def palette_table(palette: Tensor, first: int = 0, boxes: int = 4096) -> Tensor:
    """palette_assign of table_colors(first, boxes), int16 [boxes, 4096]."""
    return palette_assign(table_colors(first, boxes).to(palette.device), palette, torch.int16)


def _nearest(pixels: Tensor, palette: Tensor) -> Tensor:
    # Divided on the CPU: elsewhere torch multiplies by the reciprocal, which rounds otherwise.
    levels = (torch.arange(256, dtype=torch.float32, device="cpu") / 127.5 - 1).to(pixels.device)
    x = levels[pixels.long()] if pixels.dtype == torch.uint8 else pixels
    dr, dg, db = (x[:, None, i] - palette[None, :, i] for i in range(3))
    d = (dr * dr + dg * dg) + db * db
    d = torch.where(d.isnan(), torch.inf, d)
    index = torch.arange(len(palette), device=d.device)
    return torch.where(d == d.amin(1, keepdim=True), index, len(palette)).amin(1)
