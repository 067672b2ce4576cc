"""What drawing a token means, in plain torch and float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token per row, by inverting the distribution function.   logits [N, V]   uniforms float64 [N] → int64 [N]

    p = softmax(logits / temperature); temperature 0 is the largest logit. top_k keeps the k largest, top_p then the
    smallest set of the largest whose share of what is left reaches p; equals are kept lowest index first. The token is
    the first whose cumulative p, in the order of the indices, exceeds uniform · total. A row with NaN, +inf or nothing
    but -inf gives -1.
    """
    z = logits.double()
    top = z.amax(-1, keepdim=True)  # NaN if any of the row is
    if temperature == 0:
        token = (z == top).cumsum(-1).eq(0).sum(-1)  # how many come before the first largest; argmax promises no order
    else:
        p = ((z - top) / temperature).exp()
        if top_k is not None or top_p is not None:
            p = p * _kept(z, p, top_k, top_p)
        cdf = p.cumsum(-1)
        total = cdf[:, -1:]
        token = torch.searchsorted(cdf, uniforms.to(z).unsqueeze(-1) * total, right=True).squeeze(-1)
        token = token.minimum((cdf < total).sum(-1))  # the last possible token, should rounding step past it
    return token.where(top.squeeze(-1).isfinite(), -1)


def _kept(z: Tensor, p: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Which tokens top_k and top_p leave, bool [N, V].   z, p [N, V]: logits and what they weigh"""
    order = z.argsort(dim=-1, descending=True, stable=True)  # stable: equals stay in the order of their indices
    kept = torch.ones_like(order, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None and top_p < 1:  # at 1 rounding alone would decide about the tail
        mass = (p.gather(-1, order) * kept).cumsum(-1)
        kept &= F.pad(mass[:, :-1], (1, 0)) < top_p * mass[:, -1:]  # the mass before a token has not reached top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)
