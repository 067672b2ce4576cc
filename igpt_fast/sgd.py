"""The probe's classifier by stochastic gradient descent, for more images than L-BFGS can go through often enough.

The paper probes ImageNet by SGD with momentum 0.9. Ours beside that: features standardised as for L-BFGS, batches of
256, rates that fall to 0 by a cosine, no penalty. Features are fetched batch by batch, and classifiers of all RATES
learn from the same batches.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.regression import Score, parts_of, score

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # that are tried; the smallest of equals is used
MOMENTUM, BATCH, EPOCHS = 0.9, 256, 100
AT_ONCE = 4096  # images that are looked at together where nothing is learned

Fetch = Callable[[np.ndarray | slice], np.ndarray]  # the features of some images, int64 [n] → float32 [n, D]


def classify(
    name: str,
    fetch: Fetch,
    labels: np.ndarray,
    folds: np.ndarray,
    layer: int | None = None,
    fitted: Callable[[], object] = lambda: None,
    groups: np.ndarray | None = None,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Score:
    """Chooses the rate by validation among the images to learn from, learns from all of them, and tests.

    labels, folds, groups: as in regression.classify; labels are 0 to classes - 1. Validation is by the first part.
    epochs: passes over the images, in an order drawn by the seed. fitted: called behind each pass, of which there are
    2 · epochs. device: where it learns. A Score that has not converged became infinite on the way.
    """
    test, (learn, ask) = folds < 0, parts_of(folds)[0]
    how = {"epochs": epochs, "seed": seed, "device": torch.device(device), "fitted": fitted}
    found = (_answers(fetch, labels, learn, ask, RATES, **how)[0] == labels[ask]).sum(1)
    best = int(np.argmax(found))
    (answers,), finite = _answers(fetch, labels, ~test, test, RATES[best : best + 1], **how)
    chosen = {"rate": RATES[best], "validation": float(found[best] / ask.sum()), "converged": finite}
    return score(name, answers == labels[test], groups, labels[test], layer=layer, answers=answers, **chosen)


def _answers(
    fetch: Fetch,
    labels: np.ndarray,
    learn: np.ndarray,
    ask: np.ndarray,
    rates: Sequence[float],
    epochs: int,
    seed: int,
    device: torch.device,
    fitted: Callable[[], object],
) -> tuple[np.ndarray, bool]:
    """For each rate what a classifier of `learn` answers for `ask`: int64 [rates, asked], -1 where that is not finite;
    and whether all is.
    """
    learned, asked = np.flatnonzero(learn), np.flatnonzero(ask)
    mean, deviation = (torch.from_numpy(part).to(device) for part in _moments(fetch, learned))

    def features(rows: np.ndarray) -> Tensor:
        return (torch.from_numpy(fetch(rows)).to(device) - mean) / deviation

    shape, random = (int(labels.max()) + 1, len(mean)), np.random.default_rng([seed, 4])
    weights = [torch.zeros(shape, device=device, requires_grad=True) for _ in rates]
    biases = [torch.zeros(shape[0], device=device, requires_grad=True) for _ in rates]
    own = [{"params": pair, "lr": rate} for *pair, rate in zip(weights, biases, rates, strict=True)]
    optimizer, batches = torch.optim.SGD(own, momentum=MOMENTUM), -(-len(learned) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in np.array_split(random.permutation(learned), batches):
            x, y = features(rows), torch.from_numpy(labels[rows]).to(device)
            with torch.enable_grad():
                sum(F.cross_entropy(F.linear(x, w, b), y) for w, b in zip(weights, biases, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        fitted()
    answers, finite = np.empty((len(rates), len(asked)), np.int64), True
    with torch.no_grad():
        for at in range(0, len(asked), AT_ONCE):
            rows = asked[at : at + AT_ONCE]
            x = features(rows)
            for head, (w, b) in enumerate(zip(weights, biases, strict=True)):
                logits = F.linear(x, w, b)
                known = logits.isfinite().all(1)  # a rate that is too high leads to none
                answers[head, at : at + AT_ONCE] = logits.argmax(1).where(known, -1).cpu()
                finite = finite and bool(known.all())
    return answers, finite


def _moments(fetch: Fetch, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, float32 [D]; 1 for those that never change."""
    first = fetch(rows[:1]).astype(np.float64)
    sums = np.zeros((2, first.shape[1]))
    for at in range(0, len(rows), AT_ONCE):
        off = fetch(rows[at : at + AT_ONCE]) - first  # of what never changes, exactly 0
        sums += off.sum(0), (off * off).sum(0)
    mean, square = sums / len(rows)
    deviation = np.sqrt(np.maximum(square - mean * mean, 0))
    deviation[deviation == 0] = 1
    return (first[0] + mean).astype(np.float32), deviation.astype(np.float32)
