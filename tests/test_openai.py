"""OpenAI's checkpoints: tensor bundles as TensorFlow writes them, every variable in its place, every broken byte found.

The small one that the tests carry was written by TensorFlow 2.21 (see openai_checkpoint.py); where TensorFlow is
installed, more are written here: 32 and 64 shards, older shapes, a BERT model, a classifier.
"""

import importlib.util
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from definition import transcript
from openai_checkpoint import PREFIX, SHARDS, SIZES, variable, variables, write

from igpt_fast import Config, ImageGPT, InputError, Palette
from igpt_fast.pretrained import bundle, openai
from igpt_fast.pretrained.bundle import Bundle

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TensorFlow, which writes checkpoints, is not installed",
)
GRID = (2, 3)


def check(model: ImageGPT, found: dict[str, np.ndarray]) -> None:
    """Every weight is where SPEC's table of the original's layout says that it goes."""
    d = model.config.width
    for name in ("wte", "wpe", "wtet"):
        assert np.array_equal(getattr(model, name).detach(), found[f"model/{name}"])
    assert np.array_equal(model.ln_f.detach(), found["model/ln_f/g"])
    if model.config.objective == "ar":
        assert np.array_equal(model.sos.detach(), found["model/sos"])
    if model.config.classes:
        assert np.array_equal(model.wclf.detach(), found["model/clf/wclf"])
    for layer, block in enumerate(model.blocks):
        at = f"model/h{layer}/"
        assert np.array_equal(block.ln_1.detach(), found[at + "ln_1/g"])
        assert np.array_equal(block.ln_2.detach(), found[at + "ln_2/g"])
        qkv = np.concatenate([found[f"{at}attn/{part}_proj"].reshape(d, d) for part in "qkv"])
        assert np.array_equal(block.attn.qkv.weight.detach(), qkv)
        assert np.array_equal(block.attn.proj.weight.detach(), found[at + "attn/c_proj"].reshape(d, d).T)
        assert np.array_equal(block.mlp.fc.weight.detach(), found[at + "mlp/c_fc/w"].reshape(d, 4 * d).T)
        assert np.array_equal(block.mlp.proj.weight.detach(), found[at + "mlp/c_proj/w"].reshape(4 * d, d).T)


def test_the_checkpoint_that_the_tests_carry():
    model = ImageGPT.from_pretrained(PREFIX, size=GRID)
    assert model.config == Config(layers=2, width=8, heads=2, colors=7, size=GRID)
    check(model, variables(**SIZES))


