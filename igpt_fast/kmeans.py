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

from igpt_fast.ops.palette import count_colors, kmeans_step, palette_assign

log = logging.getLogger("igpt_fast")

SETTLED = 0.05 / 127.5  # no centre moves further along any axis: a twentieth of an 8-bit level
MAX_STEPS = 400  # … or so many steps, which only millions of evenly strewn colours need; stopping so is logged
SHORT = 20  # steps that show whether an exchange of centres was a gain
EXCHANGES = 8  # at most
BARGAIN = 3.0  # an exchange is tried while its cost, an upper bound, is below so many times its gain
SAMPLE = 1 << 15  # colours that the start is chosen from


def unit(colors: np.ndarray) -> Tensor:
    """uint8 [...] → float32 [...] in [-1, 1]."""
    return torch.from_numpy(colors.astype(np.float32) / np.float32(127.5) - np.float32(1))


def histogram(batches: Iterable[np.ndarray | Tensor]) -> tuple[np.ndarray, np.ndarray, torch.device]:
    """The distinct colours of uint8 [..., 3] batches, sorted, uint8 [N, 3], and the pixels that each has, int64 [N].

    Each batch is counted where it is; the last one's device comes third.
    """
    counts, device = None, torch.device("cpu")
    for batch in map(torch.as_tensor, batches):
        if counts is not None and batch.device != device:
            counts = counts.to(batch.device)
        counts, device = count_colors(batch, counts), batch.device
    if counts is None:
        return np.zeros((0, 3), np.uint8), np.zeros(0, np.int64), device
    packed = counts.nonzero().flatten()
    times, packed = counts[packed].numpy(force=True), packed.numpy(force=True)
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8), times, device


