"""Weights on disk in Hugging Face's layout: what is saved is loaded, bit for bit, and what is broken is named."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from definition import transcript
from safetensors.torch import load_file, save_file

from igpt_fast import Config, ImageGPT, InputError, Palette, pretrained

SIZES = {"layers": 2, "width": 24, "heads": 3, "colors": 11, "size": (4, 4)}
PALETTE = Palette(torch.linspace(-1, 1, 33).reshape(11, 3))


def make(**fields) -> ImageGPT:
    """A model whose every number matters."""
    model = ImageGPT(Config(**{**SIZES, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def same(a: ImageGPT, b: ImageGPT) -> bool:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    return a.config == b.config and mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


@pytest.fixture
def saved(tmp_path):
    make().save_pretrained(tmp_path / "w", PALETTE)
    return tmp_path / "w"


def edit(path, **fields):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**values, **fields}.items() if value != "gone"}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True},
        {"classes": 5},
        {"size": (2, 9)},
        {"mlp_width": 40, "eps": 1e-3},
        {"objective": "bert"},
        {"objective": "bert", "bias": True, "size": (3, 5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(tmp_path, fields, dtype):
    model = make(**fields).to(dtype)
    model.save_pretrained(tmp_path / "w")
    assert same(ImageGPT.from_pretrained(tmp_path / "w"), model)
    assert sorted(os.listdir(tmp_path / "w")) == ["config.json", "model.safetensors"]
    assert ImageGPT.from_pretrained(tmp_path / "w", dtype=torch.float16).wte.dtype == torch.float16


@pytest.mark.parametrize("fields", [{}, {"objective": "bert"}, {"objective": "bert", "bias": True}], ids=str)
def test_loaded_models_compute_their_definition(tmp_path, fields):
    make(**fields).save_pretrained(tmp_path / "w")
    model = ImageGPT.from_pretrained(tmp_path / "w")
    tokens = torch.randint(11, (3, 4, 4))
    keep = torch.rand(3, 4, 4) > 0.15 if fields else None
    logits, features = transcript(model, tokens, keep)
    with torch.no_grad():
        found = model(tokens, keep)
        pooled = model.features(tokens)
    assert np.abs(found.numpy() - logits).max() <= 1e-4 * np.abs(logits).max()
    if keep is not None:
        features = transcript(model, tokens)[1]  # features see every pixel
    assert np.abs(pooled.numpy() - features).max() <= 1e-4 * np.abs(features).max()


def test_the_palette_goes_along(saved, tmp_path):
    model = ImageGPT.from_pretrained(str(saved))
    assert torch.equal(model.palette.centers, PALETTE.centers)
    assert json.loads((saved / "preprocessor_config.json").read_text())["size"] == {"height": 4, "width": 4}
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(Palette.load(tmp_path / "again").centers, PALETTE.centers)
    os.unlink(saved / "preprocessor_config.json")
    assert ImageGPT.from_pretrained(saved).palette is None
    PALETTE.save(saved / "kmeans_centers.npy")
    assert torch.equal(ImageGPT.from_pretrained(saved).palette.centers, PALETTE.centers)


def test_weights_lie_in_any_of_four_ways(saved):
    model, tensors = make(), load_file(saved / "model.safetensors")
    model.load_state_dict(ImageGPT.from_pretrained(saved).state_dict())
    os.unlink(saved / "model.safetensors")
    half = len(tensors) // 2
    parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    for suffix, save in ((".safetensors", save_file), (".bin", torch.save)):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        save(tensors, saved / f"{stem}{suffix}")
        assert same(ImageGPT.from_pretrained(saved), model)
        os.unlink(saved / f"{stem}{suffix}")
        names = [f"{stem}-{k + 1:05d}-of-00002{suffix}" for k in range(2)]
        for part, name in zip(parts, names, strict=True):
            save(part, saved / name)
        index = {key: name for part, name in zip(parts, names, strict=True) for key in part}
        (saved / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        assert same(ImageGPT.from_pretrained(saved), model)
        for name in (*names, f"{stem}{suffix}.index.json"):
            os.unlink(saved / name)
    with pytest.raises(InputError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        ImageGPT.from_pretrained(saved)


def test_old_files_load(saved):
    """As the hub's first files: a pickle, no prefix, masks among the weights, fewer fields, the size a bare number."""
    model, tensors = ImageGPT.from_pretrained(saved), load_file(saved / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    os.unlink(saved / "model.safetensors")
    torch.save(old, saved / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    edit(saved / "config.json", igpt_fast="gone", n_inner="gone", dtype="gone", torch_dtype="float32", attn_pdrop=0.1)
    settings = {"clusters": PALETTE.centers.tolist(), "size": 4, "do_resize": True, "resample": 2}
    (saved / "preprocessor_config.json").write_text(json.dumps(settings))
    assert same(ImageGPT.from_pretrained(saved), model)


def test_dtypes_that_differ_become_the_widest(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].bfloat16()
    save_file(tensors, saved / "model.safetensors")
    model = ImageGPT.from_pretrained(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wtet, tensors["lm_head.weight"].float())


def test_fields_that_nobody_knows_are_said(saved, caplog):
    edit(saved / "config.json", rope_theta=10000.0, problem_type=None)
    ImageGPT.from_pretrained(saved)
    assert re.findall("not used: (.*)", caplog.text) == ["rope_theta"]


def test_a_grid_that_is_no_square_is_known_by_its_processor_or_said(tmp_path):
    make(size=(2, 8)).save_pretrained(tmp_path, PALETTE)
    edit(tmp_path / "config.json", igpt_fast="gone", n_positions=16)
    assert ImageGPT.from_pretrained(tmp_path).config.size == (2, 8)
    os.unlink(tmp_path / "preprocessor_config.json")
    assert ImageGPT.from_pretrained(tmp_path).config.size == (4, 4)
    assert ImageGPT.from_pretrained(tmp_path, size=(8, 2)).config.size == (8, 2)
    with pytest.raises(InputError, match=r"config\.json: size 3x5 does not fit the 16 positions"):
        ImageGPT.from_pretrained(tmp_path, size=(3, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "has model_type='gpt2', which is not supported"),
        ({"scale_attn_weights": False}, "has scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "gelu"}, "has activation_function='gelu'"),
        ({"add_cross_attention": True}, "has add_cross_attention=True"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings=True"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config="),
        ({"auto_map": {"AutoModel": "x.Y"}}, "has auto_map="),
        ({"n_layer": 3}, r"has no transformer\.h\.2\.ln_1\.weight"),
        (
            {"n_layer": 1},
            r"holds transformer\.h\.1\.attn\.c_attn\.bias, .* and \d+ more, which an ImageGPT of 1 layers",
        ),
        ({"n_layer": "2"}, "config.json: layers is '2'"),
        ({"n_head": 5}, "config.json: width 24 does not divide into 5 heads"),
        ({"n_embd": 48}, r"model.safetensors holds transformer\.wte\.weight as \[12, 24\], not \[12, 48\]"),
        ({"n_inner": 7}, r"holds transformer\.h\.0\.mlp\.c_fc\.weight as \[24, 96\], not \[24, 7\]"),
        ({"vocab_size": None}, "config.json: vocab_size is None"),
        ({"vocab_size": 513}, r"holds transformer\.wte\.weight as \[12, 24\], not \[513, 24\]"),
        ({"n_positions": 17, "igpt_fast": "gone"}, "17 positions are not a square; pass size="),
        ({"layer_norm_epsilon": "small"}, "eps is 'small'"),
        ({"igpt_fast": {"size": 4}}, "igpt_fast is {'size': 4}"),
        ({"igpt_fast": {"objective": "both", "size": [4, 4]}}, "objective is 'both'"),
    ],
)
def test_configs_that_ask_for_something_else(saved, fields, message):
    edit(saved / "config.json", **fields)
    with pytest.raises(InputError, match=message) as error:
        ImageGPT.from_pretrained(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def write_cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def write_garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def write_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def write_evil_zip(folder):
    os.unlink(folder / "model.safetensors")
    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")


def write_evil_pickle(folder):
    os.unlink(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def write_tampered_zip(folder):
    tensors = load_file(folder / "model.safetensors")
    os.unlink(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[largest.header_offset + 600] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)


def write_list(folder):
    os.unlink(folder / "model.safetensors")
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


def write_nested(folder):
    os.unlink(folder / "model.safetensors")
    torch.save({"model": {"wte": torch.ones(2)}}, folder / "pytorch_model.bin")


def write_index(folder, places):
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def change(folder, **tensors):
    found = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in found.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_cut, r"w/model\.safetensors cannot be read"),
        (write_garbage, r"w/model\.safetensors cannot be read"),
        (write_empty, r"w/model\.safetensors cannot be read"),
        (write_evil_zip, r"w/pytorch_model\.bin cannot be read \(it holds more than tensors"),
        (write_evil_pickle, r"w/pytorch_model\.bin cannot be read"),
        (write_tampered_zip, r"w/pytorch_model\.bin cannot be read"),
        (write_list, r"w/pytorch_model\.bin holds a list, not a state dict"),
        (write_nested, r"w/pytorch_model\.bin holds 'model' as dict, not as a dense tensor"),
        (
            lambda f: write_index(f, {"lm_head.weight": "b.safetensors"}),
            r"lm_head\.weight lies in b\.safetensors, which",
        ),
        (lambda f: write_index(f, {"lm_head.weight": "../w/a.safetensors"}), "which is no name of a .safetensors file"),
        (lambda f: write_index(f, {"lm_head.weight": 3}), "lies in 3, which is no name"),
        (lambda f: write_index(f, {"lost": "a.safetensors"}), r"a\.safetensors has no lost, which model\.safetensors"),
        (lambda f: write_index(f, []), "has no weight_map"),
        (lambda f: (f / "config.json").write_text("{"), r"w/config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), r"w/config\.json is no JSON object"),
        (lambda f: change(f, **{"lm_head.weight": None}), r"w/model\.safetensors has no lm_head\.weight"),
        (lambda f: change(f, extra=torch.ones(1)), r"w/model\.safetensors holds transformer\.extra, which an ImageGPT"),
        (
            lambda f: change(f, **{"transformer.ln_f.weight": torch.ones(25)}),
            r"w/model\.safetensors holds transformer\.ln_f\.weight as \[25\], not \[24\]",
        ),
        (lambda f: change(f, **{"wpe.weight": torch.ones(16, 24)}), r"holds transformer\.wpe\.weight twice"),
        (
            lambda f: change(f, **{"lm_head.weight": torch.ones(11, 24, dtype=torch.int64)}),
            r"holds lm_head\.weight as torch\.int64",
        ),
        (lambda f: Palette(torch.zeros(3, 3)).save(f / "palette.npy"), "its palette has 3 colours, the model is of 11"),
        (lambda f: (f / "preprocessor_config.json").write_text("{}"), "preprocessor_config.json has no `clusters`"),
    ],
)
def test_broken_files_are_named_and_nothing_is_run(saved, spoil, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spoil(saved)
    with pytest.raises(InputError, match=message) as error:
        ImageGPT.from_pretrained(saved)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_old_torch_reads_no_pickles(saved, monkeypatch):
    monkeypatch.setattr(pretrained.files.torch, "__version__", "2.5.1+cpu")
    write_list(saved)
    with pytest.raises(InputError, match=r"torch 2\.5\.1\+cpu cannot read safely; use torch 2\.6"):
        ImageGPT.from_pretrained(saved)


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "", "a--b/c", "../x/y"])
def test_what_is_no_directory_and_no_name(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not there|has no config.json; give a directory with config.json"):
        ImageGPT.from_pretrained(source)


def test_saving_is_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    model, before = make(), {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(InputError, match="holds files already; choose another place, or replace them with overwrite"):
        model.save_pretrained(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "write_atomically", "_move_into_place"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, name, full)
            for place in (saved, tmp_path / "new"):
                with pytest.raises(InputError, match="the weights cannot be written \\(the disk is full\\)"):
                    model.save_pretrained(place, overwrite=True)
        assert {file: file.read_bytes() for file in saved.iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["w"]
    model.save_pretrained(saved, overwrite=True)
    assert same(ImageGPT.from_pretrained(saved), model) and ImageGPT.from_pretrained(saved).palette is None
    (saved / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="also holds diary.txt, which would be lost"):
        model.save_pretrained(saved, overwrite=True)
    with pytest.raises(InputError, match="is there and is no directory"):
        model.save_pretrained(saved / "diary.txt", overwrite=True)
    with pytest.raises(InputError, match="the palette has 3 colours and the model 11"):
        model.save_pretrained(tmp_path / "new", Palette(torch.zeros(3, 3)))
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
