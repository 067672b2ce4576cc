"""What an op's output was made of, so that a product behind it need not keep it for the backward pass.

A norm and an activation keep what they read; what they wrote is kept a second time, by the product that reads it. On a
CPU, where a pass over memory costs next to nothing beside the products, that product has it made again instead: a
third less memory for a step's activations. On a GPU these passes would be some twentieth of a step: there it is kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """make(*parts) is the output, to the bit."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor | None, ...]
    version: int  # of the output: one that was changed in place since is not what it was made as


_recipes = WeakTensorKeyDictionary()  # not an attribute: a tensor that is saved or copied takes its attributes along


def remember(y: Tensor, make: Callable[..., Tensor], *parts: Tensor | None) -> None:
    """Notes on y, where it is worth it, that make(*parts) gives its values; parts are what the op keeps anyway."""
    if y.device.type == "cpu":
        _recipes[y] = Recipe(make, tuple(None if t is None else t.detach() for t in parts), y._version)


def recipe_of(y: Tensor) -> Recipe | None:
    """How y can be made again; None when nobody knows."""
    found = None if torch.compiler.is_compiling() else _recipes.get(y)
    return found if found is not None and found.version == y._version else None
