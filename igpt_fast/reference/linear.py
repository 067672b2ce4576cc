"""What the linear map of a decoding step means."""

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weightᵀ (+ bias).   x [N, K]   weight [M, K]   bias [M]   → [N, M] in x's dtype."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
