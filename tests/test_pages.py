"""A rolling cache: what nobody sees any more is forgotten, whatever takes its place changes no bit, and it is small."""

from types import SimpleNamespace

import pytest
import torch
from check import CUDA_KERNELS, backends, served
from definition import opinionated, pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast import BlockMask, InputError, cached, ops
from igpt_fast.cached import Decoder, cache_slots, decode_one_token, prefill
from igpt_fast.config import Config
from igpt_fast.model import ImageGPT
from igpt_fast.ops._native import use_backend
from igpt_fast.ops.attention_decode import BYTES
from igpt_fast.patterns import TILE, compiled, masks_of, pages_of
from igpt_fast.sample import complete, default_batch, sample


def places(pages, slots):
    return pages.long()[slots // TILE] * TILE + slots % TILE


def assert_same(got, want, ulps):
    """The same bits where a kernel is at work; plain torch adds up in an order that strides decide."""
    assert not got.isnan().any()
    assert (got - want).abs().max() <= ulps * torch.finfo(got.dtype).eps * want.abs().max()


@given(
    tokens=st.integers(65, 500),
    windows=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    far=st.sampled_from([0.0, 1e-4, 1e-3]),
    sos=st.booleans(),
    share=st.floats(0, 1),
)
def test_whatever_a_slot_sees_is_still_in_its_page(tokens, windows, far, sos, share):
    """From the first slot on, and from a prefill of any number of slots on, in no more pages than are alive at once."""
    generator = torch.Generator().manual_seed(tokens)
    every = torch.ones(tokens, tokens, dtype=torch.bool)
    dense = []
    for window in windows:
        seen = every.triu(1 - window) | (torch.rand(tokens, tokens, generator=generator) < far)
        seen[:, 0] |= sos
        dense.append(seen.tril())
    pages, seen = pages_of([BlockMask.from_dense(d, causal=True) for d in dense]), torch.stack(dense).any(0)
    tiles = torch.nn.functional.pad(seen, (0, -tokens % TILE, 0, -tokens % TILE))
    tiles = tiles.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).any(3).any(1)  # [query tiles, key tiles]
    alive = [int(tiles[i:, : i + 1].any(0).sum()) for i in range(len(tiles))]
    if pages is None:
        assert max(alive) == len(tiles)
        return
    assert max(alive) == pages.count < len(tiles) == len(pages.of)
    known = 1 + int(share * (tokens - 1))
    held, there = pages.held(known)
    for first, kept in ((0, held[:0]), (known, held)):
        cache = torch.full((pages.count * TILE,), -1)
        cache[there[: len(kept)]] = kept
        for slot in range(first, tokens):
            cache[places(pages.of, torch.tensor(slot))] = slot
            keys = seen[slot].nonzero().flatten()
            assert torch.equal(cache[places(pages.of, keys)], keys)


def test_no_table_where_it_saves_nothing():
    local, column = compiled("local(9)", (20, 20)), compiled("column", (20, 20))
    assert pages_of([local]).count < pages_of([local, compiled("local(90)", (20, 20))]).count < 7
    for masks in ([], [None], [local, None], [column], [local, column], [compiled("local(9)", (8, 8))]):
        assert pages_of(masks) is None
    for pattern, slots in ((None, 400), (["row", None], 400), ("column", 400), ("local(9)", 192)):
        assert cache_slots(Config(layers=2, width=8, heads=1, size=(20, 20), pattern=pattern)) == slots


SPARSE = {
    "neighborhood": {"pattern": "neighborhood(3)", "size": (13, 23)},
    "row": {"pattern": "row", "size": (23, 13)},
    "local": {"pattern": "local(20)", "size": (5, 64)},
    "blocks": {"pattern": "blocks(4)", "size": (24, 12)},
    "union": {"pattern": "row|neighborhood(5)", "size": (27, 11)},
    "layers": {"pattern": ["row", "dilated(3, 2)"], "size": (33, 9)},
    "heads": {"pattern": [["local(70)", "row", "neighborhood(3)"], "row"], "size": (19, 17)},
}


def make(dtype, **fields):
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32, "heads": 4, "colors": 13, **fields}
    return opinionated(ImageGPT(Config(**sizes)), std=0.25).to(dtype)


