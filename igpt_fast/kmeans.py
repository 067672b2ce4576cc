"""k-means over 8-bit colours: a histogram, a greedy k-means++ start, Lloyd's steps until the centres are settled.

It works on distinct colours, each weighted by its pixels, so its cost grows with the colours and not with the images.
What decides is summed in integers: the same seed gives the same bits, whatever the number of threads.
"""

import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from igpt_fast.ops.palette import kmeans_step, palette_assign

log = logging.getLogger("igpt_fast")

SETTLED = 0.05 / 127.5  # no centre moves further along any axis: a twentieth of an 8-bit level
MAX_STEPS = 400  # … or so many steps, which only millions of evenly strewn colours need; stopping so is logged
SAMPLE = 1 << 15  # pixels that the start is chosen from


def unit(colors: np.ndarray) -> Tensor:
    """uint8 [...] → float32 [...] in [-1, 1]."""
    return torch.from_numpy(colors.astype(np.float32) / np.float32(127.5) - np.float32(1))


def histogram(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct colours of uint8 [..., 3] batches, sorted, uint8 [N, 3], and the pixels that each has, int64 [N]."""
    counts = np.zeros(1 << 24, np.int64)
    for batch in batches:
        pixels = batch.reshape(-1, 3)
        for begin in range(0, len(pixels), 1 << 22):
            r, g, b = pixels[begin : begin + (1 << 22)].astype(np.uint32).T
            found, times = np.unique(r << 16 | g << 8 | b, return_counts=True)
            counts[found] += times
    packed = np.flatnonzero(counts)
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8), counts[packed]


def cluster(
    colors: np.ndarray, weights: np.ndarray, k: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, float]:
    """k centres with (locally) least weighted squared distance to the colours.

    colors: distinct, uint8 [N, 3], N > k. weights: int64 [N], positive. progress: called as progress(step, MAX_STEPS).
    Returns centers float32 [k, 3] and their inertia, the sum of weight · squared distance, both in [-1, 1] units.
    """
    centers = unit(_start(colors, weights, k, np.random.default_rng(seed)))
    every, times = torch.from_numpy(colors), torch.from_numpy(weights)
    for step in range(MAX_STEPS):
        sums, counts, _ = kmeans_step(every, times, centers)
        means = (sums.double() / counts.double()[:, None] / 127.5 - 1).float()
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            means[empty] = _farthest(every, centers, len(empty))
        moved = float((means - centers).abs().max())
        centers = means
        if progress:
            progress(step + 1, MAX_STEPS)
        if moved <= SETTLED:
            break
    else:
        log.warning(
            "k-means stopped after %d steps; a centre still moved by %.2f of 255 levels", step + 1, moved * 127.5
        )
    return centers, float(kmeans_step(every, times, centers)[2])


def _start(colors: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++: each colour is the best of several, drawn by weight · squared distance to those chosen before.

    Chooses among all colours, or, of more than SAMPLE, among those of SAMPLE pixels drawn by weight. Distances between
    8-bit colours are whole numbers below 2^24, exact in float32 in any order. Returns k colours, uint8 [k, 3].
    """
    among = np.arange(len(colors))
    if len(colors) > SAMPLE:
        pixels = rng.integers(0, weights.sum(), SAMPLE)
        among, weights = np.unique(np.searchsorted(weights.cumsum(), pixels, side="right"), return_counts=True)
    x = colors[among].astype(np.float32)
    norms = (x * x).sum(1)
    trials = 2 + int(math.log(k))
    chosen: list[int] = []
    closest = np.ones(len(x), np.float32)  # at first every pixel is as good as another
    while len(chosen) < k:
        reach = (closest.astype(np.int64) * weights).cumsum()
        if not reach[-1]:  # every colour of the sample is chosen: the others are equally welcome
            others = np.setdiff1d(np.arange(len(colors)), among)
            return colors[np.concatenate([among[chosen], rng.choice(others, k - len(chosen), replace=False)])]
        drawn = np.searchsorted(reach, rng.integers(0, reach[-1], trials if chosen else 1), side="right")
        distances = norms[drawn, None] + norms - 2 * (x[drawn] @ x.T)
        nearest = np.minimum(closest, distances) if chosen else distances
        best = int((nearest.astype(np.int64) * weights).sum(1).argmin())
        chosen.append(int(drawn[best]))
        closest = nearest[best]
    return colors[among[chosen]]


def _farthest(colors: Tensor, centers: Tensor, n: int) -> Tensor:
    """The n colours farthest from their centres, the first on ties, float32 [n, 3]: where empty clusters start anew."""
    x = unit(colors.numpy())
    squared = (x - centers[palette_assign(colors, centers)]).square().sum(1)
    return x[squared.argsort(descending=True, stable=True)[:n]]
