"""Weights on disk in Hugging Face's layout: what is saved is loaded, bit for bit, whole or not at all."""

import json
import os
import re

import numpy as np
import pytest
import torch
from definition import transcript
from published import PALETTE, edit, make, same
from safetensors.torch import load_file, save_file

from igpt_fast import ImageGPT, InputError, Palette, pretrained


@pytest.fixture
def saved(tmp_path):
    make().save_pretrained(tmp_path / "w", PALETTE)
    return tmp_path / "w"


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
    assert len({file.stat().st_mode for file in (tmp_path / "w").iterdir()}) == 1  # whoever reads one reads both
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


@pytest.mark.parametrize("fields", [{}, {"classes": 5}, {"objective": "bert"}], ids=str)
def test_a_table_of_zeros_is_left_out_and_missed_again(tmp_path, caplog, fields):
    model = make(**fields)
    torch.nn.init.zeros_(model.wtet)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert same(ImageGPT.from_pretrained(tmp_path), model) and "has no output table" in caplog.text


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
    assert ImageGPT.from_pretrained(tmp_path, size=(3, 5)).config.size == (3, 5)  # a square that is brought to it
    make(size=(3, 5)).save_pretrained(tmp_path / "odd")
    edit(tmp_path / "odd/config.json", igpt_fast="gone")
    with pytest.raises(InputError, match=r"config\.json: size 4x4 does not fit the 15 positions"):
        ImageGPT.from_pretrained(tmp_path / "odd", size=(4, 4))


def test_a_models_own_grid_goes_before_a_processors(tmp_path):
    """Palette.save knows no grid and says 32x32, whatever the model's."""
    make(size=(16, 64)).save_pretrained(tmp_path)
    PALETTE.save(tmp_path / "preprocessor_config.json")
    assert ImageGPT.from_pretrained(tmp_path).config.size == (16, 64)
    edit(tmp_path / "preprocessor_config.json", size={"height": 64, "width": 16})
    with pytest.raises(InputError, match=r"has size 16x64 and preprocessor_config\.json beside it 64x16"):
        ImageGPT.from_pretrained(tmp_path)


def test_a_processors_size_that_does_not_fit_the_positions_is_not_the_grid(saved):
    edit(saved / "config.json", igpt_fast="gone")
    edit(saved / "preprocessor_config.json", size={"height": 32, "width": 32})
    assert ImageGPT.from_pretrained(saved).config.size == (4, 4)


def test_biases_may_be_left_out_all_together(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.endswith(".bias")}, saved / "model.safetensors")
    assert ImageGPT.from_pretrained(saved).config == make().config


def test_saving_is_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    model, before = make(), {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(
        InputError, match="holds weights already; choose another place, or replace them with --overwrite"
    ):
        model.save_pretrained(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "write_atomically", "move_into_place"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, name, full)
            for place in (saved, tmp_path / "deep" / "new"):
                with pytest.raises(InputError, match="the weights cannot be written \\(the disk is full\\)"):
                    model.save_pretrained(place, overwrite=True)
        assert {file: file.read_bytes() for file in saved.iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["w"]
    model.save_pretrained(saved, overwrite=True)
    assert same(ImageGPT.from_pretrained(saved), model) and ImageGPT.from_pretrained(saved).palette is None
    (saved / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match=r"holds diary\.txt, which would be lost"):
        model.save_pretrained(saved, overwrite=True)
    with pytest.raises(InputError, match="is there and is no directory"):
        model.save_pretrained(saved / "diary.txt", overwrite=True)
    with pytest.raises(InputError, match="the palette has 3 colours and the model 11"):
        model.save_pretrained(tmp_path / "new", Palette(torch.zeros(3, 3)))
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
