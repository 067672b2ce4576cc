"""The probe: right where classes differ in colour, honest about what was tested, clear about what it refuses."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled import COLORS, SIZE, make, write_tokens
from PIL import Image

from igpt_fast import probe as module
from igpt_fast import regression
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.probe import extract_features, figure_png, probe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("probe"), np.arange(240) * 7 % 3)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def result(model, dataset):
    return probe(model, dataset)


def timeless(result) -> dict:
    return {key: value for key, value in result.to_dict().items() if key != "seconds"}


def test_layers_beat_the_most_frequent_class(result):
    # Even a random network's mean over places keeps how often each colour occurs: all that these classes differ in.
    assert [found.layer for found in result.layers] == [0, 1, 2] and result.depth == 2
    assert min(found.accuracy for found in result.layers) > result.majority.high
    assert min(found.low for found in result.layers) > result.pixels.high


def test_counts_are_of_the_split_that_training_uses(result, dataset):
    assert result.test == len(dataset.split("val", 0.2))
    assert result.train == len(dataset.split("train", 0.2))
    assert result.majority.accuracy == pytest.approx(majority(dataset))
    assert result.feature_bytes == 240 * 3 * 24 * 4
    assert result.classes == ("0", "1", "2") and not result.left_out and not result.unlabelled


def majority(dataset) -> float:
    tested = dataset.labels[dataset.split("val", 0.2)]
    return float(np.bincount(tested).max() / len(tested))


def test_the_most_frequent_class_is_the_tests_where_few_of_each_class_are_learned_from(model, tmp_path):
    labels = (np.arange(240) % 8 > 0).astype(int)  # an eighth is of the first class
    dataset = write_tokens(tmp_path, labels)
    found = probe(model, dataset, layers=[0], per_class=3)
    assert found.train == 6 and found.majority.accuracy == pytest.approx(majority(dataset)) and majority(dataset) > 0.8


def test_the_accuracy_is_scikit_learns_own(result, model, dataset):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learned, tested = dataset.split("train", 0.2), dataset.split("val", 0.2)
    for found in result.layers:
        features = model.features(dataset.batch(dataset.split("all")), found.layer).detach().numpy()
        chain = make_pipeline(StandardScaler(), LogisticRegression(C=found.strength, max_iter=1000))
        chain.fit(features[learned], dataset.labels[learned])
        assert found.accuracy == chain.score(features[tested], dataset.labels[tested])


def test_the_same_seed_gives_the_same_result_and_the_seed_decides_the_validation_part(result, model, dataset):
    again = probe(model, dataset, seed=0)
    assert timeless(again) == timeless(result)
    other = probe(model, dataset, seed=1)
    assert [found.validation for found in other.layers] != [found.validation for found in result.layers]


def test_neither_batch_nor_other_layers_change_a_layer(result, model, dataset):
    indices = np.array([5, 0, 170, 5])
    whole = extract_features(model, dataset, indices, [0, 1, 2])
    assert whole.dtype == np.float32 and whole.shape == (3, 4, 24)
    np.testing.assert_array_equal(whole[:, 0], whole[:, 3])
    wanted = model.features(dataset.batch(indices)).detach().numpy()
    np.testing.assert_allclose(whole, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(extract_features(model, dataset, indices, [0, 2], batch=3), whole[[0, 2]], rtol=1e-5)
    alone = probe(model, dataset, layers=[1])
    assert alone.layers == (result.layers[1],) and alone.pixels == result.pixels


def test_layers_side_by_side_are_one_regression(result, model, dataset):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    both = probe(model, dataset, layers=[2, 0], joined=True)
    assert both.layers == (result.layers[0], result.layers[2]) and both.pixels == result.pixels
    features = model.features(dataset.batch(dataset.split("all"))).detach().numpy()
    features, learned, tested = np.hstack(features[[0, 2]]), dataset.split("train", 0.2), dataset.split("val", 0.2)
    chain = make_pipeline(StandardScaler(), LogisticRegression(C=both.joined.strength, max_iter=1000))
    chain.fit(features[learned], dataset.labels[learned])
    assert both.joined.accuracy == chain.score(features[tested], dataset.labels[tested])
    assert both.joined.layer is None and both.joined.name == "layers joined" and result.joined is None
    assert figure_png(both, "t") != figure_png(replace(both, joined=None), "t")


def test_bf16_features_are_near(model, dataset):
    exact, near = (extract_features(model, dataset, np.arange(20), [0, 1, 2], amp=amp) for amp in (False, True))
    np.testing.assert_array_equal(exact[0], near[0])  # no matrix product comes before layer 0
    assert 0 < np.abs(exact[2] - near[2]).max() < 0.1


def test_limit_draws_by_the_seed(model, dataset):
    few = [probe(model, dataset, layers=[0], limit=60, seed=seed) for seed in (1, 1, 2)]
    assert few[0].train + few[0].test == 60
    assert timeless(few[0]) == timeless(few[1])
    assert {**timeless(few[0]), "seed": 0} != {**timeless(few[2]), "seed": 0}


def test_so_few_labels_of_each_class_and_the_same_test(model, dataset, result):
    few = [probe(model, dataset, layers=[0], per_class=3, seed=seed) for seed in (4, 4, 5)]
    assert few[0].train == 9 and few[0].test == result.test and few[0].per_class == 3
    assert timeless(few[0]) == timeless(few[1]) and few[0].layers != few[2].layers
    assert few[0].layers[0].accuracy < result.layers[0].accuracy
    assert probe(model, dataset, layers=[0], per_class=1000).layers[0] == result.layers[0]


def test_an_unfinished_fit_is_marked(monkeypatch, model, dataset):
    monkeypatch.setattr(regression, "ITERATIONS", 1)
    assert not probe(model, dataset, layers=[0]).layers[0].converged


def test_the_best_layer_is_validations_choice(result):
    assert result.best.validation == max(found.validation for found in result.layers)
    assert result.to_dict()["best_layer"] == result.best.layer
    json.dumps(result.to_dict(), allow_nan=False)
    lucky = regression.Score("layer 0", 0.9, 0, 1, layer=0, validation=0.5)  # with the test images
    preferred = regression.Score("layer 1", 0.6, 0, 1, layer=1, validation=0.8)
    assert replace(result, layers=(lucky, preferred)).best == preferred
    equal = replace(preferred, name="layer 2", layer=2)
    assert replace(result, layers=(lucky, preferred, equal)).best is preferred, "the lowest of equals"
    assert "chosen" not in result.to_dict() and result.chosen.test.sum() == result.test


def test_small_classes_and_unlabelled_images_are_left_out_and_named(model, tmp_path):
    labels = np.concatenate([np.arange(120) % 2, [-1] * 5, [4, 4]])
    found = probe(model, write_tokens(tmp_path, labels), layers=[0])
    assert found.unlabelled == 5 and found.left_out == {"4": 2}
    assert found.classes == ("0", "1") and found.train + found.test == 120


def test_the_figure_is_a_picture(result):
    picture = np.asarray(Image.open(io.BytesIO(figure_png(result, "a title"))).convert("RGB"))
    assert picture.shape == (600, 960, 3)
    blue = np.abs(picture.astype(int) - (0x2F, 0x6F, 0xDE)).sum(-1) < 10
    assert blue.sum() > 200  # the layers' line
    other = np.asarray(Image.open(io.BytesIO(figure_png(result, "another title"))).convert("RGB"))
    assert (other != picture).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "layers 3 were asked for; this model has layers 0 to 2"),
        ({"layers": [-1, 0]}, "layers 0 to 2"),
        ({"layers": []}, "layers none were asked for"),
        ({"test_fraction": 0.0}, "test fraction is 0.0"),
        ({"test_fraction": float("nan")}, "test fraction is nan"),
        ({"test_fraction": 1.0}, "test fraction is 1.0"),
        ({"limit": 0}, "limit is 0"),
        ({"per_class": 1}, "per class is 1; use at least 2"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": 4}, "it takes two classes, each with at least 2"),
    ],
)
def test_options_out_of_range(model, dataset, options, message):
    with pytest.raises(InputError, match=message):
        probe(model, dataset, **options)


def test_data_that_cannot_be_probed(model, tmp_path):
    for name, labels, message in (
        ("none", [-1] * 30, "no image has a label"),
        ("one", [2] * 30, "only one class has images"),
        ("few", [0, 1, 2, 3], "of 4 classes 0 have enough images"),
    ):
        with pytest.raises(InputError, match=message):
            probe(model, write_tokens(tmp_path, labels, name=name))


def test_tokens_of_another_shape_or_palette(dataset):
    for other in ({"size": (5, 4)}, {"colors": COLORS + 1}):
        shape = {"layers": 1, "width": 8, "heads": 1, "colors": COLORS, "size": SIZE, **other}
        with pytest.raises(InputError, match="the images are 4x5 in 9 colours, the model is made for"):
            probe(ImageGPT(Config(**shape)), dataset)
    model = make()
    model.palette = Palette(dataset.palette.centers / 2)
    with pytest.raises(InputError, match="its colours are others than the model's"):
        probe(model, dataset)


def test_layers_are_taken_once_and_few_labels_told(model, dataset, caplog):
    found = probe(model, dataset, layers=[1, 0, 1], per_class=70)
    assert [score.layer for score in found.layers] == [0, 1] and "fewer than 70 images to learn from" in caplog.text
    with pytest.raises(InputError, match="layers -1, 1 were asked for; this model has layers 0 to 2"):
        probe(model, dataset, layers=[1, -1])


def test_a_broken_model(dataset):
    broken = ImageGPT(Config(layers=1, width=8, heads=1, colors=COLORS, size=SIZE))
    torch.nn.init.constant_(broken.ln_f, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        probe(broken, dataset)


def test_features_that_no_memory_holds(monkeypatch, model, dataset):
    monkeypatch.setattr(module, "memory_of", lambda device: 1000)
    with pytest.raises(InputError, match=r"take fewer with --limit or --layers"):
        probe(model, dataset)


@pytest.mark.parametrize(("joined", "widest"), [(False, 3 * 4 * 5), (True, 3 * 24)])
def test_what_a_classifier_reads_has_room_beside_the_features(monkeypatch, model, dataset, result, joined, widest):
    """Raw pixels, or all layers joined, whichever is wider, and the same standardised."""
    layers = [0, 1, 2] if joined else [1]
    most = 240 * 4 * (2 * widest + len(layers) * 24)
    monkeypatch.setattr(module, "memory_of", lambda device: most)
    assert probe(model, dataset, layers=layers, joined=joined)
    monkeypatch.setattr(module, "memory_of", lambda device: most - 1)
    with pytest.raises(InputError, match=r"and what a classifier reads, take .* --limit or --layers, or --solver sgd"):
        probe(model, dataset, layers=layers, joined=joined)
    monkeypatch.setattr(module, "memory_of", lambda device: 240 * 4 * len(layers) * 24 - 1)
    monkeypatch.setattr(module, "memory_of", lambda device: 240 * 4 * len(layers) * 24)
    assert probe(model, dataset, layers=layers, joined=joined, solver="sgd", epochs=1)
    several = SimpleNamespace(on_this_machine=2)
    with pytest.raises(InputError, match=r"240 images at . layers in 2 processes take .* GB"):
        extract_features(model, dataset, np.arange(240), layers, processes=several)
    monkeypatch.setattr(module, "memory_of", lambda device: 240 * 4 * len(layers) * 24 - 1)
    for solver in ("lbfgs", "sgd"):  # which would not do here
        with pytest.raises(InputError, match=r"take fewer with --limit or --layers$"):
            probe(model, dataset, layers=layers, joined=joined, solver=solver)


def test_without_scikit_learn_the_extra_is_named(monkeypatch, model, dataset):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install igpt-fast\[probe\]"):
        probe(model, dataset)