def test_its_logits_are_those_of_the_definition_in_the_original_layout():
    """Written out as the original computes: heads by einsum over [H, e, d], nothing reshaped as our reader does."""
    p = {name: value.astype(np.float64) for name, value in variables(**SIZES).items()}
    x = np.arange(12).reshape(2, 6) * 5 % 7

    def norm(h, g):
        return g * h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5)

    h = p["model/wte"][x]
    h = np.concatenate([np.broadcast_to(p["model/sos"], (2, 1, 8)), h[:, :-1]], 1) + p["model/wpe"]
    for layer in range(2):
        at = f"model/h{layer}/"
        y = norm(h, p[at + "ln_1/g"])
        q, k, v = (np.einsum("btd,hed->bhte", y, p[f"{at}attn/{part}_proj"]) for part in "qkv")
        scores = np.where(np.tri(6, dtype=bool), q @ k.swapaxes(-1, -2) / 2, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        h = h + np.einsum("bhte,hed->btd", mixed, p[at + "attn/c_proj"])
        z = norm(h, p[at + "ln_2/g"]) @ p[at + "mlp/c_fc/w"]
        h = h + z / (1 + np.exp(-1.702 * z)) @ p[at + "mlp/c_proj/w"]
    want = norm(h, p["model/ln_f/g"]) @ p["model/wtet"].T
    with torch.no_grad():
        found = ImageGPT.from_pretrained(PREFIX, size=GRID)(torch.from_numpy(x)).numpy()
    assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()


@pytest.fixture
def copy(tmp_path):
    for file in PREFIX.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / PREFIX.name


def test_a_checkpoint_is_named_in_three_ways_and_its_palette_lies_beside(copy):
    palette = Palette(torch.linspace(-1, 1, 21).reshape(7, 3))
    palette.save(copy.parent / "kmeans_centers.npy")
    for source in (copy, f"{copy}.index", copy.parent):
        model = ImageGPT.from_pretrained(source, size=GRID)
        assert torch.equal(model.palette.centers, palette.centers)
    shutil.copy(f"{copy}.index", copy.parent / ".index")  # whose name is an ending and nothing before it
    with pytest.raises(InputError, match=r"is no directory; give a directory with config\.json"):
        ImageGPT.from_pretrained(copy.parent / ".index")
    assert ImageGPT.from_pretrained(copy.parent, size=GRID).palette is not None
    shutil.copy(f"{copy}.index", copy.parent / "model.ckpt-7.index")
    with pytest.raises(InputError, match="holds 2 checkpoints; name one"):
        ImageGPT.from_pretrained(copy.parent)
    with pytest.raises(InputError, match="6 positions are not a square; give the size"):
        ImageGPT.from_pretrained(copy)


def shard(copy, number: int):
    return copy.with_name(f"{copy.name}.data-{number:05d}-of-{SHARDS:05d}")


def test_every_byte_is_covered_by_a_checksum(copy):
    """A changed bit of the index (but in its footer's padding) or of a weight is found; nobody reads the rest."""
    files = [copy.with_name(f"{copy.name}.index"), *(shard(copy, k) for k in range(SHARDS))]
    used = {shard(copy, k): set() for k in range(SHARDS)}
    for name, entry in Bundle(copy).entries.items():
        if name.startswith("model/") and "adam" not in name and "Adam" not in name:
            used[shard(copy, entry.shard)] |= set(range(entry.offset, entry.offset + entry.length))
    for file in files:
        data = file.read_bytes()
        used.setdefault(file, set(range(len(data) - 48)) | set(range(len(data) - 8, len(data))))
        for at in range(0, len(data), 37):
            if at in used[file]:
                file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
                with pytest.raises(InputError, match=r"model\.ckpt-131000"):
                    ImageGPT.from_pretrained(copy, size=GRID)
        file.write_bytes(data)
    check(ImageGPT.from_pretrained(copy, size=GRID), variables(**SIZES))


def test_what_is_cut_or_missing_is_named(copy):
    index, data = copy.with_name(f"{copy.name}.index"), shard(copy, 1)
    whole = index.read_bytes()
    for length in (0, 10, 47, 48, 200, len(whole) - 1):
        index.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"131000\.index cannot be read \("):
            ImageGPT.from_pretrained(copy, size=GRID)
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-900])
    with pytest.raises(InputError, match=r"data-00001-of-00003 is cut short: model/\S+ should end at byte"):
        ImageGPT.from_pretrained(copy, size=GRID)
    data.unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003, which holds model/\S+, is missing"):
        ImageGPT.from_pretrained(copy, size=GRID)


def test_hostile_bytes_raise_nothing_but_input_errors(copy, monkeypatch):
    """Without checksums, every parser meets the damage: what comes of it is refused, or a model all the same."""
    monkeypatch.setattr(bundle, "_mask", lambda crc: mock.ANY)
    index = copy.with_name(f"{copy.name}.index")
    whole, random, refused = index.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(256)
        index.write_bytes(data)
        try:
            ImageGPT.from_pretrained(copy, size=GRID)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_an_axis_of_another_kind_is_refused(copy, monkeypatch):
    rows = [(b"", b"\x08\x01"), (b"model/wte", b"\x12\x02\x10\x05")]  # the shape's one axis is a number, no message
    monkeypatch.setattr(Bundle, "_table", lambda self, data: iter(rows))
    with pytest.raises(InputError, match=r"131000\.index cannot be read"):
        Bundle(copy)


def test_an_axis_of_one_is_no_number_of_heads(monkeypatch):
    """Projections [1, d, d] can be those of one head, or a convolution's kernel, whose rows are inputs."""

    class Flat(Bundle):
        def __init__(self, prefix):
            super().__init__(prefix)
            for name, entry in self.entries.items():
                if name.endswith("_proj"):
                    self.entries[name] = replace(entry, shape=(1, 8, 8))

    monkeypatch.setattr(openai, "Bundle", Flat)
    with pytest.raises(InputError, match="shape of the projections does not tell the number of heads; give it"):
        ImageGPT.from_pretrained(PREFIX, size=GRID)


