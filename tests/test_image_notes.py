"""What is lost of an image on its way to 8 bits, and is noted."""

import io
import struct

import numpy as np
import tifffile
from PIL import Image
from test_image_files import NODATA, png, tiff
from test_images import encode

from igpt_fast.image_files import BYTES, DARK, PAGES, read_image


def colours(largest: int, depth: int, alpha: bool = False) -> dict:
    """What is noted of a PNG of one colour pixel, which Pillow does not write in 16 bits."""
    values = [0, 7, largest, 255][: 3 + alpha]
    row = struct.pack(f">{len(values)}{'H' if depth == 16 else 'B'}", *values)
    return read_image(png(depth, 6 if alpha else 2, row, 1), "x").info


def test_colours_of_sixteen_bits_that_are_nearly_black():
    assert colours(4095, 16) == {DARK: True} and colours(8192, 16) == {} == colours(31, 8)
    assert colours(4095, 16, True) == {DARK: True} and colours(8192, 16, True) == {} == colours(31, 8, True)


def test_what_is_lost_is_noted():
    def noted(values: list, **options: int) -> dict:
        return read_image(encode(Image.fromarray(np.array([values], np.uint16))), "x", **options).info

    assert noted([0, 4095]) == {DARK: True} and noted([0, 8192]) == {} == noted([0, 4095], value_range=(0, 4095))
    pages = [Image.new("L", (4, 4), gray) for gray in (9, 200)]
    stack = read_image(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]), "x")
    assert stack.info == {PAGES: True} and (np.asarray(stack) == 9).all()
    assert read_image(encode(pages[0], "TIFF"), "x").info == {}
    volume = tiff(np.zeros((2, 16, 16), np.uint8), volumetric=True, tile=(2, 16, 16))
    assert read_image(volume, "x").info == {PAGES: True}, "the first slice of several"


def test_pages_behind_the_first_are_noted_whatever_reads_it():
    gray = np.full((6, 8), 200, np.uint8)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(gray, photometric="minisblack")
        file.write(gray, photometric="minisblack")
    start = tifffile.TiffFile(io.BytesIO(buffer.getvalue())).pages[1].offset
    assert read_image(buffer.getvalue()[: start + 6], "x").info == {PAGES: True}, "a damaged one, too"
    buffer, deep = io.BytesIO(), np.full((6, 8, 3), 60000, np.uint16)
    with tifffile.TiffWriter(buffer) as file:
        for _ in range(2):
            file.write(deep, photometric="rgb", extratags=NODATA)
    assert read_image(buffer.getvalue(), "x").info == {PAGES: True}
    photos = [Image.new("RGB", (16, 16), shade) for shade in ("red", "blue")]
    taken = read_image(encode(photos[0], "MPO", save_all=True, append_images=photos[1:]), "x")
    assert taken.info == {} and taken.getpixel((0, 0))[0] > 200, "of a camera's pictures of one moment the first counts"


def test_a_pgm_says_itself_what_is_white():
    data = b"P5\n3 1\n4095\n" + np.array([0, 300, 4095], ">u2").tobytes()
    plain, stretched = read_image(data, "x"), read_image(data, "x", value_range=(0, 300))
    assert np.asarray(plain)[0, :, 0].tolist() == [0, 19, 255] and plain.info == {}
    assert np.array_equal(plain, stretched) and stretched.info == {BYTES: True}
