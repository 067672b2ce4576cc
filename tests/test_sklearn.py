"""Images in, features out: forward_features and tokenize of the model, and scikit-learn's transformer."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import igpt_fast as igpt
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from igpt_fast.sklearn import IGPTFeatures

CONFIG = igpt.Config(layers=2, width=32, heads=4, colors=8, size=(4, 6))


@pytest.fixture
def model():
    found = igpt.ImageGPT(CONFIG)
    found.palette = igpt.Palette(torch.rand(8, 3) * 2 - 1)
    return found


def pictures(count=5, size=(4, 6)):
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8)


def test_tokenize_and_forward_features(model):
    images = pictures()
    planes = images.permute(0, 3, 1, 2)
    tokens = model.tokenize(planes)
    assert torch.equal(tokens, model.palette.encode(images))
    assert torch.equal(model.tokenize(planes.float() / 255), tokens)
    assert torch.equal(model.tokenize(planes.double() / 255), tokens)
    assert torch.equal(model.forward_features(planes), model.hidden(tokens))
    assert model.forward_features(planes).shape == (5, 24, 32)
    assert model.tokenize(planes[:0]).shape == (0, 4, 6)
    assert "palette" not in "".join(model.state_dict())


def test_other_sizes_are_resized_as_files_are(model):
    from PIL import Image

    from igpt_fast.images import resize_image

    images, made = pictures(3, (10, 8)).repeat_interleave(5, 1).repeat_interleave(5, 2), []  # no gray when it is small
    for resize in ("paper", "hf"):
        small = np.stack([resize_image(Image.fromarray(i.numpy()), (4, 6), resize, "") for i in images])
        made.append(model.palette.encode(torch.tensor(small)))
        assert torch.equal(
            model.tokenize(images.permute(0, 3, 1, 2), resize), model.palette.encode(torch.tensor(small))
        )
        model.preprocessing = {"resize": resize}  # which is what counts where nothing is said
        assert torch.equal(model.tokenize(images.permute(0, 3, 1, 2)), model.palette.encode(torch.tensor(small)))
    assert not torch.equal(*made)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(2, 4, 6, 3), "give a tensor"), (torch.zeros(3, 4, 6), "give a tensor"),
    (torch.zeros(1, 3, 4, 6) - 0.1, "not normalised"), (torch.full((1, 3, 4, 6), torch.nan), "not normalised"),
    (torch.zeros(1, 3, 4, 6, dtype=torch.int64), "int64"), (np.zeros((1, 3, 4, 6), np.uint8), "give a tensor"),
    (torch.zeros(2, 3, 0, 6), r"\[2, 3, 0, 6\]; give a tensor"),
])  # fmt: skip
def test_bad_images_are_refused(model, images, message):
    with pytest.raises(igpt.InputError, match=message):
        model.forward_features(images)


def test_a_palette_is_needed_and_comes_with_a_checkpoint(model, tmp_path):
    palette, model.palette = model.palette, None
    with pytest.raises(igpt.InputError, match="set model"):
        model.tokenize(torch.zeros(1, 3, 4, 6))
    model.palette = igpt.Palette(torch.zeros(3, 3))
    with pytest.raises(igpt.InputError, match="palette of 3"):
        model.tokenize(torch.zeros(1, 3, 4, 6))
    save_checkpoint(tmp_path, 1, model, palette)
    assert torch.equal(load_checkpoint(tmp_path).model.palette.centers, palette.centers)


def test_transformer(model):
    images = pictures(7)
    want = model.features(model.palette.encode(images), 1).detach().numpy()
    features = IGPTFeatures(model, batch=3)
    for given in (images, images.numpy(), images.permute(0, 3, 1, 2), images.float().numpy() / 255,
                  model.palette.encode(images), model.palette.encode(images).flatten(1).numpy()):  # fmt: skip
        got = features.fit_transform(given)
        assert got.dtype == np.float32 and np.allclose(got, want, atol=1e-5)
    last = IGPTFeatures(model, layer=2).transform(images)
    assert np.allclose(last, model.features(model.palette.encode(images), 2).detach().numpy(), atol=1e-5)


def test_conventions(model):
    features = IGPTFeatures(model, layer=1)
    assert features.get_params() == {"model": model, "layer": 1, "batch": 32, "resize": None}
    twin = clone(features.set_params(batch=2))
    assert twin is not features and twin.model is model and twin.batch == 2
    assert [*features.get_feature_names_out()[:2]] == ["igpt0", "igpt1"]
    assert "IGPTFeatures" in repr(features)
    for bad in ({"layer": 3}, {"layer": "a"}, {"batch": 0}, {"batch": None}, {"batch": 2.5}, {"model": None}):
        with pytest.raises(igpt.InputError, match="IGPTFeatures"):
            clone(features).set_params(**bad).fit(None)


@pytest.mark.parametrize(
    "given", [["a", "b"], [[1], [1, 2]], np.zeros((2, 24), object), np.zeros((2, 24), np.longdouble)]
)
def test_what_is_no_array_for_torch_is_refused(model, given):
    with pytest.raises(igpt.InputError, match=r"IGPTFeatures: X is .*give an array or a tensor of numbers"):
        IGPTFeatures(model).transform(given)


def test_gray_images_are_not_taken_for_tokens(model):
    gray = np.zeros((2, 4, 6), np.uint8)
    for given in (gray, gray.reshape(2, 24), torch.zeros(2, 4, 6, dtype=torch.uint8), gray / 2, torch.zeros(2, 24)):
        with pytest.raises(
            igpt.InputError, match=r"(uint8|float\d+) \[2, .*\], gray images or tokens; give gray .* H, W, 1\]"
        ):
            IGPTFeatures(model).transform(given)
    model.palette = igpt.Palette(np.random.default_rng(0).uniform(-1, 1, (model.config.colors, 3)).astype(np.float32))
    shades = np.random.default_rng(1).integers(0, 256, (2, 4, 6, 1), np.uint8)
    assert np.array_equal(*(IGPTFeatures(model).transform(x) for x in (shades, shades.repeat(3, 3))))
    assert (
        IGPTFeatures(model).transform(gray.astype(np.int64)).shape
        == IGPTFeatures(model).transform(np.zeros((2, 24), ">i4")).shape
    )


def test_pipeline(model):
    dark, light = (torch.randint(*r, (20, 4, 6, 3), dtype=torch.uint8) for r in ((0, 90), (160, 256)))
    images, labels = torch.cat((dark, light)).numpy(), np.repeat([0, 1], 20)
    model.palette = igpt.Palette.fit(images, colors=8)
    pipeline = make_pipeline(IGPTFeatures(model), LogisticRegression(max_iter=1000))
    assert cross_val_score(pipeline, images, labels, cv=3).mean() > 0.9
    pandas = pytest.importorskip("pandas")
    framed = IGPTFeatures(model).set_output(transform="pandas").fit_transform(images)
    assert isinstance(framed, pandas.DataFrame) and framed.columns[3] == "igpt3"


def test_the_package_needs_neither_library():
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['transformers'] = None\n"
        "import torch, igpt_fast\n"
        "try: igpt_fast.accelerate(torch.nn.Linear(1, 1))\n"
        "except igpt_fast.InputError as error: assert 'transformers 4.57' in str(error)\n"
        "try: import igpt_fast.sklearn\n"
        "except igpt_fast.InputError as error: assert 'igpt-fast[probe]' in str(error)\n"
        "else: raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