def test_the_extra_is_named_when_it_is_missing(copy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google_crc32c", None)
    with pytest.raises(InputError, match=r"pip install igpt-fast\[openai\]"):
        ImageGPT.from_pretrained(copy, size=GRID)


@needs_tensorflow
@pytest.mark.parametrize("shards", [32, 64])
def test_many_shards(tmp_path, shards):
    sizes = {"layers": 8, "width": 16, "heads": 4, "colors": 9, "pixels": 16}
    found = variables(**sizes)
    write(tmp_path / "model.ckpt-1000000", found, shards)
    model = ImageGPT.from_pretrained(tmp_path / "model.ckpt-1000000")
    assert model.config == Config(layers=8, width=16, heads=4, colors=9, size=(4, 4))
    check(model, found)


@needs_tensorflow
def test_bert_and_classifiers(tmp_path):
    sizes = {"layers": 2, "width": 16, "heads": 2, "colors": 9, "pixels": 16}
    found = variables(**sizes) | {"model/clf/wclf": variable("clf", (5, 16))}
    del found["model/sos"]
    write(tmp_path / "model.ckpt-1", found, 2)
    model = ImageGPT.from_pretrained(tmp_path / "model.ckpt-1")
    assert (model.config.objective, model.config.classes) == ("bert", 5)
    check(model, found)
    tokens, keep = torch.randint(9, (2, 16)), torch.rand(2, 16) > 0.15
    logits = transcript(model, tokens, keep)[0]
    with torch.no_grad():
        assert np.abs(model(tokens, keep).numpy() - logits).max() <= 1e-4 * np.abs(logits).max()


@needs_tensorflow
def test_older_shapes_load_when_they_mean_one_thing(tmp_path):
    sizes = {"layers": 2, "width": 16, "heads": 2, "colors": 9, "pixels": 16}
    found = variables(**sizes)
    old = dict(found)
    for name in ("model/wpe", "model/sos", "model/h0/mlp/c_fc/w", "model/h1/attn/c_proj", "model/h1/attn/k_proj"):
        old[name] = found[name][None]
    for name in ("q", "k", "v", "c"):
        old[f"model/h0/attn/{name}_proj"] = found[f"model/h0/attn/{name}_proj"].reshape(16, 16)
    old["model/h0/attn/c_proj"] = old["model/h0/attn/c_proj"][None]
    write(tmp_path / "model.ckpt-1", old, 2)
    with pytest.raises(InputError, match="the number of heads; give it"):
        ImageGPT.from_pretrained(tmp_path / "model.ckpt-1")
    check(ImageGPT.from_pretrained(tmp_path / "model.ckpt-1", heads=2), found)


@needs_tensorflow
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model/h0/attn/q_proj",
            np.ones((1, 16, 16), np.float32),
            r"q_proj is \[1, 16, 16\], which is not",
        ),
        ("model/h1/attn/v_proj", np.ones((16, 2, 8), np.float32), r"v_proj is \[16, 2, 8\], which is not"),
        ("model/h0/mlp/c_fc/w", np.ones((64, 16), np.float32), r"c_fc/w is \[64, 16\], which is not \[16, 16\]"),
        ("model/h1/mlp/c_fc/w", np.ones(1024, np.float32), r"c_fc/w is \[1024\], which is not \[16, 64\]"),
        ("model/h1/mlp/c_fc/b", np.ones(64, np.float32), "holds model/h1/mlp/c_fc/b, which an Image GPT of 2 layers"),
        ("model/wte", np.ones((9, 16), np.int64), "model/wte is stored in TensorFlow's dtype number 9"),
        ("model/h1/ln_2/g", None, "has no model/h1/ln_2/g"),
        ("model/wpe", None, "has no model/wpe; it is not an Image GPT's checkpoint"),
    ],
)
def test_shapes_and_names_that_are_refused(tmp_path, name, value, message):
    found = variables(layers=2, width=16, heads=2, colors=9, pixels=16) | {name: value}
    write(tmp_path / "model.ckpt-1", {key: value for key, value in found.items() if value is not None}, 2)
    with pytest.raises(InputError, match=message):
        ImageGPT.from_pretrained(tmp_path / "model.ckpt-1", heads=2)
