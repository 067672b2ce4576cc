"""Shards hold what was written, whatever the order and the gaps; a directory that contradicts itself is refused."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokens

from igpt_fast.errors import InputError
from igpt_fast.palette import Palette
from igpt_fast.tokens import FORMAT, VERSION, ShardWriter, TokenDataset, gather, is_token_directory, split_hash

COLORS = 7


def write(path: Path, tokens: np.ndarray, names: list[str], rows: int | None = None, **meta: object) -> Path:
    """A token directory by hand, so that reading is tested against the format and not against the writer's errors."""
    path.mkdir()
    rows = rows or len(tokens)
    parts = [tokens[start : start + rows].astype(np.uint16) for start in range(0, len(tokens), rows)]
    for number, part in enumerate(parts):
        np.save(path / f"shard-{number:05d}.npy", part)
    np.save(path / "palette.npy", np.linspace(-1, 1, COLORS * 3).reshape(COLORS, 3).astype(np.float32))
    np.save(path / "labels.npy", (np.arange(len(tokens)) % 3 - 1).astype(np.int32))
    (path / "names.json").write_text(json.dumps(names))
    base = {"format": FORMAT, "version": VERSION, "images": len(tokens), "size": list(tokens.shape[1:])}
    base |= {"colors": COLORS, "shards": [len(p) for p in parts], "classes": ["u", "v"]}
    (path / "meta.json").write_text(json.dumps({**base, **meta}))
    return path


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, COLORS, (11, 3, 5))


@pytest.fixture
def directory(tmp_path, tokens) -> Path:
    return write(tmp_path / "tokens", tokens, [f"n{i}.png" for i in range(11)], rows=4)


def test_opens_without_copying(directory, tokens):
    data = TokenDataset(directory)
    assert (len(data), data.size, data.colors, data.classes) == (11, (3, 5), COLORS, ["u", "v"])
    assert [len(shard) for shard in data.shards] == [4, 4, 3]
    for number, shard in enumerate(data.shards):
        assert isinstance(shard, np.memmap)
        assert Path(shard.filename) == directory / f"shard-{number:05d}.npy"
        assert not shard.flags.writeable
        assert shard.dtype == np.uint16
    assert (np.concatenate(data.shards) == tokens).all()
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0]
    assert data.names[10] == "n10.png"
    assert isinstance(data.palette, Palette)
    assert len(data.palette) == COLORS
    assert is_token_directory(directory)


@settings(max_examples=40)
@given(indices=st.lists(st.integers(0, 10), max_size=30))
def test_batch_gathers_across_shards(tmp_path_factory, indices):
    tokens = np.random.default_rng(0).integers(0, COLORS, (11, 3, 5))
    path = tmp_path_factory.getbasetemp() / "gathered"
    data = TokenDataset(path if path.exists() else write(path, tokens, [str(i) for i in range(11)], rows=4))
    batch = data.batch(np.array(indices, np.int64))
    assert batch.dtype == torch.int64
    assert batch.shape == (len(indices), 3, 5)
    assert (batch.numpy() == tokens[indices].reshape(-1, 3, 5)).all()
    assert torch.equal(data.batch(torch.tensor(indices, dtype=torch.int64)), batch)


@pytest.mark.parametrize("index", [-1, 11])
def test_batch_refuses_indices_outside(directory, index):
    with pytest.raises(IndexError, match=rf"{index}\.\.\d* ?.*outside 0\.\.10|0\.\.{index} is outside"):
        TokenDataset(directory).batch(np.array([0, index]))


@pytest.mark.parametrize("bad", [4, 6, 7])  # the first, a middle and the last image of a shard
def test_batch_refuses_tokens_that_the_palette_lacks(tmp_path, tokens, bad):
    tokens[bad, 2, 4] = COLORS
    data = TokenDataset(write(tmp_path / "tokens", tokens, ["x"] * 11, rows=4))
    assert data.batch(np.arange(bad)).max() < COLORS
    message = rf"shard-00001\.npy: image {bad} has token 7 of only 7 colours.*igpt-fast tokenize"
    with pytest.raises(InputError, match=message):
        data.batch(np.array([9, bad, 0]))


def test_a_dataset_is_sent_to_a_process_as_its_path(directory, tokens):
    sent = pickle.dumps(TokenDataset(directory))
    assert len(sent) < 500
    assert (pickle.loads(sent).batch(np.arange(11)).numpy() == tokens).all()


