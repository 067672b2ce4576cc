"""How likely a model finds images: the negative log-likelihood of whole images, every pixel scored."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from igpt_fast import intervals, ops
from igpt_fast.errors import InputError
from igpt_fast.joined import refuse_misfit
from igpt_fast.labels import group_numbers
from igpt_fast.model import ImageGPT
from igpt_fast.over_images import over_images
from igpt_fast.processes import Processes
from igpt_fast.tables import csv_bytes
from igpt_fast.tokens import TokenDataset


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood, the mean over images. `low` to `high` is its 95 % interval, by groups where images have
    some (None for one image, or one group).
    """

    nats_per_pixel: float
    low: float | None
    high: float | None
    per_image: np.ndarray  # float64 [N], nats per pixel of each image
    pixels: int  # of an image, all of them scored
    colors: int  # that a pixel can have: chance is ln(colors) nats
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold. A dimension is a pixel's token, so bits per dim are bits per pixel."""
        nats = {"per_pixel": self.nats_per_pixel, "low": self.low, "high": self.high}
        bits = {name: None if value is None else value / math.log(2) for name, value in nats.items()}
        return {
            "images": len(self.per_image),
            "pixels_per_image": self.pixels,
            "colors": self.colors,
            **{f"nats_{name}": value for name, value in nats.items()},
            **{f"bits_{name}": value for name, value in bits.items()},
            "bits_per_dim": bits["per_pixel"],
            "nats_chance": math.log(self.colors),
            "seconds": round(self.seconds, 3),
        }

    def to_csv(self, names: Sequence[str]) -> bytes:
        """A CSV file's bytes, a line an image: its name, nats per pixel, bits per pixel. names: of these images."""
        rows = zip(names, self.per_image, strict=True)
        lines = ([name, f"{nats:.6f}", f"{nats / math.log(2):.6f}"] for name, nats in rows)
        return csv_bytes(["image", "nats_per_pixel", "bits_per_pixel"], lines)


def evaluate(
    model: ImageGPT,
    dataset: TokenDataset,
    indices: Sequence[int] | np.ndarray | None = None,
    batch: int | None = None,
    amp: bool = False,
    processes: Processes | None = None,
) -> Likelihood:
    """Scores whole images under an autoregressive model: -ln p(image) / pixels, with no pixel left out.

    indices: which images; None: all. batch: images side by side; None: what fits. amp: bf16 autocast. processes: those
    that share the images, see igpt_fast.processes.together. Progress is shown on stderr. Raises InputError for a BERT
    model, which gives images no likelihood, for tokens that do not fit the model, for no image at all, for a batch
    below 1, and for a result that is not finite.
    """
    began, config = time.monotonic(), model.config
    if config.objective != "ar":
        raise InputError(f"an objective={config.objective!r} model gives whole images no likelihood; use an 'ar' model")
    refuse_misfit(dataset, config, model.palette)
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    if not len(indices):
        raise InputError(f"{dataset.origin}: no image is left to score; choose another split")
    nats = np.empty(len(indices))

    def nats_of(tokens: Tensor) -> Tensor:
        tokens = tokens.flatten(1)
        losses = ops.linear_cross_entropy(model.hidden(tokens), model.wtet, tokens)
        return losses.reshape(tokens.shape).double().mean(1)

    more = 2 * config.colors  # the logits, and what becomes of them
    said = {"doing": "scoring", "what": "likelihoods"}
    over_images(nats_of, nats, model, dataset, indices, batch, more=more, processes=processes, amp=amp, **said)
    mean, margin = float(nats.mean()), intervals.margin_of_mean(nats, group_numbers(dataset, indices))
    low, high = (None, None) if margin is None else (mean - margin, mean + margin)
    return Likelihood(mean, low, high, nats, config.tokens, config.colors, time.monotonic() - began)
