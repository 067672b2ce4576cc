"""What the activation means."""

import torch
from torch import Tensor


def bias_quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = z · sigmoid(1.702 z) with z = x (+ bias).   x [..., C]   bias [C]   → [..., C] in x's dtype."""
    z = x if bias is None else x + bias.to(x.dtype)
    return z * torch.sigmoid(1.702 * z)


def bias_quick_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of bias_quick_gelu: dx like x, dbias [C] or None."""
    z = x if bias is None else x + bias.to(x.dtype)
    sigmoid = torch.sigmoid(1.702 * z)
    dx = dy * sigmoid * (1 + 1.702 * z * (1 - sigmoid))
    return dx, None if bias is None else dx.reshape(dx.shape[:-1].numel(), dx.shape[-1]).sum(0).to(bias.dtype)
