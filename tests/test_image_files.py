"""Files in which Pillow alone would take one number for another, or lose what is transparent."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from test_images import encode

from igpt_fast.errors import InputError
from igpt_fast.image_files import PAGES, read_image
from igpt_fast.images import Preprocessing
from igpt_fast.values import Values, to_8_bits

NODATA = [(42113, "s", 0, "0", True)]  # GDAL's tag, of 0


def tiff(numbers: np.ndarray, photometric: str = "minisblack", **options: object) -> bytes:
    buffer, options = io.BytesIO(), {"planarconfig": "contig", **options}
    tifffile.imwrite(buffer, numbers, photometric=photometric, metadata=None, **options)
    return buffer.getvalue()


def png(depth: int, kind: int, row: bytes, width: int, transparent: bytes = b"") -> bytes:
    """A row of pixels, also as Pillow writes no PNG. kind: 0 gray, 2 colours, 6 with alpha."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    head += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def gray_png(depth: int, row: bytes, width: int, transparent: int) -> bytes:
    return png(depth, 0, row, width, struct.pack(">H", transparent))


def read(data: bytes, **options: object) -> list:
    """The first row, with lime behind what is transparent."""
    return np.asarray(read_image(data, "x", "lime", **options))[0].tolist()


LIME = [0, 255, 0]


def gray(value: int) -> list[int]:
    return [value] * 3


def test_signed_bytes_are_no_bytes():
    data = tiff(np.array([[-128, -1, 0, 127]], np.int8))
    with pytest.raises(InputError, match="values of int8 say of themselves neither what is black"):
        read(data)
    assert read(data, value_range=(-128, 127)) == [gray(0), gray(127), gray(128), gray(255)]


def test_nodata_is_transparent_in_every_kind_of_tiff():
    deep = np.array([[[0, 0, 0], [65535, 0, 257]]], np.uint16)
    assert read(tiff(deep, "rgb", extratags=NODATA)) == [LIME, [255, 0, 1]]
    white = np.array([[0, 255, 200]], np.uint8)
    assert read(tiff(white, "miniswhite", extratags=NODATA)) == [LIME, gray(0), gray(55)]
    assert read(tiff(white.astype(np.uint16) * 257, "miniswhite", extratags=NODATA))[0] == LIME
    table = np.arange(768, dtype=np.uint16).reshape(3, 256) * 64
    found = read(tiff(np.array([[0, 3, 200]], np.uint8), "palette", colormap=table, extratags=NODATA))
    assert found[0] == LIME and LIME not in found[1:]
    assert found[1:] == read(tiff(np.array([[3, 200]], np.uint8), "palette", colormap=table))


@pytest.mark.parametrize("bands", [None, (1,)])
def test_a_transparent_shade_of_a_png(bands):
    plain = Image.fromarray(np.array([[9, 200]], np.uint8))
    assert read(encode(plain, transparency=200), bands=bands) == [gray(9), LIME]
    assert read(gray_png(1, b"\x40", 2, 1), bands=bands) == [gray(0), LIME]
    assert read(gray_png(2, b"\x1b", 4, 2), bands=bands) == [gray(0), gray(85), LIME, gray(255)]
    assert read(gray_png(4, b"\x3f", 2, 3), bands=bands) == [LIME, gray(255)]


