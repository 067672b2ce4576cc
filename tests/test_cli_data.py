"""`igpt-fast palette` and `igpt-fast tokenize` as a user calls them: what they write, say and refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from igpt_fast.cli import data as commands
from igpt_fast.cli.options import parse_size
from igpt_fast.data import TokenDataset
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette

app = typer.Typer()
commands.register(app)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twelve images in two classes; the working directory is beside them."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def call(*arguments: object) -> tuple[str, str]:
    """Runs a command that must succeed. Returns what it wrote to stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_palette_writes_the_palette_and_its_picture(folder):
    out, err = call("palette", folder, "--colors", 20, "--size", "6x8", "-o", "new/p.npy")
    assert out == ""
    assert "12 images in 2 classes" in err
    assert "20 colours from 12 images of 6x8" in err
    palette = Palette.load("new/p.npy")
    assert len(palette) == 20
    assert (np.asarray(Image.open("new/p.png")) == palette.picture()).all()
    assert sorted(os.listdir("new")) == ["p.npy", "p.png"]


def test_palette_by_seed_and_limit(folder):
    def made(*options: object) -> tuple[bytes, dict]:
        out, _ = call("palette", folder, "--colors", 8, "--size", 4, "--json", *options)
        return Path("palette.npy").read_bytes(), json.loads(out)

    first, report = made()
    assert report["palette"] == "palette.npy"
    assert report["picture"] == "palette.png"
    assert (report["colors"], report["images"], report["skipped"], report["ignored"]) == (8, 12, [], {})
    assert report["inertia"] > 0
    assert made()[0] == first
    assert made("--seed", 1)[0] != first
    some, report = made("--limit", 5)
    assert some != first
    assert report["images"] == 5
    assert made("--limit", 0)[0] == first


def test_tokenize_writes_a_dataset(folder):
    call("palette", folder, "--colors", 20, "--size", "6x8", "-o", "p.npy")
    out, err = call("tokenize", folder, "--palette", "p.npy", "--size", "6x8", "-o", "tokens")
    assert out == ""
    data = TokenDataset("tokens")
    assert (len(data), data.size, data.colors, data.classes) == (12, (6, 8), 20, ["a", "b"])
    assert "12 images as 6x8 tokens of 20 colours" in err
    assert f"{len(data.split('val'))} are for validation and {len(data.split('train'))} for training" in err
    with pytest.raises(InputError, match="--overwrite"):
        call("tokenize", folder, "--palette", "p.npy", "-o", "tokens")
    out, _ = call("tokenize", folder, "--palette", "p.npy", "--size", 5, "-o", "tokens", "--overwrite", "--json")
    report = json.loads(out)
    assert (report["tokens"], report["images"], report["size"], report["colors"]) == ("tokens", 12, [5, 5], 20)
    assert report["classes"] == {"a": 6, "b": 6}
    assert report["train"] + report["val"] == 12
    assert report["bytes"] == sum(file.stat().st_size for file in Path("tokens").iterdir())


def test_tokenize_takes_a_few_images_drawn_by_the_seed(folder):
    call("palette", folder, "--colors", 8, "--size", 4)
    drawn = {}
    for out, options in {"all": (), "one": (3,), "same": (3,), "other": (3, "--seed", 1), "most": (99,)}.items():
        limit = ("--limit", *options) if options else ()
        call("tokenize", folder, "--palette", "palette.npy", "--size", 4, "-o", out, *limit)
        drawn[out] = TokenDataset(out)
    every, one, other = drawn["all"], drawn["one"], drawn["other"]
    assert len(one) == 3 and one.names == drawn["same"].names != other.names and drawn["most"].stamp == every.stamp
    places = [every.names.index(name) for name in one.names]
    assert places == sorted(places) and one.classes == every.classes
    assert (one.labels == every.labels[places]).all() and (one.batch([0, 1, 2]) == every.batch(places)).all()
    assert len({every.stamp, one.stamp, other.stamp}) == 3, "or they would be taken for the same images"
    assert not one.made_of(every.stamp) and not every.made_of(one.stamp)


