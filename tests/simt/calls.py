"""Writes every op's calls of test_schedules.CASES into a file that drive.cpp replays, on the bench or on a GPU.

    PYTHONPATH=tests python -m simt.calls FILE [gpu]

So a new op comes under the sanitizers by having a case there. A call: its name and its arguments, each
as a number, a tensor or several tensors, in native byte order; drive.cpp knows how many there are from struct Ops.
"""

import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simt.test_schedules import CASES

# As DType in csrc/ops.h.
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.float8_e4m3fn,
)  # fmt: skip
SHAPES = [(3, 128, torch.bfloat16), (2, 129, torch.float32)]  # in vectors of 16 bytes, and one element at a time
# Where an op has kernels that these do not reach: few and many rows, caches of bytes; and for a GPU, heads enough for
# all its multiprocessors.
BYTES = [(2, 129, torch.float16)]
MORE = {
    "linear_fwd": [(1, 128, torch.bfloat16), (9, 128, torch.bfloat16)],
    "attention_decode": BYTES, "attention_prefix": BYTES, "cache_append": BYTES,
}  # fmt: skip
HEADS = {"attention_fwd": [(430, 64, torch.bfloat16)], "attention_bwd": [(430, 64, torch.bfloat16)]}


def shapes(op: str, gpu: bool = False) -> list[tuple]:
    """Those that a case of the op is recorded with."""
    return SHAPES + MORE.get(op, []) + (HEADS.get(op, []) if gpu else [])


def argument(a: Any) -> bytes:
    """One argument: absent, a number, a tensor, or several."""
    if a is None:
        return b"\0"
    if isinstance(a, tuple | list):
        return b"\3" + struct.pack("=Q", len(a)) + b"".join(map(argument, a))
    if not isinstance(a, Tensor):
        return b"\1" + struct.pack("=d", float(a))
    span = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) if a.numel() else 0
    data = a.as_strided((span,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()
    sizes, strides = ([*x, *[1] * (4 - a.ndim)] for x in (a.shape, a.stride()))
    head = struct.pack("=BBqqqqqqqqQ", DTYPES.index(a.dtype), a.ndim, *sizes, *strides, len(data))
    return b"\2" + head + data


def call(op: str, outputs: list, inputs: list) -> bytes:
    """One call with its outputs as they are before it."""
    arguments = [*outputs, *inputs]
    return struct.pack("=I", len(op)) + op.encode() + b"".join(map(argument, arguments))


def main(path: str, where: str = "bench") -> int:
    torch.manual_seed(0)
    Path(path).write_bytes(
        b"".join(call(op, *case(*shape)) for op, case in CASES.items() for shape in shapes(op, where == "gpu"))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
