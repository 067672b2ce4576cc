"""Dropout whose mask is a hash of each element's place: nothing is drawn one after another, and nothing is stored."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._gradient import differentiable
from igpt_fast.ops._native import backend_for, serves
from igpt_fast.ops._tensors import empty, needs_grad
from igpt_fast.reference.dropout import LEVELS


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where an element is kept, else 0, with its gradient.

    x [...] floats   p in [0, 1)   seed 0 to 2^63 - 1   → [...] in x's dtype, contiguous
    The seed and an element's index decide whether it is kept, as the reference says: the same seed keeps the same
    elements anywhere. p is taken down to a multiple of 2^-24. There is a kernel for CPUs; a GPU's torch has its own.
    Raises InputError for x of integers, and for p or a seed out of range.
    """
    if not x.is_floating_point():
        raise InputError(f"dropout: x is {x.dtype}; use a floating dtype")
    p = checked("dropout", p, seed)
    if torch.compiler.is_compiling():
        return torch.ops.igpt.dropout(x, p, seed)
    if needs_grad(x) and backend_for("dropout", (x,)) is not None:  # the reference has torch's own gradient
        return _with_gradient(x, p, seed)
    return _run(x, p, seed)


def checked(op: str, p: float, seed: int) -> float:
    """p, taken down to what the kernels count in; InputError where it or the seed is out of range."""
    if not 0 <= p < 1 or not 0 <= seed < 1 << 63:
        raise InputError(f"{op}: p is {p}, seed {seed}; give 0 <= p < 1 and 0 <= seed < 2**63")
    return int(p * LEVELS) / LEVELS


def has_dropout_kernel(x: Tensor) -> bool:
    """Whether a kernel would serve dropout of x."""
    return serves("dropout", (x,))


def _run(x: Tensor, p: float, seed: int) -> Tensor:
    native = backend_for("dropout", (x,))
    if native is None:
        return reference.dropout.dropout(x, p, seed).contiguous()
    y = empty(x.shape, x)
    native.dropout(y, x.contiguous(), p, seed, 0)
    return y


def _like(x, p, seed):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, *ctx.rest = inputs


def _gradient(ctx, backward, dy):
    return backward(dy, *ctx.rest), None, None


_with_gradient = differentiable("dropout", _run, _like, _run, _like, _setup, _gradient)
