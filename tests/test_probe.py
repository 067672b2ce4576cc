"""The probe: right where classes differ in colour, honest about what was tested, clear about what it refuses."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from igpt_fast import classify as classifier
from igpt_fast import cli
from igpt_fast import probe as module
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.classify import classify, draw_folds, score
from igpt_fast.cli.probe import parse_layers
from igpt_fast.config import Config
from igpt_fast.data import tokenize
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.probe import extract_features, figure_png, probe

SIZE, COLORS = (4, 5), 9
GREYS = np.linspace(0, 255, COLORS).round().astype(np.uint8)
PALETTE = Palette(torch.from_numpy(GREYS).float()[:, None].expand(-1, 3) / 127.5 - 1)


def write_tokens(folder, labels, seed: int = 0, name: str = "images"):
    """One image per label (negative: none). Class c likes greys that lie c + 1 from the middle one, on either side.

    So the mean of every pixel is the same in all classes: no linear classifier of pixels can know them apart.
    """
    labels, random = np.asarray(labels), np.random.default_rng(seed)
    shape = (len(labels), *SIZE)
    liked = 4 + random.choice([-1, 1], shape) * (1 + np.maximum(labels, 0) % 4)[:, None, None]
    greys = np.where(random.random(shape) < 0.35, liked, random.integers(0, COLORS, shape))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", images=np.repeat(GREYS[greys][..., None], 3, axis=-1), labels=labels)
    return tokenize(folder / f"{name}.npz", PALETTE, folder / name, SIZE, resize="none", workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("probe"), np.arange(240) * 7 % 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ImageGPT(Config(layers=2, width=24, heads=3, colors=COLORS, size=SIZE))


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
    learned, tested = (dataset.labels[dataset.split(part, 0.2)] for part in ("train", "val"))
    return float((tested == np.bincount(learned).argmax()).mean())


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


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 9))
def test_every_class_is_dealt_out_evenly(count, classes, seed):
    labels, test = np.arange(count * classes) % classes, np.arange(count * classes) < classes
    folds = draw_folds(labels, test, seed)
    assert (folds[test] == -1).all()
    for label in range(classes):
        sizes = np.bincount(folds[(labels == label) & ~test], minlength=5)
        assert sizes.sum() == count - 1 and sizes.max() - sizes.min() <= 1


def test_few_images_are_all_validated_on_and_many_in_part(monkeypatch):
    asked = []
    monkeypatch.setattr(
        classifier, "_right", lambda x, y, fit, ask, c: (asked.append((fit.sum(), ask.sum())) or int(c == 0.1), True)
    )
    folds = np.array([-1] * 10 + [0, 1, 2, 3, 4] * 8)
    found = classify("x", np.zeros((50, 1)), np.arange(50) % 2, folds)
    assert asked == [(32, 8)] * 30 + [(40, 10)] and found.strength == 0.1 and found.validation == 5 / 40
    asked.clear()
    monkeypatch.setattr(classifier, "FEW", 39)
    assert classify("x", np.zeros((50, 1)), np.arange(50) % 2, folds).validation == 1 / 8
    assert asked == [(32, 8)] * 6 + [(40, 10)]


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


def test_the_test_images_have_no_say_in_the_penalty():
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (np.eye(3)[labels] + random.normal(size=(90, 3))).astype(np.float32)
    test = np.arange(90) >= 70
    folds = draw_folds(labels, test, 0)
    found = classify("x", features, labels, folds)
    features[test], labels[test] = -features[test], 0
    other = classify("x", features, labels, folds)
    assert (found.strength, found.validation) == (other.strength, other.validation)
    assert found.accuracy != other.accuracy and found.converged


def test_an_unfinished_fit_is_marked(monkeypatch, model, dataset):
    monkeypatch.setattr(classifier, "ITERATIONS", 1)
    assert not probe(model, dataset, layers=[0]).layers[0].converged


def test_wilsons_interval():
    found = score("x", 8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_accuracy_and_narrows(count, data):
    right = data.draw(st.integers(0, count))
    found, more = score("x", right, count), score("x", 4 * right, 4 * count)
    assert 0 <= found.low <= found.accuracy <= found.high <= 1
    assert more.high - more.low < found.high - found.low


def test_the_best_layer_is_validations_choice(result):
    assert result.best.validation == max(found.validation for found in result.layers)
    assert result.to_dict()["best_layer"] == result.best.layer
    json.dumps(result.to_dict(), allow_nan=False)


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
        ({"layers": [3]}, "layers 3 were asked; this model has layers 0 to 2"),
        ({"layers": [-1, 0]}, "layers 0 to 2"),
        ({"layers": []}, "layers none were asked"),
        ({"test_fraction": 0.0}, "test fraction is 0.0"),
        ({"test_fraction": float("nan")}, "test fraction is nan"),
        ({"test_fraction": 1.0}, "test fraction is 1.0"),
        ({"limit": 0}, "limit is 0"),
        ({"per_class": 1}, "per class is 1; use at least 2"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": 4}, "a probe needs two classes"),
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


def test_a_broken_model(dataset):
    broken = ImageGPT(Config(layers=1, width=8, heads=1, colors=COLORS, size=SIZE))
    torch.nn.init.constant_(broken.ln_f, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        probe(broken, dataset)


def test_features_that_no_memory_holds(monkeypatch, model, dataset):
    monkeypatch.setattr(module, "_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"take fewer with --limit or --layers"):
        probe(model, dataset)


def test_without_scikit_learn_the_extra_is_named(monkeypatch, model, dataset):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install igpt-fast\[probe\]"):
        probe(model, dataset)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", [0, 1, 2, 3]), ("3,5", [3, 5]), (" 2-4, 0", [2, 3, 4, 0]), ("7", [7])]
)
def test_layers_are_read(text, layers):
    assert parse_layers(text, 3) == layers


@pytest.mark.parametrize("text", ["", "3,", "-1", "a", "1-2-3", "1.5"])
def test_layers_that_mean_nothing(text):
    with pytest.raises(InputError, match="is not understood; give all, or layers from 0 to 3"):
        parse_layers(text, 3)


@pytest.fixture
def igpt(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["igpt-fast", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        return (end.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def run(tmp_path, model):
    save_checkpoint(tmp_path / "run", 3, model, PALETTE)
    return tmp_path / "run"


def test_the_command_prints_one_object_and_writes_the_figure(igpt, run, dataset, result, tmp_path):
    out = tmp_path / "figures" / "probe.png"
    code, printed, said = igpt("probe", run, dataset.path, "--out", out, "--json")
    assert code == 0 and Image.open(out).size == (960, 600)
    found = json.loads(printed)
    assert found["step"] == 3 and found["figure"] == str(out)
    wanted = json.loads(json.dumps(timeless(result)))
    assert {key: found[key] for key in wanted} == wanted
    assert "raw pixels" in said and "majority class" in said and f"layer {result.best.layer} *" in said


def test_images_are_tokenised_for_the_probe_and_leave_nothing(igpt, run, dataset, result, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (run / "train.json").write_text(
        json.dumps({"config": {}, "options": {}, "data": {}, "command": {"images": {"resize": "none"}}})
    )
    images = dataset.path.with_suffix(".npz")
    code, printed, _ = igpt("probe", run, images, "--layers", "1", "--json", "-o", tmp_path / "p.png")
    assert code == 0 and not list(scratch.iterdir())
    assert json.loads(printed)["layers"][0]["accuracy"] == result.layers[1].accuracy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "9"), "layers 9 were asked; this model has layers 0 to 2"),
        (("--layers", "x"), "--layers 'x' is not understood"),
        (("--test-fraction", "2"), "test fraction is 2.0"),
        (("--out", "probe.txt"), "a name ending in .png"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used here"),
    ],
)
def test_the_command_refuses_in_one_line(igpt, run, dataset, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, printed, said = igpt("probe", run, dataset.path, *words)
    assert code == 2 and not printed
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not list(tmp_path.glob("*.png"))


def test_without_a_palette_only_tokens_can_be_probed(igpt, model, dataset, tmp_path):
    save_checkpoint(tmp_path / "bare", 1, model)
    code, _, said = igpt("probe", tmp_path / "bare", dataset.path.with_suffix(".npz"), "-o", tmp_path / "p.png")
    assert code == 2 and "has no palette to read images with" in said
    assert igpt("probe", tmp_path / "bare", dataset.path, "--layers", "0", "-o", tmp_path / "p.png")[0] == 0
