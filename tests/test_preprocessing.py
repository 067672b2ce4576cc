"""How images were read goes with their tokens into a model, and with the model wherever it goes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt_fast import ImageGPT, InputError
from igpt_fast.checkpoint import load_checkpoint
from igpt_fast.tokens import TokenDataset

SHAPE = ("--layers", 1, "--width", 16, "--heads", 2, "--steps", 2, "--batch", 4)
HOW = ("--resize", "hf", "--background", "black", "--value-range", "0,3000")
NOTED = {"resize": "hf", "background": "black", "value_range": [0, 3000], "bands": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of two classes that any other reading makes others: wide, of 16 bits, with holes in colours."""
    root, random = tmp_path_factory.mktemp("reading") / "images", np.random.default_rng(0)
    for k in range(12):
        path = root / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k < 6:
            Image.fromarray(random.integers(0, 3000, (8, 20)).astype(np.uint16)).save(path)
        else:
            Image.fromarray(random.integers(0, 256, (8, 20, 4), np.uint8)).save(path)
    return root


@pytest.fixture
def run(igpt, folder, tmp_path, monkeypatch):
    """A run on tokens, in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert igpt("palette", folder, "--colors", 8, "--size", 6, *HOW)[0] == 0
    assert igpt("tokenize", folder, "--palette", "palette.npy", "--size", 6, *HOW, "-o", "tokens")[0] == 0
    code, _, said = igpt("train", "tokens", "--out", "run", *SHAPE)
    assert code == 0, said
    return tmp_path / "run"


def nats(igpt, model, data) -> float:
    code, printed, said = igpt("eval", model, data, "--json")
    assert code == 0, said
    return json.loads(printed)["nats_per_pixel"]


def test_a_model_that_learned_from_tokens_reads_images_as_they_were_read(igpt, run, folder):
    assert json.loads((run / "train.json").read_text())["command"]["images"].items() >= NOTED.items()
    assert load_checkpoint(run).model.preprocessing == NOTED == TokenDataset("tokens").preprocessing
    wanted = nats(igpt, run, "tokens")
    assert nats(igpt, run, folder) == wanted
    for name, words in (("hf", ()), ("ours", ("--to", "run"))):
        assert igpt("convert", run, name, *words)[0] == 0
        assert nats(igpt, name, folder) == pytest.approx(wanted, abs=1e-6)
    assert ImageGPT.from_pretrained("hf").preprocessing == NOTED
    code, _, said = igpt("finetune", "hf", folder, "--out", "classes", "--steps", 2, "--batch", 4)
    assert code == 0, said
    assert igpt("convert", "classes", "classes-hf")[0] == 0
    assert igpt("classify", "classes", folder, "-o", "a.csv")[0] == 0 == igpt("classify", "classes-hf", folder)[0]
    assert (run.parent / "a.csv").read_text() == (run.parent / "classes.csv").read_text()


def test_runs_that_note_it_in_train_json_alone_are_understood(igpt, run, folder):
    wanted = nats(igpt, run, folder)
    state = next((run / "checkpoints").glob("*/state.json"))
    assert '"reading"' in state.read_text()
    checkpoint = load_checkpoint(run)
    checkpoint.model.preprocessing = {}
    shutil.rmtree(run / "checkpoints")
    from igpt_fast.checkpoint import save_checkpoint

    save_checkpoint(run, 2, checkpoint.model, checkpoint.palette)
    assert load_checkpoint(run).model.preprocessing == {} and nats(igpt, run, folder) == wanted
    assert igpt("convert", run, "hf")[0] == 0 and nats(igpt, "hf", folder) == pytest.approx(wanted, abs=1e-6)


def test_tokens_that_were_read_in_another_way_are_named(igpt, run, folder):
    words = ("--palette", "palette.npy", "--size", 6, "--value-range", "0,3000", "--resize", "hf", "-o", "other")
    assert igpt("tokenize", folder, *words)[0] == 0
    code, _, said = igpt("eval", run, "other")
    assert code == 0 and "other was made with --background white, but the model learned from images with black" in said
    assert "was made with" not in igpt("eval", run, "tokens")[2]


def test_images_to_test_on_are_read_as_the_tokens_that_are_learned_from(igpt, run, folder, tmp_path):
    assert igpt("convert", run, "bare")[0] == 0
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["igpt_fast"]["reading"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    test = shutil.copytree(folder, tmp_path / "test")
    for name in ("a/0.png", "b/1.png"):  # others than those that are learned from
        (test / name).unlink()
    words = ("finetune", "bare", "tokens", "--test", test, "--out", "classes")
    code, _, said = igpt(*words, "--steps", 2, "--batch", 4)
    assert code == 0, said
    assert TokenDataset("classes/test-tokens").preprocessing == NOTED
    code, _, said = igpt(*words, "--resume", "--steps", 3)
    assert code == 0, said
    probe = ("probe", "bare", "tokens", "--test", test, "--json")
    first = json.loads(igpt(*probe)[1])
    assert first["pixels"] == json.loads(igpt(*probe, *HOW)[1])["pixels"] and first["test"] == 10
    turned = (
        "probe",
        "bare",
        test,
        "--test",
        "tokens",
        *HOW,
        "--json",
    )  # the other way round, where tokens are tested on
    code, printed, said = igpt(*turned)
    assert code == 0 and "was made with" not in said and json.loads(printed)["train"] == 10


@pytest.mark.parametrize(
    "bad", [("--value-range", "5,1"), ("--value-range", "7"), ("--bands", "0"), ("--bands", "1,1")]
)
def test_complete_checks_how_photos_are_read(igpt, run, folder, bad):
    code, _, said = igpt("complete", run, folder / "a" / "0.png", "-n", 1, *bad)
    assert code == 2 and said.startswith(f"error: {bad[0][2:].replace('-', '_')} [") and said.count("\n") == 1


def test_a_run_on_tokens_refuses_images_before_anything_is_made(igpt, run, folder):
    code, _, said = igpt("train", folder, "--out", "run", "--resume", "--steps", 3)
    whole = f"run was trained on tokens ({run.parent / 'tokens'}); give those"
    assert code == 2 and whole in said and not (run / "tokens").exists()
    assert igpt("train", "tokens", "--out", "run", "--resume", "--steps", 3)[0] == 0
    assert json.loads((run / "train.json").read_text())["command"]["from_tokens"] is True


@pytest.mark.parametrize("bad", [3, {"resize": "up"}, {"crop": 1}, {"bands": [1, 2]}])
def test_a_reading_that_no_image_can_have_is_named(igpt, run, bad):
    assert igpt("convert", run, "hf")[0] == 0
    config = json.loads((run.parent / "hf" / "config.json").read_text())
    config["igpt_fast"]["reading"] = bad
    (run.parent / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: igpt_fast has reading"):
        ImageGPT.from_pretrained("hf")


def test_what_a_run_began_with_has_learned_too(igpt, run, folder, tmp_path):
    learned = len(TokenDataset("tokens").split("train"))
    others = tmp_path / "others"
    others.mkdir()
    for k in range(9):
        Image.fromarray(np.random.default_rng(k + 99).integers(0, 256, (8, 20, 3), np.uint8)).save(others / f"{k}.png")
    code, _, said = igpt("train", others, "--init", "run", "--out", "next", "--steps", 1, "--batch", 2)
    assert code == 0 and "learned from: resize hf, background black, value_range [0, 3000]" in said, said
    assert load_checkpoint("next").model.preprocessing == NOTED
    code, printed, said = igpt("eval", "next", "tokens", "--json")
    assert code == 0 and json.loads(printed)["seen"] == learned and f"had learned from {learned} of" in said
    assert igpt("train", others, "--out", "next", "--resume", "--steps", 2, "--batch", 2)[0] == 0
    assert json.loads(igpt("eval", "next", folder, "--json")[1])["seen"] == learned
    assert igpt("convert", run, "hf")[0] == 0
    assert igpt("train", others, "--init", "hf", "--out", "third", "--steps", 1, "--batch", 2)[0] == 0
    assert json.loads(igpt("eval", "third", "tokens", "--json")[1])["seen"] is None
    (run / "train.json").unlink()  # its weights alone say nothing of images
    assert json.loads(igpt("eval", "next", "tokens", "--json")[1])["seen"] is None
    shutil.rmtree(run)
    assert json.loads(igpt("eval", "next", "tokens", "--json")[1])["seen"] is None


def test_pictures_and_tables_that_are_read_are_not_replaced(igpt, run, folder):
    photo = folder / "a" / "0.png"
    before = photo.read_bytes()
    for words in (
        ("complete", run, photo, "-n", 1, "-o", photo),
        ("complete", run, folder / "b" / "1.png", photo, "-n", 1, "-o", photo),
        ("probe", run, folder, "-o", photo),
        ("classify", run, folder, "-o", "c.csv", "--confusion", photo),
        ("palette", folder, "-o", photo.with_suffix(".npy")),
    ):
        code, _, said = igpt(*words)
        assert code == 2 and "0.png: is among the images, and would be replaced" in said, said
    np.save(folder / "own.npy", np.zeros(3))
    code, _, said = igpt("palette", folder, "-o", folder / "own.npy")
    (folder / "own.npy").unlink()
    assert code == 2 and "own.npy: is among the images, and would be replaced" in said
    (folder / "metadata.csv").write_text("file_name,label\na/0.png,x\n")
    code, _, said = igpt("classify", run, folder, "-o", folder / "metadata.csv")
    (folder / "metadata.csv").unlink()
    assert code == 2 and "would be taken for their labels" in said and photo.read_bytes() == before
