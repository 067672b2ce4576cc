"""The palette's ops: tokens that are exact on every backend, and k-means' step, exact too."""

import numpy as np
import pytest
import torch
from check import CUDA_KERNELS, backends
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast import InputError, ops, reference
from igpt_fast.ops._native import use_backend

NATIVE = backends("palette_assign")[1:]
LEVELS = torch.arange(256) / 127.5 - 1


def random_palette(kind: str, k: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [k, 3]; every kind but the first is there to break something."""
    p = torch.rand(k, 3, generator=generator) * 2 - 1
    if kind == "levels":  # 8-bit colours: many colours lie half-way between two centres
        return LEVELS[torch.randint(0, 64, (k, 3), generator=generator) * 4]
    if kind == "twice":  # every centre at least twice: exact ties throughout
        return p[torch.randint(0, max(1, k // 2), (k,), generator=generator)]
    if kind == "corners":  # pairs on opposite sides of a colour where eight cells of the grid meet: rounding decides
        middle = LEVELS[torch.randint(0, 32, (k // 2, 3), generator=generator) * 8]
        return torch.cat([middle + p[: k // 2] / 50, middle - p[: k // 2] / 50, p[: k % 2]])
    if kind == "crowded":  # all within a few cells, which then hold more candidates than there is room for
        return p * 0.03 + 0.4
    if kind == "outside":
        return p * 5
    if kind == "odd":  # distances that overflow, or are no numbers
        p[torch.randint(0, k, (1 + k // 3,), generator=generator)] = torch.tensor([float("nan"), 1e30, float("-inf")])
    if kind == "none":  # no distance at all
        return torch.tensor([[float("nan")] * 3, [float("inf")] * 3]).repeat(k, 1)[:k]
    return p


KINDS = ["uniform", "levels", "twice", "corners", "crowded", "outside", "odd", "none"]


def test_reference_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3), generator=generator, dtype=torch.uint8)
    for kind in ("uniform", "levels", "twice"):
        palette = random_palette(kind, 40, generator)
        c = palette.numpy()
        wanted = []
        for u in pixels.numpy():
            x = u.astype(np.float32) / np.float32(127.5) - np.float32(1)
            d = [
                ((x[0] - q[0]) * (x[0] - q[0]) + (x[1] - q[1]) * (x[1] - q[1])) + (x[2] - q[2]) * (x[2] - q[2])
                for q in c
            ]
            wanted.append(d.index(min(d)))
        assert reference.palette.palette_assign(pixels, palette).tolist() == wanted


@pytest.mark.parametrize("backend", backends("palette_assign"))
def test_ties_and_odd_numbers_go_to_the_lowest(backend):
    nan, inf = float("nan"), float("inf")
    with use_backend(backend, poison=True):
        middle = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0]])
        assert ops.palette_assign(torch.zeros(3, 3), middle).tolist() == [0, 0, 0]
        assert ops.palette_assign(torch.zeros(2, 3), middle.flip(0) * 1.0).tolist() == [0, 0]
        assert ops.palette_assign(torch.tensor([[nan, 0, 0], [inf, 0, 0]]), middle).tolist() == [0, 0]
        assert ops.palette_assign(torch.zeros(1, 3), torch.tensor([[nan, 0, 0], [1, 0, 0], [1, 0, 0]])).tolist() == [1]


@pytest.mark.parametrize("backend", NATIVE)
@given(
    k=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 4096])),
    n=st.integers(0, 150),
    kind=st.sampled_from(KINDS),
    floats=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    seed=st.integers(0, 1 << 20),
)
def test_few_pixels(backend, k, n, kind, floats, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    palette = random_palette(kind, k, generator)
    pixels = torch.randint(0, 256, (n, 3), generator=generator, dtype=torch.uint8)
    if floats:
        pixels = torch.cat(
            [torch.rand(n, 3, generator=generator) * 4 - 2, palette[: n // 2]]
        )  # some exactly on a centre
    with use_backend(backend, poison=True):
        tokens = ops.palette_assign(pixels, palette, dtype)
    assert tokens.dtype is dtype
    assert torch.equal(tokens, reference.palette.palette_assign(pixels, palette, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [64, 513, 1500])
def test_many_pixels(kind, k):
    """So many that 8-bit pixels take the grid. What they must equal takes every distance: float pixels always do."""
    generator = torch.Generator().manual_seed(k)
    palette = random_palette(kind, k, generator)
    edge = torch.arange(256).view(32, 8)[:, [0, 7]].flatten()
    corners = torch.cartesian_prod(edge, edge, edge)  # of all cells of the grid
    spread = torch.randint(0, 256, (50_000, 3), generator=generator)
    middle = (127.5 * (palette[0].nan_to_num() + 1)).clamp(3, 252).long()
    pixels = torch.cat([corners, spread, middle + spread % 7 - 3]).to(torch.uint8)
    with use_backend(NATIVE[0]):
        wanted = ops.palette_assign(LEVELS[pixels.long()], palette, torch.int16)
    for backend in NATIVE:
        some = slice(None, None, 97 if backend == "simt" else 1)  # the bench is slow, and its kernel has no grid
        with use_backend(backend, poison=True):
            assert torch.equal(ops.palette_assign(pixels[some], palette, torch.int16), wanted[some]), backend


def test_every_colour_there_is():
    palette = torch.rand(512, 3) * 2 - 1
    packed = torch.arange(1 << 24)
    pixels = torch.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).to(torch.uint8)
    tokens = ops.palette_assign(pixels, palette, torch.int16)
    for begin in range(0, 1 << 24, 1 << 21):
        part = slice(begin, begin + (1 << 21))
        assert torch.equal(tokens[part], ops.palette_assign(LEVELS[pixels[part].long()], palette, torch.int16))
    some = torch.randint(0, 1 << 24, (1 << 16,))
    assert torch.equal(tokens[some], reference.palette.palette_assign(pixels[some], palette, torch.int16))


@pytest.mark.parametrize("backend", backends("kmeans_step"))
@given(
    k=st.integers(1, 90),
    n=st.sampled_from([0, 1, 7, 513, 5000, 100_000]),
    kind=st.sampled_from(KINDS[:-2]),
    heaviest=st.sampled_from([1, 9, 1 << 28]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=15)
def test_kmeans_step(backend, k, n, kind, heaviest, seed):
    generator = torch.Generator().manual_seed(seed)
    palette = random_palette(kind, k, generator)
    colors = torch.randint(0, 256, (n, 3), generator=generator, dtype=torch.uint8)
    weights = torch.randint(0, heaviest + 1, (n,), generator=generator)
    with use_backend(backend, poison=True):
        sums, counts, inertia = ops.kmeans_step(colors, weights, palette)
    with use_backend(NATIVE[-1]):
        tokens = ops.palette_assign(colors, palette)
    assert torch.equal(counts, torch.zeros(k, dtype=torch.int64).index_add_(0, tokens, weights))
    assert torch.equal(sums, torch.zeros(k, 3, dtype=torch.int64).index_add_(0, tokens, colors * weights[:, None]))
    offset = colors.double() / 127.5 - 1 - palette.double()[tokens]
    wanted = (weights * offset.square().sum(1)).sum()
    assert abs(inertia - wanted) <= 1e-12 * wanted + 1e-14 * weights.sum() ** 0.5 * wanted**0.5


@pytest.mark.parametrize("n", [3000, 150_000])
def test_kmeans_step_has_the_same_bits_everywhere(n):
    colors, palette = torch.randint(0, 256, (n, 3), dtype=torch.uint8), torch.rand(300, 3) * 2 - 1
    weights = torch.randint(1, 50, (n,))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for backend in NATIVE:
                with use_backend(backend):
                    results.append(ops.kmeans_step(colors, weights, palette))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", [b for b in NATIVE if b in CUDA_KERNELS])
def test_kmeans_step_of_more_centres_than_shared_memory_holds(backend):
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (3000, 3), generator=generator, dtype=torch.uint8)
    weights = torch.randint(0, 1 << 33, (3000,), generator=generator)
    for k in (700, 701, 4096):
        palette = random_palette("uniform", k, generator)
        with use_backend(backend, poison=True):
            got = ops.kmeans_step(colors, weights, palette)
        assert all(torch.equal(a, b) for a, b in zip(got, ops.kmeans_step(colors, weights, palette), strict=True))


@pytest.mark.parametrize("backend", backends("kmeans_step"))
@pytest.mark.parametrize("weights", [[1, -1], [1 << 45, 1], [1 << 62, 1 << 62], [-(1 << 63), 5]])
def test_kmeans_step_refuses_weights_that_it_could_not_sum(backend, weights):
    args = torch.full((2, 3), 255, dtype=torch.uint8), torch.tensor(weights), torch.zeros(2, 3)
    with use_backend(backend):
        if backend in CUDA_KERNELS:  # no host reads them
            assert ops.kmeans_step(*args)[2].isnan()
            return
        with pytest.raises(InputError, match="weights must not be negative"):
            ops.kmeans_step(*args)


@pytest.mark.parametrize("backend", backends("kmeans_step"))
def test_kmeans_step_takes_weights_up_to_the_limit(backend):
    with use_backend(backend, poison=True):
        colors, weights = torch.full((2, 3), 255, dtype=torch.uint8), torch.tensor([(1 << 45) - 1, 1])
        sums, counts, inertia = ops.kmeans_step(colors, weights, torch.zeros(1, 3))
    assert counts.item() == 1 << 45 and sums.tolist() == [[255 << 45] * 3] and inertia == 3 * 2.0**45


@pytest.mark.parametrize("backend", backends("kmeans_step"))
def test_tensors_may_have_any_strides(backend):
    colors, palette = torch.randint(0, 256, (3, 50), dtype=torch.uint8).t(), (torch.rand(3, 9) * 2 - 1).t()
    weights = torch.randint(0, 9, (100,))[::2]
    with use_backend(backend, poison=True):
        got = (*ops.kmeans_step(colors, weights, palette), ops.palette_assign(colors, palette))
    colors, weights, palette = (t.contiguous() for t in (colors, weights, palette))
    with use_backend("reference"):
        wanted = (*ops.kmeans_step(colors, weights, palette), ops.palette_assign(colors, palette))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, wanted, strict=True))


def test_ops_are_known_to_torch():
    pixels, palette = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8), torch.rand(9, 3)
    torch.library.opcheck(torch.ops.igpt.palette_assign.default, (pixels, palette, torch.int32))
    torch.library.opcheck(torch.ops.igpt.kmeans_step.default, (pixels.view(-1, 3), torch.ones(40).long(), palette))


def test_ops_refuse_what_does_not_fit():
    pixels, palette = torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(5, 3)
    with pytest.raises(InputError, match=r"pixels are int64 \[4, 3\]"):
        ops.palette_assign(pixels.long(), palette)
    with pytest.raises(InputError, match=r"pixels are uint8 \[3, 4\]"):
        ops.palette_assign(pixels.T, palette)
    for bad in (palette.double(), palette[:, :2], palette[:0], torch.zeros(4097, 3), palette[0]):
        with pytest.raises(InputError, match=r"the palette is .*; give float32 \[K, 3\]"):
            ops.palette_assign(pixels, bad)
    with pytest.raises(InputError, match="use int64, int32 or int16"):
        ops.palette_assign(pixels, palette, torch.uint8)
    with pytest.raises(InputError, match="colors are float32"):
        ops.kmeans_step(pixels.float(), torch.ones(4).long(), palette)
    with pytest.raises(InputError, match=r"weights are int64 \[3\]"):
        ops.kmeans_step(pixels, torch.ones(3).long(), palette)
