"""The linear map of a decoding step: few rows, no gradient, the same bits whatever stands in the batch."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for, has_cuda_kernels
from igpt_fast.ops._tensors import empty, floats, needs_grad, rows, stream_of


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
) -> Tensor:
    """(residual +) f(x weightᵀ (+ bias)) for a few rows: a decoding step's linear with what stands around it.

    x [N, K]   weight [M, K]   bias [M] or None   residual [N, M] or None   → [N, M] in x's dtype
    norm [K]: x goes through rms_norm(x, norm, eps) first   gelu: f is quick GELU, else nothing

    A row's bits do not depend on the other rows, so an image is sampled alike alone and in a batch: where a kernel
    serves, on a GPU for 16 bits and K a multiple of 8. It carries no gradient: use torch.nn.functional.linear to train.
    Raises InputError when shapes do not fit, for integers, or where a gradient is wanted.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.size(1) != weight.size(1):
        raise InputError(
            f"linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; expected [M, K] and [N, K]"
        )
    (N, K), (M, _) = x.shape, weight.shape
    given = {"x": x, "weight": weight, "bias": bias, "norm": norm, "residual": residual}
    for name, t, shape in (("bias", bias, (M,)), ("norm", norm, (K,)), ("residual", residual, (N, M))):
        if t is not None and t.shape != shape:
            raise InputError(f"linear: {name} {tuple(t.shape)} is not {shape}, as x and weight ask for")
    floats("linear", **given)
    if needs_grad(*given.values()):
        raise InputError(
            "linear: this op has no gradient; call it under torch.no_grad or use torch.nn.functional.linear"
        )
    run = torch.ops.igpt.linear if torch.compiler.is_compiling() else _linear
    return run(x, weight, bias, norm, residual, eps, gelu)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
) -> Tensor:
    given = [t for t in (x, weight, bias, norm, residual) if t is not None]

    def refused(name: str) -> str | None:
        if not has_cuda_kernels(name):
            return None
        if x.dtype is torch.float32 or any(t.dtype is not x.dtype for t in given):
            return f"{name} has no linear for float32, nor for several dtypes at once"
        return f"{x.size(1)} columns are no multiple of 8" if x.size(1) % 8 else None

    native = backend_for("linear_fwd", given, refused) if weight.numel() else None
    if native is None:
        return reference.linear.linear(x, weight, bias, norm, residual, eps, gelu)
    y, on_gpu = empty((x.size(0), weight.size(0)), x), has_cuda_kernels(native.name)
    x, weight = rows(x.contiguous(), on_gpu), rows(weight.contiguous(), on_gpu)
    norm = None if norm is None else rows(norm.contiguous(), on_gpu)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    native.linear_fwd(y, x, weight, bias, norm, residual, eps, gelu, stream_of(x))
    return y


_linear_op = torch.library.custom_op("igpt::linear", mutates_args=())(_linear)


@_linear_op.register_fake
def _(x, weight, bias, norm=None, residual=None, eps=1e-5, gelu=False):
    return x.new_empty(x.size(0), weight.size(0))
