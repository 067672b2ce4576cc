"""The bench's self-test: kernels with one planted mistake each must be caught, or the bench has gone blind.

A fault is caught when some schedule ends in an error that says what is wrong, or in a result that is wrong.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from simt import bench
from simt.test_layouts import sixteen

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")
WRONG = "wrong result"
EVERY = [*bench.SCHEDULES, *((2, seed, seed % 2) for seed in range(20, 32))]


def tile(fault: int, schedule) -> bool:
    x = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    out = np.full_like(x, np.nan)
    bench.run("tile", [x, out], [640, fault], schedule)
    rows = x.reshape(-1, 64)
    wanted = rows[:, ::-1] + rows[:, 32:].sum(1, keepdims=True)
    return np.allclose(out.reshape(-1, 64), wanted, atol=1e-4)


def lanes(fault: int, schedule) -> bool:
    x = np.arange(128, dtype=np.float32)
    out = np.empty_like(x)
    bench.run("lanes", [x, out], [128, fault], schedule)
    return np.array_equal(out, x.reshape(-1, 32)[:, ::-1].ravel())


def stages(fault: int, schedule) -> bool:
    x = np.arange(1, 2001, dtype=np.float32)
    out = np.empty_like(x)
    bench.run("stages", [x, out], [2000, fault], schedule)
    return np.array_equal(out, np.pad(x, (0, 48)).reshape(-1, 512)[:, ::-1].ravel()[:2000])


def fragments(fault: int, schedule) -> bool:
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, shape).astype(np.float32) for shape in [(16, 16), (8, 16)])
    d = np.empty((16, 8), np.float32)
    bench.run("fragments", [sixteen(a, 1), sixteen(b, 1), d], [fault], schedule)
    return np.array_equal(d, a @ b.T)


def pairs(fault: int, schedule) -> bool:
    x = np.arange(128, dtype=np.float32)
    out = np.empty_like(x)
    bench.run("pairs", [x, out], [fault], schedule)
    return np.array_equal(out, x.reshape(2, 64)[:, ::-1].ravel())


def product(fault: int, schedule) -> bool:
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, (64, 328)).astype(np.float32) for _ in range(2))
    c = np.full((64, 64), np.nan, np.float32)
    bench.run("product", [sixteen(a, 1), sixteen(b, 1), c], [328, fault], schedule)
    return np.array_equal(c, a @ b.T)


def ring(fault: int, schedule) -> bool:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    out = np.empty_like(x)
    bench.run("ring", [x, out], [4, 4, fault], schedule)
    return np.array_equal(out, (x + np.arange(4, dtype=np.float32)[:, None])[np.arange(4) - 1, ::-1])


# kernel, fault, what it is, what a schedule must end in: words of the report, or WRONG
FAULTS = [
    (tile, 1, "no __syncthreads between writing and reading", WRONG),
    (tile, 2, "no __syncthreads before the memory is written again: a race between warps", WRONG),
    (tile, 3, "reads one element past the input", "wild access: byte 2560 of a buffer of 2560 bytes"),
    (tile, 4, "writes one element past dynamic shared memory", "dynamic shared memory"),
    (tile, 5, "uninitialised shared memory", WRONG),
    (tile, 6, "one warp leaves out a __syncthreads", "divergent barrier"),
    (tile, 7, "half a warp at a shuffle of the whole", "deadlock"),
    (tile, 8, "writes past a static array", "past the end of sum"),
    (tile, 9, "no __syncthreads before another warp's sum is read", WRONG),
    (lanes, 1, "no __syncwarp", WRONG),
    (lanes, 2, "a vector read at an odd address", "misaligned access"),
    (lanes, 3, "an index past a local array", "past the end of an array"),
    (stages, 1, "cp.async wait leaves the group in flight that is read", WRONG),
    (stages, 2, "no __syncthreads after the wait: other threads' copies", WRONG),
    (stages, 3, "forgets to commit", "cp.async in flight"),
    (stages, 4, "stage overwritten while others read it", WRONG),
    (stages, 5, "no bound on the last stage", "wild access"),
    (stages, 6, "a copy is in flight when the thread exits", "cp.async in flight"),
    (fragments, 1, "reads with another swizzle than it wrote", WRONG),
    (pairs, 1, "warps at barriers of their own", "deadlock"),
    (pairs, 2, "a barrier with two counts", "expects 128 threads"),
    (product, 1, "no __syncthreads after the mbarriers are initialised", "before it is initialised"),
    (product, 2, "producer does not wait for an empty stage", "more arrivals in a phase than its count"),
    (product, 3, "wrong parity", "deadlock"),
    (product, 4, "half the bytes expected", WRONG),
    (product, 5, "descriptor with another swizzle than the tile's", WRONG),
    (product, 6, "no wgmma fence", "no wgmma_fence"),
    (product, 7, "stage released before the product has read it", WRONG),
    (product, 8, "no wait for the product", "wgmma"),
    (product, 9, "product not committed", "wgmma"),
    (product, 10, "empty barrier counts one too many", "deadlock"),
    (product, 11, "no fence after the mbarriers are initialised", "no fence (mbar_fence_init)"),
    (product, 12, "wrong stride in the descriptor", WRONG),
    (product, 13, "no proxy fence before the TMA store", WRONG),
    (product, 14, "TMA store not committed", "bulk stores in flight"),
    (product, 15, "more shared memory than allowed", "invalid launch"),
    (ring, 1, "no cluster barrier before another block's mbarrier is used", "before it is initialised"),
    (ring, 2, "a block leaves while another reads its shared memory", "has exited"),
    (ring, 3, "no proxy fence before the copy to another block", WRONG),
]


def ending(kernel: Callable, fault: int, schedule) -> str:
    """'' when the result is right, WRONG, or the error's text."""
    try:
        return "" if kernel(fault, schedule) else WRONG
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("kernel", [tile, lanes, stages, fragments, pairs, product, ring])
def test_without_a_fault_every_schedule_is_right(kernel, schedule):
    assert ending(kernel, 0, schedule) == ""


@pytest.mark.parametrize(("kernel", "fault", "what", "expected"), FAULTS)
def test_planted_fault_is_caught(kernel, fault, what, expected):
    endings = {schedule: ending(kernel, fault, schedule) for schedule in EVERY}
    assert any(expected in e for e in endings.values()), f"{what}: {endings}"


def test_a_deadlock_says_who_waits_where():
    with pytest.raises(RuntimeError) as error:
        pairs(1, bench.IN_ORDER)
    text = str(error.value)
    assert "pairs_kernel" in text and text.count("wait in bar.sync at faults.cu:") == 1 and "128 threads" in text


def test_a_launch_that_cannot_be_raises():
    """More shared memory than the kernel was allowed: on a GPU too, where gpu-check runs this."""
    with pytest.raises(RuntimeError, match="invalid"):
        product(15, bench.IN_ORDER)


def test_a_launch_after_a_failed_one_is_right():
    assert ending(product, 10, bench.IN_ORDER) and ending(product, 0, bench.IN_ORDER) == ""


def test_ops_and_test_kernels_catch_their_own_faults():
    """Both are copies of the bench in one process, and take turns at the signals of a wild access."""
    [backend] = bench.module().backends()
    x, y, short = (torch.ones(9, 64) for _ in range(3))
    for _ in range(2):
        assert "wild access" in ending(tile, 3, bench.IN_ORDER)
        with pytest.raises(RuntimeError, match="wild access"):
            backend.rms_norm_bwd(
                x, None, torch.ones(1, 64), y, None, short, torch.ones(64), torch.ones(1).expand(9, 1), 0
            )
