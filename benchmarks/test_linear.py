"""The linear map of a decoding step: few rows, so what counts is how fast the weights are read."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, served_by
from igpt_fast import ops


def case(op, x, weight, ours, others, judge):
    (rows, fan_in), fan_out = x.shape, len(weight)
    return Case(
        op=op,
        shape=f"{rows} × {fan_in} → {fan_out}",
        dtype=dtype_name(x.dtype),
        device=x.device.type,
        backend=served_by("linear_fwd", x, weight),
        ours=ours,
        peers=others,
        judge=judge,
        work={"GB/s": weight.numel() * weight.element_size(), "GFLOP/s": 2 * rows * fan_in * fan_out},
        seconds=1.0,
    )


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
    others = {"F.linear": peers.call(F.linear, x, weight)}
    judge = Close(float64(F.linear, x, weight), dtype)
    compare(case("linear", x, weight, peers.call(ops.linear, x, weight), others, judge))


def norm_fc_gelu(x, weight, bias, norm):
    return peers.quick_gelu(F.linear(F.rms_norm(x, norm.shape, norm, 1e-5), weight, bias))


@pytest.mark.parametrize("rows", [1, 16])
@torch.no_grad()
def test_with_what_stands_around_it(compare, device, quick, rows):
    """A step's norm, linear and GELU: one kernel on a GPU."""
    dtype, (x, weight, bias, norm) = torch.bfloat16, (torch.randn(n) for n in ((rows, 512), (2048, 512), 2048, 512))
    given = [t.to(device).to(dtype) for t in (x, weight / 512**0.5, bias, norm)]
    others = {
        "F.rms_norm, F.linear, x * torch.sigmoid(1.702 * x)": peers.call(norm_fc_gelu, *given),
        "torch.compile of them": peers.call(peers.compiled(norm_fc_gelu, quick), *given),
    }
    judge = Close(float64(norm_fc_gelu, *given), dtype)
    compare(case("norm, linear, GELU", *given[:2], lambda: ops.linear(*given, gelu=True), others, judge))
