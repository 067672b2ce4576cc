"""`igpt-fast sample` and `complete`: the pictures they write, and what they refuse before anything is loaded."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.cli import sample as commands
from igpt_fast.config import Config
from igpt_fast.image_files import read_image
from igpt_fast.images import resize_image
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.sample import complete, sample

sampling = sys.modules["igpt_fast.sample"]  # the package's attribute of this name is the function
SIZE = (6, 8)
CENTERS = torch.linspace(-1, 1, 27).reshape(9, 3)


@pytest.fixture
def model():
    model = ImageGPT(Config(layers=1, width=16, heads=2, colors=9, size=SIZE))
    torch.nn.init.normal_(model.wtet, std=0.5)
    return model


@pytest.fixture
def run(tmp_path, model):
    save_checkpoint(tmp_path / "run", 7, model, Palette(CENTERS))
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / name for name in ("cat.png", "dog.jpg")]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def test_sample_writes_the_grid_and_single_files(igpt, run, model, tmp_path):
    code, printed, _ = igpt(
        "sample",
        run,
        "-n",
        5,
        "--seed",
        3,
        "--batch",
        2,
        "-o",
        tmp_path / "g.png",
        "--single",
        tmp_path / "one",
        "--json",
    )
    assert code == 0
    want = Palette(CENTERS).decode(sample(model, n=5, seed=3)).numpy()
    files = sorted((tmp_path / "one").iterdir())
    assert [file.name for file in files] == [f"sample-{i:06d}.png" for i in range(5)]
    for file, image in zip(files, want, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image)
    said = json.loads(printed)
    assert (said["images"], said["step"], said["seed"], said["grid"]) == (5, 7, 3, str(tmp_path / "g.png"))
    assert said["single"] == [str(file) for file in files]
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    for image in want:
        assert all((grid == colour).all(-1).any() for colour in image.reshape(-1, 3))


def test_finished_images_are_kept_and_the_rest_are_drawn_behind_them(igpt, run, model, tmp_path, monkeypatch):
    words = ("sample", run, "--single", tmp_path / "one", "--batch", 2, "-o", tmp_path / "g.png")
    with monkeypatch.context() as patch:
        batches = []
        draw = sampling.draw
        patch.setattr(
            sampling, "draw", lambda *given: draw(*given) if not batches.append(1) and len(batches) < 3 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            igpt(*words, "-n", 6)
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == [f"sample-{i:06d}.png" for i in range(4)]
    assert not (tmp_path / "g.png").exists()
    code, printed, _ = igpt(*words, "-n", 2, "--first", 4, "--json")
    assert code == 0 and json.loads(printed)["first"] == 4
    got = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "one").iterdir())]
    assert np.array_equal(got, Palette(CENTERS).decode(sample(model, n=6)).numpy())


def test_the_grid_takes_no_single_images_place(igpt, run, photos, tmp_path, monkeypatch):
    one = tmp_path / "one"
    code, _, said = igpt("sample", run, "-n", 4, "--single", one, "-o", one / "sample-000001.png")
    assert code == 2 and "one of the single images is to be there; give another name to --out" in said
    grid = one / f"000-{photos[0].stem}-000.png"
    code, _, said = igpt("complete", run, photos[0], "-n", 1, "--single", one, "-o", grid)
    assert code == 2 and "one of the single images is to be there" in said and not one.exists()
    monkeypatch.chdir(tmp_path)
    code, _, said = igpt("complete", run, photos[0], "-n", 1, "--single", "one", "-o", grid)
    assert code == 2 and "one of the single images is to be there" in said
    assert igpt("sample", run, "-n", 1, "--single", one, "-o", one / "grid.png")[0] == 0


def test_an_interrupted_sample_says_what_is_there(igpt, run, tmp_path, monkeypatch):
    real, ends = commands.sample_tokens, [KeyboardInterrupt()]

    def two_and_no_more(*args, drawn, **options):
        def stop(before, tokens):
            drawn(before, tokens)
            raise ends[0]

        return real(*args, drawn=stop, **options)

    monkeypatch.setattr(commands, "sample_tokens", two_and_no_more)
    words = ("sample", run, "-n", 5, "--first", 3, "--batch", 2, "-o", tmp_path / "g.png")
    code, _, said = igpt(*words, "--single", tmp_path / "one")
    assert code == 130 and f"2 of 5 images are in {tmp_path / 'one'}; --first 5 -n 3 gives the others" in said
    code, _, said = igpt(*words)
    assert code == 130 and "images are in" not in said
    (tmp_path / "old").mkdir()
    for number in range(3, 8):  # of another seed: they do not count
        (tmp_path / "old" / f"sample-{number:06d}.png").write_bytes(b"")
    ends[:] = [SystemExit(143)]  # as SIGTERM does
    code, _, said = igpt(*words, "--single", tmp_path / "old")
    assert code == 143 and "2 of 5 images are in" in said and "--first 5 -n 3 gives the others" in said
    code, _, said = igpt("sample", run, "-n", 2, "-o", tmp_path / "g.png", "--single", tmp_path / "all")
    assert code == 143 and "gives the others" not in said  # all are there


def test_bfloat16_is_another_model(igpt, run, model, tmp_path):
    words = ("sample", run, "-n", 4, "--single", tmp_path / "one", "-o", tmp_path / "g.png", "--dtype", "bfloat16")
    assert igpt(*words)[0] == 0
    want = Palette(CENTERS).decode(sample(model.bfloat16(), n=4)).numpy()
    got = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "one").iterdir())]
    assert np.array_equal(got, want)


def test_complete_shows_original_kept_part_and_completions(igpt, run, model, photos, tmp_path, monkeypatch):
    grids = {}
    monkeypatch.setattr(commands, "save_grid", lambda path, images, columns: grids.update({columns: images}))
    words = ("complete", run, *photos, "--keep", 0.5, "-n", 3, "--seed", 2, "--single", tmp_path / "one", "--json")
    code, printed, _ = igpt(*words)
    assert code == 0
    palette, grid = Palette(CENTERS), grids[5].reshape(2, 5, *SIZE, 3)
    originals = np.stack([resize_image(read_image(p.read_bytes(), "x"), SIZE, "paper", "x") for p in photos])
    tokens = torch.from_numpy(palette.encode(originals))
    half = SIZE[0] // 2
    assert np.array_equal(grid[:, 0], originals)
    assert np.array_equal(grid[:, 1, :half], palette.decode(tokens)[:, :half].numpy())
    assert (grid[:, 1, half:] == commands.GRAY).all()
    want = palette.decode(complete(model, tokens, 0.5, n=3, seed=2)).numpy()
    assert np.array_equal(grid[:, 2:], want)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == [f"{i:03d}-{stem}-{j:03d}.png" for i, stem in enumerate(("cat", "dog")) for j in range(3)]
    said = json.loads(printed)
    assert (said["images"], said["kept_pixels"], said["keep"]) == (6, 24, 0.5)


def test_complete_reads_photos_as_the_run_read_its_images(igpt, run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(commands, "save_grid", lambda path, images, columns: shown.append(images[0]))
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 87  # to 4,089
    Image.fromarray(values).save(tmp_path / "scan.png")
    words = ("complete", run, tmp_path / "scan.png", "-n", 1)
    code, _, said = igpt(*words)
    assert code == 0 and "use less than an eighth of their values" in said and shown.pop().max() == round(4089 / 257)
    images = {"resize": "hf", "background": "white", "gray_bits": 12, "on_error": "raise"}
    saved = {"config": {}, "options": {}, "data": {}, "command": {"images": images}}
    (run / "train.json").write_text(json.dumps(saved))
    code, _, said = igpt(*words)
    whole = read_image((tmp_path / "scan.png").read_bytes(), "x", value_range=(0, 4095))
    assert code == 0 and np.array_equal(shown.pop(), resize_image(whole, SIZE, "hf", "x"))
    assert igpt(*words, "--value-range", "0,8191")[0] == 0 and shown.pop().max() == round(4089 / 8191 * 255)
    (run / "train.json").unlink()


def test_complete_writes_a_picture(igpt, run, photos, tmp_path):
    assert igpt("complete", run, photos[0], "-n", 2, "--keep", 1, "-o", tmp_path / "c.png")[0] == 0
    assert Image.open(tmp_path / "c.png").size[0] > 4 * SIZE[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--temperature", -1), "temperature is -1.0"),
        (("sample", "-n", 0), "n is 0"),
        (("sample", "--top-k", 0), "top_k is 0"),
        (("sample", "--top-p", 2), "top_p is 2.0"),
        (("sample", "--temperature", 0, "--top-k", 3), "--top-k changes nothing with --temperature 0"),
        (("complete", "PHOTO", "--temperature", 0, "--top-p", 0.5), "--top-p changes nothing with --temperature 0"),
        (("sample", "--batch", 0), "batch is 0"),
        (("sample", "-o", "grid.jpg"), "ending in .png"),
        (("complete", "PHOTO", "--keep", 1.5), "keep is 1.5"),
        (("complete", "PHOTO", "--keep", -0.5), "keep is -0.5"),
        (("complete", "PHOTO", "--keep", "nan"), "keep is nan"),
        (("complete", "PHOTO", "--temperature", -1), "temperature is -1.0"),
        (("complete", "PHOTO", "--background", "blurple"), "background 'blurple'"),
        (("complete", "nowhere.png"), "there is no file nowhere.png"),
    ],
)
def test_bad_options_end_before_anything_is_loaded(igpt, run, photos, tmp_path, monkeypatch, words, message):
    def never(*_):
        raise AssertionError("the checkpoint was loaded")

    monkeypatch.setattr(commands, "open_model", never)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command, *rest = (photos[0] if word == "PHOTO" else word for word in words)
    code, printed, said = igpt(command, run, *rest)
    assert code == 2
    assert printed == ""
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written_are_found_first(igpt, run, photos, monkeypatch):
    monkeypatch.setattr(commands, "open_model", None)
    for words in (("-o", photos[0] / "x.png"), ("--single", photos[0] / "x")):
        code, _, said = igpt("sample", run, *words)
        assert code == 2
        assert "is no writable folder" in said


def test_runs_and_photos_that_cannot_be_used_are_named(igpt, run, photos, tmp_path, model):
    code, _, said = igpt("sample", tmp_path / "nothing")
    assert (code, "nothing is not there" in said) == (2, True)
    photos[0].write_bytes(b"")
    code, _, said = igpt("complete", run, photos[0], "-o", tmp_path / "c.png")
    assert (code, "cat.png: the file is empty" in said) == (2, True)
    assert not (tmp_path / "c.png").exists()
    save_checkpoint(tmp_path / "bare", 1, model)
    code, _, said = igpt("sample", tmp_path / "bare")
    assert (code, "has no palette" in said) == (2, True)
    bert = ImageGPT(Config(layers=1, width=16, heads=2, colors=9, size=SIZE, objective="bert"))
    save_checkpoint(tmp_path / "bert", 1, bert, Palette(CENTERS))
    code, _, said = igpt("sample", tmp_path / "bert", "-o", tmp_path / "c.png")
    assert (code, "objective='bert' model cannot be sampled from" in said) == (2, True)
