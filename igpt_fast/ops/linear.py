"""The linear map of a decoding step: few rows, no gradient, the same bits whatever stands in the batch."""

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for, empty, has_cuda_kernels, needs_grad, rows, same_device, stream_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ (+ bias) for a few rows.   x [N, K]   weight [M, K]   bias [M] or None   → [N, M] in x's dtype.

    A row's bits do not depend on the other rows, so an image is sampled alike alone and in a batch: where a kernel
    serves, on a GPU for 16 bits and K a multiple of 8. It carries no gradient: use torch.nn.functional.linear to train.
    Raises InputError when shapes do not fit or a gradient is wanted.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.size(1) != weight.size(1):
        raise InputError(
            f"linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; expected [M, K] and [N, K]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    same_device("linear", x=x, weight=weight, bias=bias)
    if needs_grad(x, weight, bias):
        raise InputError(
            "linear: this op has no gradient; call it under torch.no_grad or use torch.nn.functional.linear"
        )
    return torch.ops.igpt.linear(x, weight, bias) if torch.compiler.is_compiling() else _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given = (x, weight) if bias is None else (x, weight, bias)

    def refused(name: str) -> str | None:
        if not has_cuda_kernels(name):
            return None
        if x.dtype is torch.float32 or any(t.dtype is not x.dtype for t in given):
            return f"{name} has no linear for float32, nor for several dtypes at once"
        return f"{x.size(1)} columns are no multiple of 8" if x.size(1) % 8 else None

    native = backend_for("linear_fwd", given, refused)
    if native is None:
        return reference.linear.linear(x, weight, bias)
    y, on_gpu = empty((x.size(0), weight.size(0)), x), has_cuda_kernels(native.name)
    x, weight = (rows(t.contiguous(), on_gpu) for t in (x, weight))
    native.linear_fwd(y, x, weight, None if bias is None else bias.contiguous(), stream_of(x))
    return y


@torch.library.custom_op("igpt::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias)


@_linear_op.register_fake
def _(x, weight, bias):
    return x.new_empty(x.size(0), weight.size(0))
