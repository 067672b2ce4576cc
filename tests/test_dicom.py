"""DICOM files of bytes, of several frames, with windows: what they say of their values counts."""

import numpy as np
import pytest
from test_scientific import RNG, dicom, read, stretched

from igpt_fast.image_files import PAGES, read_image

pydicom = pytest.importorskip("pydicom", reason="DICOM needs the [dicom] extra")


def test_what_dicom_files_of_bytes_say_counts():
    raw = np.array([[0, 9, 200]], np.uint8)
    assert read(dicom(raw, 8, PhotometricInterpretation="MONOCHROME1"))[0, :, 0].tolist() == [255, 246, 55]
    rescaled = dicom(raw, 8, RescaleSlope=2, RescaleIntercept=-100)
    assert (read(rescaled, value_range=(-100, 100))[..., 0] == stretched(2.0 * raw - 100, -100, 100)).all()
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [3, 0, 16], "US"
    table.add_new("LUTData", "US", [500, 0, 1000])
    listed = dicom(np.array([[0, 1, 2]], np.uint8), 8, ModalityLUTSequence=[table])
    assert read(listed, value_range=(0, 1000))[0, :, 0].tolist() == [128, 0, 255]


def test_windows_of_dicom():
    raw, dark = np.array([[0, 99, 100, 101, 4095]], np.uint16), {"PhotometricInterpretation": "MONOCHROME1"}
    window = {"WindowCenter": 1000, "WindowWidth": 1500}
    assert (read(dicom(raw, **window, **dark)) == 255 - read(dicom(raw, **window))).all()
    assert read(dicom(raw, WindowCenter=100, WindowWidth=1))[0, :, 0].tolist() == [0, 0, 255, 255, 255]
    assert (read(dicom(raw, WindowCenter=100)) == read(dicom(raw))).all(), "half a window is none"


def test_more_frames_of_bytes_are_noted():
    gray, colours = (RNG.integers(0, 256, shape, np.uint8) for shape in ((2, 4, 5), (2, 4, 5, 3)))
    for data, first in (
        (dicom(gray, 8, NumberOfFrames=2), gray[0][..., None]),
        (dicom(colours, 8, 3, NumberOfFrames=2, Rows=4, Columns=5), colours[0]),
    ):
        image = read_image(data, "x")
        assert image.info == {PAGES: True} and (np.asarray(image) == first).all()
    assert read_image(dicom(gray[0], 8, NumberOfFrames=None), "x").info == {}


def test_the_first_frame_has_values_of_its_own():
    groups = []
    for intercept in (-1024, 0):
        values, group = pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = 1, intercept
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    raw = np.array([[[0, 1000, 4095]], [[0, 0, 0]]], np.uint16)
    data = dicom(raw, NumberOfFrames=2, PerFrameFunctionalGroupsSequence=groups)
    assert (read(data, value_range=(-160, 240))[..., 0] == stretched(raw[0] - 1024.0, -160, 240)).all()
