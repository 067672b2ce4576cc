"""How an op's output was computed, so that the matrix product behind it can recompute it in the backward pass.

A norm and an activation save their input for their own backward pass; the product that reads their output would save
that output too. On a CPU, where a pass over memory costs next to nothing beside the products, it recomputes the output
instead: a third less memory for a step's activations. On a GPU that would cost some twentieth of a step: it is saved.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe(NamedTuple):
    """make(*parts) is the output, to the bit, while neither it nor a part has been changed in place (but by .data).

    plain(*parts) is it, too, but for rounding, in torch's own ops, which can be differentiated.
    """

    make: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    parts: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]  # of the output and the parts


_recipes = WeakTensorKeyDictionary()  # not an attribute: a tensor that is saved or copied takes its attributes along


def remember(y: Tensor, make: Callable[..., Tensor], plain: Callable[..., Tensor], *parts: Tensor | None) -> None:
    """Registers how a backward pass makes y again instead of keeping it: `make` by kernels, to the bit, `plain` by
    torch's own ops. parts: tensors that the op keeps for its own backward pass anyway. On the CPU only.
    """
    if y.device.type == "cpu":
        _recipes[y] = Recipe(make, plain, parts, _versions(y, *parts))


def forget(y: Tensor) -> None:
    """y is kept after all: somebody else may see it, and change it through .data, of which no version tells."""
    _recipes.pop(y, None)


def recipe_of(y: Tensor) -> Recipe | None:
    """How y can be made again; None when nobody knows."""
    found = None if torch.compiler.is_compiling() else _recipes.get(y)
    return found if found is not None and found.versions == _versions(y, *found.parts) else None


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if t is None else t._version for t in tensors)