def cluster(
    colors: np.ndarray,
    weights: np.ndarray,
    k: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """k centres with (locally) least weighted squared distance to the colours.

    colors: distinct, uint8 [N, 3], N > k. weights: int64 [N], positive. progress: called as progress(step, MAX_STEPS).
    device: where the steps run; the rest runs on the CPU, and no bit depends on it.
    Returns centers float32 [k, 3] and their inertia, the sum of weight · squared distance, both in [-1, 1] units.
    """
    every, times = torch.from_numpy(colors), torch.from_numpy(weights)
    there = every.to(device), times.to(device)
    taken = 0

    def step(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, counts, inertia = kmeans_step(*there, centers.to(device))
        return sums.cpu(), counts.cpu(), inertia

    def lloyd(centers: Tensor, steps: int) -> tuple[Tensor, float, float]:
        """Centres at the means of their colours, their inertia, and the last step's longest move along an axis."""
        nonlocal taken
        moved = math.inf
        while steps and moved > SETTLED:
            sums, counts, _ = step(centers)
            means = (sums.double() / counts.double()[:, None] / 127.5 - 1).float()
            empty = (counts == 0).nonzero().flatten()
            if len(empty):
                means[empty] = _farthest(every, centers, len(empty))
            moved = float((means - centers).abs().max())
            centers, steps, taken = means, steps - 1, taken + 1
            if progress:
                progress(taken, MAX_STEPS)
        return centers, float(step(centers)[2]), moved

    centers, inertia, _ = lloyd(unit(_start(colors, weights, k, np.random.default_rng(seed))), SHORT)
    for _ in range(EXCHANGES):
        other = _exchange(colors, weights, centers)
        if other is None:
            break
        other, less, _ = lloyd(other, SHORT)
        if less >= inertia:
            break
        centers, inertia = other, less
    centers, inertia, moved = lloyd(centers, max(1, MAX_STEPS - taken))
    if moved > SETTLED:
        log.warning("k-means stopped after %d steps; a centre still moved by %.2f of 255 levels", taken, moved * 127.5)
    return centers, inertia


def _start(colors: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k different colours to start from, uint8 [k, 3]: k-means++ over all colours, or a sample where they are many."""
    among, stands_for = np.arange(len(colors)), weights
    if len(colors) > SAMPLE:
        among, stands_for = _sample(colors, weights, rng)
    chosen = among[_spread(colors[among], stands_for, k, rng)]
    if len(chosen) < k:  # few colours fill the sample, and all of them are chosen: the others are equally welcome
        others = np.setdiff1d(np.arange(len(colors)), chosen)
        chosen = np.concatenate([chosen, rng.choice(others, k - len(chosen), replace=False)])
    return colors[chosen]


def _sample(colors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of at most SAMPLE colours that stand for all, and the weight with which each does, int64.

    Half of them are drawn by weight, half by weight · squared distance to a rough palette: a background that fills most
    pixels would else leave few draws for the colours that k-means has to tell apart. Weights undo the preference.
    """
    among, times = _draw(weights, SAMPLE // 8, rng)
    rough = colors[among[_spread(colors[among], times, 64, rng)]]
    nearest = palette_assign(torch.from_numpy(colors), unit(rough)).numpy()
    squared = ((colors.astype(np.int64) - rough[nearest]) ** 2).sum(1)
    mean = max(1, int((weights * squared).sum() // weights.sum()))
    among, times = _draw(weights * (squared + mean), SAMPLE, rng)
    return among, times * ((mean << 20) // (squared[among] + mean))


def _spread(colors: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> list[int]:
    """Greedy k-means++: each index is the best of several, drawn by weight · squared distance to those chosen before.

    Distances between 8-bit colours are whole numbers below 2^24, exact in float32 in any order. Returns k different
    indices, or all that there are.
    """
    x = colors.astype(np.float32)
    norms = (x * x).sum(1)
    trials = 2 + int(math.log(k))
    chosen: list[int] = []
    closest = np.ones(len(x), np.float32)  # at first every pixel is as good as another
    while len(chosen) < min(k, len(x)):
        drawn, _ = _draw(closest.astype(np.int64) * weights, trials if chosen else 1, rng)
        distances = norms[drawn, None] + norms - 2 * (x[drawn] @ x.T)
        nearest = np.minimum(closest, distances) if chosen else distances
        best = int((nearest.astype(np.int64) * weights).sum(1).argmin())
        chosen.append(int(drawn[best]))
        closest = nearest[best]
    return chosen


def _draw(shares: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n draws by shares, whole numbers: the indices that came up, and how often each did."""
    ends = shares.cumsum()
    return np.unique(np.searchsorted(ends, rng.integers(0, ends[-1], n), side="right"), return_counts=True)


def _exchange(colors: np.ndarray, weights: np.ndarray, centers: Tensor) -> Tensor | None:
    """Takes centres from where they are missed least to where two do better than one; None where nothing is to gain.

    Lloyd's steps keep what the start has misjudged, for a centre seldom leaves its neighbourhood. To give up a centre
    costs at most its weight · squared distance to the nearest other; to split one gains most of the scatter along its
    widest axis. Whether an exchange was good is for the steps after it to show.
    """
    k, tokens = len(centers), palette_assign(torch.from_numpy(colors), centers)
    offset = (unit(colors) - centers[tokens]).numpy().astype(np.float64)
    tokens = tokens.numpy()
    count = np.bincount(tokens, weights, k)
    scatter = np.stack([np.bincount(tokens, weights * offset[:, axis] ** 2, k) for axis in range(3)], 1)
    apart = sum((centers[:, None, axis] - centers[None, :, axis]).square() for axis in range(3))
    apart.fill_diagonal_(math.inf)
    distance, neighbour = (t.numpy() for t in apart.min(1))
    cost, gain = count * distance, scatter.max(1)
    result, free = centers.numpy().copy(), np.ones(k, bool)
    widest = iter(np.argsort(-gain, kind="stable"))
    for idle in np.argsort(cost, kind="stable"):
        near = neighbour[idle]
        if not (free[idle] and free[near]):
            continue
        free[[idle, near]] = False
        wide = next((j for j in widest if free[j]), None)
        if wide is None or cost[idle] >= BARGAIN * gain[wide]:
            break
        free[wide] = False
        axis = scatter[wide].argmax()
        result[idle] = result[wide]
        result[[idle, wide], axis] += np.array([1, -1]) * math.sqrt(gain[wide] / count[wide])
    return None if np.array_equal(result, centers.numpy()) else torch.from_numpy(result)


def _farthest(colors: Tensor, centers: Tensor, n: int) -> Tensor:
    """The n colours farthest from their centres, the first on ties, float32 [n, 3]: where empty clusters start anew."""
    x = unit(colors.numpy())
    squared = (x - centers[palette_assign(colors, centers)]).square().sum(1)
    return x[squared.argsort(descending=True, stable=True)[:n]]
