"""Files that Pillow does not read, or not in full, become the pixels that their numbers say."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_images import encode

from igpt_fast.errors import InputError
from igpt_fast.image_files import DARK, PAGES, read_image
from igpt_fast.scientific import nodata_of, upright

tifffile = pytest.importorskip("tifffile", reason="TIFFs beyond Pillow need the [tiff] extra")
imagecodecs = pytest.importorskip("imagecodecs", reason="TIFFs beyond Pillow need the [tiff] extra")
pydicom = pytest.importorskip("pydicom", reason="DICOM needs the [dicom] extra")

RNG = np.random.default_rng(0)
TILE = RNG.integers(0, 3000, (6, 9, 7)).astype(np.uint16)  # as a satellite's: bands from 0 to 3,000


def tiff(numbers: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, numbers, metadata=None, **options)
    return buffer.getvalue()


def png(numbers: np.ndarray) -> bytes:
    return imagecodecs.png_encode(np.ascontiguousarray(numbers))


def read(data: bytes, **options: object) -> np.ndarray:
    return np.asarray(read_image(data, "some/tile.tif", **options))


def stretched(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.floor((np.clip(numbers.astype(float), low, high) - low) / (high - low) * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_of_a_satellite(planar, compression):
    numbers = TILE if planar == "contig" else TILE.transpose(2, 0, 1)
    data = tiff(numbers, photometric="minisblack", planarconfig=planar, compression=compression)
    seen = read(data, bands=(4, 3, 2), value_range=(0, 3000))
    assert (seen == stretched(TILE[..., [3, 2, 1]], 0, 3000)).all()
    assert (read(data, bands=(7,), value_range=(100, 900))[..., 0] == stretched(TILE[..., 6], 100, 900)).all()
    with pytest.raises(InputError, match=r"some/tile\.tif: it has 7 bands: --bands"):
        read(data)


def test_colours_of_sixteen_bits_are_stretched_in_full():
    colours = TILE[..., :3]
    for data in (tiff(colours, photometric="rgb"), png(colours)):
        assert (read(data, value_range=(0, 3000)) == stretched(colours, 0, 3000)).all()
        high_bytes = read_image(data, "x")
        assert (np.asarray(high_bytes) == colours >> 8).all() and high_bytes.info == {DARK: True}
    alpha = np.full((6, 9, 1), 65535, np.uint16)
    alpha[0] = 0
    both = np.concatenate([colours, alpha], 2)
    for data in (tiff(both, photometric="rgb", extrasamples=["unassalpha"]), png(both)):
        seen = read(data, value_range=(0, 3000), background="#010203")
        assert (seen[0] == [1, 2, 3]).all() and (seen[1:] == stretched(colours[1:], 0, 3000)).all()


@pytest.mark.parametrize("kind", ["int16", "int32", "uint32", "float32", "float64"])
def test_numbers_that_are_no_bytes(kind):
    numbers = np.array([[-1000, 0, 40, 400, 3000]]).astype(kind)
    window = (0, 400) if kind == "uint32" else (-160, 240)
    assert (read(tiff(numbers), value_range=window)[..., 0] == stretched(numbers, *window)).all()
    with pytest.raises(InputError, match=rf"some/tile\.tif: values of {kind} say .* --value-range .* does, as 0,3000$"):
        read(tiff(numbers))


def test_bands_are_those_of_the_picture_where_pillow_reads_all():
    colours = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8))
    indexed = colours.quantize(16)
    for image in (indexed, colours.convert("CMYK"), colours.convert("YCbCr"), Image.new("L", (9, 6), 77)):
        data = encode(image, "TIFF")
        plain = np.asarray(image.convert("RGB"))
        if image.mode != "L":
            assert (read(data) == plain).all() and (read(data, bands=(3, 1, 1)) == plain[..., [2, 0, 0]]).all()
        assert (read(data, bands=(1,))[..., 0] == plain[..., 0]).all()
    with pytest.raises(InputError, match="colours in LAB are not read, convert the image to 8-bit RGB"):
        read(encode(Image.new("LAB", (2, 2)), "TIFF"), bands=(1,))
    four = np.full((6, 9, 4), 200, np.uint16)
    with pytest.raises(InputError, match="it has 4 bands"):  # colours that opacity has been multiplied into
        read(tiff(four, photometric="rgb", extrasamples=["assocalpha"]), value_range=(0, 255))
    with pytest.raises(InputError, match=r"a TIFF of SEPARATED of 16 bits is not read in full, convert it"):
        read(tiff(np.zeros((6, 9, 5), np.uint16), photometric="separated"), bands=(1,))


def test_a_turned_png_of_sixteen_bits():
    exif = Image.Exif()
    exif[274] = 6
    data = imagecodecs.png_encode(np.ascontiguousarray(TILE[..., :3]))
    place = data.index(b"IDAT") - 4
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = data[:place] + chunk + data[place:]
    assert read(data).shape == (9, 6, 3)
    assert (read(data, value_range=(0, 3000)) == np.rot90(stretched(TILE[..., :3], 0, 3000), -1)).all()


def test_where_white_is_0_and_what_was_not_measured():
    numbers = np.array([[0, 1000, 3000]], np.int32)
    assert read(tiff(numbers, photometric="miniswhite"), value_range=(0, 3000))[0, :, 0].tolist() == [255, 170, 0]
    gdal = {"extratags": [(42113, "s", 0, "-9999", True)]}
    holes = np.array([[-9999.0, np.nan, 1.0]], np.float32)
    seen = read(tiff(holes, **gdal), value_range=(0, 1), background="red")
    assert seen[0].tolist() == [[255, 0, 0], [255, 0, 0], [255, 255, 255]]
    gdal = {"extratags": [(42113, "s", 0, "0", True)]}
    for numbers in (np.array([[0, 255]], np.uint8), np.array([[0, 65535]], np.uint16)):  # these Pillow reads
        assert read(tiff(numbers, **gdal), background="red")[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert [nodata_of(text) for text in ("-9999\0", "nan", "none", "")] == [-9999.0, None, None, None]


@pytest.mark.parametrize(("dtype", "options"), [(np.uint8, {}), (np.int16, {"bands": (1,), "value_range": (0, 3000)})])
def test_pages_are_noted_and_smaller_copies_are_none(dtype, options):
    tile = np.arange(24, dtype=dtype).reshape(4, 6)

    def noted(**second: object) -> dict:
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            writer.write(tile, photometric="minisblack", planarconfig="contig", metadata=None)
            writer.write(tile[::2, ::2], photometric="minisblack", planarconfig="contig", metadata=None, **second)
        return read_image(buffer.getvalue(), "x", **options).info

    assert noted() == {PAGES: True} and noted(subfiletype=1) == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    stored = Image.fromarray(RNG.integers(0, 256, (3, 5, 3), np.uint8))
    stored.getexif()[274] = orientation
    turned = ImageOps.exif_transpose(stored) if orientation > 1 else stored
    assert (upright(np.asarray(stored), orientation) == np.asarray(turned)).all()
    tags = [(274, "H", 1, orientation, True)]
    data = tiff(np.asarray(stored).astype(np.float32), photometric="rgb", extratags=tags)
    assert (read(data, value_range=(0, 255)) == np.asarray(turned)).all()


def dicom(numbers: np.ndarray, bits: int = 12, samples: int = 1, **more: object) -> bytes:
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file.Rows, file.Columns = numbers.shape[-2:] if samples == 1 else numbers.shape[:2]
    file.SamplesPerPixel, file.PlanarConfiguration = samples, 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 * numbers.itemsize, bits, bits - 1
    file.PixelRepresentation = int(numbers.dtype.kind == "i")
    file.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = numbers.tobytes()
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


WHOLE = tiff(TILE, photometric="minisblack", planarconfig="contig"), dicom(TILE[..., 0])


def test_dicom():
    raw = np.array([[0, 100, 1024, 1224, 4095, 2000]], np.uint16)
    assert (read(dicom(raw))[..., 0] == stretched(raw, 0, 4095)).all()
    assert (read(dicom(raw, PhotometricInterpretation="MONOCHROME1"))[..., 0] == 255 - stretched(raw, 0, 4095)).all()
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    assert (read(dicom(raw, **hounsfield), value_range=(-160, 240))[..., 0] == stretched(raw - 1024.0, -160, 240)).all()
    window = {"WindowCenter": [40, 500], "WindowWidth": [400, 2000]}  # the first: from 40 - 0.5 - 399/2 on
    assert (read(dicom(raw, **hounsfield, **window))[..., 0] == stretched(raw - 1024.0, -160, 239)).all()
    signed = np.array([[-2048, 0, 2047]], np.int16)
    assert read(dicom(signed))[0, :, 0].tolist() == [0, 128, 255]
    colours = RNG.integers(0, 256, (4, 5, 3), np.uint8)
    assert (read(dicom(colours, 8, 3)) == colours).all()
    table = RNG.integers(0, 65536, (3, 4)).astype("<u2")
    names = [f"{colour}PaletteColorLookupTableD" for colour in ("Red", "Green", "Blue")]
    luts = {f"{name}ata": part.tobytes() for name, part in zip(names, table, strict=True)}
    luts |= {f"{name}escriptor": [4, 0, 16] for name in names}
    indexed = read(dicom(np.array([[3, 0, 1]], np.uint8), 8, PhotometricInterpretation="PALETTE COLOR", **luts))
    assert (indexed[0] == stretched(table.T[[3, 0, 1]], 0, 65535)).all()
    for less in ({}, hounsfield):  # a CT without a window keeps to a small part of what it could store
        assert read_image(dicom(raw // 2, 16, **less), "x").info == {DARK: True}
        assert read_image(dicom(raw * 8, 16, **less), "x").info == {}
    assert read_image(dicom(np.array([[-1024, 0, 3000]], np.int16), 16), "x").info == {DARK: True}
    falling = read(dicom(np.array([[0, 2000, 4095]], np.uint16), RescaleSlope=-1, RescaleIntercept=4095))
    assert falling[0, :, 0].tolist() == [255, 130, 0]
    with pytest.raises(InputError, match="its rescale slope is 0"):
        read(dicom(raw, RescaleSlope=0, RescaleIntercept=5))
    empty = {"WindowCenter": None, "WindowWidth": None, "RescaleSlope": None, "RescaleIntercept": None}
    assert (read(dicom(raw, **empty)) == read(dicom(raw))).all()
    bytes_ = np.array([[0, 9, 200]], np.uint8)
    assert read(dicom(bytes_, 8), value_range=(0, 4095))[0, :, 0].tolist() == [0, 9, 200]
    values, shown = pydicom.Dataset(), pydicom.Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
    shown.WindowCenter, shown.WindowWidth = 40, 400
    shared = pydicom.Dataset()  # an enhanced file has them for all frames, or for each
    shared.PixelValueTransformationSequence, shared.FrameVOILUTSequence = [values], [shown]
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        enhanced = dicom(raw, **{groups: [shared]})
        assert (read(enhanced)[..., 0] == stretched(raw - 1024.0, -160, 239)).all()
        assert (read(enhanced, value_range=(0, 100))[..., 0] == stretched(raw - 1024.0, 0, 100)).all()
    frames = read_image(dicom(np.stack([raw, raw[:, ::-1]]), NumberOfFrames=2), "x")
    assert frames.info == {PAGES: True} and (np.asarray(frames)[..., 0] == stretched(raw, 0, 4095)).all()


def test_opacity_is_what_a_file_calls_so_and_ends_with():
    plain = {"photometric": "rgb", "planarconfig": "contig"}
    floats = tiff(np.full((2, 3, 4), 0.5, np.float32), extrasamples=["unassalpha"], **plain)
    assert (read(floats, bands=(1, 2, 3), value_range=(0, 1)) == 128).all()
    bands = np.full((2, 3, 5), 9000, np.uint16)
    inside = tiff(bands, extrasamples=["unassalpha", "unspecified"], **plain)
    assert (read(inside, bands=(4, 2, 1), value_range=(0, 18000)) == 128).all()
    pair = np.zeros((2, 3, 2), np.uint16)
    pair[0] = 3000, 65535
    seen = read(png(pair), value_range=(0, 6000), background="red")
    assert (seen[0] == 128).all() and (seen[1] == [255, 0, 0]).all()


def test_a_missing_library_is_named(monkeypatch):
    for library, extra, data, options in (
        ("tifffile", "tiff", WHOLE[0], {}),
        ("imagecodecs", "tiff", png(TILE[..., :3]), {"value_range": (0, 1)}),
        ("pydicom", "dicom", WHOLE[1], {}),
    ):
        with monkeypatch.context() as gone:
            gone.setitem(sys.modules, library, None)
            with pytest.raises(
                InputError, match=rf"some/tile\.tif: {library} reads such .*; pip install 'igpt-fast\[{extra}\]'"
            ):
                read(data, **options)
    assert read(encode(Image.new("RGB", (2, 2)))).shape == (2, 2, 3)


def test_files_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53)  # TILE has 54
    for data in WHOLE:
        with pytest.raises(InputError, match=r"54 pixels are more than the 53 that are read; cut it into smaller ones"):
            read(data, bands=(1,))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 54)
    assert read(WHOLE[0], bands=(1,), value_range=(0, 1)).shape == (6, 9, 3)
    many = tiff(np.zeros((6, 9, 17), np.uint8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(InputError, match=r"918 bytes .*are more than the 864 that are read; cut it"):
        read(many, bands=(1,))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as Pillow is told to read any
    assert read(many, bands=(1,)).shape == (6, 9, 3)


def test_what_is_no_tiff_and_no_dicom():
    for data in (b"II*\0" + bytes(40), struct.pack("<2sHI", b"II", 43, 8) + bytes(60), bytes(128) + b"DICM" + bytes(9)):
        with pytest.raises(InputError, match=r"some/tile\.tif: .*; mend or remove the file"):
            read(data)
    stack = tiff(np.zeros((16, 16, 16), np.float32), photometric="minisblack", volumetric=True, tile=(16, 16, 16))
    with pytest.raises(InputError, match=r"a TIFF of .*, where an image has YX"):
        read(stack)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_damage_escapes(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, min(len(whole), 700) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read(bytes(whole), bands=(1,), value_range=(0, 3000)).ndim == 3
    except InputError as error:
        assert str(error).startswith("some/tile.tif: ")
