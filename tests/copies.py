"""The CUDA backend for CPU tensors: each call carries copies to the GPU and brings back what they have become.

So the op tests, which loop over backends on CPU tensors, run the CUDA kernels on the hardware too, where there is one.
"""

from typing import Any

import torch
from torch import Tensor

from igpt_fast.ops import _native, _tensors

NAME = "cuda_copies"


class Copies:
    """A backend of copies on `device`, with the strides and the alignment modulo 16 bytes of what is copied."""

    name = NAME

    def __init__(self, native: Any, device: str):
        self.native, self.device = native, device

    def has(self, op: str) -> bool:
        return op != "decode_step" and self.native.has(op)  # its layers reach us as addresses already

    def __getattr__(self, op: str) -> Any:
        kernel = getattr(self.native, op)

        def call(*args):
            copies: dict[tuple, tuple[Tensor, Tensor]] = {}
            given = [self._carry(a, copies) for a in args[:-1]]  # the last is the stream
            first = next(there for _, there in copies.values())
            with torch.no_grad():
                kernel(*given, _tensors.stream_of(first))
                for here, there in copies.values():
                    _own(here.data).copy_(_own(there))  # .data: autograd need not hear of it

        return call

    def _carry(self, a: Any, copies: dict) -> Any:
        if isinstance(a, tuple | list):
            return tuple(self._carry(x, copies) for x in a)
        if not isinstance(a, Tensor):
            return a
        key = a.data_ptr(), a.shape, a.stride(), a.dtype
        if key not in copies:  # one tensor given twice stays one tensor
            copies[key] = a, self._there(a)
        return copies[key][1]

    def _there(self, a: Tensor) -> Tensor:
        if not a.numel():
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=self.device)
        offset = a.data_ptr() % 16 // a.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
        there = torch.empty(offset + span, dtype=a.dtype, device=self.device).as_strided(a.shape, a.stride(), offset)
        _own(there).copy_(_own(a.detach()))
        return there


def _own(t: Tensor) -> Tensor:
    """The elements of an expanded tensor that lie in memory of their own."""
    return t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())] if t.numel() else t


def register() -> None:
    """Makes the copies a backend that serves by name, where a GPU is."""
    if NAME not in _native.BACKENDS and "cuda" in _native.BACKENDS and torch.cuda.is_available():
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        _native.register_backend(NAME, Copies(_native.BACKENDS["cuda"], "cuda"), device="cpu", dtypes=dtypes)
