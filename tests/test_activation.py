"""bias_quick_gelu on every backend against its reference."""

import pytest
import torch
from check import backends, check, served
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("backend", "dtype"), served("bias_quick_gelu_bwd", F32, BF16, F16))
@given(
    rows=st.integers(1, 100),
    cols=st.integers(1, 70),
    bias=st.booleans(),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_bias_quick_gelu(backend, dtype, rows, cols, bias, spread):
    generator = torch.Generator().manual_seed(rows + cols)
    args = [torch.randn(rows, cols, generator=generator) * spread]
    args += [torch.randn(cols, generator=generator)] if bias else []
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, args, backend, dtype, terms=rows)


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_fwd"))
def test_far_ends(backend):
    x = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, [x], backend, grads=False)


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_bwd"))
def test_float32_bias_under_bfloat16_activations(backend):
    x, bias = torch.randn(200, 32).to(BF16), torch.randn(32)
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, [x, bias], backend)


@pytest.mark.parametrize(("backend", "dtype"), served("bias_quick_gelu_bwd", F32, BF16, F16))
def test_rows_of_several_blocks(backend, dtype):
    args = [torch.randn(75, 2056), torch.randn(2056)]
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, args, backend, dtype)


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_bwd"))
def test_slices_that_no_vector_fits(backend):
    """Rows of 16 that begin 4 bytes after an aligned address; and no rows at all, whose dbias is zero."""
    x = torch.randn(3 * 16 + 1)[1:].view(3, 16)
    check(ops.bias_quick_gelu, reference.activation.bias_quick_gelu, [x, torch.randn(16)], backend)
    bias = torch.ones(16, requires_grad=True)
    with use_backend(backend, poison=True):
        ops.bias_quick_gelu(x[:0], bias).backward(torch.ones(0, 16))
    assert torch.equal(bias.grad, torch.zeros(16))


def test_bad_bias():
    with pytest.raises(InputError, match="bias"):
        ops.bias_quick_gelu(torch.ones(2, 4), torch.ones(3))
