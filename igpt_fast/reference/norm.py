"""What the norm means."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s²) + eps) · weight with s = x (+ residual), over the last dimension.

    x, residual [..., C]   weight [C]   → y [..., C], or (y, s) when a residual is given.
    s has the residual's dtype, y has `dtype` (x's when None); the mean is taken in float32 at least.
    """
    s = x if residual is None else (residual + x).to(residual.dtype)
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd * weight).to(dtype or x.dtype)
    return y if residual is None else (y, s)
