"""dropout: its mask to the bit, forward and backward, whatever the tensor's layout; its share."""

import pytest
import torch
from check import served

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend
from igpt_fast.reference.dropout import RUN, factor


@pytest.mark.parametrize("backend, dtype", served("dropout", torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 33), (0, 4), (RUN - 1,), (3, RUN // 2 + 5)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.75, 0.0])
def test_equals_the_reference_to_the_bit(backend, dtype, shape, p):
    x = torch.randn(shape).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    with use_backend(backend, poison=True):
        y = ops.dropout(x, p, 99)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype is dtype and torch.equal(y, reference.dropout.dropout(x, p, 99))
    assert torch.equal(dx, reference.dropout.dropout(dy, p, 99))


@pytest.mark.parametrize("backend, dtype", served("dropout", torch.float32))
def test_places_count_not_strides(backend, dtype):
    x = torch.randn(40, 30, dtype=dtype).t().requires_grad_()
    with use_backend(backend):
        y = ops.dropout(x, 0.3, 5)
        (dx,) = torch.autograd.grad(y, x, torch.ones(40, 30).t())
    assert torch.equal(y, ops.dropout(x.detach().contiguous(), 0.3, 5))
    assert torch.equal(dx != 0, y != 0)


def test_it_draws_its_share_and_seeds_are_independent():
    n, p = 1 << 20, 0.1
    masks = [ops.dropout(torch.ones(n), p, seed) for seed in (0, 1, (1 << 63) - 1)]
    spread = (p * (1 - p) / n) ** 0.5
    for m in masks:
        assert abs((m != 0).double().mean() - (1 - p)) < 5 * spread
        assert m.max() == torch.tensor(factor(p), dtype=torch.float32)
    centred = [((m != 0).double() - (1 - p)) / (p * (1 - p)) ** 0.5 for m in masks]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((centred[a] * centred[b]).mean()) < 5 / n**0.5
    c = centred[0]
    for apart in (1, 2, 16, RUN):  # neighbours, lanes, runs
        assert abs((c[apart:] * c[:-apart]).mean()) < 5 / n**0.5


@pytest.mark.parametrize("p, seed", [(1.0, 0), (-0.1, 0), (0.1, -1), (0.1, 1 << 63), (float("nan"), 0)])
def test_bad_arguments(p, seed):
    with pytest.raises(InputError, match=r"dropout: p is .*, seed"):
        ops.dropout(torch.ones(3), p, seed)
