"""bias_quick_gelu, forward and backward."""

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Case, Close, dtype_name, float64, gradients64, served_by
from igpt_fast import ops

# 16 MB; on a GPU 128 MB, a training batch of the small model.
SIZE = {"cpu": (4096, 1024), "cuda": (32768, 2048)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)


def case(op, field, x, ours, others, judge, crossings):
    return Case(
        op=op,
        shape=" × ".join(map(str, x.shape)),
        dtype=dtype_name(x.dtype),
        device=x.device.type,
        backend=served_by(field, x),
        ours=ours,
        peers=others,
        judge=judge,
        work={"GB/s": crossings * x.numel() * x.element_size()},
        seconds=3.0,
    )


@DTYPES
@torch.no_grad()
def test_forward(compare, device, quick, dtype):
    x = torch.randn(*(64, 1024) if quick else SIZE[device], device=device).to(dtype)
    others = {
        "x * torch.sigmoid(1.702 * x)": peers.call(peers.quick_gelu, x),
        "torch.compile of it": peers.call(peers.compiled(peers.quick_gelu, quick), x),
    }
    judge = Close(float64(peers.quick_gelu, x), dtype)
    compare(case("bias_quick_gelu", "bias_quick_gelu_fwd", x, lambda: ops.bias_quick_gelu(x), others, judge, 2))


@DTYPES
def test_backward(compare, device, quick, dtype):
    x = torch.randn(*(64, 1024) if quick else SIZE[device], device=device).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    sides = ops.bias_quick_gelu, peers.quick_gelu, peers.compiled(peers.quick_gelu, quick)
    ours, plain, fused = (peers.backward(peers.call(side, x), [x], dy) for side in sides)
    others = {"x * torch.sigmoid(1.702 * x)": plain, "torch.compile of it": fused}
    judge = Close(gradients64(peers.quick_gelu, [x], [dy]), dtype)
    compare(case("bias_quick_gelu, backward", "bias_quick_gelu_bwd", dy, ours, others, judge, 3))