def test_options_reach_the_images(folder, tmp_path):
    Image.new("RGBA", (4, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    np.save("p.npy", np.array([[-1, -1, -1], [1, 1, 1], [1, -1, -1]], np.float32))
    for background, token in (("white", 1), ("#000000", 0), ("red", 2)):
        options = ("--background", background, "--resize", "hf", "--size", 4, "--overwrite", "--workers", 1)
        call("tokenize", "clear.png", "--palette", "p.npy", "-o", "t", *options)
        data = TokenDataset("t")
        assert (data.shards[0] == token).all()
        assert (data.meta["background"], data.meta["resize"]) == (background, "hf")
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "scan.png")
    for bits, token in (((), 0), (("--value-range", "0,4095"), 1)):  # black, or white
        call("tokenize", "scan.png", "--palette", "p.npy", "-o", "t", "--size", 4, "--overwrite", *bits)
        assert (TokenDataset("t").shards[0] == token).all()
    np.save("tiles.npy", np.random.default_rng(0).integers(0, 3000, (5, 4, 4, 7), np.uint16))
    words = ("--palette", "p.npy", "-o", "t", "--size", 4, "--overwrite")
    call("tokenize", "tiles.npy", *words, "--bands", "4,3,2", "--value-range", "0,3000")
    assert (TokenDataset("t").meta["bands"], TokenDataset("t").meta["value_range"]) == ([4, 3, 2], [0, 3000])
    for bad in (("--bands", "red"), ("--bands", "1.5"), ("--value-range", "0-9"), ("--value-range", "nan,1")):
        with pytest.raises(InputError, match=f"{bad[0][2:].replace('-', '.')} .* (not two numbers|not bands)"):
            call("tokenize", "tiles.npy", *words, *bad)
    with pytest.raises(InputError, match=r"clear\.png: is 8x4, not 4x4"):
        call("tokenize", "clear.png", "--palette", "p.npy", "-o", "t2", "--resize", "none", "--size", 4)


def test_skipping_counts_and_lists(folder):
    (folder / "a" / "4.png").write_bytes(b"")
    (folder / "notes.txt").touch()
    out, err = call("palette", folder, "--colors", 8, "--size", 4, "--on-error", "skip", "--json")
    assert [entry["name"] for entry in json.loads(out)["skipped"]] == ["a/4.png"]
    assert json.loads(out)["ignored"] == {"not an image": 1}
    out, err = call("tokenize", folder, "--palette", "palette.npy", "--size", 4, "-o", "t", "--on-error", "skip")
    assert "ignored 1 file: 1 not an image" in err
    assert "skipped 1 image that could not be read:" in err
    assert f"  {folder}/a/4.png: the file is empty (0 bytes)" in err
    assert len(TokenDataset("t")) == 11
    for k in range(3):
        (folder / "a" / f"broken{k}.png").write_bytes(b"")
        Image.fromarray(np.full((2, 2), k - 4.5, np.float32)).save(folder / "b" / f"{k}.tif")
    out, err = call("palette", folder, "--colors", 8, "--size", 4, "--on-error", "skip", "--json")
    assert len(json.loads(out)["skipped"]) == 7 and "skipped 7 images that could not be read:" in err
    assert "4.png: the file is empty (0 bytes); mend or remove the file (and 3 more like it)\n" in err
    assert "0.tif: values of float32" in err and "does, as 0,3000 (and 2 more like it)\n" in err and "1.tif" not in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["palette", "nowhere"], "nowhere: no such file or folder"),
        (["palette", "empty"], "empty: empty; give a folder"),
        (["palette", "texts"], "texts: no image among its 1 files"),
        (["palette", "photos", "--size", "big"], "--size 'big' is not a size"),
        (["palette", "photos", "--size", "0"], "--size '0' is not a size"),
        (["palette", "photos", "--colors", "1"], "2 to 4096"),
        (["palette", "photos", "--background", "no"], "background 'no'"),
        (["palette", "photos", "-o", "p.txt"], "ending in .npy"),
        (["palette", "photos/a/0.png", "-o", "photos/a/0.npy"], "0.png: is among the images, and would be replaced"),
        (["palette", "photos", "-o", "photos/b/1.npy"], "photos/b/1.png: is among the images"),
        (["palette", "photos", "-o", "bad.npy"], "bad.npy: is there and holds no palette; give another --out"),
        (["palette", "photos", "-o", "own.npy"], "own.png: is there, and the palette's picture would take its place"),
        (["palette", "photos", "-o", "texts/c.npy"], "texts/c.png: is there"),
        (["palette", "photos", "-o", "texts/a.txt/p.npy"], "texts/a.txt/p.npy: cannot be written"),
        (["palette", "broken"], "broken/0.png: the file is empty (0 bytes); mend or remove the file, or leave"),
        (["palette", "broken", "--on-error", "skip"], "none of 1 images can be read"),
        (["tokenize", "photos", "--palette", "none.npy", "-o", "t"], "none.npy"),
        (["tokenize", "photos", "--palette", "bad.npy", "-o", "t"], "bad.npy"),
        (["tokenize", "photos", "--palette", "good.npy", "-o", "texts/a.txt/t"], "texts/a.txt/t: cannot be written"),
        (["tokenize", "photos", "--palette", "good.npy", "-o", "texts"], "texts: exists and holds no tokens"),
        (["tokenize", "broken", "--palette", "good.npy", "-o", "t"], "broken/0.png: the file is empty"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, arguments, reason):
    for name in ("empty", "texts", "broken"):
        Path(name).mkdir()
    Path("texts/a.txt").touch()
    Path("broken/0.png").touch()
    Path("own.png").touch()
    Path("texts/c.png").mkdir()
    np.save("bad.npy", np.zeros((4, 2), np.float32))
    np.save("good.npy", np.zeros((4, 3), np.float32))
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before


def test_the_program_ends_with_code_2(folder):
    """The whole way once: one line on stderr, nothing on stdout, exit code 2."""
    code = "from igpt_fast.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "palette", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: nowhere: no such file or folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["palette", "tokenize"])
def test_help_shows_an_example(command):
    out, _ = call(command, "--help")
    assert f"Example: igpt-fast {command} photos/" in " ".join(out.split())


@pytest.mark.parametrize(
    ("text", "size"), [("32", (32, 32)), ("32x48", (32, 48)), (" 8 × 4 ", (8, 4)), ("1,2", (1, 2))]
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "32x", "3.5", "-4", "0", "8x0", "32x32x3", "123456"])
def test_parse_size_refuses(text):
    with pytest.raises(InputError, match="give pixels a side as 32"):
        parse_size(text)
