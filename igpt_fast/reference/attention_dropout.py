"""What attention with dropout on its weights means, and which weights are kept."""

import torch
from torch import Tensor

from igpt_fast.reference.dropout import factor, keeps


def kept(heads: int, tokens: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """bool [heads, tokens, tokens]: whether head h keeps query t's weight of key s, by `keeps`.

    h counts through the batch: b · H + head.
    """
    head, query, key = (torch.arange(n, device=device) for n in (heads, tokens, tokens))
    return keeps(p, seed, head[:, None, None], query[:, None], key)


def _weights(q: Tensor, k: Tensor, scale: float, p: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax, what it is multiplied with, and its LSE."""
    B, H, T, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = ((q @ k.transpose(-1, -2)) * scale).to(wide).masked_fill(hidden, float("-inf"))
    mask = kept(B * H, T, p, seed, q.device).view(B, H, T, T) * factor(p)
    return torch.softmax(scores, -1), mask.to(wide), torch.logsumexp(scores, -1)


def attention_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """o = dropout(softmax(scale · q kᵀ, causal), p) v, and the softmax's LSE.

    q, k, v [B, H, T, D]   → o [B, H, T, D], lse float32 or wider [B, H, T]
    Weights that are kept are divided by the share that is kept in the mean.
    """
    softmax, mask, lse = _weights(q, k, scale, p, seed)
    return (softmax * mask).to(q.dtype) @ v, lse.detach()


def attention_dropout_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention_dropout's o: dq, dk, dv, with dS = P (M dout vᵀ - rowsum(P M dout vᵀ)), M the mask."""
    softmax, mask, _ = _weights(q, k, scale, p, seed)
    dp = (dout @ v.transpose(-1, -2)) * mask
    ds = ((dp - (softmax * dp).sum(-1, keepdim=True)) * softmax * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, (softmax * mask).to(q.dtype).transpose(-1, -2) @ dout