def test_a_transparent_colour_of_a_png():
    image = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert read(image) == [LIME, [4, 5, 6]] and read(image, bands=(3, 2, 1)) == [LIME, [6, 5, 4]]
    deep = struct.pack(">9H", 257, 514, 771, 257, 514, 772, 65535, 0, 257)  # the second differs in its low byte alone
    image = png(16, 2, deep, 3, deep[:6])
    for options in ({}, {"value_range": (0, 65535)}):
        assert read(image, **options) == [LIME, [1, 2, 3], [255, 0, 1]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_two_bands_are_gray_and_opacity_only_where_the_file_says_so(kind):
    pair = np.array([[[9, 200], [7, 0]]], kind)
    with pytest.raises(InputError, match="it has 2 bands"):
        read(tiff(pair, extrasamples=["unspecified"]))
    if kind is np.uint8:
        assert read(tiff(pair, extrasamples=["unassalpha"]))[1] == LIME


def test_complex_numbers_are_refused():
    with pytest.raises(InputError, match="complex numbers are no brightness"):
        read(tiff(np.ones((2, 2), np.complex64)), value_range=(0, 1))


def test_a_tall_image_takes_no_longer_than_a_wide_one():
    numbers = np.linspace(0, 1, 3_000_001, dtype=np.float32)
    began = time.monotonic()
    tall = to_8_bits(Values(numbers.reshape(-1, 1, 1)), value_range=(0, 1))[0]
    assert time.monotonic() - began < 3
    wide = to_8_bits(Values(numbers.reshape(1, -1, 1)), value_range=(0, 1))[0]
    assert np.array_equal(np.asarray(tall).reshape(-1), np.asarray(wide).reshape(-1))


@pytest.mark.parametrize("ends", [(-1e308, 1e308), (0, 1e306), (0, 10**307), (0, 10**400), 5, "05", (0, None)])
def test_ranges_that_no_number_can_be_measured_by(ends):
    with pytest.raises(InputError, match="is not two numbers: the value of black, then a larger one of white"):
        Preprocessing(value_range=ends)


@pytest.mark.parametrize(("options", "name"), [({"bands": 1}, "bands"), ({"background": None}, "background")])
def test_options_of_another_type(options, name):
    with pytest.raises(InputError, match=f"^{name} "):
        Preprocessing(**options)


def test_few_of_the_values_that_could_be_stored_are_noted():
    values = np.array([[[0], [1000], [8191]]], np.float64)
    for low, dim in ((-32768.0, True), (0.0, True), (-1024.0, True)):
        assert to_8_bits(Values(values, bounds=(low, low + 65535)))[1] is dim
    assert not to_8_bits(Values(values * 1.1, bounds=(0.0, 65535.0)))[1]
    assert not to_8_bits(Values(values, bounds=(0.0, 65535.0)), value_range=(0, 65535))[1]
    assert not to_8_bits(Values(values, bounds=(0.0, 65535.0), window=(0.0, 9e4)))[1]


def test_nodata_of_sixteen_bits_beside_bands_that_are_no_colours():
    """As many tiles have near infrared behind red, green and blue."""
    deep = np.array([[[0, 0, 0, 9], [65535, 0, 257, 9]]], np.uint16)
    assert read(tiff(deep, "rgb", extrasamples=["unspecified"], extratags=NODATA)) == [LIME, [255, 0, 1]]
    assert read(tiff(deep, "rgb", extrasamples=["assocalpha"], extratags=NODATA))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_nodata_beside_opacity(kind):
    """Transparent is what either says."""
    whole = np.iinfo(kind).max
    colours = np.array([[[0, 0, 0, whole], [whole, 0, whole, whole], [whole, whole, 0, 0]]], kind)
    assert read(tiff(colours, "rgb", extrasamples=["unassalpha"], extratags=NODATA)) == [LIME, [255, 0, 255], LIME]
    grays = np.array([[[0, 255], [51, 255], [51, 0]]], np.uint8)
    assert read(tiff(grays, extrasamples=["unassalpha"], extratags=NODATA)) == [LIME, gray(51), LIME]


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_nodata_of_few_bits_is_a_number_of_the_files(bits, white):
    """Which Pillow spreads over a byte."""
    shades = (1 << bits) - 1
    for nodata in (0, shades, shades + 1, 51, 255):
        row = sum(value << (8 - bits * (at + 1)) for at, value in enumerate((0, shades)))
        data = few_bits_tiff(bits, bytes([row]), 2, white, str(nodata))
        wanted = [gray(0), gray(255)] if white else [gray(255), gray(0)]
        found = {0: 0, shades: 1}.get(nodata)
        assert read(data) == [LIME if at == found else shade for at, shade in enumerate(wanted)]


def few_bits_tiff(bits: int, row: bytes, width: int, photometric: int, nodata: str) -> bytes:
    text = nodata.encode().ljust(4, b"\0")
    tags = [(256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(row)), (42113, 2, 4, text)]
    entries = [
        struct.pack("<HHI", *tag[:3]) + (v if type(v := tag[3]) is bytes else struct.pack("<I", v)) for tag in tags
    ]
    head = b"II*\0" + struct.pack("<I", 8 + len(row) + len(row) % 2) + row.ljust(len(row) + len(row) % 2, b"\0")
    return head + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("extra", [(), ("unassalpha",)])
def test_sixteen_bits_one_band_behind_the_other(compression, extra):
    """Pillow takes planes that nobody has compressed for bytes."""
    of_bands = (0x1111, 0x3333, 0x5555, 0xFFFF)[: 3 + len(extra)]
    planes = np.stack([np.full((3, 4), value, np.uint16) for value in of_bands])
    data = tiff(planes, "rgb", planarconfig="separate", compression=compression, extrasamples=extra)
    assert read(data) == [[0x11, 0x33, 0x55]] * 4
    assert read(data, value_range=(0, 2 * 0x5555 + 1))[0] == [25, 76, 127]


def test_a_stack_is_known_by_its_second_page(monkeypatch):
    pages = [Image.new("L", (4, 4), gray) for gray in range(20)]
    data, seen = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]), []
    real = TiffImageFile.seek
    monkeypatch.setattr(TiffImageFile, "seek", lambda self, page: seen.append(page) or real(self, page))
    assert read_image(data, "x").info == {PAGES: True} and max(seen) == 1


