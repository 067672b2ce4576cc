"""`igpt-fast features`: what other programs are given of images."""

import json

import numpy as np
import pytest
import torch
from labelled import PALETTE, SIZE, make, write_tokens
from PIL import Image

from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.weights import open_model


@pytest.fixture
def place(tmp_path):
    dataset = write_tokens(tmp_path, np.arange(30) % 3 - 1)
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    return tmp_path, dataset


def of_model(folder, dataset, indices, layers):
    model = open_model(folder / "run").model
    with torch.inference_mode():
        return model.features(dataset.batch(indices), layers).transpose(0, 1).numpy()


def test_features_labels_and_names_are_those_of_the_images(igpt, place):
    folder, dataset = place
    code, printed, said = igpt(
        "features", folder / "run", dataset.path, "--layers", "0-2", "-o", folder / "f.npz", "--json"
    )
    assert code == 0 and f"wrote {folder / 'f.npz'}" in said and "30 images" in said and "3 layers" in said
    facts, found = json.loads(printed), np.load(folder / "f.npz")
    assert (facts["images"], facts["layers"], facts["width"], facts["step"]) == (30, [0, 1, 2], 24, 3)
    assert set(found) == {"features", "layers", "names", "labels", "classes"} and found["layers"].tolist() == [0, 1, 2]
    assert found["features"].dtype == np.float32 and found["names"].tolist() == dataset.names
    assert np.abs(found["features"] - of_model(folder, dataset, np.arange(30), [0, 1, 2])).max() < 1e-5
    assert found["labels"].tolist() == dataset.labels.tolist() and found["classes"].tolist() == dataset.classes


def test_the_middle_layer_of_images_in_groups(igpt, place):
    folder, _ = place
    (folder / "photos").mkdir()
    images = np.load(folder / "images.npz")["images"]
    rows = ["file_name,group"]
    for k in range(9):
        Image.fromarray(images[k]).save(folder / f"photos/{k}.png")
        rows.append(f"{k}.png,{k // 3}")
    (folder / "photos/metadata.csv").write_text("\n".join(rows))
    words = ("features", folder / "run", folder / "photos", "--resize", "none", "--limit", "4", "-o", folder / "f.npz")
    assert igpt(*words)[0] == 0
    found = np.load(folder / "f.npz")
    assert found["features"].shape == (4, 1, 24) and found["layers"].tolist() == [1] and "labels" not in found
    numbers = [int(name.removesuffix(".png")) for name in found["names"]]
    assert found["groups"].tolist() == [f"{number // 3}" for number in numbers]  # as the table has them
    tokens = PALETTE.encode(torch.from_numpy(images[numbers]))
    model = open_model(folder / "run").model
    want = model.features(tokens.reshape(4, *SIZE), 1).detach().numpy()
    assert np.abs(found["features"][:, 0] - want).max() < 1e-5
    assert igpt(*words[:-1], folder / "g.npz", "--precision", "bf16")[0] == 0
    off = np.abs(np.load(folder / "g.npz")["features"] - found["features"])
    assert 0 < off.max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "3"), "this model has layers 0 to 2"),
        (("--layers", "top"), "--layers 'top' is not understood"),
        (("-o", "f.csv"), "f.csv: is written as a .npz file"),
    ],
)
def test_what_is_refused(igpt, place, monkeypatch, words, message):
    folder, dataset = place
    monkeypatch.chdir(folder)
    code, _, said = igpt("features", folder / "run", dataset.path, *words)
    assert code == 2 and message in said and not (folder / "features.npz").exists()
