"""Random crops of images, as the published training drew them: of the right sizes and places, an image's own."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_fast.data import fit_palette, load_pixels, open_source, open_tokens, tokenize
from igpt_fast.errors import InputError
from igpt_fast.images import random_view
from igpt_fast.palette import Palette

PALETTE = Palette(np.random.default_rng(1).uniform(-1, 1, (40, 3)).astype(np.float32))
SIZE = (4, 6)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "photos" / ("cat" if number % 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_views_are_crops_of_the_image_at_sides_of_256_to_384():
    ramp = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(0)), 2))
    random, sides, lefts, tops = np.random.default_rng(0), [], [], []
    for _ in range(300):
        view = random_view(image, (32, 32), random).astype(float)
        step = (view[16, 24:, 1] - view[16, :8, 1]).mean() / 24  # source pixels in seven of the crop
        sides.append(7 * 256 / step)
        lefts.append((view[0, :, 1] - step * np.arange(32)).mean() - step / 2)
        tops.append((view[:, 0, 0] - step * np.arange(32)).mean() - step / 2)
        assert (view[..., 1] == view[0, :, 1]).all() and (view[..., 0] == view[:, :1, 0]).all()
    sides, rest = np.array(sides), 256 - 32 * 7 * 256 / np.array(sides)  # rest: how far a crop can lie from the left
    assert 254 < sides.min() < 262 and 378 < sides.max() < 387 and abs(sides.mean() - 320) < 8
    for places in (np.array(lefts), np.array(tops)):
        assert (places > -1).all() and (places < rest + 1).all()
        shares = places / rest
        assert shares.min() < 0.03 and shares.max() > 0.97 and abs(shares.mean() - 0.5) < 0.06


def test_the_longest_side_and_the_farthest_places_are_drawn_too():
    drawn = []

    class Most:
        def integers(self, *ends, endpoint=False):
            drawn.append(ends[-1] - (not endpoint))
            return drawn[-1]

    random_view(Image.new("RGB", (256, 256)), (32, 32), Most())
    assert drawn == [384, 384 - 224, 384 - 224]


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 500)] * 2), st.tuples(*[st.integers(1, 260)] * 2), st.integers(0, 99))
def test_any_image_gives_views_of_any_size_in_its_own_colour(shape, size, seed):
    image = Image.fromarray(np.full((*shape, 3), (10, 128, 250), np.uint8))
    view = random_view(image, size, np.random.default_rng(seed))
    assert view.shape == (*size, 3) and (view == (10, 128, 250)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_has_so_many_rows_with_its_name_and_label(folder, tmp_path, workers):
    data = tokenize(folder, PALETTE, tmp_path / "t", SIZE, views=3, workers=workers, shard_images=7)
    source = open_source(folder)
    assert data.names == [name for name in source.names for _ in range(3)] and data.meta["views"] == 3
    assert data.labels.tolist() == np.repeat(source.labels, 3).tolist()
    tokens = data.batch(np.arange(27)).numpy().reshape(9, 3, *SIZE)
    for name, views in zip(source.names, tokens, strict=True):
        content = (folder / name).read_bytes()
        random = np.random.default_rng(list(hashlib.blake2b(content, digest_size=16).digest()))
        image = Image.open(folder / name)
        want = [PALETTE.encode(random_view(image, SIZE, random)) for _ in range(3)]
        np.testing.assert_array_equal(views, want)
        assert (views[0] != views[1]).any() and (views[1] != views[2]).any()
    for part in ("train", "val"):  # no image is on both sides
        rows = data.split(part, 0.4)
        assert len(rows) % 3 == 0 and (rows.reshape(-1, 3) // 3 == rows[::3, None] // 3).all()


def test_views_are_an_images_own_whatever_is_around_it(folder, tmp_path):
    whole = tokenize(folder, PALETTE, tmp_path / "a", SIZE, views=2)
    (folder / "cat" / "1.png").write_bytes(b"no image")
    (folder / "cat" / "2.png").rename(folder / "dog" / "zz.png")
    less = tokenize(folder, PALETTE, tmp_path / "b", SIZE, views=2, on_error="skip")
    assert less.names == [name for name in open_source(folder).names if name != "cat/1.png" for _ in range(2)]
    assert [s["name"] for s in less.meta["skipped"]] == ["cat/1.png"] and len(less) == 16

    def tokens(data, name):
        return data.batch(np.flatnonzero(np.array(data.names) == name)).numpy()

    for name in set(less.names):
        old = "cat/2.png" if name == "dog/zz.png" else name
        np.testing.assert_array_equal(tokens(less, name), tokens(whole, old))


def test_views_are_part_of_how_tokens_were_made(folder, tmp_path):
    tokenize(folder, PALETTE, tmp_path / "t", SIZE, views=2)
    assert len(open_tokens(folder, PALETTE, tmp_path / "t", size=SIZE, views=2)) == 18
    with pytest.raises(InputError, match="views is 2, not 0"):
        open_tokens(folder, PALETTE, tmp_path / "t", size=SIZE)
    assert fit_palette(folder, 8, views=2)[1] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, "views is -1"),
        ({"views": 101}, "up to 100"),
        ({"views": 2, "resize": "hf"}, "'hf' crops nothing"),
    ],
)
def test_views_that_make_no_sense_are_refused(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        tokenize(folder, PALETTE, tmp_path / "t", **options)
    with pytest.raises(InputError, match="views is 2; pixels are loaded as the evaluation crops them"):
        load_pixels(folder, views=2)


def test_the_command_line_says_what_they_are(folder, tmp_path, igpt):
    PALETTE.save(tmp_path / "p.npy")
    words = ("tokenize", folder, "--palette", tmp_path / "p.npy", "-o", tmp_path / "t", "--size", "4x6", "--views", 2)
    code, printed, said = igpt(*words, "--json")
    assert code == 0 and '"views": 2' in printed and "18 random crops of 9 images" in said
    assert "less than or equal to 100" in igpt(*words[:-1], 101)[2]


def test_other_bands_are_other_tokens(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 3000, (3, *SIZE, 5), np.uint16))
    how = {"size": SIZE, "bands": (3, 2, 1), "value_range": (0, 3000)}
    tokens = open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", **how)
    numbers = np.load(tmp_path / "x.npy")[..., 2::-1]
    pixels = ((numbers.astype(int) * 510 + 3000) // 6000).astype(np.uint8)
    assert (tokens.shards[0] == np.asarray(PALETTE.encode(pixels))).all()
    assert len(open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", **how)) == 3
    with pytest.raises(InputError, match=r"bands is \[3, 2, 1\], not \[1, 2, 3\]"):
        open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", **{**how, "bands": [1, 2, 3]})


def test_tokens_that_note_the_bits_of_grayscale_are_used_again(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 4096, (3, *SIZE), np.uint16))
    how = {"size": SIZE, "value_range": (0, 4095)}
    open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", **how)
    meta = json.loads((tmp_path / "t" / "meta.json").read_text())
    meta = {**{k: v for k, v in meta.items() if k not in ("value_range", "bands")}, "gray_bits": 12}
    (tmp_path / "t" / "meta.json").write_text(json.dumps(meta))
    assert len(open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", **how)) == 3
    with pytest.raises(InputError, match=r"value_range is \[0, 4095\], not None"):
        open_tokens(tmp_path / "x.npy", PALETTE, tmp_path / "t", size=SIZE)
