"""The wrappers of ptx.cuh on the bench, each against a formula written out here."""

import numpy as np
import pytest
import torch

from simt import bench

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")
LANE = np.arange(32)
GROUP, PAIR = LANE // 4, LANE % 4 * 2  # the row and the first column that a lane holds of an 8 x 8 matrix


def words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def sixteen(x: np.ndarray, bf16: int) -> np.ndarray:
    """Float32 numbers that 16 bits hold exactly, as those bits."""
    t = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16 if bf16 else torch.float16)
    return t.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans, schedule):
    matrices = np.random.default_rng(0).integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    out = np.empty((32, count), np.uint32)
    bench.run("ldmatrix", [matrices, out], [count, trans], schedule)
    for i, m in enumerate(matrices):
        m = m.T if trans else m
        assert np.array_equal(out[:, i], words(m[GROUP, PAIR], m[GROUP, PAIR + 1]))


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize("bf16", [0, 1])
def test_mma(bf16, schedule):
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 9, shape).astype(np.float32) for shape in [(16, 16), (16, 8), (16, 8)])
    ha, hb = sixteen(a, bf16), sixteen(b, bf16)
    rows, columns = [0, 8, 0, 8], [0, 0, 8, 8]
    fa = np.stack(
        [words(ha[GROUP + r, PAIR + k], ha[GROUP + r, PAIR + k + 1]) for r, k in zip(rows, columns, strict=True)], 1
    )
    fb = np.stack([words(hb[PAIR + k, GROUP], hb[PAIR + k + 1, GROUP]) for k in (0, 8)], 1)
    at = [(GROUP + i // 2 * 8, PAIR + i % 2) for i in range(4)]
    d = np.stack([c[where] for where in at], 1)
    bench.run("mma", [np.ascontiguousarray(fa), np.ascontiguousarray(fb), d], [bf16], schedule)
    assert np.array_equal(d, np.stack([(c + a @ b)[where] for where in at], 1))


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size, schedule):
    random = np.random.default_rng(size)
    source = random.integers(1, 256, (2, 32, size), dtype=np.uint8)
    given = random.integers(0, size + 1, 32, dtype=np.int32)
    given[:2] = 0, size
    out = np.empty_like(source)
    bench.run("cp_async", [source, given, out], [size], schedule)
    assert np.array_equal(out, np.where(np.arange(size) < given[None, :, None], source, 0))


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
def test_named_barriers(schedule):
    x, out = np.arange(9 * 64, dtype=np.int32).reshape(9, 2, 32), np.empty((9, 2, 32), np.int32)
    bench.run("named_barriers", [x, out], [9], schedule)
    assert np.array_equal(out, x[:, :, ::-1])


def test_scalars():
    x = np.random.default_rng(0).standard_normal(200).astype(np.float32) * 20
    powers, bf16, f16 = np.empty(200, np.float32), np.empty(100, np.uint32), np.empty(100, np.uint32)
    bench.run("scalars", [x, powers, bf16, f16], [200])
    assert np.allclose(powers, np.exp2(x.astype(np.float64)), rtol=2**-21, atol=0)
    for got, kind in ((bf16, 1), (f16, 0)):
        assert np.array_equal(got, words(sixteen(x[::2], kind), sixteen(x[1::2], kind)))
