"""The wrappers of ptx_sm90.cuh on the bench, each against a formula written out here."""

import itertools

import numpy as np
import pytest

from simt import bench
from simt.test_layouts import sixteen, words

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")
SPAN = [0, 32, 64, 128]  # bytes of a tensor map's swizzle by its number
BASE = 1 << 13  # a multiple of every swizzle's repeat


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Of a tile whose swizzle spans 32, 64 or 128 bytes: XOR a 16-byte chunk's number with its 128-byte line's."""
    if not span:
        return address
    chunks = span // 16
    chunk, line = address // 16 % chunks, address // 128 % chunks
    return address + ((chunk ^ line) - chunk) * 16


TILES = [
    # sizes, box (innermost first), coordinates, swizzle
    ((40, 20), (16, 8), (8, 4), 0),
    ((40, 20), (16, 8), (32, 16), 1),
    ((40, 20), (32, 16), (-8, -3), 2),
    ((72, 33), (64, 24), (16, 20), 3),
    ((72, 33), (64, 24), (-200, 0), 3),
    ((64, 6, 5), (64, 4, 3), (0, 4, 3), 3),
    ((40, 6, 5), (32, 5, 2), (16, -2, -1), 2),
    ((40, 6, 5, 4), (16, 3, 2, 3), (24, 4, 3, 2), 1),
    ((40, 6, 5, 4), (24, 2, 2, 2), (8, 5, -1, 3), 0),
]


def tile(sizes, box, at):
    """A tensor with room after each row, its tile with zeros outside, and which elements lie inside."""
    rank = len(sizes)
    pitch = sizes[0] + 8
    tensor = np.arange(1, 1 + pitch * int(np.prod(sizes[1:]))).astype(np.uint16).reshape(*sizes[:0:-1], pitch)
    index = [np.arange(b) + a for b, a in zip(box[::-1], at[::-1], strict=True)]
    grid = np.meshgrid(*index, indexing="ij")
    inside = np.logical_and.reduce([(g >= 0) & (g < s) for g, s in zip(grid, sizes[::-1], strict=True)])
    where = tuple(np.where(inside, g, 0) for g in grid)
    strides = [pitch * int(np.prod(sizes[1 : i + 1])) for i in range(rank - 1)]
    return tensor, where, inside, strides


def numbers(sizes, box, at, swizzle, strides, store=0, blocks=1, mask=0):
    bytes_ = 2 * int(np.prod(box))
    return [len(sizes), store, bytes_, *at, *[0] * (4 - len(at)), blocks, mask, *sizes, *strides, *box, swizzle]


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize(("sizes", "box", "at", "swizzle"), TILES)
def test_tensor_loads(sizes, box, at, swizzle, schedule):
    tensor, where, inside, strides = tile(sizes, box, at)
    count = int(np.prod(box))
    address = swizzled(BASE + 2 * np.arange(count), SPAN[swizzle]) - BASE
    wanted = np.zeros(count, np.uint16)
    wanted[address // 2] = np.where(inside, tensor[where], 0).ravel()
    for blocks, mask in ((1, 0), (2, 3)):  # alone, and sent by one block to both of a cluster
        out = np.empty((blocks, count), np.uint16)
        bench.run("tensor_tile", [tensor, out], numbers(sizes, box, at, swizzle, strides, 0, blocks, mask), schedule)
        assert all(np.array_equal(o, wanted) for o in out)


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
@pytest.mark.parametrize(("sizes", "box", "at", "swizzle"), TILES)
def test_tensor_stores(sizes, box, at, swizzle, schedule):
    at = tuple(max(0, x) for x in at)
    tensor, where, inside, strides = tile(sizes, box, at)
    count = int(np.prod(box))
    address = swizzled(BASE + 2 * np.arange(count), SPAN[swizzle]) - BASE
    values = (address // 2 + 1).astype(np.uint16).reshape(box[::-1])
    wanted = tensor.copy()
    wanted[tuple(w[inside] for w in where)] = values[inside]
    bench.run("tensor_tile", [tensor, np.empty(1, np.uint16)], numbers(sizes, box, at, swizzle, strides, 1), schedule)
    assert np.array_equal(tensor, wanted)


@pytest.mark.parametrize("at", [(-8, 0), (0, -4)])
def test_a_store_begins_inside(at):
    """A GPU loads zeros from before the tensor, but stores nothing there: it calls the instruction illegal."""
    sizes, box = (40, 20), (16, 8)
    tensor, _, _, strides = tile(sizes, box, at)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        bench.run("tensor_tile", [tensor, np.empty(1, np.uint16)], numbers(sizes, box, at, 0, strides, 1))


def test_tensor_maps_are_refused_as_the_driver_refuses():
    tensor, out = np.zeros((16, 64), np.uint16), np.empty(4096, np.uint16)
    good = numbers((64, 16), (64, 8), (0, 0), 3, [64])
    bench.run("tensor_tile", [tensor, out], good)
    for change in ({11: 60}, {12: 257}, {13: 257}, {12: 128}, {12: 4, 14: 0}):  # stride, boxes, box against swizzle
        bad = [change.get(i, n) for i, n in enumerate(good)]
        with pytest.raises(RuntimeError, match="tensor map refused"):
            bench.run("tensor_tile", [tensor, out], bad)


# A matrix descriptor's swizzle has its own numbering: none, 128, 64, 32 bytes.
MODES = {0: 0, 1: 128, 2: 64, 3: 32}


def operand(x: np.ndarray, mn_major: int, mode: int):
    """The image in shared memory of an operand [rows, 16], its lbo and sbo: the canonical layouts of the PTX ISA."""
    rows = len(x)
    mn, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    span = MODES[mode]
    if mode == 0:  # core matrices of 8 x 16 bytes, at strides of our choice
        lbo, sbo = (rows * 32 + 128, 256) if not mn_major else (rows * 16, 128)
        if mn_major:
            address = mn // 8 * sbo + mn % 8 * 2 + k % 8 * 16 + k // 8 * lbo
        else:
            address = mn // 8 * sbo + mn % 8 * 16 + k % 8 * 2 + k // 8 * lbo
    elif mn_major:  # rows of `span` bytes along M or N, eight of K one below the other
        wide = span // 2
        sbo, lbo = 8 * span, 16 * span
        address = mn // wide * lbo + mn % wide * 2 + k % 8 * span + k // 8 * sbo
    else:  # rows of `span` bytes along K, of which 32 are used, eight of M or N one below the other
        sbo, lbo = 8 * span, 16
        address = mn // 8 * sbo + mn % 8 * span + k * 2
    address = swizzled(BASE + address, span) - BASE
    image = np.full(int(address.max()) // 2 + 8 & ~7, 0x7FFF, np.uint16)  # NaN wherever no element lies
    image[address // 2] = x
    return image, lbo, sbo


def registers(d: np.ndarray) -> np.ndarray:
    """[64, N] as the 128 threads of a warpgroup hold it: [128, N / 2]."""
    t, j = np.meshgrid(np.arange(128), np.arange(d.shape[1] // 2), indexing="ij")
    return d[t // 32 * 16 + t % 32 // 4 + j // 2 % 2 * 8, j // 4 * 8 + t % 4 * 2 + j % 2]


MAJORS = list(itertools.product((0, 1), (0, 1)))
WGMMA = [
    *((64, bf16, *majors, 1, 1) for bf16 in (1, 0) for majors in MAJORS),
    *((64, 1, *majors, *modes) for majors in MAJORS for modes in [(0, 0), (2, 2), (3, 3), (0, 1)]),
    *((n, *rest) for n in (96, 128, 192, 256) for rest in [(1, 0, 0, 1, 1), (0, 0, 1, 1, 1), (1, 0, 1, 1, 2)]),
]


@pytest.mark.parametrize("schedule", [bench.IN_ORDER, bench.AT_ONCE, bench.RANDOM[0]])
@pytest.mark.parametrize(("n", "bf16", "a_mn", "b_mn", "a_mode", "b_mode"), WGMMA)
def test_wgmma(n, bf16, a_mn, b_mn, a_mode, b_mode, schedule):
    random = np.random.default_rng(n)
    a, b, c = (random.integers(-8, 9, shape).astype(np.float32) for shape in [(64, 16), (n, 16), (64, n)])
    image_a, lbo_a, sbo_a = operand(sixteen(a, bf16), a_mn, a_mode)
    image_b, lbo_b, sbo_b = operand(sixteen(b, bf16), b_mn, b_mode)
    h = sixteen(a, bf16)
    t = np.arange(128)
    row, pair = t // 32 * 16 + t % 32 // 4, t % 4 * 2
    at = [(row + i % 2 * 8, pair + i // 2 * 8) for i in range(4)]
    fragments = np.ascontiguousarray(np.stack([words(h[r, k], h[r, k + 1]) for r, k in at], 1))
    for accumulate, in_registers in ((0, 0), (1, 0), (1, 1)):
        d = np.ascontiguousarray(registers(c))
        layout = [a_mn, b_mn, lbo_a, sbo_a, lbo_b, sbo_b, a_mode, b_mode]
        numbers_ = [n, bf16, image_a.nbytes, image_b.nbytes, *layout, accumulate, in_registers]
        bench.run("wgmma", [image_a, image_b, fragments, d], numbers_, schedule)
        assert np.array_equal(d, registers(a @ b.T + accumulate * c)), (accumulate, in_registers)


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
def test_mbarrier_phases(schedule):
    out = np.empty((7, 32), np.int32)
    bench.run("phases", [out], [7], schedule)
    assert np.array_equal(out, 100 * np.arange(7)[:, None] + 31 - np.arange(32))


@pytest.mark.parametrize("schedule", [*bench.SCHEDULES, (2, 3, 0, 2)])
@pytest.mark.parametrize(("blocks", "size"), [(4, 2), (4, 4), (8, 8)])
def test_bulk_copies_around_a_cluster(blocks, size, schedule):
    x = np.random.default_rng(0).standard_normal((blocks, 64)).astype(np.float32)
    out = np.empty_like(x)
    bench.run("ring", [x, out], [blocks, size, 0], schedule)
    # Each block sends its row plus its rank to the next, which stores it into the one after, where it is read from.
    rank = np.arange(blocks) % size
    rows = (x + rank[:, None].astype(np.float32)).reshape(-1, size, 64)
    assert np.array_equal(out, rows[:, np.arange(size) - 1, ::-1].reshape(blocks, 64))


@pytest.mark.parametrize("schedule", bench.SCHEDULES)
def test_arrivals_and_stores_across_a_cluster(schedule):
    out = np.empty(8, np.int32)
    bench.run("arrivals", [out], [8, 4], schedule)
    assert out.tolist() == [1000 + 10 * r + r for r in range(4)] * 2
