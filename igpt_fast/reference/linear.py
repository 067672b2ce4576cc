"""What the linear map of a decoding step means, with what stands before and behind it."""

import torch
from torch import Tensor
from torch.nn import functional

from igpt_fast.reference.activation import bias_quick_gelu
from igpt_fast.reference.norm import rms_norm


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
) -> Tensor:
    """y = (residual +) f(x' weightᵀ (+ bias)), row by row: in one product a row's bits would depend on the others.

    x [N, K]   weight [M, K]   bias [M]   norm [K]   residual [N, M]   → [N, M] in x's dtype.
    x' is x, or rms_norm(x, norm, eps); f is quick GELU, or nothing.
    """
    x = x if norm is None else rms_norm(x, norm, eps)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    rows = [functional.linear(row, weight, bias) for row in x.split(1)]
    y = torch.cat(rows) if rows else functional.linear(x, weight, bias)
    y = bias_quick_gelu(y) if gelu else y
    return y if residual is None else (residual + y).to(x.dtype)