def names_of(data: TokenDataset, split: str, fraction: float) -> set[str]:
    return {data.names[index] for index in data.split(split, fraction)}


def test_split_is_by_name_and_never_moves(tmp_path):
    names = [f"cat/{i}.png" for i in range(2000)]
    whole = TokenDataset(write(tmp_path / "whole", np.zeros((2000, 1, 1)), names))
    train, val = whole.split("train"), whole.split("val")
    assert sorted([*train, *val]) == list(range(2000))
    assert (np.diff(train) > 0).all()
    assert whole.split("all").tolist() == list(range(2000))
    assert 150 < len(val) < 250  # a tenth, give or take four standard deviations
    # Other images come and go, others' order changes: every image stays on its side.
    shuffled = [*names[::-3], *(f"dog/{i}.png" for i in range(300))]
    other = TokenDataset(write(tmp_path / "other", np.zeros((len(shuffled), 1, 1)), shuffled))
    assert names_of(other, "val", 0.1) & set(names) == names_of(whole, "val", 0.1) & set(shuffled)
    # More validation only adds.
    assert names_of(whole, "val", 0.1) < names_of(whole, "val", 0.3)
    assert len(whole.split("val", 0.0)) == 0
    assert len(whole.split("train", 1.0)) == 0
    assert len(whole.split("train", 0.0)) == len(whole.split("val", 1.0)) == 2000


def test_split_hash_is_fixed_for_ever():
    """A change here would move images between the splits of trainings that were begun before."""
    assert split_hash("cat/1.png") == 0xE4BEB39DEC288D0C  # b2sum -l 64
    assert split_hash("ü\udcff.png") != split_hash("ü.png")  # a name that is not UTF-8


@pytest.mark.parametrize(("name", "fraction", "reason"), [("test", 0.1, "train, val or all"), ("val", 1.5, "0..1")])
def test_bad_splits(directory, name, fraction, reason):
    with pytest.raises(InputError, match=reason):
        TokenDataset(directory).split(name, fraction)


def test_what_is_no_token_directory(tmp_path):
    (tmp_path / "meta.json").write_text("[1]")
    assert not is_token_directory(tmp_path)
    assert not is_token_directory(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such directory of tokens; write one with igpt-fast tokenize"):
        TokenDataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"meta\.json: cannot be read"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.npy", "labels.npy", "names.json", "palette.npy", "meta.json"])
@pytest.mark.parametrize("left", [None, 0.0, 0.5, 0.98])
def test_files_that_are_missing_or_cut_short(directory, name, left):
    path = directory / name
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(InputError, match=name):
        _ = TokenDataset(directory).names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"images": 12}, "its entries contradict each other"),
        ({"size": [5, 3]}, r"shard-00000\.npy: holds uint16 \[4, 3, 5\] and not uint16 \[4, 5, 3\]"),
        ({"size": 3}, "cannot be read"),
        ({"colors": 8}, r"palette\.npy: has 7 colours and not 8"),
        ({"shards": [4, 4, 4], "images": 12}, r"shard-00002\.npy"),
        ({"shards": [], "images": 0}, "its entries contradict each other"),
        ({"classes": "cats"}, "its entries contradict each other"),
        ({"classes": ["u", "u"]}, "its entries contradict each other"),
        ({"classes": ["u", 3]}, "its entries contradict each other"),
        ({"size": [3.0, 5.0]}, "its entries contradict each other"),
        ({"shards": [4, 4, 3.0]}, "its entries contradict each other"),
        ({"classes": ["u"]}, r"labels\.npy: has labels -1\.\.1, which 1 classes do not have"),
        ({"classes": None}, r"labels\.npy: has labels -1\.\.1, which 0 classes do not have"),
    ],
)
def test_contradictions(tmp_path, tokens, change, reason):
    path = write(tmp_path / "tokens", tokens, ["x"] * 11, rows=4, **change)
    with pytest.raises(InputError, match=reason):
        TokenDataset(path)


def test_labels_below_that_of_none_are_refused(directory):
    np.save(directory / "labels.npy", np.arange(-2, 9).clip(max=1).astype(np.int32))
    with pytest.raises(InputError, match=r"labels\.npy: has labels -2\.\.1, which 2 classes do not have"):
        TokenDataset(directory)


