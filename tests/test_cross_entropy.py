"""cross_entropy on every backend against its reference."""

import math

import pytest
import torch
from check import CUDA_KERNELS, backends, check, served
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import BACKENDS, use_backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("backend", "dtype"), served("cross_entropy_bwd", F32, BF16, F16))
@given(
    rows=st.integers(1, 90),
    colors=st.integers(1, 530) | st.sampled_from([512, 1024, 1100]),
    reduction=st.sampled_from(["mean", "none"]),
    spread=st.sampled_from([1.0, 50.0]),
)
def test_cross_entropy(backend, dtype, rows, colors, reduction, spread):
    generator = torch.Generator().manual_seed(rows * 1000 + colors)
    logits = torch.randn(rows, colors, generator=generator) * spread
    targets = torch.randint(colors, (rows,), generator=generator)

    def run(op):
        return lambda x, t: op(x, t, reduction)

    check(run(ops.cross_entropy), run(reference.cross_entropy.cross_entropy), [logits, targets], backend, dtype)


def test_equal_logits_cost_the_logarithm_of_their_number():
    loss = ops.cross_entropy(torch.zeros(2, 3, 512), torch.randint(512, (2, 3)))
    assert abs(loss.item() - math.log(512)) < 1e-6


@pytest.mark.parametrize("target", [-1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by a kernel and by plain torch
def test_target_out_of_range(target, dtype):
    with pytest.raises(InputError, match=r"outside 0\.\.4"):
        ops.cross_entropy(torch.zeros(2, 5, dtype=dtype), torch.tensor([0, target]))


@pytest.mark.parametrize("backend", [b for b in backends("cross_entropy_bwd") if b in CUDA_KERNELS])
def test_where_no_host_reads_the_targets_a_bad_one_gives_nan(backend):
    logits, targets = torch.randn(6, 70, requires_grad=True), torch.tensor([0, -1, 69, 70, 1 << 40, -(1 << 33)])
    with use_backend(backend, poison=True):
        loss = ops.cross_entropy(logits, targets, "none")
        [grad] = torch.autograd.grad(loss.sum(), logits)
    bad = torch.tensor([False, True, False, True, True, True])
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan(), bad[:, None].expand(6, 70))


@pytest.mark.parametrize("backend", backends("cross_entropy_bwd"))
@pytest.mark.parametrize("colors", [9, 512, 1300])
def test_colours_that_cannot_be(backend, colors):
    """Logits of -inf cost nothing and receive nothing, wherever they stand, be it a whole piece of a row."""
    logits = torch.randn(4, colors)
    logits[0, 1:], logits[1, : colors - 1], logits[2, ::2] = -math.inf, -math.inf, -math.inf
    targets = torch.tensor([0, colors - 1, 1, 5])
    check(ops.cross_entropy, reference.cross_entropy.cross_entropy, [logits, targets], backend, grads=False)
    logits.requires_grad_()
    with use_backend(backend, poison=True):
        [grad] = torch.autograd.grad(ops.cross_entropy(logits, targets), logits)
    assert not grad.isnan().any() and not grad[logits == -math.inf].any()
    assert grad.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize(("backend", "dtype"), served("cross_entropy_bwd", F32, BF16, F16))
@pytest.mark.parametrize("colors", [31, 512, 1300])
def test_the_gradient_may_overwrite_the_logits(backend, dtype, colors):
    if backend == "reference":
        return
    native = BACKENDS[backend]
    logits, targets, dloss = torch.randn(5, colors).to(dtype), torch.randint(colors, (5,)), torch.randn(5)
    lse, apart = torch.logsumexp(logits.float(), -1), torch.empty(5, colors, dtype=dtype)
    native.cross_entropy_bwd(apart, dloss, logits, targets, lse, 0)
    native.cross_entropy_bwd(logits, dloss, logits, targets, lse, 0)
    assert torch.equal(logits, apart) and apart.any()


def test_bad_arguments():
    with pytest.raises(InputError):
        ops.cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError):
        ops.cross_entropy(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    with pytest.raises(InputError, match="reduction"):
        ops.cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), "sum")
