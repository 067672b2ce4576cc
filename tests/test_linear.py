"""The decoding step's linear map: right, and the same bits for a row whatever stands beside it."""

import pytest
import torch
from check import backends, check
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", backends("linear_fwd"))
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    m=st.integers(1, 40),
    bias=st.booleans(),
    x=st.sampled_from(DTYPES),
    w=st.sampled_from(DTYPES),
)
def test_linear(backend, n, k, m, bias, x, w):
    generator = torch.Generator().manual_seed(n * k + m)
    args = [torch.randn(n, k, generator=generator).to(x), torch.randn(m, k, generator=generator).to(w)]
    args += [torch.randn(m, generator=generator).to(w)] if bias else []
    check(ops.linear, reference.linear.linear, args, backend, grads=False)


@pytest.mark.parametrize("backend", backends("linear_fwd"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_know_their_batch(backend, dtype):
    x, w = torch.randn(5, 256).to(dtype), torch.randn(768, 256).to(dtype)
    with use_backend(backend):
        whole = ops.linear(x, w)
        assert all(torch.equal(ops.linear(x[i : i + 1], w)[0], whole[i]) for i in range(5))


def test_bad_arguments():
    with pytest.raises(InputError, match="does not fit"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match="no gradient"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True))
