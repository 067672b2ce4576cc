"""Palettes: tokens and back, the picture, and files that others wrote or will read."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast import InputError, Palette
from igpt_fast.images import resize_image
from igpt_fast.palette import HF_CONFIG

HEADER = b"\x93NUMPY\x01\x00\x76\x00%s" % b"{'descr': '<f4', 'fortran_order': False, 'shape': %-67s\n"
LEVELS = torch.arange(256) / 127.5 - 1


def test_encode_and_decode():
    palette = Palette(LEVELS[torch.randperm(256)[:192].view(64, 3)])
    tokens = torch.randint(0, 64, (2, 5, 7))
    pixels = palette.decode(tokens)
    assert pixels.dtype is torch.uint8 and torch.equal(palette.encode(pixels), tokens)
    assert np.array_equal(pixels.numpy(), np.rint(127.5 * (palette.centers.numpy()[tokens] + 1)))
    array = pixels.numpy().copy()
    array.flags.writeable = False
    for view, wanted in ((array, tokens), (array[:, ::-2], tokens.flip(1)[:, ::2])):
        for dtype, name in ((torch.int64, "int64"), (torch.int32, "int32"), (torch.int16, "int16")):
            got = palette.encode(view, dtype)
            assert isinstance(got, np.ndarray) and got.dtype == name and np.array_equal(got, wanted.numpy())
            assert np.array_equal(palette.decode(got), view)
    assert np.array_equal(palette.decode(tokens.numpy().astype(np.uint16)), array)
    assert palette.decode(tokens[:0]).shape == (0, 5, 7, 3) and palette.encode(array[:, :0]).shape == (2, 0, 7)


def test_decode_clips_and_rounds_to_even():
    palette = Palette(torch.tensor([[-1.0005, 1.0005, 0.0], [1.0, -1.0, 2 / 127.5 * 0.25]]))
    assert palette.decode(torch.tensor([0, 1])).tolist() == [[0, 255, 128], [255, 0, 128]]


@pytest.mark.parametrize("bad", [-1, 8, 600])
def test_decode_names_the_token_that_is_out_of_range(bad):
    palette = Palette(torch.zeros(8, 3))
    for tokens in (torch.tensor([[0, bad]]), np.array([7, bad], np.int16)):
        with pytest.raises(
            InputError, match=rf"token {bad} is out of range: this palette of 8 colours has tokens 0 to 7"
        ):
            palette.decode(tokens)


def test_decode_and_encode_refuse_other_numbers():
    palette = Palette(torch.zeros(8, 3))
    numbers = (torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.complex64))
    for tokens in (*numbers, *(wrong.numpy() for wrong in numbers)):
        with pytest.raises(InputError, match="give integers"):
            palette.decode(tokens)
    for images in (torch.zeros(2, 2, 3), np.zeros((2, 2, 4), np.uint8), np.uint8(3), [1, 2, 3]):
        with pytest.raises(InputError, match=r"Palette\.encode reads"):
            palette.encode(images)


@pytest.mark.parametrize("k", [1, 2, 7, 512])
def test_picture_shows_every_colour(k):
    palette = Palette(torch.rand(k, 3) * 2 - 1)
    picture = palette.picture(swatch=3)
    assert picture.dtype == np.uint8 and picture.shape[0] % 3 == 0 and picture.shape[1] % 3 == 0
    shown = {tuple(c) for c in picture[::3, ::3].reshape(-1, 3).tolist()}
    assert {tuple(c) for c in palette.decode(torch.arange(k)).tolist()} <= shown


@pytest.mark.parametrize("name", ["palette.npy", "kmeans_centers.npy", HF_CONFIG])
def test_save_and_load(tmp_path, name):
    palette = Palette(torch.rand(33, 3) * 2 - 1)
    palette.save(tmp_path / name)
    palette.save(str(tmp_path / name))
    assert [f.name for f in tmp_path.iterdir()] == [name]
    for path in (tmp_path / name, tmp_path, str(tmp_path)):
        loaded = Palette.load(path)
        assert torch.equal(loaded.centers, palette.centers) and loaded.inertia is None


def test_npy_is_openai_s(tmp_path):
    Palette(torch.rand(5, 3)).save(tmp_path / "c.npy")
    assert np.load(tmp_path / "c.npy").dtype == np.float32
    centers = np.random.default_rng(0).uniform(-1, 1, (9, 3))
    np.save(tmp_path / "d.npy", centers)
    assert np.array_equal(Palette.load(tmp_path / "d.npy").centers.numpy(), centers.astype(np.float32))


def test_hugging_face_reads_ours(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the [hf] extra")
    palette = Palette(torch.rand(33, 3) * 2 - 1)
    palette.save(tmp_path / HF_CONFIG)
    processor = transformers.ImageGPTImageProcessor.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    theirs = np.asarray(processor(image, return_tensors="np", input_data_format="channels_last")["input_ids"])
    assert (theirs.reshape(32, 32) == palette.encode(image)).mean() > 0.999  # they expand the square: ties may differ
    large = np.random.default_rng(1).integers(0, 256, (48, 40, 3)).astype(np.uint8)
    theirs = np.asarray(processor(large, return_tensors="np", input_data_format="channels_last")["input_ids"])
    ours = palette.encode(resize_image(Image.fromarray(large), (32, 32), "hf", "large"))
    assert (theirs.reshape(32, 32) == ours).mean() > 0.9, "it is told how images are resized"
    processor.save_pretrained(tmp_path / "theirs")
    assert torch.equal(Palette.load(tmp_path / "theirs").centers, palette.centers)


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_extractor_type": "ImageGPTFeatureExtractor", "size": 32, "resample": 2},  # the oldest form
        {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": 0.5},
    ],
)
@pytest.mark.parametrize("part", [None, "image_processor", "feature_extractor"])
def test_hugging_face_forms(tmp_path, settings, part):
    settings = {**settings, "clusters": [[-1, 0, 1], [0.5, 0.25, -0.125]]}
    (tmp_path / "x.json").write_text(json.dumps({part: settings} if part else settings))
    assert Palette.load(tmp_path / "x.json").centers.tolist() == settings["clusters"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 5), np.float32), r"float32 \[3, 5\]; a palette is float \[K, 3\]"),
        (np.zeros((0, 3), np.float32), r"float32 \[0, 3\]"),
        (np.zeros((4097, 3), np.float32), r"\[4097, 3\]"),
        (np.zeros((512, 3), np.uint8), "holds uint8 values"),
        (np.full((5, 3), 255.0), "value of size 255"),
        (np.array([[0, np.nan, 0]]), "not a finite number"),
        (np.array([[0, np.inf, 0]]), "not a finite number"),
        (np.array([["a", "b", "c"]]), "holds <U1 values"),
        (np.array([[None] * 3]), "cannot be read"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "cannot be read"),
        (b"not an array", "cannot be read"),
        (b"PK\x03\x04 cut short", "cannot be read"),
        (HEADER % b"(3, 3(, }", "cannot be read"),
        (HEADER % b"(10000000000000, 3), }", "cannot be read"),
    ],
)
def test_load_refuses_arrays(tmp_path, content, message):
    path = tmp_path / "p.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(InputError, match=message) as error:
        Palette.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no `clusters`"),
        ('{"clusters": null}', "has no `clusters`"),
        ('{"clusters": [[0, 1]]}', r"\[1, 2\]"),
        ('{"clusters": [[0, 1, 2], [0]]}', "cannot be read"),
        ('{"clusters": "none"}', "cannot be read"),
        ('{"clusters": {}}', "cannot be read"),
        ('{"clusters": [[{}, 0, 0]]}', "cannot be read"),
        ('{"clusters": [[1%s, 0, 0]]}' % ("0" * 400), "cannot be read"),
        ("[" * 200_000, "cannot be read"),
        ('{"clusters": [[0, 0, 0]], "image_mean": [0.4, 0.5, 0.5]}', "image_mean"),
        ('{"clusters": [[0, 0, 0]], "image_std": [0.2, 0.2, 0.2]}', "image_std"),
        ('{"clusters": [[0, 1.2, 0]]}', "value of size 1.2;"),
    ],
)
def test_load_refuses_settings(tmp_path, content, message):
    (tmp_path / HF_CONFIG).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Palette.load(tmp_path)
    assert HF_CONFIG in str(error.value)


def test_load_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "p.npy")
    with pytest.raises(InputError, match=r"p\.npy is a pipe or a device; give a palette"):
        Palette.load(tmp_path / "p.npy")


@pytest.mark.parametrize(("colors", "seed"), [(1, 0), (4097, 0), (2.5, 0), (True, 0), (8, -1), (8, 0.5)])
def test_fit_takes_whole_numbers(colors, seed):
    with pytest.raises(InputError, match=r"cannot be fitted; choose from 2 to 4096$|seed is .* at least 0$"):
        Palette.fit(np.zeros((2, 2, 3), np.uint8), colors, seed=seed)


def test_load_and_save_name_the_place(tmp_path):
    with pytest.raises(InputError, match=r"there is no palette .*none\.npy"):
        Palette.load(tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"holds no palette; expected palette\.npy"):
        Palette.load(tmp_path)
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    with pytest.raises(InputError, match="archive of arrays"):
        Palette.load(tmp_path / "many.npz")
    palette = Palette(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"cannot be saved as palette\.txt"):
        palette.save(tmp_path / "palette.txt")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        palette.save(tmp_path / "file" / "palette.npy")


def test_centres_are_checked_and_kept():
    for bad in (torch.zeros(3), torch.zeros(3, 3).long(), torch.full((2, 3), 1.1), torch.full((2, 3), float("nan"))):
        with pytest.raises(InputError, match="the palette"):
            Palette(bad)
    centers = torch.zeros(2, 3)
    palette = Palette(centers)
    centers += 9
    assert palette.centers.max() == 0 and len(palette) == 2


@pytest.mark.parametrize(
    ("images", "way"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "channels come last"),
        (np.zeros((3, 4, 5), np.uint8), "channels come last"),
        (np.zeros((2, 4, 5, 4), np.uint8), "leave out alpha"),
        (np.zeros((2, 4, 5), np.uint8), "gray is repeated"),
        (np.zeros((2, 4, 5, 3), np.float32), "values from 0 to 1 become bytes"),
        (np.zeros((2, 4, 5, 3), np.uint16), "16 bits are divided by 257"),
    ],
)
def test_other_images_are_told_the_way(images, way):
    with pytest.raises(InputError, match=way):
        Palette(np.zeros((1, 3), np.float32)).encode(images)


def test_a_palette_that_seems_to_be_in_0_to_1_is_named(tmp_path, caplog):
    np.save(tmp_path / "p.npy", np.array([[0, 0.5, 1], [0.25, 0, 0]]))
    Palette.load(tmp_path / "p.npy")
    assert "is it in [0, 1]?" in caplog.text
    caplog.clear()
    np.save(tmp_path / "p.npy", np.array([[-0.1, 0.5, 1], [0.25, 0, 0]]))
    Palette.load(tmp_path / "p.npy")
    assert not caplog.text


def test_the_picture_is_sorted_greys_then_hues_each_dark_to_light():
    wanted = [(0, 0, 0), (128, 120, 125), (250, 250, 250), (90, 0, 0), (255, 60, 60), (200, 180, 0), (0, 99, 0),
              (0, 200, 0), (0, 0, 80), (100, 100, 255)]  # fmt: skip
    mixed = np.array(wanted, np.float32)[[7, 2, 9, 4, 0, 5, 8, 1, 3, 6]] / 127.5 - 1
    picture = Palette(mixed).picture(swatch=1).reshape(-1, 3)
    assert [tuple(colour) for colour in picture.tolist()][: len(wanted)] == wanted
    assert (picture[len(wanted) :] == 255).all()


def test_what_is_no_file_of_a_palette_is_told_which_are(tmp_path):
    (tmp_path / "palette.txt").write_text("0 0 0")
    with pytest.raises(InputError, match=r"palette\.txt is no palette: give one as \.npy or preprocessor_config"):
        Palette.load(tmp_path / "palette.txt")


def test_settings_name_height_and_width():
    assert Palette(torch.zeros(2, 3)).to_hf((3, 5))["size"] == {"height": 3, "width": 5}


def test_colours_that_were_learned_are_saved(tmp_path):
    learned = torch.rand(4, 3, requires_grad=True)
    Palette(learned).save(tmp_path / "p.npy")
    assert torch.equal(Palette.load(tmp_path / "p.npy").centers, learned.detach())


def test_colours_may_lie_as_they_like():
    colours = np.array([[0.5, -0.25, 1.0], [0.0, 0.125, -1.0]], np.float32)
    for given in (colours[::-1][::-1], colours.astype(">f4"), colours.astype(np.float64), colours.tolist()):
        assert np.array_equal(Palette(given).centers, colours)
    assert np.array_equal(Palette(colours[::-1]).centers, colours[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Palette(torch.tensor(colours, requires_grad=True)).centers.requires_grad


@pytest.mark.parametrize("given", ["x", None, [[0.5, 0.5, 0.5], [0.5]], np.array([None])], ids=repr)
def test_what_is_no_palette_is_refused(given):
    with pytest.raises(InputError, match="the palette is"):
        Palette(given)


@pytest.mark.parametrize("given", [[1, 2], 3, np.int64(3)])
def test_tokens_are_arrays_or_tensors(given):
    with pytest.raises(InputError, match=r"Palette\.decode reads numpy arrays and tensors, not"):
        Palette([[0.5, 0.5, 0.5]]).decode(given)