@torch.inference_mode()
def logits_of(model, flat, known, poison=False):
    """Logits of the pixels from `known` on; with poison all is NaN that no later slot sees, before every step."""
    logits, cache = prefill(model, flat[:, :known])
    c = model.config
    masks = [m for layer in range(c.layers) for m in masks_of(c.patterns(layer), c.size, True, c.tokens, flat.device)]
    seen = torch.stack([m.dense() for m in masks]).any(0)
    last = (seen * torch.arange(c.tokens).unsqueeze(1)).amax(0)  # the last slot that sees each
    rows, decoder = [logits], Decoder(model, cache)
    for at in range(known, c.tokens - 1):
        if poison:
            kept = places(cache.pages, (last[: at + 1] > at).nonzero().flatten())
            data = cache.data[..., kept, :].clone()
            cache.data.fill_(torch.nan)
            cache.data[..., kept, :] = data
        rows.append(decode_one_token(decoder, flat[:, at]))
    return torch.stack(rows, dim=1), cache


@pytest.fixture
def whole(monkeypatch):
    """Calls a function with whole caches."""

    def call(fn, *args):
        with monkeypatch.context() as patch:
            patch.setattr(cached, "_table_of", lambda config: None)
            return fn(*args)

    return call


@pytest.mark.parametrize(("known", "kernels"), [(0, torch.bfloat16), (63, torch.float32), (230, torch.bfloat16)])
@pytest.mark.parametrize("name", SPARSE)
def test_a_rolling_cache_gives_the_bits_of_a_whole_one(name, known, kernels, whole, one_thread):
    """What is forgotten may be NaN. Plain torch is at work in float64, where errors add up as in test_sample.py."""
    for dtype in [kernels] + [torch.float64] * (name == "heads" and known == 230):
        model = make(dtype, **SPARSE[name])
        flat = pixels(model, 2).flatten(1)
        want, all_slots = whole(logits_of, model, flat, known)
        got, few = logits_of(model, flat, known, poison=True)
        assert all_slots.pages is None and few.data.nbytes < all_slots.data.nbytes
        assert_same(got, want, model.config.tokens * (dtype is torch.float64))


@pytest.mark.parametrize("name", ["neighborhood", "heads"])
def test_images_are_those_of_a_whole_cache(name, whole, one_thread):
    model = make(torch.float32, **SPARSE[name])
    tokens = pixels(model, 2)
    for draw in (lambda: sample(model, n=3, seed=4), lambda: complete(model, tokens, keep=0.6, n=2, seed=4, batch=3)):
        assert torch.equal(draw(), whole(draw))


def test_the_cache_does_not_grow_with_the_image():
    """A neighbourhood of 7 sees 3 rows up and 3 pixels on: so many pages, two more for where they begin, and sos."""
    for height in (16, 128):
        pages = pages_of([compiled("neighborhood(7)", (height, 128))])
        assert pages.count <= 3 + (3 * 128 + 4) // TILE == 9
    fields = {"layers": 24, "width": 512, "heads": 8, "size": (128, 128)}
    for pattern, slots, batch in (("neighborhood(7)", 576, 37), (None, 16384, 1)):  # of 28 and 805 MB each
        config = Config(**fields, pattern=pattern)
        assert cache_slots(config) == slots
        assert default_batch(SimpleNamespace(config=config, wte=torch.empty(0, dtype=torch.bfloat16))) == batch


CASES = [
    (backend, dtype)
    for backend, dtype in served("attention_decode", torch.float32, torch.bfloat16)
    if not (dtype is torch.float32 and backend in CUDA_KERNELS)
]


