"""The demo: a page that stands alone, with the pictures and numbers of the run, written where it may be."""

import base64
import io
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast import cli
from igpt_fast import demo as module
from igpt_fast.checkpoint import load_checkpoint
from igpt_fast.cli import demo as commands
from igpt_fast.demo import demo, load_digits, position_loss
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette
from igpt_fast.tokens import TokenDataset

SECTIONS = ["loss", "samples", "completions", "probe", "timings", "machine", "yours"]
VOID = {"meta", "img", "br", "hr", "input", "link"}
SMALL = {"MODEL": {"layers": 1, "width": 16, "heads": 2}, "SAMPLES": 12, "COMPLETIONS": 3}


class Page(HTMLParser):
    """What a browser would find: ids, links, pictures, words; AssertionError when the tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.pictures, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[name] for name in ("href", "srcset", "action", "data") if name in attrs]
        if tag == "img":
            assert attrs["alt"]
            self.pictures.append(attrs["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def images(self) -> list[np.ndarray]:
        """Every picture as uint8 [H, W, 3]."""
        head = "data:image/png;base64,"
        assert all(source.startswith(head) for source in self.pictures)
        files = [io.BytesIO(base64.b64decode(source[len(head) :], validate=True)) for source in self.pictures]
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "page"
    return demo(out, steps=2, seed=3)


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page(made.page.read_text())


def test_the_page_has_every_section_and_opens_with_what_it_shows(page):
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == len(SECTIONS)
    assert page.tags.index("h1") < page.tags.index("h2")
    opening = page.text[: page.text.index("Learning to guess the next pixel")]
    assert "looked at 1,425 small scans of handwritten digits" in opening and "weights" in opening


def test_the_page_asks_no_server_for_anything(made, page):
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed", "video", "audio", "source", "base"} & set(page.tags)
    text = made.page.read_text().lower()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text


def test_every_picture_decodes_and_is_the_runs_own(made, page):
    images, tokens = page.images(), TokenDataset(made.page.parent / "tokens")
    palette, pixels = Palette.load(made.page.parent / "palette.npy"), load_digits()[0]
    figures = [image for image in images if image.shape[0] > 8]
    assert [image.shape for image in figures] == [(600, 960, 3)] * 2
    small = [image for image in images if image.shape[0] <= 8]
    assert len(small) == 8 + 12 + 12 + 10 * (2 + 3)
    real = np.stack(small[20:32])
    np.testing.assert_array_equal(real, pixels[tokens.split("val", 0.2)[:12]])
    seen = set()
    for row in range(10):
        original, given, *completions = small[32 + 5 * row : 37 + 5 * row]
        np.testing.assert_array_equal(given, original[:4])
        index = np.flatnonzero((pixels == original).all((1, 2, 3)))[0]
        assert tokens.labels[index] == row and index in tokens.split("val", 0.2)
        kept = palette.decode(palette.encode(original))[:4]
        assert all((image[:4] == kept).all() and image.shape == (8, 8, 3) for image in completions)
        seen |= {image[4:].tobytes() for image in completions}
    assert len(seen) > 20  # drawn anew each time


def test_the_numbers_on_the_page_are_those_of_the_run(made, page):
    numbers = json.loads((made.page.parent / "demo.json").read_text())
    assert numbers == json.loads(json.dumps(made.numbers)) and numbers["complete"]
    assert f"{numbers['val_loss']:.3f} nats per pixel on scans it never saw" in page.text
    for name in ("few", "probe"):
        rows = numbers[name]["layers"]
        best = next(row for row in rows if row["layer"] == numbers[name]["best_layer"])
        assert f"{100 * best['accuracy']:.1f} % from layer {best['layer']}" in page.text
        assert f"give {100 * numbers[name]['pixels']['accuracy']:.1f} %" in page.text
        assert all(f"{100 * row['accuracy']:.1f} % {100 * row['low']:.1f} –" in page.text for row in rows)
    assert (numbers["few"]["train"], numbers["probe"]["train"]) == (100, 1425)
    assert numbers["probe"]["test"] == numbers["held_out"] == 372 and numbers["learned_from"] == 1425
    assert list(numbers["seconds"]) == ["palette and tokens", "training", "sampling", "completing", "probing"]
    rows = [json.loads(line) for line in (made.page.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in rows if "val_loss" in row][-1] == numbers["val_loss"]
    assert load_checkpoint(made.page.parent / "run").step == 2


def test_the_pictures_lie_beside_the_page(made):
    for name in ("loss.png", "samples.png", "completions.png", "probe.png"):
        Image.open(made.page.parent / name).verify()


def test_a_seed_gives_the_same_demo_and_an_old_one_is_replaced(small, made, tmp_path):
    old = made.page.read_bytes()
    (made.page.parent / "notes.txt").write_text("mine")
    again = demo(made.page.parent, steps=2, seed=3)
    assert timeless(again.numbers) == timeless(made.numbers)
    assert (made.page.parent / "notes.txt").read_text() == "mine"
    assert Page(old.decode()).pictures[:8] == Page(again.page.read_text()).pictures[:8]


def timeless(numbers: dict) -> dict:
    """Without any "seconds", at any depth."""
    return {
        key: timeless(value) if isinstance(value, dict) else value for key, value in numbers.items() if key != "seconds"
    }


def test_one_thread_works_and_the_callers_own_come_back(monkeypatch, tmp_path):
    seen, before = [], torch.get_num_threads()

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "demo", steps=1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not json.loads((tmp_path / "demo" / "demo.json").read_text())["complete"]


def test_the_digits_are_ink_on_paper():
    pixels, labels = load_digits()
    assert pixels.shape == (1797, 8, 8, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    assert (pixels.min(), pixels.max()) == (0, 255) and np.median(pixels[:, 0, 0]) == 255
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_baseline_is_what_frequencies_know(made):
    dataset = TokenDataset(made.page.parent / "tokens")
    learned, held_out = (dataset.batch(dataset.split(part, 0.2)).numpy().reshape(-1, 64) for part in ("train", "val"))
    total = 0.0
    for place in range(64):
        counts = np.bincount(learned[:, place], minlength=dataset.colors) + 1
        total -= np.log(counts / counts.sum())[held_out[:, place]].mean()
    assert position_loss(dataset) == pytest.approx(total / 64, rel=1e-5)
    assert made.numbers["position_loss"] == position_loss(dataset)


def test_copies_are_found(made):
    dataset = TokenDataset(made.page.parent / "tokens")
    learned, held_out = dataset.split("train", 0.2), dataset.split("val", 0.2)
    found = module._resemblance(dataset, dataset.batch(np.concatenate([learned[:3], held_out[:2]])))
    assert found["copies"] == 3 and found["sample_distance"] == 0 < found["real_distance"] < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "--seconds is 0"),
        ({"seconds": float("nan")}, "--seconds is nan"),
        ({"steps": 0}, "at least 1 step"),
        ({"seed": -1}, "a seed from 0"),
    ],
)
def test_options_out_of_range_leave_no_trace(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        demo(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


def test_what_no_demo_wrote_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("years")
    with pytest.raises(InputError, match="holds files that no demo wrote"):
        demo(tmp_path, steps=1)
    with pytest.raises(InputError, match="is a file; give a directory"):
        demo(tmp_path / "run" / "precious", steps=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "precious"]


def test_without_scikit_learn_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install igpt-fast\[probe\]"):
        demo(tmp_path / "demo", steps=1)
    assert not (tmp_path / "demo").exists()


def test_the_command_line(monkeypatch, capsys, made, tmp_path):
    seen = {}
    monkeypatch.setattr(commands, "run_demo", lambda out, **options: seen.update(out=out, **options) or made)
    monkeypatch.setattr(
        sys, "argv", ["igpt-fast", "demo", "--out", str(tmp_path), "--seconds", "5", "--seed", "2", "--json"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code and seen == {"out": tmp_path, "seconds": 5.0, "seed": 2}
    printed, said = capsys.readouterr()
    assert json.loads(printed)["val_loss"] == made.numbers["val_loss"] and str(made.page) in said
