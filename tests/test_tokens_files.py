"""Token directories that contradict themselves, digests, and the writing of shards."""

import json
import os

import numpy as np
import pytest
import torch
from test_tokens import COLORS, write

from igpt_fast import tokens as module
from igpt_fast.data import open_tokens, tokenize
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette
from igpt_fast.tokens import ShardWriter, TokenDataset, is_token_directory


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(0, COLORS, (11, 3, 5))


@pytest.fixture
def directory(tmp_path, tokens):
    return write(tmp_path / "tokens", tokens, [f"n{i}.png" for i in range(11)], rows=4)


def test_digests(tmp_path, monkeypatch):
    """One of each image, in the order asked for, equal where its tokens are, however many are read at a time."""
    images = np.random.default_rng(0).integers(0, 512, (9, 3, 5))
    images[4] = images[1]
    images[1, 0, 0] = images[4, 0, 0] = 300
    images[7] = images[1]
    images[7, 0, 0] = 300 - 256
    path = write(tmp_path / "t", images, ["x"] * 9, rows=4, colors=512)
    np.save(path / "palette.npy", np.linspace(-1, 1, 512 * 3).reshape(512, 3).astype(np.float32))
    data = TokenDataset(path)
    order = np.array([8, 1, 4, 7, 0, 2, 3, 5, 6])
    whole = [*data.digests(order)]
    assert len(whole) == 9 and whole[1] == whole[2] and len(set(whole)) == 8
    for chunk in (1, 15, 31, 60):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert [*data.digests(order)] == whole


def test_what_is_read_otherwise(tmp_path, tokens):
    noted = {"resize": "hf", "value_range": [0, 100], "background": "black"}
    data = TokenDataset(write(tmp_path / "t", tokens, ["x"] * 11, **noted))
    assert {k: data.preprocessing[k] for k in noted} == noted
    assert [*data.read_otherwise({})] == []
    found = [*data.read_otherwise({"value_range": [0, 4095], "background": "black", "resize": "paper"})]
    assert sorted(found) == [("--resize hf", "paper"), ("--value-range [0, 100]", [0, 4095])]


@pytest.mark.parametrize(
    "change",
    [{"shards": [4, 0, 4, 3]}, {"shards": [4, 4, 4, -1]}, {"size": [True, 15]}, {"format": "igpt-fast something"}],
)
def test_more_contradictions(tmp_path, tokens, change):
    path = write(
        tmp_path / "t", tokens.reshape(11, 1, 15) if "size" in change else tokens, ["x"] * 11, rows=4, **change
    )
    if change.get("shards", [0, 1])[1] == 0:
        for old, new in ((2, 3), (1, 2)):
            os.rename(path / f"shard-{old:05d}.npy", path / f"shard-{new:05d}.npy")
        np.save(path / "shard-00001.npy", np.zeros((0, 3, 5), np.uint16))
    with pytest.raises(InputError, match=r"its entries contradict each other|is igpt-fast something of version 1"):
        TokenDataset(path)
    assert is_token_directory(path) == ("format" not in change)


def test_more_names_than_images(directory):
    (directory / "names.json").write_text(json.dumps(["x"] * 12))
    with pytest.raises(InputError, match=r"names\.json: holds 12 names and not 11"):
        _ = TokenDataset(directory).names


