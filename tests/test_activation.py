"""bias_quick_gelu on every backend against its reference."""

import pytest
import torch
from check import backends, check
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_bwd"))
@given(
    rows=st.integers(1, 100),
    cols=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_bias_quick_gelu(backend, rows, cols, bias, dtype, spread):
    generator = torch.Generator().manual_seed(rows + cols)
    args = [torch.randn(rows, cols, generator=generator) * spread]
    args += [torch.randn(cols, generator=generator)] if bias else []
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, args, backend, dtype)


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_fwd"))
def test_far_ends(backend):
    x = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, [x], backend, grads=False)


def test_float32_bias_under_bfloat16_activations():
    x, bias = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True), torch.randn(32, requires_grad=True)
    ops.bias_quick_gelu(x, bias).sum().backward()
    assert x.grad.dtype is torch.bfloat16 and bias.grad.dtype is torch.float32


def test_bad_bias():
    with pytest.raises(InputError, match="bias"):
        ops.bias_quick_gelu(torch.ones(2, 4), torch.ones(3))
