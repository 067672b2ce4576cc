"""Weights that are broken, strange or hostile: one InputError names file and key, nothing is run or half loaded."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from published import PALETTE, edit, make
from safetensors.torch import load_file, save_file

from igpt_fast import ImageGPT, InputError, Palette, pretrained


@pytest.fixture
def saved(tmp_path):
    make().save_pretrained(tmp_path / "w", PALETTE)
    return tmp_path / "w"


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
            r"holds transformer\.h\.1\.attn\.c_attn\.bias, .* and \d+ more, which an ImageGPT of",
        ),
        ({"n_layer": "2"}, "config.json: layers is '2'"),
        ({"n_head": 5}, "config.json: width 24 does not divide into 5 heads"),
        ({"n_embd": 48}, r"model.safetensors holds transformer\.wte\.weight as \[12, 24\], not \[12, 48\]"),
        ({"n_inner": 7}, r"holds transformer\.h\.0\.mlp\.c_fc\.weight as \[24, 96\], not \[24, 7\]"),
        ({"vocab_size": None}, "config.json: vocab_size is None"),
        ({"vocab_size": 513}, r"holds transformer\.wte\.weight as \[12, 24\], not \[513, 24\]"),
        ({"n_positions": 17, "igpt_fast": "gone"}, "17 positions are not a square; give the size"),
        ({"layer_norm_epsilon": "small"}, "eps is 'small'"),
        ({"layer_norm_epsilon": 10**400}, "eps is 1000"),
        ({"n_layer": 10**4}, r"has no transformer\.h\.2\.ln_1\.weight"),
        ({"n_embd": 99991}, "use width 99990 or heads 1"),
        ({"n_embd": 10**399 + 1}, r"width is 10+1; use at most 100,000"),
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


def write_meta(folder):
    tensors = load_file(folder / "model.safetensors")
    os.unlink(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to("meta")
    torch.save(tensors, folder / "pytorch_model.bin")


def write_headless(folder, architectures):
    edit(folder / "config.json", architectures=architectures)
    change(folder, **{"lm_head.weight": None})


def write_nested(folder):
    os.unlink(folder / "model.safetensors")
    torch.save({"model": {"wte": torch.ones(2)}}, folder / "pytorch_model.bin")


def write_index(folder, places):
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_twice(folder):
    tensors = load_file(folder / "model.safetensors")
    write_index(folder, dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"})
    save_file(tensors, folder / "b.safetensors")


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
            r"lm_head\.weight lies in b\.safetensors,",
        ),
        (lambda f: write_index(f, {"lm_head.weight": "../w/a.safetensors"}), "which is no name of a .safetensors file"),
        (lambda f: write_index(f, {"lm_head.weight": 3}), "lies in 3, which is no name"),
        (lambda f: write_index(f, {"lost": "a.safetensors"}), r"a\.safetensors has no lost, which model\.safetensors"),
        (write_twice, r"w/b\.safetensors holds lm_head\.weight, and so does \S+/w/a\.safetensors"),
        (lambda f: write_index(f, []), "has no weight_map"),
        (lambda f: write_index(f, {"lost": "a" * 5000 + ".safetensors"}), r"lies in 'a{79}, which is no name"),
        (lambda f: (f / "config.json").write_text("{"), r"w/config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[" * 200_000), r"w/config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), r"w/config\.json is no JSON object"),
        (lambda f: change(f, **{"lm_head.weight": None}), r"w/model\.safetensors has no lm_head\.weight"),
        (lambda f: write_headless(f, {"a": 1}), r"has no lm_head\.weight"),
        (lambda f: write_headless(f, 5), r"has no lm_head\.weight"),
        (
            lambda f: change(f, **{"transformer.h.0.attn.c_attn.bias": None}),
            r"w/model\.safetensors has no transformer\.h\.0\.attn\.c_attn\.bias",
        ),
        (
            lambda f: change(f, **{"transformer.ln_f.weight": torch.ones(24).to(torch.float8_e5m2)}),
            r"holds transformer\.ln_f\.weight as torch\.float8_e5m2; weights are torch\.float32, ",
        ),
        (write_meta, r"w/pytorch_model\.bin holds lm_head\.weight without its numbers"),
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
    with pytest.raises(InputError, match=r"is not there|has no config\.json; give a directory with config.json"):
        ImageGPT.from_pretrained(source)
