"""What the activation means."""

import torch
from torch import Tensor


def bias_quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = z · sigmoid(1.702 z) with z = x (+ bias).   x [..., C]   bias [C]   → [..., C] in x's dtype."""
    z = x if bias is None else x + bias.to(x.dtype)
    return z * torch.sigmoid(1.702 * z)
