"""cross_entropy on every backend against its reference."""

import math

import pytest
import torch
from check import backends, check
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference


@pytest.mark.parametrize("backend", backends("cross_entropy_bwd"))
@given(
    rows=st.integers(1, 90),
    colors=st.integers(1, 530),
    reduction=st.sampled_from(["mean", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([1.0, 50.0]),
)
def test_cross_entropy(backend, rows, colors, reduction, dtype, spread):
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
def test_target_out_of_range(target):
    with pytest.raises(InputError, match=r"outside 0\.\.4"):
        ops.cross_entropy(torch.zeros(2, 5), torch.tensor([0, target]))


def test_bad_arguments():
    with pytest.raises(InputError):
        ops.cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="reduction"):
        ops.cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), "sum")
