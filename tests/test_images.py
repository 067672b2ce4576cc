"""Every kind of image becomes the RGB pixels that it shows; resizing does what its docstring says; damage is named."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_fast.errors import InputError
from igpt_fast.image_files import FORMATS, read_image
from igpt_fast.images import parse_background, resize_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # neither square nor symmetric: a turned image shows
HALF = 25.1 / 49  # the farthest that Pillow's whole-number arithmetic rounds a mean of 7×7
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def read(image: Image.Image | bytes, kind: str = "PNG", background: str = "white", **options: object) -> np.ndarray:
    data = image if isinstance(image, bytes) else encode(image, kind, **options)
    result = read_image(data, "some/file.png", background)
    assert result.mode == "RGB"
    return np.asarray(result)


def composite(rgb: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    alpha = alpha[..., None].astype(np.int64)
    exact = rgb * alpha + np.array(background) * (255 - alpha)
    return ((2 * exact + 255) // 510).astype(np.uint8)  # /255, to the nearest


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_rgb_comes_through_exactly(kind):
    assert (read(Image.fromarray(RGB), kind) == RGB).all()


def test_lossless_webp_and_gif_come_through():
    assert (read(Image.fromarray(RGB), "WEBP", lossless=True, exact=True) == RGB).all()
    two = Image.fromarray(np.where(ALPHA > 127, 255, 0).astype(np.uint8))
    frames = encode(two, "GIF", save_all=True, append_images=[Image.new("L", two.size, 77)])
    assert (read(frames) == np.asarray(two)[..., None]).all()  # the first frame


def test_grayscale_is_repeated():
    assert (read(Image.fromarray(ALPHA)) == ALPHA[..., None]).all()


@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#20a040", (32, 160, 64))]
)
def test_alpha_is_composited_on_the_background(background, colour):
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    assert (read(rgba, background=background) == composite(RGB, ALPHA, colour)).all()
    la = Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(ALPHA)])
    gray = np.repeat(RGB[..., :1], 3, axis=2)
    assert (read(la, background=background) == composite(gray, ALPHA, colour)).all()


def test_palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    plain = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert read(image).tolist() == plain
    assert read(image, transparency=1, background="red").tolist() == [[[10, 20, 30], [255, 0, 0], [70, 80, 90]]]
    faded = read(image, transparency=bytes([255, 128, 0]), background="black")
    assert faded.tolist() == [[[10, 20, 30], [20, 25, 30], [0, 0, 0]]]


def test_one_transparent_colour():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert read(rgb, transparency=(4, 5, 6)).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    gray = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read(gray, transparency=7, background="blue").tolist() == [[[0, 0, 255], [8, 8, 8]]]


def test_one_bit():
    bits = ALPHA > 127
    assert (read(Image.fromarray(bits)) == np.where(bits, 255, 0)[..., None]).all()


def test_sixteen_bit_is_scaled_not_clipped():
    values = np.array([[0, 127, 129, 257, 300, 32768, 65278, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1, 1, 128, 254, 255, 255]])  # v / 257, rounded; clipping would give 255 from 300 on
    for kind in ("PNG", "TIFF"):
        assert (read(Image.fromarray(values), kind) == expected[..., None]).all(), kind
    wide = b"P5\n9 1\n65535\n" + values.astype(">u2").tobytes()
    assert (read(wide) == expected[..., None]).all()
    turned = read(Image.fromarray(65535 - values), "TIFF", tiffinfo={262: 0})  # photometric: 0 is white
    assert (turned == expected[..., None]).all()
    marked = read(Image.fromarray(values), transparency=300, background="#010203")
    assert marked[0, 4].tolist() == [1, 2, 3]
    assert marked[0, 3].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_sixteen_bits_that_hold_fewer(bits):
    top = (1 << bits) - 1
    values = np.array([[0, 1, top // 3, top - 1, top]], np.uint16)
    expected = np.floor(values / top * 255 + 0.5)[..., None].repeat(3, 2)
    for kind in ("PNG", "TIFF"):
        seen = read_image(encode(Image.fromarray(values), kind), "x", value_range=(0, top))
        assert (np.asarray(seen) == expected).all() and not seen.info
    turned = read_image(encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0}), "x", value_range=(0, top))
    assert (np.asarray(turned) == 255 - expected).all()


def test_cmyk_jpeg():
    flat = {"white": (0, 0, 0, 0), "black": (0, 0, 0, 255), "red": (0, 255, 255, 0), "cyan": (255, 0, 0, 0)}
    for name, ink in flat.items():
        seen = read(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100).astype(int)
        assert np.abs(seen - parse_background(name)).max() <= 3, name


def test_ycbcr_tiff():
    seen = read(Image.fromarray(RGB).convert("YCbCr"), "TIFF").astype(int)
    assert np.abs(seen - RGB).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    """The pixels stored are those that EXIF's turn brings to RGB."""
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](RGB)))
    assert (read(stored, exif=exif) == RGB).all()


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1), (6, 9, 2), (6, 9, 3), (6, 9, 4)])
def test_array_rows(shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    seen = np.asarray(read_image(pixels, "x.npy", "black"))
    planes = pixels.reshape(6, 9, -1)
    if planes.shape[2] in (2, 4):
        planes = composite(planes[..., :-1], planes[..., -1], (0, 0, 0))
    assert (seen == planes).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"this is no image", "not an image"),
        (encode(Image.fromarray(RGB))[:60], "some/file.png"),
        (encode(Image.fromarray(np.tile(RGB, (20, 20, 1))), "JPEG")[:900], "truncated"),
        (encode(Image.new("LAB", (2, 2)), "TIFF"), "LAB"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start another program
    ],
)
def test_what_cannot_be_decoded_is_named(data, reason):
    with pytest.raises(InputError, match=r"some/file.png.*mend or remove") as error:
        read(data)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert "EPS" not in FORMATS


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_damage_escapes(data):
    """Whatever is done to a file, the outcome is an image or an InputError that names the file."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    whole = bytearray(encode(Image.fromarray(RGB), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read(bytes(whole)).ndim == 3
    except InputError as error:
        assert str(error).startswith("some/file.png: ")


def test_decompression_bombs_are_refused(monkeypatch):
    data = encode(Image.new("L", (40, 30)))
    for limit in (700, 300):  # Pillow itself only warns about 1200 pixels at a limit of 700, and raises at 300
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"bomb.*; cut it into smaller ones, or remove the file"):
            read(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert read(data).shape == (30, 40, 3)


@pytest.mark.parametrize("text", ["", "whiteish", "#12", "rgba(1,2,3,4)", "#11223344"])
def test_bad_background(text):
    with pytest.raises(InputError, match="background"):
        parse_background(text)


def resized(pixels: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    result = resize_image(Image.fromarray(pixels), size, how, "a.png")
    assert result.shape == (*size, 3)
    assert result.dtype == np.uint8
    return result


def blocks(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mean of equal blocks."""
    h, w = pixels.shape[0] // size[0], pixels.shape[1] // size[1]
    return pixels.reshape(size[0], h, size[1], w, 3).mean((1, 3))


