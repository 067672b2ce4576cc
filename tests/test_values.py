"""Numbers of any kind to 8 bits: which bands, which values are black and white, and what nobody measured."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast.errors import InputError
from igpt_fast.image_files import BYTES, DARK, read_image
from igpt_fast.values import Values, to_8_bits

KINDS = ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


def grays(numbers: object, **options: object) -> np.ndarray:
    """One row of gray values as they come out."""
    return np.asarray(read_image(np.asarray(numbers)[None], "x", **options))[0, :, 0]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_values_are_stretched_as_written(data):
    kind = np.dtype(data.draw(st.sampled_from(KINDS[1:])))
    least, most = (-(2**40), 2**40) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    low = data.draw(st.integers(least, most - 1))
    high = data.draw(st.integers(low + 1, most))
    values = data.draw(st.lists(st.integers(least, most) | st.integers(low, high), min_size=1, max_size=20))
    numbers = np.array(values).astype(kind)
    expected = [(510 * (min(max(int(v), low), high) - low) + high - low) // (2 * (high - low)) for v in numbers]
    assert grays(numbers, value_range=(low, high)).tolist() == expected


def test_unsigned_types_say_what_is_white_and_bytes_stay():
    assert grays(np.array([0, 128, 129, 65535], np.uint16)).tolist() == [0, 0, 1, 255]  # v / 257, rounded
    assert grays(np.array([False, True])).tolist() == [0, 255]
    every = np.arange(256, dtype=np.uint8)
    assert (grays(every) == every).all() and (grays(every, value_range=(0, 9)) == every).all()
    assert read_image(every[None], "x", value_range=(0, 9)).info == {BYTES: True}
    assert read_image(np.full((2, 2), 4095, np.uint16), "x").info == {DARK: True}
    assert read_image(np.full((2, 2), 4095, np.uint16), "x", value_range=(0, 4095)).info == {}
    assert not to_8_bits(Values(np.full((2, 2, 1), 57000, np.uint16)))[1]
    assert to_8_bits(Values(np.full((2, 2, 1), 57400, np.uint16), white_is_0=True))[1]


@pytest.mark.parametrize("kind", ["int16", "uint32", "float32"])
def test_other_types_have_to_be_told(kind):
    with pytest.raises(InputError, match=rf"scan: values of {kind} say .*here they run from 3 to 700.: --value-range"):
        read_image(np.array([[3, 700]], kind), "scan")
    with pytest.raises(InputError, match="--value-range"):
        read_image(np.full((1, 2), np.nan), "scan")


def test_where_white_is_0():
    numbers = np.array([[[0], [1000], [4095]]], np.uint16)
    image, _ = to_8_bits(Values(numbers, white_is_0=True), value_range=(0, 4095))
    assert np.asarray(image)[0].tolist() == [255, 255 - 62, 0]


def test_bands_are_counted_from_one():
    numbers = np.random.default_rng(0).integers(0, 256, (3, 4, 7), np.uint8)
    seen = np.asarray(read_image(numbers, "x", bands=(4, 3, 2)))
    assert (seen == numbers[..., [3, 2, 1]]).all()
    assert (np.asarray(read_image(numbers, "x", bands=(7,))) == numbers[..., 6:]).all()
    with pytest.raises(InputError, match=re.escape("tile: it has 7 bands: --bands (bands) says which become red")):
        read_image(numbers, "tile")
    with pytest.raises(InputError, match=re.escape("tile: it has 7 bands, so there is no band 8, as --bands (bands)")):
        read_image(numbers, "tile", bands=(8,))


def test_four_bands_that_are_no_bytes_have_no_opacity():
    numbers = np.random.default_rng(0).integers(0, 3000, (3, 4, 4)).astype(np.uint16)
    for kind in ("uint16", "float32"):
        with pytest.raises(InputError, match="it has 4 bands: --bands"):
            read_image(numbers.astype(kind), "tile", value_range=(0, 3000))
    seen = np.asarray(read_image(numbers, "tile", bands=(4, 2, 1), value_range=(0, 3000)))
    assert (seen == (numbers[..., [3, 1, 0]].astype(int) * 510 + 3000) // 6000).all()
    rgba = np.full((1, 1, 4), (9, 9, 9, 0), np.uint8)
    assert np.asarray(read_image(rgba, "x", background="red")).tolist() == [[[255, 0, 0]]]


def test_who_asks_for_the_opacity_gets_it():
    numbers = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8)
    assert (np.asarray(to_8_bits(Values(numbers, alpha=True), (4,))[0]) == numbers[..., 3]).all()
    assert (np.asarray(to_8_bits(Values(numbers, alpha=True), (3, 2, 1))[0]) == numbers[..., [2, 1, 0, 3]]).all()
    deep = numbers.astype(np.uint16) * 257
    assert (np.asarray(to_8_bits(Values(deep, alpha=True), value_range=(0, 65535))[0]) == numbers).all()


def test_what_nobody_measured_is_transparent():
    red = [255, 0, 0]
    numbers = np.array([[0.0, np.nan, 1.0, np.inf, -np.inf]], np.float32)
    seen = np.asarray(read_image(numbers, "x", background="red", value_range=(0, 1)))[0]
    assert seen.tolist() == [[0, 0, 0], red, [255, 255, 255], [255, 255, 255], [0, 0, 0]]
    one_missing = np.array([[[0.0, np.nan, 1.0], [0.0, 0.5, 1.0]]])
    assert np.asarray(read_image(one_missing, "x", background="red", value_range=(0, 1)))[0, 0].tolist() == red
    bands = np.array([[[9, 9, 9], [9, 9, 8]]], np.uint8)  # only where no band holds anything
    seen, _ = to_8_bits(Values(bands, nodata=9))
    assert np.asarray(seen)[0, :, 3].tolist() == [0, 255]


def test_what_nobody_measured_has_no_say():
    numbers = np.array([[[100], [4095], [65535]]], np.uint16)
    assert to_8_bits(Values(numbers, nodata=65535))[1] and not to_8_bits(Values(numbers))[1]
    holes = np.array([[[-9999.0], [5000.0], [6000.0]]])
    assert to_8_bits(Values(holes, nodata=-9999.0), value_range=(0, 3000))[1], "all that was measured is white"
    for nothing in (np.full((1, 2, 1), 7, np.uint16), np.full((1, 2, 1), np.nan)):
        window = None if nothing.dtype == np.uint16 else (0, 1)
        image, dim = to_8_bits(Values(nothing, nodata=7), value_range=window)
        assert not dim and not np.asarray(image)[..., -1].any()


def test_all_that_hides_a_pixel_does():
    both = np.array([[[9, 0], [9, 128], [7, 255]]], np.uint8)
    assert np.asarray(to_8_bits(Values(both, alpha=True, nodata=7))[0])[0, :, 1].tolist() == [0, 128, 0]
    floats, mask = np.array([[[np.nan], [1.0], [1.0]]]), np.array([[True, True, False]])
    assert np.asarray(to_8_bits(Values(floats, seen=mask), value_range=(0, 1))[0])[0, :, 1].tolist() == [0, 255, 0]
    deep = np.array([[[0, 128], [0, 129]]], np.uint16)
    assert np.asarray(to_8_bits(Values(deep, alpha=True))[0])[0, :, 1].tolist() == [0, 1]
