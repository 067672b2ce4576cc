"""The tile tables of every pattern against the predicate, by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpt_fast import BlockMask, InputError
from igpt_fast.patterns import PATTERNS, compiled, unpack


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 13), (20, 9), (16, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_tables_hold_the_predicate(name, size, causal):
    mask = compiled(name, size, causal)
    n, width = size[0] * size[1], size[1]
    expected = torch.zeros(n, n, dtype=torch.bool)
    tests = {
        "row": lambda r, c: r == 0,
        "column": lambda r, c: c == 0,
        "neighborhood": lambda r, c: abs(r) <= 3 and abs(c) <= 3,
    }
    for q in range(n):
        for slot in range(n):
            k = slot - 1 if causal else slot
            if causal and slot == 0:
                expected[q, slot] = True  # sos
            elif not causal or slot <= q:
                near = (
                    abs(q - k) <= 128
                    if name == "local"
                    else tests[name](q // width - k // width, q % width - k % width)
                )
                expected[q, slot] = near
    assert torch.equal(mask.dense(), expected)
    assert torch.equal(unpack(list(mask.tensors), n), expected)


@given(tokens=st.integers(1, 200), density=st.floats(0, 1))
def test_both_directions_hold_any_matrix(tokens, density):
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(tokens)) <= density
    t = BlockMask.from_dense(seen).tensors
    assert torch.equal(unpack(list(t), tokens), seen)
    assert torch.equal(unpack([*t[3:6], *t[:3], t[7], t[6]], tokens), seen.T)


def test_full_tiles_carry_no_bits():
    mask = BlockMask.from_dense(torch.ones(100, 100, dtype=torch.bool))
    assert mask.tensors[6].numel() == 0 and mask.density() == 1.0


def test_refusals():
    with pytest.raises(InputError, match="no pattern named"):
        compiled("diagonal", (4, 4))
    with pytest.raises(InputError, match="later slot"):
        BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool), causal=True)
    with pytest.raises(InputError, match="square"):
        BlockMask.from_dense(torch.ones(3, 4, dtype=torch.bool))
