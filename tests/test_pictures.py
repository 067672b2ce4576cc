"""Pictures: whole or absent, each image in its place, pixels enlarged, never smoothed; and progress as it is shown."""

import io
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from igpt_fast import console, pictures
from igpt_fast.console import Bar, duration, number, printable, progress, say
from igpt_fast.errors import InputError
from igpt_fast.pictures import curve_png_bytes, grid, save_curve, save_grid, to_png_bytes


def random_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (n, height, width, 3), dtype=np.uint8)


def read_png(source) -> np.ndarray:
    with Image.open(source) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@given(
    n=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    columns=st.integers(1, 5),
    scale=st.integers(1, 5),
)
def test_a_grid_shows_every_image_in_its_place(n, height, width, columns, scale):
    images = random_images(n, height, width)
    canvas = grid(images, columns, scale)
    across, gap = min(n, columns), max(2, scale // 2)
    rows = math.ceil(n / across)
    assert canvas.shape == (rows * (height * scale + gap) + gap, across * (width * scale + gap) + gap, 3)
    rest = np.ones(canvas.shape[:2], bool)
    for index in range(n):
        top, left = (
            gap + place * (side * scale + gap)
            for place, side in zip(divmod(index, across), (height, width), strict=True)
        )
        where = slice(top, top + height * scale), slice(left, left + width * scale)
        shown = canvas[where].reshape(height, scale, width, scale, 3)
        assert (shown == images[index][:, None, :, None]).all(), "each pixel is a square of its own colour"
        rest[where] = False
    assert (canvas[rest] == 255).all(), "all else is white"


def test_small_images_are_enlarged_and_large_grids_are_not(tmp_path):
    save_grid(tmp_path / "sub/small.png", torch.from_numpy(random_images(16, 32, 32)))
    assert read_png(tmp_path / "sub/small.png").shape == (4 * 130 + 2, 4 * 130 + 2, 3)
    assert grid(random_images(400, 32, 32)).shape[1] < 2048
    assert grid(random_images(1, 300, 200)).shape == (304, 204, 3)


def test_a_grid_that_nobody_shapes(tmp_path):
    assert grid(random_images(5, 64, 64)).shape == (2 * 130 + 2, 3 * 130 + 2, 3), "about square, wider than high"
    assert grid(random_images(1, 16, 64)).shape == (16 * 2 + 4, 64 * 2 + 4, 3), "by the longer side"
    save_grid(tmp_path / "row.png", random_images(5, 64, 64), columns=5)
    assert read_png(tmp_path / "row.png").shape == (130 + 2, 5 * 130 + 2, 3)
    for wrong in ({"columns": -1}, {"columns": 0}, {"scale": 0}):
        with pytest.raises(InputError, match="at least one column and a scale of at least 1"):
            grid(random_images(2, 4, 4), **wrong)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_images_is_refused(tmp_path, images):
    with pytest.raises(InputError, match="decode tokens first"):
        save_grid(tmp_path / "no.png", images)
    assert not list(tmp_path.iterdir())


def test_an_image_survives_png():
    image = random_images(1, 5, 7)[0]
    assert np.array_equal(read_png(io.BytesIO(to_png_bytes(image))), image)


def test_a_curve_draws_its_lines_and_levels(tmp_path):
    x = [10, 20, 30]
    curves = {"training": (x, [3.0, 2.0, 1.5]), "validation": ([20], [2.1]), "none yet": ([], [])}
    save_curve(tmp_path / "loss.png", curves, "step", "loss (nats per pixel)", levels={"chance, ln 16": math.log(16)})
    full = read_png(tmp_path / "loss.png")
    bare = read_png(io.BytesIO(curve_png_bytes({}, "step", "loss (nats per pixel)")))
    grey = np.array([0x88, 0x88, 0x88])
    dashes = (full == grey).all(-1).sum(1).max()
    assert full.shape == (600, 960, 3) and dashes > 300 > (bare == grey).all(-1).sum(1).max(), (
        "chance is a long grey line"
    )
    for colour in ([0x2F, 0x6F, 0xDE], [0xD9, 0x54, 0x1E]):
        drawn = (full == colour).all(-1).sum()
        assert drawn > 20 and not (bare == colour).all(-1).any(), f"no line in {colour}"
    with pytest.raises(InputError, match="'a' has 2 x values and 1 y values"):
        curve_png_bytes({"a": ([1, 2], [1.0])}, "x", "y")
    with pytest.raises(InputError, match="'a' has 1 x values and 2 y values"):
        curve_png_bytes({"a": ([1], [1.0, 2.0])}, "x", "y")


def test_what_a_curve_is_called(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "figure_png_bytes", lambda figure: figures.append(figure) or b"")
    curves = {f"curve {n}": ([0, 1, 2], [n, n, 0]) for n in range(8)} | {"few": ([1, 2], [1, 2])}
    curve_png_bytes(curves, "step", "loss (nats)", "all", {"chance": 2.0, "best": 1.0})
    save_curve(tmp_path / "x.png", {"a": ([0, 1, 2], [2, 1, 0])}, "step", "accuracy (%)", markers=True)
    axes, dotted = (figure.axes[0] for figure in figures)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "loss (nats)", "all")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*curves, "chance", "best"]
    few, chance, best = axes.get_lines()[8:]
    assert few.get_marker() == "o", "a line of two points has dots"
    assert chance.get_linestyle() != best.get_linestyle() and set(chance.get_ydata()) == {2.0}
    assert [line.get_marker() for line in axes.get_lines()[:8]] == ["None"] * 8
    assert dotted.get_lines()[0].get_marker() == "o"


