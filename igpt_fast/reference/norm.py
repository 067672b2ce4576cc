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


def rms_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of rms_norm: dx (which is the residual's too) in `dtype`, dweight. ds is the gradient of s itself."""
    wide = torch.promote_types(s.dtype, torch.float32)
    x, g = s.to(wide), dy.to(wide) * weight
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    dx = rstd * (g - x * rstd.square() * (g * x).mean(-1, keepdim=True))
    dweight = (dy.to(wide) * x * rstd).reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0)
    return (dx if ds is None else dx + ds).to(dtype), dweight.to(weight.dtype)
