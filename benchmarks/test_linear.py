"""The linear map of a decoding step: few rows, so what counts is how fast the weights are read."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, served_by
from igpt_fast import ops


@pytest.mark.parametrize(
    ("rows", "fan_in", "fan_out", "dtype"),
    [
        (1, 256, 1024, torch.float32),
        (4, 256, 1024, torch.float32),
        (4, 256, 1024, torch.bfloat16),
        (4, 512, 2048, torch.float32),
        (16, 512, 2048, torch.float32),
        (16, 512, 2048, torch.bfloat16),
        (64, 2048, 512, torch.bfloat16),
    ],
    ids=dtype_name,
)
@torch.no_grad()
def test_linear(compare, device, quick, rows, fan_in, fan_out, dtype):
    x = torch.randn(rows, fan_in, device=device).to(dtype)
    weight = torch.randn(fan_out, fan_in, device=device).to(dtype) / fan_in**0.5
    compare(
        Case(
            op="linear",
            shape=f"{rows} × {fan_in} → {fan_out}",
            dtype=dtype_name(dtype),
            device=device,
            backend=served_by("linear_fwd", x, weight),
            ours=peers.call(ops.linear, x, weight),
            peers={"F.linear": peers.call(F.linear, x, weight)},
            judge=Close(float64(F.linear, x, weight), dtype),
            work={"GB/s": weight.numel() * weight.element_size(), "GFLOP/s": 2 * rows * fan_in * fan_out},
            seconds=1.0,
        )
    )
