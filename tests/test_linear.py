"""The decoding step's linear map: right, and the same bits for a row whatever stands beside it."""

import pytest
import torch
from check import CUDA_KERNELS, backends, check, served
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

DTYPES = [torch.float32, torch.bfloat16]
# The GPU's kernels are of 16 bits, one dtype, and columns in eights.
CASES = [c for c in served("linear_fwd", *DTYPES, torch.float16) if c[0] not in CUDA_KERNELS or c[1] is not DTYPES[0]]


@pytest.mark.parametrize("backend", [b for b in backends("linear_fwd") if b not in CUDA_KERNELS])
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    m=st.integers(1, 40),
    bias=st.booleans(),
    x=st.sampled_from(DTYPES),
    w=st.sampled_from(DTYPES),
)
def test_linear(backend, n, k, m, bias, x, w):
    check(ops.linear, reference.linear.linear, drawn(n, k, m, bias, x, w), backend, grads=False)


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] in CUDA_KERNELS])
@given(n=st.integers(1, 70), eights=st.integers(1, 70), m=st.integers(1, 40), bias=st.booleans())
def test_linear_in_eights(backend, dtype, n, eights, m, bias):
    check(ops.linear, reference.linear.linear, drawn(n, 8 * eights, m, bias, dtype, dtype), backend, grads=False)


def drawn(n, k, m, bias, x, w):
    generator = torch.Generator().manual_seed(n * k + m)
    args = [torch.randn(n, k, generator=generator).to(x), torch.randn(m, k, generator=generator).to(w)]
    return args + ([torch.randn(m, generator=generator).to(w)] if bias else [])


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] != "reference"])
def test_rows_do_not_know_their_batch(backend, dtype):
    """Alone, in a block with others, and in blocks of other shapes."""
    few = backend in CUDA_KERNELS
    x, w = torch.randn(70 if few else 5, 256).to(dtype), torch.randn(40 if few else 768, 256).to(dtype)
    with use_backend(backend):
        whole = ops.linear(x, w)
        assert all(torch.equal(ops.linear(x[i : i + 1], w)[0], whole[i]) for i in range(5))
        assert all(torch.equal(ops.linear(x[-count:], w), whole[-count:]) for count in (5, 16, 17, 33, 65) if few)


def test_bad_arguments():
    with pytest.raises(InputError, match="does not fit"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match="no gradient"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True))