def test_frames_of_other_kinds_are_noted():
    frames = [Image.new("L", (4, 4), gray) for gray in (0, 255)]
    for kind in ("GIF", "PNG", "WEBP"):
        assert PAGES in read_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]), "x").info


@pytest.mark.parametrize("mode", ["LA", "RGB", "P", "I;16"])
def test_changed_pixels_of_a_png_are_known_by_their_checksum(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 2), np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(pixels)
    data = encode(image.convert(mode), "PNG")
    assert read_image(data, "x").size == (20, 24)
    begin, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for place in range(begin, end):
        with pytest.raises(InputError, match=r"^x: .*; mend or remove the file$"):
            read_image(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], "x")
    with pytest.raises(InputError, match="x: it is cut short"):
        read_image(data[: data.index(b"IEND") - 6], "x")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", None])
def test_a_tiff_that_is_cut_in_its_tags_is_refused(compression):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    data = encode(image, "TIFF", compression=compression, tiffinfo={42113: "0", 274: 6})
    assert read_image(data, "x").size == (24, 20)
    for left in range(1, 60):
        with pytest.raises(InputError, match=r"^x: .*; mend or remove the file$"):
            read_image(data[:-left], "x")


@pytest.mark.parametrize("tag", [65000, 270, 305, 34675])
def test_a_lost_tag_that_says_nothing_of_pixels_is_no_damage(tag):
    data = encode(
        Image.new("RGB", (4, 4), "red"), "TIFF", tiffinfo={tag: b"bytes" if tag == 34675 else "a text of ours"}
    )
    begin = int.from_bytes(data[4:8], "little") + 2
    at = next(at for at in range(begin, len(data), 12) if data[at : at + 2] == struct.pack("<H", tag))
    lost = data[: at + 4] + struct.pack("<I", 1 << 30) + data[at + 8 :]
    assert read(lost)[0] == [255, 0, 0]


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_that_ends_behind_its_last_tag_is_whole(big):
    """Without the place of a next page, which there is not."""
    data = tiff(np.full((2, 2, 3), 9, np.uint8), "rgb", bigtiff=big)
    wide, entry, head = (8, 20, 8) if big else (4, 12, 2)
    at = int.from_bytes(data[8 if big else 4 :][:wide], "little")
    count = int.from_bytes(data[at : at + head], "little")
    tags = data[at : at + head + entry * count]
    moved = data[: 8 if big else 4] + len(data).to_bytes(wide, "little") + data[(8 if big else 4) + wide :] + tags
    assert read(moved)[0] == gray(9)
    with pytest.raises(InputError, match="x: its tags are cut short; mend or remove the file"):
        read(moved[:-1])


def test_black_and_white_is_not_dim():
    assert to_8_bits(Values(np.array([[[True], [False]]])))[1] is False


def test_the_nodata_of_a_palettes_image_is_no_shade():
    table = np.full((3, 256), 40 << 8, np.uint16)
    table[:, 5] = 0  # black, which is not the index 0
    data = tiff(np.array([[0, 5, 7]], np.uint8), "palette", colormap=table, extratags=NODATA)
    assert read(data) == read(data, bands=(1, 2, 3)) == [LIME, gray(0), gray(40)]


def test_of_an_arrays_bands_none_is_opacity_where_they_are_asked_for():
    assert read(np.array([[[1, 2, 3, 0]]], np.uint8), bands=(3, 2, 1)) == [[3, 2, 1]]
