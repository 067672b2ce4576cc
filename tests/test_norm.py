"""rms_norm on every backend against its reference."""

import pytest
import torch
from check import CUDA_KERNELS, backends, check, served
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("backend", "dtype"), served("rms_norm_fwd", F32, BF16, F16))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 17), (4, 512), (300, 64), (7, 1025)])
def test_rms_norm(backend, dtype, shape):
    check(ops.rms_norm, reference.norm.rms_norm, [torch.randn(shape), torch.randn(shape[-1])], backend, dtype)


# Three columns at least: in narrower rows dx is a small difference of large terms, and torch's own error is luck.
@pytest.mark.parametrize("backend", backends("rms_norm_bwd"))
@given(
    rows=st.integers(1, 300),
    cols=st.integers(3, 80),
    stream=st.sampled_from([F32, BF16]),
    x=st.sampled_from([F32, BF16]),
)
def test_fused_residual_of_mixed_dtypes(backend, rows, cols, stream, x):
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    args = [draw(rows, cols).to(x), draw(cols), draw(rows, cols).to(stream)]

    def run(norm):
        return lambda a, w, r: norm(a, w, 1e-5, residual=r)

    check(run(ops.rms_norm), run(reference.norm.rms_norm), args, backend)


@pytest.mark.parametrize(("backend", "dtype"), served("rms_norm_bwd", F32, BF16, F16))
@pytest.mark.parametrize(("rows", "cols", "stream"), [(40, 1536, None), (70, 1032, F32), (3, 4096, F32)])
def test_rows_of_several_warps(backend, dtype, rows, cols, stream):
    """Columns in eights, as a model has them; the stream of the branch's dtype and, as under autocast, float32."""
    args = [torch.randn(rows, cols).to(dtype), torch.randn(cols), torch.randn(rows, cols).to(stream or dtype)]

    def run(norm):
        return lambda a, w, r: norm(a, w, 1e-5, residual=r)

    check(run(ops.rms_norm), run(reference.norm.rms_norm), args, backend)


def test_shared_gradient_is_not_aliased():
    x, r = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    y, s = ops.rms_norm(x, torch.ones(32), residual=r)
    (y.sum() + s.sum()).backward()
    before = r.grad.clone()
    x.grad.zero_()
    assert torch.equal(r.grad, before)


def test_only_the_sum_is_used():
    x, r = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    ops.rms_norm(x, torch.ones(32), residual=r)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 32)) and torch.equal(r.grad, torch.ones(4, 32))


@pytest.mark.parametrize("backend", [b for b in backends("rms_norm_bwd") if b in CUDA_KERNELS])
def test_rows_longer_than_the_kernels_take_are_left_to_plain_torch(backend):
    x, device = torch.randn(2, 4097), "cuda" if backend == "cuda" else "cpu"
    with use_backend(backend):
        with pytest.raises(RuntimeError, match="rms_norm_fwd: rows of 12289 columns are longer than 12288"):
            ops.rms_norm(torch.ones(1, 12289, device=device), torch.ones(12289, device=device))
        y = ops.rms_norm(x.to(device).requires_grad_(), torch.ones(4097, device=device))
        with pytest.raises(RuntimeError, match="rms_norm_bwd: rows of 4097 columns are longer than 4096"):
            y.sum().backward()
    assert torch.allclose(y.cpu(), reference.norm.rms_norm(x, torch.ones(4097)), atol=1e-5)


def test_zero_rows():
    assert ops.rms_norm(torch.zeros(0, 16), torch.ones(16)).shape == (0, 16)


@pytest.mark.parametrize("weight, residual", [(torch.ones(3), None), (torch.ones(4), torch.ones(2, 3))])
def test_bad_shapes(weight, residual):
    with pytest.raises(InputError):
        ops.rms_norm(torch.ones(2, 4), weight, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_no_kernel_writes_runs_on_plain_torch(dtype):
    x, w = torch.randn(3, 8, requires_grad=True), torch.rand(8)
    y = ops.rms_norm(x, w, dtype=dtype)
    assert y.dtype is dtype and torch.allclose(y.float(), reference.norm.rms_norm(x, w), atol=1e-3)
    y.sum().backward()
    assert x.grad.isfinite().all()