def test_pyplot_is_not_used():
    """It keeps every figure for ever and looks for a display."""
    script = "import sys, igpt_fast.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


# Progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (10_810, "3:00:10"), (176_400, "2 days 1:00:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12345, "12,345"), (math.pi, "3.142"), (0.00123, "0.00123"), (98765.4, "98,765"), ("s", "s")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_characters_that_our_font_lacks_come_from_another(caplog, monkeypatch):
    from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    [font] = pictures._fonts_for("a\u0359")  # which comes with matplotlib, in a font for formulas
    assert font != pictures.OWN_FONT and 0x359 in FT2Font(findfont(FontProperties(font))).get_charmap()
    assert pictures._fonts_for("Übung, кошка") == []
    curve = {"a": ([0, 1], [0, 1])}
    boxes, letters = (curve_png_bytes(curve, "x", "y", 2 * chr(code)) for code in (0x358, 0x359))
    assert boxes != letters and not caplog.text
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if "DejaVu Sans" in f.name])
    gone = FontEntry(fname="/nonexistent/font.ttf", name="Gone")
    monkeypatch.setattr(fontManager, "ttflist", [gone, *fontManager.ttflist])  # as of a package that was removed
    for _ in range(2):
        assert curve_png_bytes(curve, "x", "y", "𠀀").startswith(b"\x89PNG")
    assert caplog.text.count("boxes stand for them") == 1 and "no font of this machine has 𠀀" in caplog.text


@pytest.mark.parametrize("title", ["a $x_$", r"$\foo$", "$^$", "\udcff\udcfe"])
def test_titles_are_no_formulas(title):
    assert curve_png_bytes({"a": ([0, 1], [0, 1])}, "x", "y", title).startswith(b"\x89PNG")


def test_without_a_terminal_there_are_plain_lines_on_stderr_only(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress(100, "images", "reading", start=20) as bar:
        for _ in range(80):
            now[0] += 0.5
            bar.advance(loss=2.5, **{"images/s": 7.0})
        say("in between")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and "\x1b" not in err
    assert lines[0] == "reading: 40/100 images · 2 images/s · 0:30 left · loss 2.5 · 7 images/s"
    assert [line.split()[1] for line in lines[:3]] == ["40/100", "60/100", "80/100"], "one line in ten seconds"
    assert lines[3:] == ["in between", "reading: 100/100 images in 0:40, 2 images/s, loss 2.5, 7 images/s"]


def test_a_body_that_fails_has_no_summary(capsys):
    with pytest.raises(ZeroDivisionError), progress(3, "images", "reading") as bar:
        bar.to(1)
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_and_stdout_stays_clean(capsys, monkeypatch):
    monkeypatch.setattr(console, "interactive", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(None, "images", "reading [x]") as bar:
        bar.to(5, 10, note="[bold]")
        say("above")
        print("data")
    out, err = capsys.readouterr()
    assert out == "data\n" and "above" in err and "5/10 images" in err and "note [bold]" in err
    assert "reading [x]: 5/10 images in 0:00" in err.rstrip().splitlines()[-1]


def test_an_unknown_total_is_counted_without_a_time_left():
    bar = Bar(None, "images", "reading", 0)
    bar.to(7)
    assert bar.counts() == "7 images" and "left" not in bar.text()


def test_a_terminal_obeys_no_name(capsys):
    name = "a\nb\x1b[2J\udc80 Ä 猫"
    assert printable(name) == "a\\nb\\x1b[2J\\udc80 Ä 猫"
    say(name)
    assert capsys.readouterr().err == "a\nb\\x1b[2J\\udc80 Ä 猫\n"
    assert printable("a\u00a0👩\u200d🔬") == "a\u00a0👩\u200d🔬"  # which no terminal obeys
    said = console.Said()
    said.emit(logging.LogRecord("igpt_fast", logging.WARNING, "", 0, "%s is here", (name,), None))
    assert capsys.readouterr().err == "a\nb\\x1b[2J\\udc80 Ä 猫 is here\n"
