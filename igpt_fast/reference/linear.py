"""What the linear map of a decoding step means."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ (+ bias), row by row: a matrix product would let a row's bits depend on the rows beside it.

    x [N, K]   weight [M, K]   bias [M]   → [N, M] in x's dtype.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    rows = [functional.linear(row, weight, bias) for row in x.split(1)]
    return torch.cat(rows) if rows else functional.linear(x, weight, bias)