def test_groups_stay_together(tmp_path):
    path = write(tmp_path / "t", np.zeros((400, 1, 1)), [f"{k}.png" for k in range(400)])
    (path / "groups.json").write_text(json.dumps([f"group {k // 8}" for k in range(400)]))
    val = TokenDataset(path).split("val", 0.4)
    assert 0 < len(val) < 400 and np.array_equal(val, (val[::8, None] // 8 * 8 + np.arange(8)).reshape(-1))


@pytest.mark.parametrize("fraction", [float("nan"), -0.1, 1.1])
def test_fractions_outside(directory, fraction):
    for name in ("train", "val", "all"):
        with pytest.raises(InputError, match=r"outside 0\.\.1"):
            TokenDataset(directory).split(name, fraction)


def test_indices_of_every_integer_type(directory, tokens):
    for kind in ("u1", "i1", "u2", "i4", "u8"):
        assert (TokenDataset(directory).batch(np.array([10, 3], kind)).numpy() == tokens[[10, 3]]).all()


def test_stamps():
    data = object.__new__(TokenDataset)
    for stamp, others, wanted in (
        ("a-1-2", ("a-1-2", "a-1-2-ff"), True),
        ("a-1-2", ("a-1", "b", "", "a-1-2-ff-9"), False),
        ("", ("", "a", "-a"), False),
    ):
        data.meta = {"source_stamp": stamp}
        assert all(data.made_of(other) is wanted for other in others), stamp
    data.meta = {}
    assert not data.made_of("") and not data.made_of("-x")


def test_tokens_of_a_run_have_another_way(tmp_path, tokens):
    (tmp_path / "run").mkdir()
    for name, runs, way in (
        ("tokens", True, "train makes again"),
        ("others", True, "igpt-fast tokenize"),
        ("tokens", False, "igpt-fast tokenize"),
    ):
        for file in ("train.json", "metrics.jsonl"):
            (tmp_path / "run" / file).touch() if runs else (tmp_path / "run" / file).unlink()
        path = tmp_path / "run" / name
        path = path if path.exists() else write(path, tokens, ["x"] * 11)
        (path / "labels.npy").unlink(missing_ok=True)
        with pytest.raises(InputError, match=way):
            TokenDataset(path)


def test_gaps_among_many(tmp_path):
    """More than are moved at a time."""
    images = np.random.default_rng(0).integers(0, 2**16, (3000, 1, 2)).astype(np.uint16)
    writer = ShardWriter(tmp_path, 3000, (1, 2), 700)
    writer.write(np.arange(3000), images)
    kept = np.delete(np.arange(3000), [0, 5, 1500])
    lengths = writer.finish(kept)
    parts = [np.load(tmp_path / f"shard-{k:05d}.npy") for k in range(len(lengths))]
    assert (np.concatenate(parts) == images[kept]).all()


def test_a_large_image_fills_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    writer = ShardWriter(tmp_path, 3, (8, 9))
    images = np.random.default_rng(0).integers(0, 2**16, (3, 8, 9)).astype(np.uint16)
    writer.write(np.arange(3), images)
    assert writer.finish(np.arange(3)) == [1, 1, 1]
    assert all((np.load(tmp_path / f"shard-{k:05d}.npy") == images[k]).all() for k in range(3))


@pytest.mark.parametrize(("name", "kind"), [("labels", np.int64), ("labels", np.float32), ("shard-00001", np.int16)])
def test_arrays_of_another_type_are_refused(directory, name, kind):
    np.save(directory / f"{name}.npy", np.load(directory / f"{name}.npy").astype(kind))
    with pytest.raises(InputError, match=rf"{name}\.npy: holds {np.dtype(kind)} .* and not "):
        TokenDataset(directory)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "multiprocessing_context": "spawn"}], ids=str)
def test_a_data_loader_takes_them(directory, tokens, options):
    data = TokenDataset(directory)
    found = torch.cat([*torch.utils.data.DataLoader(data, batch_size=4, **options)])
    assert found.dtype is torch.int64 and np.array_equal(found, tokens)


def test_one_image_by_its_number(directory, tokens):
    data = TokenDataset(directory)
    assert all(np.array_equal(found, tokens[k]) for k, found in enumerate(data)) and len([*data]) == len(tokens)
    assert np.array_equal(data[-1], tokens[-1]) and np.array_equal(data[np.int64(3)], tokens[3])
    for outside, error in ((11, IndexError), (-12, IndexError), (slice(2), TypeError)):
        with pytest.raises(error):
            data[outside]


def test_tokens_that_come_while_a_palette_is_fitted_are_another_process_s(tmp_path, monkeypatch):
    """Whose command has no --overwrite: train's."""
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4, 3), np.uint8))
    palette, out = Palette(np.zeros((2, 3), np.float32)), tmp_path / "tokens"

    def meanwhile(*_: object, **__: object) -> tuple[Palette, int, list]:
        tokenize(tmp_path / "images.npy", palette, out, (4, 4))
        return palette, 3, []

    monkeypatch.setattr("igpt_fast.data.fit_palette", meanwhile)
    with pytest.raises(InputError, match="another process has written tokens there meanwhile; start again"):
        open_tokens(tmp_path / "images.npy", cache_dir=out, size=(4, 4))
