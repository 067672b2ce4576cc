"""Small labelled images whose classes no linear classifier of pixels can tell apart, for the tests of the probe."""

import numpy as np
import torch

from igpt_fast.config import Config
from igpt_fast.data import tokenize
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette

SIZE, COLORS = (4, 5), 9
FAST = {"steps": 24, "batch": 8, "log_every": 5, "val_every": 4, "save_every": 7}  # of fine-tuning
GREYS = np.linspace(0, 255, COLORS).round().astype(np.uint8)
PALETTE = Palette(torch.from_numpy(GREYS).float()[:, None].expand(-1, 3) / 127.5 - 1)


def write_tokens(folder, labels, seed: int = 0, name: str = "images"):
    """One image per label (negative: none). Class c likes greys that lie c + 1 from the middle one, on either side.

    So the mean of every pixel is the same in all classes: no linear classifier of pixels can know them apart.
    """
    labels, random = np.asarray(labels), np.random.default_rng(seed)
    shape = (len(labels), *SIZE)
    liked = 4 + random.choice([-1, 1], shape) * (1 + np.maximum(labels, 0) % 4)[:, None, None]
    greys = np.where(random.random(shape) < 0.35, liked, random.integers(0, COLORS, shape))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", images=np.repeat(GREYS[greys][..., None], 3, axis=-1), labels=labels)
    return tokenize(folder / f"{name}.npz", PALETTE, folder / name, SIZE, resize="none", workers=0)


def make(**fields) -> ImageGPT:
    """A small model of these images, fresh, the same each time."""
    torch.manual_seed(0)
    return ImageGPT(Config(**{"layers": 2, "width": 24, "heads": 3, "colors": COLORS, "size": SIZE, **fields}))
