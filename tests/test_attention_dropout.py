"""attention_dropout: against its reference, weight for weight, and the reference against torch's own words."""

import pytest
import torch
import torch.nn.functional as F
from check import CUDA_KERNELS, check, served

from igpt_fast import InputError, reference
from igpt_fast.ops import attention_dropout
from igpt_fast.reference.attention_dropout import kept

OP = "attention_dropout_fwd"


# Batch, tokens, heads, head dim. The CUDA kernels have four head dims and 16 bits; a tile is 64, their block 128.
SHAPES = [(1, 1, 1, 8), (2, 63, 2, 16), (1, 64, 3, 64), (2, 65, 1, 96), (1, 197, 2, 128), (1, 130, 2, 40)]
WHOLE = [(1, 1, 1, 32), (2, 63, 2, 64), (1, 129, 2, 32), (1, 197, 2, 96), (1, 130, 1, 128), (2, 260, 1, 64)]
CASES = [
    (backend, dtype, shape)
    for backend, dtype in served(OP, torch.float32, torch.bfloat16, torch.float16)
    for shape in (WHOLE if backend in CUDA_KERNELS else SHAPES)
    if not (backend in CUDA_KERNELS and dtype is torch.float32)
]


@pytest.mark.parametrize("backend, dtype, shape", CASES)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_agrees_with_the_reference(backend, dtype, shape, p):
    B, T, H, D = shape
    qkv = torch.randn(B, T, 3, H, D)

    def slow(x):
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return reference.attention_dropout.attention_dropout(q, k, v, 0.3, p, 77)[0].transpose(1, 2)

    check(lambda x: attention_dropout(x, p, 77, 0.3), slow, [qkv], backend, dtype)


def test_without_dropout_it_is_attention():
    qkv = torch.randn(2, 50, 3, 2, 16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert torch.allclose(attention_dropout(qkv, 0.0, 3), want, atol=1e-5)


def test_the_mask_is_one_of_independent_draws():
    mask, p = kept(16, 256, 0.1, 5).double(), 0.1
    n, spread = mask.numel(), (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * spread / n**0.5
    centred = (mask - (1 - p)) / spread
    other = (kept(16, 256, 0.1, 6).double() - (1 - p)) / spread
    pairs = {
        "keys": centred[..., 1:] * centred[..., :-1],
        "queries": centred[:, 1:] * centred[:, :-1],
        "heads": centred[1:] * centred[:-1],
        "diagonals": centred[:, 1:, 1:] * centred[:, :-1, :-1],
        "seeds": centred * other,
    }
    for name, product in pairs.items():
        assert abs(product.mean()) < 5 / product.numel() ** 0.5, name
    for counts in (mask.sum((0, 1)), mask.sum((0, 2)), mask.sum((1, 2))):  # a key's, a query's, a head's
        per = n / counts.numel()
        deviation = (counts - per * (1 - p)) / (per**0.5 * spread)
        assert deviation.abs().max() < 5 and 0.6 < deviation.var() < 1.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_threads_share_out_has_the_same_gradient(dtype):
    qkv = torch.randn(1, 300, 3, 1, 32).to(dtype).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            out = attention_dropout(qkv, 0.1, 3)
            found.append(torch.autograd.grad(out.float().square().sum(), qkv)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("p, seed, shape, message", [
    (1.0, 0, (1, 4, 3, 1, 8), "p is 1.0"), (-0.1, 0, (1, 4, 3, 1, 8), "p is -0.1"),
    (0.1, -1, (1, 4, 3, 1, 8), "seed -1"), (0.1, 1 << 63, (1, 4, 3, 1, 8), "2\\*\\*63"),
    (0.1, 0, (1, 4, 2, 1, 8), "expected qkv"),
])  # fmt: skip
def test_bad_input_is_refused(p, seed, shape, message):
    with pytest.raises(InputError, match=message):
        attention_dropout(torch.zeros(shape), p, seed)
