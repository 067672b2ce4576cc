"""What the tests of training share: a tiny model, tokens that are easy to learn, and a way to break in midway."""

import numpy as np
import torch

from igpt_fast import loop
from igpt_fast.checkpoint import load_checkpoint
from igpt_fast.config import Config
from igpt_fast.data import tokenize
from igpt_fast.metrics import read_metrics
from igpt_fast.palette import Palette
from igpt_fast.tokens import TokenDataset

CONFIG = Config(layers=2, width=32, heads=4, colors=16, size=(4, 6))
FAST = {"steps": 12, "batch": 6, "lr": 3e-3, "log_every": 4, "val_every": 5, "sample_every": 0, "save_every": 6}
TIMES = ("elapsed", "images_per_second")  # what may differ between two runs that take the same steps


def write_tokens(folder, seed: int = 0, count: int = 40, size=(4, 6), colors: int = 16) -> TokenDataset:
    """Images whose rows are ramps through a palette of greys: easy to learn, different from one another."""
    levels = np.linspace(0, 255, colors).round().astype(np.uint8)
    random = np.random.default_rng(seed)
    ramps = random.integers(colors, size=(count, size[0], 1)) + np.arange(size[1])
    pixels = np.repeat(levels[ramps % colors][..., None], 3, axis=-1)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", pixels)
    palette = Palette(torch.from_numpy(levels).float()[:, None].expand(-1, 3) / 127.5 - 1)
    return tokenize(folder / "images.npy", palette, folder / "tokens", size, resize="none", workers=0)


def rows(run) -> list[dict]:
    """metrics.jsonl without the times, the order of the lines included."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]


def weights(run) -> dict[str, torch.Tensor]:
    """Everything that a newest checkpoint holds in tensors."""
    found = load_checkpoint(run)
    return {**dict(found.model.named_parameters()), **found.optimizer_tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def raise_at(monkeypatch, step: int, act) -> None:
    """Calls `act` at the start of each part of the `step`-th step (counted from 1)."""
    real = loop.Loop._learn

    def learn(self, learned, batch):
        if self.step == step - 1:
            act()
        return real(self, learned, batch)

    monkeypatch.setattr(loop.Loop, "_learn", learn)


# Fine-tuning on the images of labelled.py.
FEW = Config(layers=2, width=24, heads=3, colors=9, size=(4, 5))
CLASSES = {"steps": 12, "batch": 6, "lr": 3e-3, "val_every": 5, "save_every": 6, "log_every": 4}
EARLY = {**CLASSES, "lr": 1e-9, "val_every": 2, "patience": 2}  # which learns nothing, so that it ends at step 6

# Runs whose steps go in two parts, for what must not change their numbers.
VARIANTS = {
    "plain": {},
    "bert": {"objective": "bert", "flip": True, "ema": 0.9},
    "in parts": {"accumulate": 4, "batch": 8, "precision": "fp32"},
    "sparse": {"pattern": [["row|neighborhood(3)", "column"], "dense"], "positions": "axial", "precision": "fp32"},
    "frugal": {"activation_checkpointing": True, "sample_every": 4},
}


def variant(name: str) -> tuple[Config, dict]:
    """The model and the options of one of VARIANTS."""
    options = {**FAST, "accumulate": 2, **VARIANTS[name]}
    shape = {key: options.pop(key) for key in ("objective", "pattern", "positions") if key in options}
    return Config.from_dict({**CONFIG.to_dict(), **shape}), options