@pytest.mark.parametrize("text", [json.dumps([1] * 11), json.dumps({"a": 1}), "[" * 200_000])
def test_names_that_are_none(directory, text):
    (directory / "names.json").write_text(text)
    with pytest.raises(InputError, match=r"names\.json: cannot be read"):
        _ = TokenDataset(directory).names
    (directory / "meta.json").write_text(text)
    assert not is_token_directory(directory)
    with pytest.raises(InputError, match=r"meta\.json: cannot be read"):
        TokenDataset(directory)


@settings(max_examples=30)
@given(data=st.data())
def test_writer_takes_any_order_and_closes_gaps(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shards")
    count, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(count)))
    kept = np.sort(np.array(order[: data.draw(st.integers(1, count))]))
    tokens = np.random.default_rng(count).integers(0, 2**16, (count, 2, 3)).astype(np.uint16)
    writer = ShardWriter(folder, count, (2, 3), rows)
    for start in range(0, count, 5):
        part = np.array([index for index in order[start : start + 5] if index in kept], np.int64)
        writer.write(part, tokens[part])
    lengths = writer.finish(kept)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"shard-{number:05d}.npy" for number in range(len(lengths))]
    parts = [np.load(file) for file in files]
    assert [len(part) for part in parts] == lengths
    assert lengths[:-1] == [rows] * (len(lengths) - 1)
    assert (np.concatenate(parts) == tokens[kept]).all()
    assert (gather(parts, np.cumsum([0, *lengths]), np.arange(len(kept))) == tokens[kept]).all()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room for a file")
def test_writer_reserves_the_room_at_once(tmp_path):
    ShardWriter(tmp_path, 1000, (32, 32), 600)
    used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert used >= 1000 * 32 * 32 * 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("24 requested and 0 written"), "tokens: the disk is full; make room"),  # NumPy's own
        (OSError(errno.EFBIG, "File too large"), "File too large: '.*/tokens'"),
    ],
)
def test_a_write_that_fails_names_the_place(tmp_path, monkeypatch, error, reason):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(ShardWriter, "write", fail)
    with pytest.raises((InputError, OSError), match=reason):
        write_tokens(tmp_path)
    assert os.listdir(tmp_path) == ["images.npy"]


def test_only_the_works_of_the_dead_are_removed(tmp_path, monkeypatch):
    """Of the same place, that is: others may be at work beside it."""
    kept = [".tokens.0123abcd.tmp.old", ".tokens.notours.tmp", ".tokens2.0123abcd.tmp"]
    for name in (".tokens.0123abcd.tmp", *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000.npy").touch()
    during, real = [], ShardWriter.write

    def another(*arguments: object) -> None:
        monkeypatch.setattr(ShardWriter, "write", real)
        write_tokens(tmp_path)
        during.extend(name for name in os.listdir(tmp_path) if name.startswith(".tokens.") and name not in kept)
        real(*arguments)

    monkeypatch.setattr(ShardWriter, "write", another)
    with pytest.raises(InputError, match="another process has written tokens there"):
        write_tokens(tmp_path)
    assert len(during) == 1 and during != [".tokens.0123abcd.tmp"], "the dead one's is gone, the living one's is not"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "images.npy", "tokens"])


def test_indices_are_whole_numbers(directory):
    data = TokenDataset(directory)
    for bad in (np.ones(11, bool), [0.5], np.array(["1"])):
        with pytest.raises(InputError, match=r"give whole numbers, as numpy\.flatnonzero of a mask"):
            data.batch(bad)
    assert len(data.batch([])) == 0 and len(data.batch(np.array([3], np.uint8))) == 1


def test_names_of_tokens_that_were_written_anew_are_not_taken_for_theirs(tmp_path, tokens):
    old = TokenDataset(write(tmp_path / "t", tokens, [f"{k}.png" for k in range(11)]))
    os.rename(tmp_path / "t", tmp_path / "gone")
    write(tmp_path / "t", tokens, [f"other {k}.png" for k in range(11)], source_stamp="2")
    with pytest.raises(InputError, match=r"names\.json: was written anew since the tokens were opened"):
        _ = old.names


@pytest.mark.parametrize(
    "change", [{"source_stamp": 5}, {"skipped": 3}, {"background": 5}, {"value_range": 7}, {"bands": 1}, {"resize": []}]
)
def test_a_meta_that_no_image_was_read_by(tmp_path, tokens, change):
    with pytest.raises(InputError, match=r"meta\.json"):
        TokenDataset(write(tmp_path / "t", tokens, [f"{k}.png" for k in range(11)], **change))
