"""How to train: every option of a run, checked once, here."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, get_args

from igpt_fast.errors import InputError

PRECISIONS = ("bf16", "fp32")
MOST = {"seed": 2**64 - 1, "batch": 10**6}  # of others 10**12; a larger batch would first take minutes to draw
NUMBERS = {int: Integral, float: Real}  # what passes for one: NumPy's too
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


@dataclass(frozen=True)
class Options:
    """How to train. Values that make no sense raise InputError at construction, named as on the command line."""

    # What decides which numbers are learned from which images in which order: a resumed run cannot change it midway.
    FIXED: ClassVar[tuple[str, ...]] = ("seed", "batch", "flip", "shift", "ema", "val_fraction")
    PEAK: ClassVar[float] = 3e-3  # the paper's learning rate for width 512 and batch 128

    steps: int = 1000  # optimizer steps in all, those before a resume included
    batch: int = 16  # images a step
    accumulate: int = 1  # equal parts that a step's images are split into, one after the other, to save memory
    lr: float | None = None  # peak learning rate; None: see `peak_lr`
    warmup: int | None = None  # steps of linear warm-up; None: a twentieth of the steps, at most 10,000
    clip: float = 1.0  # largest norm of the gradient; 0: as it comes
    precision: str = "bf16"  # of matrix products and activations; weights and optimizer are always float32
    ema: float = 0.0  # decay of a running average of the weights, which then is what is validated and sampled; 0: none
    flip: bool = False  # mirror each image left to right with probability 1/2
    shift: int = 0  # move each image by up to so many pixels either way, its border mirrored; 0: none
    val_fraction: float = 0.1  # of the images, held out by a hash of their names
    val_every: int = 250  # steps between validations; 0: only at the end
    val_images: int = 512  # held-out images that a validation looks at, evenly spread over them; 0: all
    sample_every: int = 500  # steps between pictures of samples and of the loss; 0: none
    save_every: int = 250  # steps between checkpoints; 0: only at the end
    log_every: int = 10  # steps between lines of metrics.jsonl, each the mean over them
    keep: int = 2  # newest checkpoints that are kept; the best, where there is one, stays too
    seed: int = 0  # of the weights, the order of the images, flips, masks and samples
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, *none = get_args(field.type) or (field.type,)
            value = getattr(self, field.name)
            good = isinstance(value, NUMBERS.get(kind, kind)) and isinstance(value, bool) == (kind is bool)
            if not good and not (none and value is None):
                raise InputError(f"--{field.name.replace('_', '-')} is {value!r}; use {WORDS[kind]}")
            if value is not None and kind in NUMBERS:  # files of a run hold Python's own
                try:
                    object.__setattr__(self, field.name, kind(value))
                except OverflowError:
                    self._require(field.name, False, "a smaller number")
            if kind is int:
                most = MOST.get(field.name, 10**12)
                self._require(field.name, value is None or value <= most, f"at most {most:,}")
        for name in ("steps", "batch", "accumulate", "log_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("val_every", "val_images", "sample_every", "save_every", "seed", "warmup", "shift"):
            self._require(name, (getattr(self, name) or 0) >= 0, "0 or more")
        self._require("accumulate", self.batch % self.accumulate == 0, f"a divisor of the batch ({self.batch})")
        self._require("lr", self.lr is None or 0 < self.lr < math.inf, "a positive number such as 1e-3")
        self._require("warmup", self.warmup is None or self.warmup <= self.steps, f"at most the {self.steps} steps")
        self._require("clip", 0 <= self.clip < math.inf, "a positive number such as 1.0, or 0 for none")
        self._require("precision", self.precision in PRECISIONS, " or ".join(PRECISIONS))
        self._require("ema", 0 <= self.ema < 1, "a decay below 1 such as 0.999, or 0 for none")
        self._require("val_fraction", 0 <= self.val_fraction < 1, "a fraction from 0 to less than 1")

    def _require(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; use {wanted}")

    def peak_lr(self, width: int) -> float:
        """The learning rate after warm-up: as given, else PEAK for width 512 and batch 128, for others in proportion.

        Less with the width, more for widths below 512 up to 3e-3; less with the root of the batch below 128, where
        gradients are noisier.
        """
        if self.lr is not None:
            return self.lr
        return min(3e-3, self.PEAK * (512 / width)) * min(1.0, math.sqrt(self.batch / 128))

    def rate(self, step: int, width: int) -> float:
        """The learning rate of step 0, 1, …: linear warm-up to the peak, then a cosine to 0 after the last."""
        warmup = self._warmup()
        if step < warmup:
            return self.peak_lr(width) * (step + 1) / warmup
        return self.peak_lr(width) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def _warmup(self) -> int:
        return min(self.steps // 20, 10_000) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class FinetuneOptions(Options):
    """How to learn classes: as Options, with an early end and a constant rate, a tenth of theirs at width 512."""

    FIXED: ClassVar[tuple[str, ...]] = (*Options.FIXED, "generative", "test_fraction", "per_class")
    PEAK: ClassVar[float] = 3e-4

    val_fraction: float = 0.2  # of the images to learn from, of each class; validation decides which weights are best
    val_every: int = 50
    val_images: int = 0
    sample_every: int = 0
    generative: float = 1.0  # weight of the pixels' loss beside that of the classes
    patience: int = 10  # validations without a better accuracy after which the run ends; 0: it takes all steps
    test_fraction: float = 0.2  # of the images, by a hash of their names, kept for the test at the end; 0: no test
    per_class: int | None = None  # images of each class to learn from, validation included; None: all

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("generative", 0 <= self.generative < math.inf, "a weight such as 1.0, or 0 for classes alone")
        self._require("patience", self.patience >= 0, "0 or more")
        self._require("test_fraction", 0 <= self.test_fraction < 1, "a fraction from 0 to less than 1")
        self._require("per_class", self.per_class is None or self.per_class >= 2, "at least 2")

    def rate(self, step: int, width: int) -> float:
        """The learning rate of step 0, 1, …: linear warm-up to the peak, which stays."""
        return self.peak_lr(width) * min(1.0, (step + 1) / max(1, self._warmup()))