def scattered(x, count, seed):
    """x [..., T, D] in pages of a cache of `count`, in any order, and the table; elsewhere NaN."""
    tiles = -(-x.size(-2) // TILE)
    pages = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:tiles].int()
    cache = torch.full((*x.shape[:-2], count * TILE, x.size(-1)), torch.nan).to(x.dtype)
    cache[..., places(pages, torch.arange(x.size(-2))), :] = x
    return cache, pages


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@settings(max_examples=12)
@given(
    length=st.integers(1, 400),
    spare=st.integers(0, 2),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    density=st.sampled_from([0.003, 0.1, 1.0]),
    counted=st.booleans(),
    in_bytes=st.booleans(),
    before=st.sampled_from([0, TILE]),
)
def test_attention_reads_pages_wherever_they_are(backend, dtype, length, spare, head_dim, density, **extras):
    """With lengths, prefixes and caches of 8 bits too, where there are kernels for these."""
    counted, in_bytes, before = extras.values() if backend in ("reference", *CUDA_KERNELS) else (False, False, 0)
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 2, 1, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, length, head_dim, generator=generator) for _ in range(2))
    prefix = [torch.randn(1, 2, before, head_dim, generator=generator) for _ in range(2)] if before else []
    seen = torch.rand(before + length, before + length, generator=generator) < density
    lengths = torch.tensor([length, length // 2], dtype=torch.int32) if counted else None
    count = -(-length // TILE) + spare
    (kp, pages), (vp, _) = scattered(k, count, length), scattered(v, count, length)
    scales, scales_there = [], []
    if in_bytes:
        scales = [2.0 ** torch.randint(-3, 3, (2, 2, -(-length // TILE)), generator=generator) for _ in range(2)]
        for s in scales:
            scales_there.append(torch.full((2, 2, count), torch.nan).index_copy(2, pages.long(), s))
        more = [torch.ones(1, 2, 1) for _ in prefix]
        scales, scales_there = scales + more, scales_there + more
    kind = BYTES if in_bytes else dtype
    rest = length, None, lengths, BlockMask.from_dense(seen), [p.to(kind) for p in prefix]
    with use_backend(backend, poison=True):
        want = ops.attention_decode(q, k.to(kind), v.to(kind), *rest, scales)
        got = ops.attention_decode(q, kp.to(kind), vp.to(kind), *rest, scales_there, pages)
    assert_same(got, want, 8 * (backend == "reference"))


@pytest.mark.parametrize("backend", backends("decode_step"))
def test_a_step_puts_its_slot_into_its_page(backend):
    """And nowhere else; logits and slots are those of a whole cache."""
    model = make(torch.float32, pattern="row", size=(20, 13))
    _, cache = prefill(model, pixels(model, 3).flatten(1)[:, :150])
    decoder, pixel = Decoder(model, cache), torch.tensor([3, 1, 4])
    data = torch.randn(*cache.data.shape[:4], 260, 8)
    few, pages = scattered(data, 7, seed=1)
    with use_backend(backend):
        step = pixel, decoder.weights, 151, 1e-5, decoder.masks
        want, got = ops.decode_step(data, *step), ops.decode_step(few, *step, pages)
    assert_same(got, want, 8 * (backend == "reference"))
    assert_same(few[..., places(pages, torch.arange(260)), :], data, 8 * (backend == "reference"))
    assert int(few.isnan().sum()) == few[..., : 7 * TILE - 260, :].numel()


@pytest.mark.parametrize(
    ("pages", "masked", "message"),
    [
        (
            torch.tensor([0, 1]),
            True,
            r"expected pages int32 \[2 or more\], one for each 64 of 80 slots, got torch.int64",
        ),
        (torch.tensor([[0, 1]]).int(), True, r"got torch.int32 \(1, 2\)"),
        (torch.tensor([0, 2]).int(), True, "page 2 is outside a cache of 128 slots, which has 2 pages of 64"),
        (torch.tensor([-1, 0]).int(), True, "page -1 is outside"),
        (torch.tensor([0, 1]).int(), False, "give a mask to every head, or a whole cache and no pages"),
    ],
)
def test_pages_that_do_not_fit_are_refused(pages, masked, message):
    """Nor is a head without a mask, which would see slots that are gone."""
    model = make(torch.float32, pattern="row", size=(8, 16), layers=1)
    weights, pixel = Decoder(model, prefill(model, torch.zeros(1, 0).long())[1]).weights, torch.tensor([0])
    mask, q, cache = compiled("row", (8, 16)), torch.randn(1, 4, 1, 8), torch.randn(1, 1, 2, 4, 128, 8)
    with pytest.raises(InputError, match=f"attention_decode: .*{message}"):
        ops.attention_decode(q, *cache[0].unbind(1), 80, mask=mask if masked else None, pages=pages)
    with pytest.raises(InputError, match=f"decode_step: .*{message}"):
        ops.decode_step(cache, pixel, weights, 79, masks=[(mask, mask if masked else None)], pages=pages)
    few = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InputError, match=r"1\.\.64 keys"):
        ops.attention_decode(q, *cache[0].unbind(1), 80, mask=mask, pages=few)
    with pytest.raises(InputError, match="slots 0 to 63"):
        ops.decode_step(cache, pixel, weights, 79, masks=[mask], pages=few)
