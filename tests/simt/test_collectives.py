"""Warp and block collectives, atomics and 16-bit arithmetic of the bench against plain formulas."""

import numpy as np
import pytest
import torch

from simt import bench

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")
LANES = np.arange(64)


def segment(lane: int, width: int) -> int:
    return lane // width * width


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize(("argument", "width"), [(3, 32), (5, 8), (1, 2), (30, 32), (0, 16)])
def test_shuffles(argument, width, schedule):
    x, out = np.random.default_rng(0).integers(0, 100, 64, dtype=np.int32), np.empty((7, 64), np.int32)
    bench.run("shuffles", [x, out], [argument, width], schedule)

    def source(lane, to):  # a lane keeps its own value when the source lies outside its segment
        first = segment(lane, width)
        return to if first <= to < first + width else lane

    wanted = [
        [x[segment(i, width) + argument % width] for i in LANES],
        [x[i ^ argument if (i ^ argument) < segment(i, width) + width else i] for i in LANES],
        [x[source(i, i + argument)] for i in LANES],
        [x[source(i, i - argument)] for i in LANES],
        x[LANES ^ 1],
        [x[i ^ 3] if i % 32 < 16 else x[i + 2 if i % 16 < 14 else i] for i in LANES],
        x[LANES ^ 2],
    ]
    assert np.array_equal(out, np.array(wanted))


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize("high", [8, 7, 6, 30])
def test_votes_and_reductions(high, schedule):
    x, out = np.random.default_rng(1).integers(0, high, 64, dtype=np.int32), np.empty((11, 64), np.uint32)
    bench.run("votes", [x, out], (), schedule)
    wanted = []
    for w in np.split(x, 2):
        bits = lambda mask: np.uint32(sum(1 << i for i in np.flatnonzero(mask)))  # noqa: E731
        same = len(set(w // 8)) == 1
        wanted.append(
            [
                [bits(w > 3)] * 32,
                [int((w == 5).any()) + 2 * int((w < 8).all())] * 32,
                [bits(w == v) for v in w],
                [0xFFFFFFFE if same else 0] * 32,
                [np.uint32((w - 4).sum() & 0xFFFFFFFF)] * 32,
                [np.uint32(int((w - 4).min()) & 0xFFFFFFFF)] * 32,
                [w.max()] * 32,
                [np.bitwise_or.reduce(1 << w) ^ np.bitwise_and.reduce(w | 32)] * 32,
                [np.bitwise_xor.reduce(w)] * 32,
                [(x > 3).sum()] * 32,
                [int((x == 5).any()) + 2 * int((x < 8).all())] * 32,
            ]
        )
    assert np.array_equal(out, np.concatenate([np.array(w, np.uint32) for w in wanted], axis=1))


@pytest.mark.parametrize("schedule", [*bench.SCHEDULES, (2, 5, 0, 2)])
def test_atomics(schedule):
    blocks = 5
    ids = np.arange(blocks * 64)
    ints, floats, longs = np.zeros(8, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint64)
    bench.run("atomics", [ints, floats, longs], [blocks], schedule)
    assert ints[:5].tolist() == [blocks * 2016, ids[-1], -ids[-1], 2**31 - 1, 2 * len(ids)]
    assert ints[5] - 1 in ids and ints[6] == 1 and ints[7] == 77
    assert floats[0] == len(ids) / 2 and longs[0] == len(ids) << 33


def rounded(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Float64 numbers rounded once to `dtype`, as float32. bfloat16: of its normal numbers only."""
    if dtype is torch.float16:
        return torch.from_numpy(x.astype(np.float16).astype(np.float32))
    mantissa, exponent = np.frexp(x)
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_floats_round_as_torch_rounds(dtype):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 1 << 16, (2, 20000), generator=generator, dtype=torch.int32).to(torch.int16)
    a, b = patterns.view(dtype).float()
    raw = torch.randn(20000, generator=generator) * torch.randn(20000, generator=generator).exp()
    a[:10000], b[:5000] = raw[:10000], raw[10000:15000]  # floats that the conversion has to round, ties among them
    a[0], a[1], b[2], a[3] = float("inf"), float("nan"), -float("inf"), 1 + 2.0**-9
    out = np.empty((6, 20000), np.float32)
    bench.run("arithmetic", [a.numpy(), b.numpy(), out], [20000, int(dtype is torch.bfloat16)])
    x, y = a.to(dtype), b.to(dtype)
    for i, want in enumerate([x, x * y, x + y, None, torch.fmax(x, y), x + y]):
        if want is not None:
            got = torch.from_numpy(out[i])
            assert torch.equal(got.nan_to_num(1.5), want.float().nan_to_num(1.5)), i
            assert torch.equal(got.isnan(), want.isnan()), i
    # Of the fused product the moderate numbers, whose exact value a double holds.
    exact = (x.double() * y.double() + x.double())[4:5000].numpy()
    assert torch.equal(torch.from_numpy(out[3][4:5000]), rounded(exact, dtype))
    apart = (x * y + x)[4:5000].float()
    assert not torch.equal(apart, rounded(exact, dtype)), "rounding twice would have passed"
