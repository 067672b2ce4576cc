"""What attention means."""

import torch
from torch import Tensor

EMPTY_LSE = -1e30  # the LSE of a query that sees no key: finite, so that nothing downstream turns into NaN


def _weights(
    q: Tensor, k: Tensor, seen: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """The softmax's probabilities in q's dtype, its LSE, and the scale."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = ((q @ k.transpose(-1, -2)) * scale).to(torch.promote_types(q.dtype, torch.float32))
    if seen is None and causal:
        seen = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if seen is None:
        lse = torch.logsumexp(scores, -1)
    else:
        blind = ~seen.any(-1)
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores.masked_fill(blind.unsqueeze(-1), 0), -1).masked_fill(blind, EMPTY_LSE)
    return torch.exp(scores - lse.unsqueeze(-1)).to(q.dtype), lse, scale


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, causal: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale · q kᵀ) v and the logarithm of the softmax's denominator.

    q [B, H, Tq, D]   k, v [B, H, Tk, D]   seen bool [Tq, Tk] (it decides alone when given)   scale 1/sqrt(D) when None
    → o [B, H, Tq, D], lse float32 or wider [B, H, Tq]. A query that sees nothing gives o = 0 and lse = -1e30.
    """
    p, lse, _ = _weights(q, k, seen, causal, scale)
    return p @ v, lse.detach()


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention's o: dq, dk, dv, with dS = p (dP - rowsum(p dP)) and dP = dout vᵀ."""
    p, _, scale = _weights(q, k, seen, causal, scale)
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
