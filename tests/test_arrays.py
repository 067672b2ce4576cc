"""Images in .npy and .npz files, with their labels, are found where they lie; arrays of another form are refused."""

import json
import os
import zipfile

import numpy as np
import pytest
from labelled import PALETTE

from igpt_fast.data import open_tokens, tokenize
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.sources import open_source


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 5, 7, 1), (4, 5, 7, 3), (4, 5, 7, 4)])
@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_arrays(tmp_path, shape, save):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if shape[-1] == 4:
        images[..., 3] = 255
    if save is np.save:
        path = tmp_path / "x.npy"
        save(path, images)
    else:
        path = tmp_path / "x.npz"
        save(path, images=images, y=np.array([7, -1, 3, 7], np.int16))
    source = open_source(path)
    assert source.names == ["00000000", "00000001", "00000002", "00000003"]
    for index in (3, 0, 2):  # any order
        expected = images[index].reshape(5, 7, -1)[..., :3]
        assert (source.read(index) == expected).all()
    if save is not np.save:
        assert source.classes == ["3", "7"]
        assert source.labels.tolist() == [1, -1, 0, 1]
    else:
        assert source.labels is None


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i2", "<f4", "|b1"])
def test_arrays_of_other_numbers(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 3000, (4, 5, 7, 6)).astype(kind)
    np.save(tmp_path / "x.npy", images)
    np.savez_compressed(tmp_path / "x.npz", images=images)
    for path in (tmp_path / "x.npy", tmp_path / "x.npz"):
        source, (low, high) = open_source(path), (0, 1) if kind == "|b1" else (0, 3000)
        for index in (3, 0):
            seen = source.read(index, bands=(6, 1, 2), value_range=(low, high))
            numbers = images[index][..., [5, 0, 1]].astype(int)
            assert (seen == (numbers * 510 + high) // (2 * high)).all()


def test_npz_keys(tmp_path):
    images = np.zeros((2, 3, 3, 3), np.uint8)
    for key in ("images", "x", "data", "X"):
        np.savez(tmp_path / "x.npz", **{key: images, "labels": np.array(["dog", "cat"])})
        source = open_source(tmp_path / "x.npz")
        assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [1, 0])
    assert source.groups is None
    for groups in (np.array([7, 7]), np.array(["7", "7"]), np.array([b"7", b"7"])):
        np.savez(tmp_path / "x.npz", x=images, groups=groups)
        assert open_source(tmp_path / "x.npz").groups == ["group 7", "group 7"]
    np.savez(tmp_path / "x.npz", x=images, groups=np.array(["7", ""]))
    assert open_source(tmp_path / "x.npz").groups == ["group 7", "image 00000001"]
    np.savez(tmp_path / "x.npz", x=images, groups=np.array([-1, 7]))
    assert open_source(tmp_path / "x.npz").groups == ["image 00000000", "group 7"]
    np.savez(tmp_path / "x.npz", x=images, groups=np.zeros(2))
    with pytest.raises(InputError, match=r"x\.npz: groups are float64 \[2\]; give one integer or string for each"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", pictures=images)
    with pytest.raises(InputError, match=r"no images among its arrays \(pictures\); name the array images or x"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=images, y=np.zeros(3, int))
    with pytest.raises(InputError, match=r"labels are int64 \[3\]; give one integer or string for each of the 2"):
        open_source(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=images, y=np.array([{}, None]))
    with pytest.raises(InputError, match=r"x\.npz: y is an array of Python objects; save it as y\.astype\(str\)"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 3, 3), np.complex64), r"complex64 \[2, 3, 3, 3\]; give numbers \[N, H, W, C\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[2, 3, 8, 8\] has its channels first; save numpy.moveaxis"),
        (np.zeros((8, 8, 3), np.uint8), "looks like one image"),
        (np.zeros((0, 8, 8), np.uint8), "no pixel"),
        (np.zeros((20, 13, 64, 64), np.float32), "has its channels first"),
        (np.zeros((8, 8), np.uint8), "give numbers"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
    ],
)
def test_arrays_of_other_forms(tmp_path, array, reason):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"(2, 8, 8, 3)", b"(2, 8, 8, 3(", "cannot be read"),
        (b"(2, 8, 8, 3), }            ", b"(9223372036854775808,8,8),}", "cut short"),
        (b"(2, 8, 8, 3), }", b"(-2,-8, 8, 3),}", "holds no pixel"),
    ],
)
def test_headers_that_are_damaged(tmp_path, old, new, reason):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3), np.uint8))
    data = (tmp_path / "x.npy").read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    (tmp_path / "x.npy").write_bytes(data.replace(old, new))
    with pytest.raises(InputError, match=rf"x\.npy: .*{reason}"):
        open_source(tmp_path / "x.npy")


