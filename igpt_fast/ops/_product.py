"""Products of float32 matrices on a CPU, without gradients: torch's own, or oneDNN's where that is twice as fast.

torch multiplies float32 by MKL, which on AMD's processors stops at AVX2. AVX-512 does twice as much a cycle on Zen 5:
there oneDNN, which torch has for bf16 anyway, takes half of MKL's time. torch calls it by the op that torch.compile
makes of a Linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast.ops import _native
from igpt_fast.ops._native import is_transformed, makes_its_own, why_plain
from igpt_fast.ops._tensors import needs_grad

LEAST = 1 << 22  # multiplications of a product that oneDNN's way in, some 10 µs longer than MKL's, pays for
NARROW = 16  # rows or columns below which it may be slower
ROWS = 1024  # of a gradient's summands at a time: oneDNN copies them, which the cache then holds

_BY_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build of torch


def mkl_is_slow() -> bool:
    """Whether torch's own float32 products leave half of this CPU's multipliers idle, and there is another way."""
    there = _BY_ONEDNN is not None and torch.backends.mkl.is_available() and not _native.WHY_NO_EXTENSION
    return there and _native._C.cpu_is_wide_amd()


_MKL_IS_SLOW = mkl_is_slow()


def for_onednn(*operands: Tensor | None) -> bool:
    """Whether such tensors, if they are large, are for oneDNN: plain float32 ones, outside autocast and torch.func."""
    return (
        _MKL_IS_SLOW
        and all(
            t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and not makes_its_own(t)
            for t in operands
            if t is not None
        )
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN multiplies x [..., K] by weight [M, K] here and now."""
    return (
        for_onednn(x, weight, bias)
        and x.numel() * weight.shape[0] >= LEAST
        and min(x.shape[:-1].numel(), *weight.shape) >= NARROW
        and torch.backends.mkldnn.enabled
        and not why_plain()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ (+ bias).   x [..., K]   weight [M, K]   bias [M] or None   → [..., M]"""
    if needs_grad(x, weight, bias) or not by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return _multiply(x, weight, bias)


def outer(y: Tensor, x: Tensor) -> Tensor:
    """yᵀ x, summed over the rows.   y [N, M]   x [N, K]   → [M, K]"""
    if needs_grad(y, x) or not by_onednn(y.t(), x.t()):
        return y.t() @ x
    if y.shape[1] > x.shape[1]:  # the left factor is the one to be turned round: the narrower
        return outer(x, y).t().contiguous()
    parts = zip(y.split(ROWS), x.split(ROWS), strict=True)
    total = _multiply(*(part.t() for part in next(parts)))
    for part in parts:
        total += _multiply(*(t.t() for t in part))
    return total


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not weight.t().is_contiguous():
        weight = weight.contiguous()  # of others it has only its plain loops, a thousand times slower
    bias = None if bias is None else bias.contiguous()  # it does not look at strides
    return _BY_ONEDNN(x, weight, bias, "none", [], "")
