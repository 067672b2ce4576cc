"""What the loss means."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """log Σ exp(logits) - logits[target], in nats.   logits [..., V]   target [...] → scalar, or [...] for "none"."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.logsumexp(wide, -1) - wide.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return loss.mean() if reduction == "mean" else loss


def cross_entropy_backward(dloss: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Gradient of cross_entropy(..., "none"): (softmax - onehot) · dloss, like logits.   dloss [...]"""
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    onehot = torch.zeros_like(p).scatter_(-1, target.unsqueeze(-1), 1)
    return ((p - onehot) * dloss.unsqueeze(-1)).to(logits.dtype)