def test_paper_is_the_mean_of_the_centre_crops_blocks():
    pixels = RNG.integers(0, 256, (224, 301, 3), dtype=np.uint8)  # short side 224 already: only cropped and reduced
    expected = blocks(pixels[:, 38 : 38 + 224], (32, 32))
    assert np.abs(resized(pixels, (32, 32), "paper") - expected).max() <= HALF


def test_paper_scales_the_short_side_first():
    pixels = RNG.integers(0, 256, (600, 448, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((224, 300), Image.Resampling.BILINEAR))
    expected = blocks(small[38 : 38 + 224], (32, 32))
    assert np.abs(resized(pixels, (32, 32), "paper") - expected).max() <= HALF


@pytest.mark.parametrize("shape", [(56, 80), (210, 223), (33, 40), (100, 75)])
def test_paper_enlarges_a_small_image_to_its_window(shape):
    pixels, short = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), min(shape)
    height, width = (round(side * 224 / short) for side in shape)
    large = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = blocks(large[top : top + 224, left : left + 224], (32, 32))
    # Pillow holds the place of a crop in float32, so a few values of a block round the other way.
    assert np.abs(resized(pixels, (32, 32), "paper") - expected).max() <= 1


def test_a_thin_image_is_not_enlarged_as_a_whole(monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *given: made.append(resize(*given)) or made[-1])
    pixels = RNG.integers(0, 256, (2, 60_001, 3), dtype=np.uint8)
    expected = resized(pixels[:, 29_998:30_003], (32, 32), "paper")
    assert np.abs(resized(pixels, (32, 32), "paper").astype(int) - expected).max() <= 1
    assert {image.size for image in made} == {(224, 224)}


def test_paper_takes_whole_multiples_as_they_are():
    exact = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (resized(exact, (32, 32), "paper") == exact).all()
    wide = RNG.integers(0, 256, (64, 100, 3), dtype=np.uint8)
    assert np.abs(resized(wide, (32, 32), "paper") - blocks(wide[:, 18:82], (32, 32))).max() <= HALF


def test_paper_on_a_grid_that_is_not_square():
    pixels = RNG.integers(0, 256, (224, 448, 3), dtype=np.uint8)  # window 224×336
    expected = blocks(pixels[:, 56 : 56 + 336], (32, 48))
    assert np.abs(resized(pixels, (32, 48), "paper") - expected).max() <= HALF


def test_hf_is_pillows_bilinear_on_the_whole_image():
    pixels = RNG.integers(0, 256, (50, 90, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((24, 16), Image.Resampling.BILINEAR)
    assert (resized(pixels, (16, 24), "hf") == np.asarray(expected)).all()


def test_none_demands_the_size():
    assert (resized(RGB, (6, 9), "none") == RGB).all()
    with pytest.raises(InputError, match=r"a\.png: is 6x9, not 9x6 .*--resize paper, or, .* --size 6x9"):
        resized(RGB, (9, 6), "none")


@settings(deadline=None, max_examples=80)
@given(st.tuples(*[st.integers(1, 700)] * 2), st.tuples(*[st.integers(1, 300)] * 2), st.sampled_from(["paper", "hf"]))
def test_any_shape_gives_the_size_and_keeps_a_flat_colour(shape, size, how):
    assert (resized(np.full((*shape, 3), (10, 128, 250), np.uint8), size, how) == (10, 128, 250)).all()


def test_unknown_resize():
    with pytest.raises(InputError, match="'crop' is not known; give one of paper, hf, none"):
        resized(RGB, (6, 9), "crop")
