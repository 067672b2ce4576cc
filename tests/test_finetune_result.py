"""What fine-tuning says of itself: its JSON, its interval, its warnings, why it ended."""

import json

import numpy as np
import pytest
from labelled import FAST, PALETTE, SIZE, make, write_tokens

from igpt_fast import intervals
from igpt_fast.data import tokenize
from igpt_fast.errors import InputError
from igpt_fast.evaluate import evaluate
from igpt_fast.finetune import finetune
from igpt_fast.palette import Palette
from igpt_fast.predict import predict

pytestmark = pytest.mark.usefixtures("one_thread")


def test_few_images_and_equal_ones_to_test_on_are_said(tmp_path, caplog):
    write_tokens(tmp_path, np.arange(30) % 3)
    once = np.load(tmp_path / "images.npz")
    np.savez(tmp_path / "twice.npz", **{name: np.concatenate([once[name]] * 2) for name in once})
    twice = tokenize(tmp_path / "twice.npz", PALETTE, tmp_path / "twice", SIZE, resize="none", workers=0)
    finetune(make(), twice, tmp_path / "run", **{**FAST, "steps": 1, "per_class": 50})
    assert "fewer than 50 images to learn from" in caplog.text
    assert "images to test on are learned from too" in caplog.text


def test_an_end_at_the_last_step_is_none_for_want_of_progress(tmp_path, capsys):
    data = write_tokens(tmp_path, np.arange(60) % 3)
    still = {**FAST, "lr": 1e-12, "warmup": 0, "val_every": 2, "precision": "fp32"}
    finetune(make(), data, tmp_path / "all", **{**still, "steps": 4})
    assert "has not become better" not in capsys.readouterr().err
    finetune(make(), data, tmp_path / "early", **{**still, "steps": 40, "patience": 1})
    assert "ended at step 4: validation has not become better 1 times in a row" in capsys.readouterr().err


def test_the_test_of_images_in_groups_has_the_interval_of_the_groups(tmp_path):
    write_tokens(tmp_path, np.arange(120) // 4 % 3)
    images = dict(np.load(tmp_path / "images.npz"))
    np.savez(tmp_path / "grouped.npz", **images, groups=np.arange(120) // 4)
    data = tokenize(tmp_path / "grouped.npz", PALETTE, tmp_path / "grouped", SIZE, resize="none", workers=0)
    result = finetune(make(), data, tmp_path / "run", **{**FAST, "steps": 2})
    right = result.answers.best == result.chosen.labels[result.chosen.test]
    assert (result.test.low, result.test.high) == intervals.of_share(right, result.chosen.test_groups)
    assert (result.test.low, result.test.high) != intervals.of_share(right)


def test_tokens_of_another_palette_are_refused(tmp_path):
    data, model = write_tokens(tmp_path, np.arange(30) % 3), make(classes=3)
    model.palette = Palette(-PALETTE.centers)
    for call in (evaluate, predict):
        with pytest.raises(InputError, match="its colours are others than the model's"):
            call(model, data)
    with pytest.raises(InputError, match="its colours are others than the model's"):
        finetune(model, data, tmp_path / "run", **FAST)
    assert not list(tmp_path.glob("run/*"))


def test_what_json_holds_of_a_fine_tuning(tmp_path):
    data = write_tokens(tmp_path, np.r_[np.arange(90) % 3, [3], [-1] * 5])
    found = finetune(make(), data, tmp_path / "run", **{**FAST, "lr": 1e-12, "warmup": 0, "steps": 8})
    values = json.loads(json.dumps(found.to_dict()))
    assert (values["step"], values["last_step"]) == (found.step, found.last_step) == (4, 8)
    assert (values["left_out"], values["unlabelled"]) == ({data.classes[3]: 1}, 5)
    assert values["images"] == {"train": found.train, "val": found.val, "test": int(found.chosen.test.sum())}
    labels, best = found.chosen.labels[found.chosen.test], found.answers.best
    wanted = [{"images": int((labels == k).sum()), "right": int(((labels == k) & (best == k)).sum())} for k in range(3)]
    assert values["recall"] == dict(zip(found.chosen.classes, wanted, strict=True))
    assert values["seconds"] > 0 and values["parameters"] == found.model.num_parameters()
