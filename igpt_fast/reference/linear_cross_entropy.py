"""What the head and its loss mean together."""

import torch
from torch import Tensor

from igpt_fast.reference.cross_entropy import cross_entropy, cross_entropy_backward


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the logits hidden weightᵀ, in nats.   hidden [..., C]   weight [V, C]   target [...] → [...]"""
    return cross_entropy(torch.nn.functional.linear(hidden, weight), target, "none")


def linear_cross_entropy_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients for hidden and weight: dlogits weight and dlogitsᵀ hidden, summed over all rows.   dloss [...]"""
    dlogits = cross_entropy_backward(dloss, torch.nn.functional.linear(hidden, weight), target)
    return dlogits @ weight, dlogits.flatten(0, -2).t() @ hidden.flatten(0, -2)
