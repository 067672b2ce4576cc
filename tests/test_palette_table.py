"""Tables of a palette's tokens, tokens back to colours, colours counted: exact on every backend."""

import functools

import pytest
import torch
from check import backends
from hypothesis import given, settings
from hypothesis import strategies as st
from test_palette_ops import KINDS, LEVELS, random_palette

from igpt_fast import InputError, Palette, ops, reference
from igpt_fast.ops import palette as palette_ops
from igpt_fast.ops._native import BACKENDS, use_backend

WITH_TABLE = [b for b in backends("palette_assign") if b != "reference" and BACKENDS[b].has("palette_table")]
DTYPES = [torch.int64, torch.int32, torch.int16]


def image(n: int, seed: int, start: int = 0) -> torch.Tensor:
    """uint8 [n, 3] with runs of one colour, of which the first byte lies `start` bytes behind 16."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 256, (n, 3), generator=generator, dtype=torch.uint8)
    some = colors[torch.randint(0, n, (n,), generator=generator).cummax(0).values] if n else colors
    return torch.cat([torch.zeros(start, dtype=torch.uint8), some.flatten()])[start:].view(-1, 3)


def test_the_tables_order_holds_every_colour_once():
    colors = every_color().view(-1, 3).int()
    packed = colors[:, 0] << 16 | colors[:, 1] << 8 | colors[:, 2]
    assert torch.equal(packed.sort().values, torch.arange(1 << 24, dtype=torch.int32))
    box = reference.palette.table_colors(0x5A3, 1)[0].int()
    assert (box.amin(0).tolist(), box.amax(0).tolist()) == ([0x50, 0xA0, 0x30], [0x5F, 0xAF, 0x3F])
    for size, side in ((512, [7, 7, 7]), (64, [3, 3, 3]), (16, [1, 1, 3])):
        cells = box.view(-1, size, 3)
        assert (cells.amax(1) - cells.amin(1) == torch.tensor(side)).all()
    some = reference.palette.palette_table(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), 4094, 2)
    assert some.shape == (2, 4096) and some.dtype is torch.int16 and (some == 1).all()


@pytest.mark.parametrize("backend", WITH_TABLE)
@given(
    kind=st.sampled_from(KINDS),
    k=st.sampled_from([1, 2, 31, 64, 300, 512, 513, 4096]),
    first=st.integers(0, 4094),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=60)
def test_palette_table(backend, kind, k, first, seed):
    palette = random_palette(kind, k, torch.Generator().manual_seed(seed))
    table = torch.full((2, 4096), -9, dtype=torch.int16)
    BACKENDS[backend].palette_table(table, palette, first, 0)
    pixels = LEVELS[reference.palette.table_colors(first, 2).long()]  # floats take every distance
    assert torch.equal(table, ops.palette_assign(pixels, palette, torch.int16))


@pytest.mark.parametrize("backend", WITH_TABLE)
def test_centres_on_levels_and_all_equal_tie_everywhere(backend):
    for palette in (torch.zeros(600, 3), LEVELS[torch.cartesian_prod(*[torch.arange(96, 112, 2)] * 3)]):
        table = torch.full((1, 4096), -9, dtype=torch.int16)
        BACKENDS[backend].palette_table(table, palette, 0x666, 0)
        pixels = LEVELS[reference.palette.table_colors(0x666, 1).long()]
        assert torch.equal(table, ops.palette_assign(pixels, palette, torch.int16))


@functools.cache
def every_color() -> torch.Tensor:
    return reference.palette.table_colors(0, 4096)


def tabled(monkeypatch, palette):
    """Lets every uint8 call go through this table, which the CPU has made."""
    table = ops.palette_assign(every_color(), palette, torch.int16)
    monkeypatch.setattr(palette_ops, "_table", lambda *args: table if args[1].dtype is torch.uint8 else None)


@pytest.mark.parametrize("backend", WITH_TABLE)
def test_tokens_from_a_table(backend, monkeypatch):
    palette = random_palette("levels", 300, torch.Generator().manual_seed(0))
    cases = [(n, start, dtype) for n in (0, 1, 15, 16, 17, 700) for start in (0, 1, 3) for dtype in DTYPES]
    pixels = [image(n, n + start, start) for n, start, _ in cases]
    wanted = [ops.palette_assign(p, palette, dtype) for p, (_, _, dtype) in zip(pixels, cases, strict=True)]
    tabled(monkeypatch, palette)
    for p, w, (_, _, dtype) in zip(pixels, wanted, cases, strict=True):
        with use_backend(backend, poison=True):
            assert torch.equal(ops.palette_assign(p, palette, dtype), w)
            out = torch.full((len(p) + 1,), -9, dtype=dtype)  # tokens that start between multiples of 16 bytes
            table = palette_ops._table(None, p, palette)
            BACKENDS[backend].palette_assign(out[1:], p, palette, table, 0)
        assert torch.equal(out[1:], w) and out[0] == -9


@pytest.mark.parametrize("backend", WITH_TABLE)
@pytest.mark.parametrize("k", [3, 300, 900])
@pytest.mark.parametrize("heaviest", [1, 1 << 18, 1 << 30])
def test_kmeans_step_from_a_table(backend, monkeypatch, k, heaviest):
    generator = torch.Generator().manual_seed(k)
    palette = random_palette("uniform", k, generator)
    colors = torch.cat([image(2000, 1).unique(dim=0), image(1111, 2)])  # sorted, then not
    weights = torch.randint(0, heaviest, (len(colors),), generator=generator)
    wanted = ops.kmeans_step(colors, weights, palette)
    tabled(monkeypatch, palette)
    with use_backend(backend, poison=True):
        got = ops.kmeans_step(colors, weights, palette)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", WITH_TABLE)
def test_many_pixels_make_a_table_of_their_own(backend, monkeypatch):
    palette, pixels = random_palette("twice", 64, torch.Generator().manual_seed(0)), image(3000, 0)
    wanted = ops.palette_assign(pixels, palette)
    monkeypatch.setattr(palette_ops, "TABLE_PAYS", 3000 * 64)
    with use_backend(backend, poison=True):
        assert torch.equal(ops.palette_assign(pixels, palette), wanted)
    assert palette_ops._table(BACKENDS[backend], pixels[1:], palette) is None  # one pixel fewer does not repay it


@pytest.mark.parametrize("backend", backends("palette_decode"))
@given(
    k=st.sampled_from([1, 2, 512, 4096]),
    n=st.integers(0, 200),
    start=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 20),
)
def test_palette_decode(backend, k, n, start, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 256, (k, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, k, (n + start,), generator=generator).to(dtype)[start:]
    with use_backend(backend, poison=True):
        pixels = ops.palette_decode(tokens, colors)
        assert pixels.dtype is torch.uint8 and torch.equal(pixels, colors[tokens.long()])
        if n:
            tokens[n // 2], tokens[-1] = -1, k if seed % 2 else -3
            with pytest.raises(
                InputError, match=f"token {tokens[n // 2]} is out of range: this palette of {k} colours"
            ):
                ops.palette_decode(tokens, colors)


@pytest.mark.parametrize("backend", backends("palette_decode"))
def test_palette_decode_of_many_tokens(backend):
    colors = torch.randint(0, 256, (512, 3), dtype=torch.uint8)
    tokens = torch.randint(0, 512, (100_003,)).to(torch.int16).view(1, -1)
    with use_backend(backend, poison=True):
        assert torch.equal(ops.palette_decode(tokens, colors), colors[tokens.long()])
        tokens[0, [70_000, 99_999]] = torch.tensor([512, -7], dtype=torch.int16)
        with pytest.raises(InputError, match="token 512 is out of range"):
            ops.palette_decode(tokens, colors)
        assert torch.equal(Palette(torch.ones(1, 3)).decode(torch.zeros(2, 2)[:0].long()), torch.zeros(0, 2, 3).byte())


@pytest.mark.parametrize("backend", backends("color_histogram"))
@pytest.mark.parametrize(("n", "start"), [(0, 0), (1, 0), (16, 0), (17, 1), (5000, 0), (5001, 5), (70_000, 0)])
def test_color_histogram(backend, n, start):
    pixels = image(n, n, start)
    with use_backend(backend, poison=True):
        counts = ops.color_histogram(pixels)
        assert counts.dtype is torch.int64
        assert torch.equal(counts, reference.palette.color_histogram(pixels))
        both = palette_ops.count_colors(pixels[: n // 2], counts)
        assert both is counts and int(both.sum()) == n + n // 2


@pytest.mark.parametrize("backend", WITH_TABLE)
@pytest.mark.parametrize(("n", "start", "tiles"), [(1, 0, 1), (50_001, 0, 2), (100_000, 1, 9)])
def test_color_histogram_sorts_many_pixels(backend, n, start, tiles, monkeypatch):
    monkeypatch.setattr(palette_ops, "SORTING_PAYS", 1)
    monkeypatch.setattr(palette_ops, "MOST_TILES", tiles)
    pixels = image(n, n, start)
    pixels[: n // 2] = torch.randint(256, (n // 2, 3), generator=torch.Generator().manual_seed(n)).byte()
    pixels[n // 3 : n // 3 + n // 20, 1:] = 7  # runs, and more keys of one bucket in a tile than a warp reads at once
    with use_backend(backend, poison=True):
        assert torch.equal(ops.color_histogram(pixels), reference.palette.color_histogram(pixels))


def test_ops_refuse_what_does_not_fit():
    tokens, colors = torch.zeros(4, dtype=torch.int64), torch.zeros(5, 3, dtype=torch.uint8)
    for bad in (colors.float(), colors[:, :2], colors[:0], colors[0], torch.zeros(4097, 3, dtype=torch.uint8)):
        with pytest.raises(InputError, match=r"the colors are .*; give uint8 \[K, 3\]"):
            ops.palette_decode(tokens, bad)
    with pytest.raises(InputError, match="tokens are uint8"):
        ops.palette_decode(tokens.byte(), colors)
    for bad in (colors.float(), tokens):
        with pytest.raises(InputError, match=r"pixels are .*; give uint8"):
            ops.color_histogram(bad)
    for name in backends("palette_assign")[1:]:
        with pytest.raises(ValueError, match="table"):  # a table of the wrong size, or where none is taken
            BACKENDS[name].palette_assign(tokens, colors[:4], torch.zeros(2, 3), torch.zeros(7, dtype=torch.int16), 0)
    for name in WITH_TABLE:
        with pytest.raises(ValueError, match="workspace"):
            counts, narrow = torch.zeros(1 << 24, dtype=torch.int64), torch.zeros(2, 16384, dtype=torch.int16)
            BACKENDS[name].color_histogram(counts, colors, narrow, 0)
        for boxes, first in ((1, 4096), (2, 4095), (1, -1)):
            with pytest.raises(ValueError, match="are not among 0 to 4095"):
                table = torch.zeros(boxes, 4096, dtype=torch.int16)
                BACKENDS[name].palette_table(table, torch.zeros(2, 3), first, 0)
