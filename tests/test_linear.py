"""The decoding step's linear map: right, and the same bits for a row whatever stands beside it."""

from functools import partial
from itertools import product

import pytest
import torch
from check import CUDA_KERNELS, backends, check, served
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

DTYPES = [torch.float32, torch.bfloat16]
MORE = st.tuples(*[st.booleans()] * 4)  # bias, norm, residual, gelu
# The GPU's kernels are of 16 bits, one dtype, and columns in eights.
CASES = [c for c in served("linear_fwd", *DTYPES, torch.float16) if c[0] not in CUDA_KERNELS or c[1] is not DTYPES[0]]
EIGHTS = [c for c in CASES if c[0] in CUDA_KERNELS or c == ("amx", torch.bfloat16)]  # AMX: a way of its own


@pytest.mark.parametrize("backend", [b for b in backends("linear_fwd") if b not in CUDA_KERNELS])
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    m=st.integers(1, 40),
    more=MORE,
    x=st.sampled_from(DTYPES),
    w=st.sampled_from(DTYPES),
)
def test_linear(backend, n, k, m, more, x, w):
    check(ops.linear, reference.linear.linear, drawn(n, k, m, more, x, w), backend, grads=False)


@pytest.mark.parametrize(("backend", "dtype"), EIGHTS)
@given(n=st.integers(1, 70), eights=st.integers(1, 70), m=st.integers(1, 40), more=MORE)
def test_linear_in_eights(backend, dtype, n, eights, m, more):
    check(ops.linear, reference.linear.linear, drawn(n, 8 * eights, m, more, dtype, dtype), backend, grads=False)


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] not in CUDA_KERNELS])
@given(n=st.sampled_from([31, 32, 65, 100]), k=st.integers(500, 3000), more=MORE)
def test_long_rows(backend, dtype, n, k, more):
    """Of many rows the CPU copies the weights in blocks of columns."""
    check(ops.linear, reference.linear.linear, drawn(n, k, 20, more, dtype, dtype), backend, grads=False)


def drawn(n, k, m, more, x, w):
    """Arguments of linear, of dtypes x and w; more: bias, norm, residual, gelu."""
    generator = torch.Generator().manual_seed(n * k + m)
    bias, norm, residual, gelu = more
    shapes = [((m, k), w, True), ((m,), w, bias), ((k,), w, norm), ((n, m), x, residual)]
    rest = [torch.randn(shape, generator=generator).to(dtype) if there else None for shape, dtype, there in shapes]
    return [torch.randn(n, k, generator=generator).to(x), *rest, 1e-5, gelu]


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[0] != "reference"])
def test_rows_do_not_know_their_batch(backend, dtype):
    """Alone, in a block with others, and in blocks of other shapes; also by a norm."""
    on_gpu = backend in CUDA_KERNELS
    shapes = [(40, 256)] if on_gpu else [(760, 256), (40, 2600), (40, 2601)]  # the CPU copies long rows in blocks
    with use_backend(backend):
        for (m, k), normed in product(shapes, (False, True)):
            x, w = torch.randn(70, k).to(dtype), torch.randn(m, k).to(dtype)
            linear = partial(ops.linear, weight=w, norm=torch.rand(k).to(dtype) if normed else None)
            whole = linear(x)
            assert all(torch.equal(linear(x[i : i + 1])[0], whole[i]) for i in range(5))
            assert all(torch.equal(linear(x[-count:]), whole[-count:]) for count in (5, 16, 17, 33, 65))


def test_bad_arguments():
    with pytest.raises(InputError, match="does not fit"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 5))
    for name in ("bias", "norm", "residual"):
        with pytest.raises(InputError, match=f"{name} .* is not"):
            ops.linear(torch.ones(2, 3), torch.ones(4, 3), **{name: torch.ones(5)})
    with pytest.raises(InputError, match="no gradient"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True))