def test_arrays_of_one_size_and_one_time_are_told_apart(tmp_path):
    """As an archive unpacks them. Tokens from before stamps knew bytes are those of their images still."""
    for name, value in (("train", 9), ("test", 10)):
        np.save(tmp_path / f"{name}.npy", np.full((40, 32, 32, 3), value, np.uint8))
        os.utime(tmp_path / f"{name}.npy", ns=(10**18, 10**18))
    train, test = (open_source(tmp_path / f"{name}.npy") for name in ("train", "test"))
    assert train.stamp != test.stamp and train.stamp == open_source(tmp_path / "train.npy").stamp
    tokens = tokenize(train, PALETTE, tmp_path / "tokens", workers=0)
    assert tokens.made_of(train.stamp) and not tokens.made_of(test.stamp)
    again = tokenize(train, PALETTE, tmp_path / "again", workers=0)
    with pytest.raises(InputError, match="the images have changed since, or are others"):
        open_tokens(test, PALETTE, tmp_path / "tokens")
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    meta["source_stamp"] = train.stamp.rpartition("-")[0]
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    assert len(open_tokens(train, PALETTE, tmp_path / "tokens")) == 40
    older = open_tokens(tmp_path / "tokens")
    for pair in ((older, again), (again, older), (again, again), (older, older)):
        with pytest.raises(InputError, match="holds the images that are learned from"):
            JoinedTokens(*pair)
    del meta["source_stamp"], meta["resize"]
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="resize is None, not paper; the images have changed since"):
        open_tokens(train, PALETTE, tmp_path / "tokens")


def test_a_label_of_nothing_is_unknown(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2, 2, 3), np.uint8), y=np.array(["b", "", "a"]))
    source = open_source(tmp_path / "x.npz")
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, -1, 0]
    for kind in ("U", "S"):
        np.savez(tmp_path / "x.npz", x=np.zeros((3, 2, 2, 3), np.uint8), y=np.array(["b ", " ", "b"], kind))
        source = open_source(tmp_path / "x.npz")
        assert source.classes == ["b"] and source.labels.tolist() == [0, -1, 0], "blanks around them are none of theirs"


def test_bytes_all_over_a_file_tell_it_from_others(tmp_path):
    images, stamps = np.zeros((40, 32, 32, 3), np.uint8), []
    for last in (0, 9):
        images[-4:] = last
        np.save(tmp_path / "x.npy", images)
        os.utime(tmp_path / "x.npy", (1, 1))
        stamps.append(open_source(tmp_path / "x.npy").stamp)
    assert stamps[0] != stamps[1]


@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 3), (2, 3, 4, 4), (2, 20, 8, 8), (2, 8, 8, 8), (4, 5, 1), (5, 4, 2), (3, 9, 5)]
)
def test_forms_that_only_look_like_others(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    assert len(open_source(tmp_path / "x.npy")) == shape[0]


def test_one_image_of_four_bands_is_no_stack(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(InputError, match=r"looks like one image; give \[1, H, W, 4\]"):
        open_source(tmp_path / "x.npy")


@pytest.mark.parametrize("lost", [1, 100])
def test_arrays_that_lack_their_last_bytes(tmp_path, lost):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-lost])
    with pytest.raises(InputError, match="cut short"):
        open_source(tmp_path / "x.npy")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(tmp_path, version):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, images, version=version)
    assert (open_source(tmp_path / "x.npy").read(2) == images[2]).all()


def test_labels_of_many_forms(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", X=images, y=np.arange(200)[:, None])  # a column, as CIFAR's are
    source = open_source(tmp_path / "x.npz")
    assert source.labels.tolist() == [*range(200)] and len(source.classes) == 200
    assert (source.read(199) == images[199]).all()
    np.savez(tmp_path / "x.npz", images=images[:2], y=np.array([b"\xff", b"\xfe"]))
    assert len(open_source(tmp_path / "x.npz").classes) == 2
    for labels in (np.zeros((2, 2), int), np.zeros((2, 0), int), np.array([True, False])):
        np.savez(tmp_path / "x.npz", images=images[:2], y=labels)
        with pytest.raises(InputError, match="give one integer or string for each of the 2"):
            open_source(tmp_path / "x.npz")


def test_what_else_lies_in_an_archive(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("images", b"notes")
    assert (open_source(tmp_path / "x.npz").read(2) == images[2]).all()
