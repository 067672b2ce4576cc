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


def attention_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, seed: int) -> Tensor:
    """dropout(softmax(scale · q kᵀ, causal), p) v.   q, k, v [B, H, T, D] → [B, H, T, D]

    Weights that are kept are divided by the share that is kept in the mean.
    """
    B, H, T, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = ((q @ k.transpose(-1, -2)) * scale).to(wide).masked_fill(hidden, float("-inf"))
    mask = kept(B * H, T, p, seed, q.device).view(B, H, T, T) * factor(p)
    return (torch.softmax(scores, -1) * mask.to(wide)).to(q.dtype) @ v
