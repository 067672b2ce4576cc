"""What a classifier answers: probabilities, the same in any batch; tables and files that say them."""

import csv
import importlib
import io

import labelled
import numpy as np
import pytest
import torch
from labelled import COLORS, SIZE, write_tokens
from PIL import Image

from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.predict import Answers, answers_csv, class_names, predict, table_png
from igpt_fast.processes import Processes

NAMES = ("cats", 'a "dog", or two', "ü$x$")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("predict"), np.arange(23) % 3)


def make(**fields) -> ImageGPT:
    torch.manual_seed(0)
    model = ImageGPT(Config(**{"layers": 2, "width": 24, "heads": 3, "colors": COLORS, "size": SIZE, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_probabilities_are_those_of_the_logits_in_any_batch(dataset):
    model = make(classes=3)
    model.class_names = NAMES
    with torch.no_grad():  # so that images differ in their answers
        means = model.hidden(dataset.batch(np.arange(23))).mean(1)
        model.wclf.copy_(10 * (means[:3] - means.mean(0)))
    answers, few = predict(model, dataset, batch=5), predict(model, dataset, np.array([7, 3]))
    wanted = model.double().classify(dataset.batch(np.arange(23))).softmax(1).detach().numpy()
    assert np.abs(answers.probabilities - wanted).max() < 1e-5 and answers.classes == NAMES
    assert np.allclose(answers.probabilities.sum(1), 1) and np.array_equal(answers.best, wanted.argmax(1))
    assert np.allclose(few.probabilities, wanted[[7, 3]], atol=1e-5) and few.indices.tolist() == [7, 3]
    assert len(set(answers.best)) > 1
    fine, rough = (predict(model.float(), dataset, amp=amp).probabilities for amp in (False, True))
    assert 100 * np.abs(fine - wanted).max() < np.abs(rough - wanted).max() < 0.2


def test_what_cannot_be_answered(dataset):
    with pytest.raises(InputError, match="no classifier head: igpt-fast finetune gives it one"):
        predict(make(), dataset)
    with pytest.raises(InputError, match="tokenise them for it"):
        predict(make(classes=3, size=(5, 5)), dataset)
    with pytest.raises(InputError, match="no image is left to classify"):
        predict(make(classes=3), dataset, np.arange(0))
    with pytest.raises(InputError, match="batch is -1; use at least 1"):
        predict(make(classes=3), dataset, batch=-1)
    broken = make(classes=3)
    broken.wclf.data[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        predict(broken, dataset)
    assert class_names(make(classes=2)) == ("LABEL_0", "LABEL_1")


def answers_of(*best: int) -> Answers:
    probabilities = np.full((len(best), 3), 0.2, np.float32)
    probabilities[np.arange(len(best)), best] = 0.6
    return Answers(np.arange(len(best))[::-1].copy(), probabilities, NAMES)


def test_the_table_counts_answers_by_class():
    table = answers_of(0, 1, 1, 2, 0).table(np.array([0, 0, 1, 2, 2]))
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_the_file_names_images_as_they_are_called():
    names = ["a.png", "b,c.png", b"caf\xe9.png".decode("utf-8", "surrogateescape")]
    plain = answers_csv(answers_of(1, 0, 2), names)
    assert plain.splitlines()[1] == b'caf\xe9.png,"a ""dog"", or two",0.600000'
    text = answers_csv(answers_of(1, 0, 2), [*names[:2], "d"], np.array([1, -1, 0]), whole=True).decode()
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0] == ["image", "answer", "probability", "class", *(f"p({name})" for name in NAMES)]
    assert lines[1] == ["d", NAMES[1], "0.600000", NAMES[1], "0.200000", "0.600000", "0.200000"]
    assert [line[3] for line in lines[2:]] == ["", NAMES[0]]


@pytest.mark.parametrize("labels", [None, np.array([1, -1, 0])])
@pytest.mark.parametrize("whole", [False, True])
def test_every_column_of_the_file_has_a_head(labels, whole):
    text = answers_csv(answers_of(1, 0, 2), ["a.png", "b.png", "c.png"], labels, whole).decode()
    head, *lines = csv.reader(io.StringIO(text))
    assert head[:3] == ["image", "answer", "probability"] and ("class" in head) == (labels is not None)
    assert [len(line) for line in lines] == [len(head)] * 3 and len(head) == 3 + (labels is not None) + 3 * whole


@pytest.mark.parametrize("count", [2, 3, 24, 25, 300])
def test_the_picture_is_one(count):
    table = np.eye(count, dtype=np.int64) * 3
    names = tuple(f"class {row} $ \udcff of a long name indeed" for row in range(count))
    picture = Image.open(io.BytesIO(table_png(table, names, "50 % of $data$")))
    pixels = np.asarray(picture.convert("RGB"))
    assert min(picture.size) > 300 and (pixels.std((0, 1)) > 5).all()


def test_the_picture_says_where_the_images_of_a_class_went(monkeypatch):
    monkeypatch.setattr(importlib.import_module("igpt_fast.predict"), "figure_png_bytes", lambda figure: figure)
    table = np.array([[3, 1, 0], [0, 4, 4], [0, 0, 0]])  # of the last class there is none
    axes = table_png(table, ("a", "b", 21 * "c"), "some data").axes[0]
    shares = [[75, 25, 0], [0, 50, 50], [0, 0, 0]]
    assert axes.images[0].get_array().tolist() == shares
    written = {text.get_position(): (text.get_text(), text.get_color() == "white") for text in axes.texts}
    cells = ((row, column) for row in range(3) for column in range(3))
    assert written == {(c, r): (str(table[r, c]), shares[r][c] > 50) for r, c in cells}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("answer", "class", "some data")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b", 19 * "c" + "…"]
    many, most = (table_png(np.eye(n), tuple(20 * "d" for _ in range(n)), "").axes[0] for n in (24, 130))
    assert len(many.texts) == 24 * 24 and not most.texts
    assert {label.get_text() for label in many.get_xticklabels()} == {20 * "d"}
    assert 25 < len(most.get_yticklabels()) <= 50, "names that can be read"


def test_half_a_character_in_a_class_is_spelled_out():
    answers = Answers(np.arange(1), np.array([[1.0, 0.0]], np.float32), ("\ud800x", "b"))
    assert answers_csv(answers, ["a.png"]).splitlines()[1] == b"a.png,\\ud800x,1.000000"


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_the_processes_that_are_given_share_the_images(tmp_path, monkeypatch, name):
    given, module = [], importlib.import_module(f"igpt_fast.{name}")
    monkeypatch.setattr(module, "over_images", lambda _, found, *rest, processes, **more: given.append(processes))
    data, processes = write_tokens(tmp_path, np.arange(9) % 3), Processes(torch.device("cpu"))
    getattr(module, name)(labelled.make(classes=3), data, processes=processes)
    assert given == [processes]
