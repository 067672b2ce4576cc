"""igpt-fast: Image GPT, exactly, and fast. See README.md for the tour."""

__version__ = "0.1.0"

from igpt_fast import ops, weights
from igpt_fast.accelerate import accelerate
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.patterns import BlockMask
from igpt_fast.sample import complete, sample

__all__ = [
    "BlockMask",
    "Config",
    "ImageGPT",
    "InputError",
    "Palette",
    "accelerate",
    "complete",
    "ops",
    "sample",
    "weights",
]
