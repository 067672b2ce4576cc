"""Images become tokens: the same ones whatever the source's form and the number of workers, whole or not at all."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast import decode
from igpt_fast.data import TokenDataset, fit_palette, load_pixels, open_source, open_tokens, tokenize
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette

COUNT = 23
SIZE = (4, 6)
PALETTE = Palette(np.random.default_rng(1).uniform(-1, 1, (40, 3)).astype(np.float32))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(decode, "CHUNK", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of different sizes in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "photos" / ("cat" if number % 3 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*rng.integers(4, 20, 2), 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:50])


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_tokens_are_the_nearest_colours(folder, tmp_path):
    seen = []
    data = tokenize(folder, PALETTE, tmp_path / "t", SIZE, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (COUNT, COUNT)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    source = open_source(folder)
    assert data.names == source.names
    assert (data.size, data.colors, data.classes) == (SIZE, 40, ["cat", "dog"])
    assert data.labels.tolist() == source.labels.tolist() == [0] * 15 + [1] * 8
    assert data.meta["class_counts"] == {"cat": 15, "dog": 8}
    pixels, labels, skipped = load_pixels(folder, SIZE)
    assert (labels == data.labels).all()
    assert skipped == []
    centers = PALETTE.centers.numpy().astype(np.float64)
    distances = ((pixels[..., None, :] / 127.5 - 1 - centers) ** 2).sum(-1)
    assert (data.batch(np.arange(COUNT)).numpy() == distances.argmin(-1)).all()
    assert (data.palette.centers == PALETTE.centers).all()


@pytest.mark.parametrize("kind", ["folder", "zip", "gztar"])
@pytest.mark.parametrize("spoiled", [False, True])
def test_the_number_of_workers_changes_no_bit(folder, tmp_path, kind, spoiled):
    if spoiled:
        spoil(folder, "cat/05.png", "dog/12.png")
    source = folder if kind == "folder" else Path(shutil.make_archive(str(tmp_path / "archive"), kind, folder))
    written = []
    for workers in (0, 1, 2):
        out = tmp_path / f"tokens-{workers}"
        data = tokenize(source, PALETTE, out, SIZE, on_error="skip", workers=workers, shard_images=5)
        assert len(data) == (COUNT - 2 if spoiled else COUNT)
        written.append(digests(out))
    assert written[0] == written[1] == written[2]
    assert sum(name.startswith("shard") for name in written[0]) == 5


def test_archives_equal_the_folder(folder, tmp_path):
    data = tokenize(folder, PALETTE, tmp_path / "t", SIZE)
    for kind in ("zip", "tar", "gztar", "bztar", "xztar"):
        archive = shutil.make_archive(str(tmp_path / kind), kind, folder)
        other = tokenize(archive, PALETTE, tmp_path / f"t-{kind}", SIZE)
        assert other.names == data.names
        assert (other.labels == data.labels).all()
        assert (other.batch(np.arange(COUNT)) == data.batch(np.arange(COUNT))).all()
        assert (other.split("val", 0.3) == data.split("val", 0.3)).all()


def test_skipped_images_are_listed(folder, tmp_path):
    spoil(folder, "cat/05.png", "dog/12.png")
    whole = load_pixels(folder, SIZE, on_error="skip")
    data = tokenize(folder, PALETTE, tmp_path / "t", SIZE, on_error="skip", shard_images=5)
    assert [entry["name"] for entry in data.meta["skipped"]] == ["cat/05.png", "dog/12.png"]
    assert all(entry["name"] in entry["error"] for entry in data.meta["skipped"])
    assert "cat/05.png" not in data.names
    assert len(data.names) == len(data) == COUNT - 2
    assert data.meta["class_counts"] == {"cat": 14, "dog": 7}
    assert (data.batch(np.arange(COUNT - 2)).numpy() == PALETTE.encode(whole[0])).all()
    assert (data.labels == whole[1]).all()
    assert [name for name, _ in whole[2]] == ["cat/05.png", "dog/12.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_leaves_nothing_behind(folder, tmp_path, workers):
    spoil(folder, "dog/21.png")
    before = entries(tmp_path)
    with pytest.raises(InputError, match=r"photos/dog/21\.png: .*--on-error skip"):
        tokenize(folder, PALETTE, tmp_path / "deep" / "down" / "t", SIZE, workers=workers)
    assert entries(tmp_path) == before


def test_an_interruption_leaves_nothing_behind(folder, tmp_path):
    def interrupt(done: int, total: int) -> None:
        assert [name for name in entries(tmp_path) if name.startswith(".t.")]  # the work, beside where it will be
        assert not (tmp_path / "t").exists()
        raise KeyboardInterrupt

    before = entries(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tokenize(folder, PALETTE, tmp_path / "t", SIZE, progress=interrupt)
    assert entries(tmp_path) == before


def test_a_full_disk_is_met_at_the_start(folder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    before = entries(tmp_path)
    with pytest.raises(InputError, match="the disk is full; make room"):
        tokenize(folder, PALETTE, tmp_path / "t", SIZE, progress=lambda *_: pytest.fail("decoded first"))
    assert entries(tmp_path) == before


def test_what_is_there_is_not_replaced_unasked(folder, tmp_path):
    out = tmp_path / "t"
    out.mkdir()
    tokenize(folder, PALETTE, out, SIZE)  # an empty directory is welcome
    before = digests(out)
    with pytest.raises(InputError, match=r"holds tokens already; .*--overwrite"):
        tokenize(folder, PALETTE, out, (2, 2))
    assert digests(out) == before
    assert tokenize(folder, PALETTE, out, (2, 2), overwrite=True).size == (2, 2)
    assert entries(tmp_path) == ["photos", "t"]
    (out / "notes.txt").touch()
    with pytest.raises(InputError, match=r"t holds notes\.txt, which would be lost"):
        tokenize(folder, PALETTE, out, SIZE, overwrite=True)
    with pytest.raises(InputError, match="exists and holds no tokens"):  # somebody's photos, above all
        tokenize(folder, PALETTE, folder, SIZE, overwrite=True)
    assert len(open_source(folder)) == COUNT


def test_a_failed_overwrite_keeps_the_old_tokens(folder, tmp_path):
    tokenize(folder, PALETTE, tmp_path / "t", SIZE)
    before = digests(tmp_path / "t")
    spoil(folder, "dog/21.png")
    with pytest.raises(InputError):
        tokenize(folder, PALETTE, tmp_path / "t", SIZE, overwrite=True)
    assert digests(tmp_path / "t") == before
    assert entries(tmp_path) == ["photos", "t"]


def test_places_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/t: cannot be written .*choose a place"):
        tokenize(folder, PALETTE, tmp_path / "file" / "t", SIZE, progress=lambda *_: pytest.fail("decoded first"))
    with pytest.raises(InputError, match="cannot be written"):
        tokenize(folder, PALETTE, "/proc/t", SIZE)


def test_nothing_readable(folder, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    for work in (
        lambda: tokenize(folder, PALETTE, tmp_path / "t", SIZE, on_error="skip"),
        lambda: load_pixels(folder, SIZE, on_error="skip"),
        lambda: fit_palette(folder, 8, SIZE, on_error="skip"),
    ):
        with pytest.raises(
            InputError, match=rf"none of {COUNT} images can be read; the first: .*01\.png: the file is em"
        ):
            work()
    assert entries(tmp_path) == ["photos"]


def test_bad_arguments(folder, tmp_path):
    np.save(tmp_path / "bad.npy", np.zeros((512, 4), np.float32))
    with pytest.raises(InputError, match=r"bad\.npy.*\[512, 4\]"):
        tokenize(folder, tmp_path / "bad.npy", tmp_path / "t", SIZE)
    with pytest.raises(InputError, match="shard_images 0"):
        tokenize(folder, PALETTE, tmp_path / "t", SIZE, shard_images=0)
    with pytest.raises(InputError, match="limit 0"):
        load_pixels(folder, SIZE, limit=0)
    tokens = tokenize(folder, PALETTE, tmp_path / "t", SIZE)
    with pytest.raises(InputError, match="holds tokens, not images"):
        load_pixels(tokens.path, SIZE)


def test_load_pixels_draws_by_seed(folder):
    everything, labels, _ = load_pixels(folder, SIZE)
    some = [
        load_pixels(folder, SIZE, limit=9, seed=seed, workers=workers) for seed, workers in ((0, 0), (0, 2), (1, 0))
    ]
    assert (some[0][0] == some[1][0]).all()
    assert not np.array_equal(some[0][0], some[2][0])
    for pixels, drawn, _ in some:
        assert len(pixels) == len(drawn) == 9
        places = [int(np.flatnonzero((everything == image).all((1, 2, 3)))[0]) for image in pixels]
        assert places == sorted(set(places))  # different ones, in the source's order
        assert (labels[places] == drawn).all()


def test_fit_palette_is_palette_fit_on_the_pixels(folder):
    pixels, _, _ = load_pixels(folder, SIZE, limit=10, seed=3)
    expected = Palette.fit(pixels, 16, seed=3)
    steps = []
    fitted, images, skipped = fit_palette(
        folder, 16, SIZE, limit=10, seed=3, workers=2, fitting=lambda step, most: steps.append(step)
    )
    assert (fitted.centers == expected.centers).all()
    assert (images, skipped) == (10, [])
    assert steps == list(range(1, len(steps) + 1))


def test_open_tokens_opens_a_token_directory(folder, tmp_path):
    tokenize(folder, PALETTE, tmp_path / "t", SIZE)
    assert open_tokens(tmp_path / "t").size == SIZE
    assert open_tokens(tmp_path / "t", PALETTE, size=SIZE).size == SIZE
    with pytest.raises(InputError, match=r"size is \[4, 6\], not \[8, 8\]"):
        open_tokens(tmp_path / "t", size=(8, 8))
    with pytest.raises(InputError, match=r"the palette is another \(40 colours, the one given has 5\)"):
        open_tokens(tmp_path / "t", Palette(PALETTE.centers[:5]))


def test_open_tokens_makes_and_reuses_a_cache(folder, tmp_path, capsys):
    cache = tmp_path / "run" / "tokens"
    options = {"cache_dir": cache, "size": SIZE, "colors": 16, "seed": 5}
    made = open_tokens(folder, **options)
    assert made.path == cache
    assert (made.palette.centers == fit_palette(folder, 16, SIZE, seed=5)[0].centers).all()
    before = digests(cache)
    capsys.readouterr()
    again = open_tokens(folder, **options)
    assert digests(cache) == before
    assert again.names == made.names
    assert capsys.readouterr().err == f"using the tokens at {cache} again: {COUNT} images, 4x6, 16 colours\n"
    assert open_tokens(open_source(folder), made.palette, cache, size=SIZE).colors == 16  # the same palette, given
    for change, reason in [
        ({"size": (8, 8)}, r"size is \[4, 6\], not \[8, 8\]"),
        ({"resize": "hf"}, "resize is paper, not hf"),
        ({"background": "black"}, "background is white, not black"),
        ({"colors": 8}, r"palette_fit is .*'colors': 16.*not .*'colors': 8"),
        ({"seed": 6}, "palette_fit"),
        ({"palette": PALETTE}, "the palette is another"),
    ]:
        with pytest.raises(InputError, match=reason) as error:
            open_tokens(folder, **{**options, **change})
        assert str(cache) in str(error.value)
        assert "delete that directory" in str(error.value)
    os.utime(folder / "dog/21.png", ns=(1, 1))
    with pytest.raises(InputError, match="the images have changed since"):
        open_tokens(folder, **options)


def test_open_tokens_does_not_hide_what_a_cache_skipped(folder, tmp_path, capsys):
    spoil(folder, "cat/05.png")
    cache = tmp_path / "t"
    with pytest.raises(InputError, match=r"cat/05\.png"):
        open_tokens(folder, PALETTE, cache, size=SIZE)
    assert not cache.exists()
    assert len(open_tokens(folder, PALETTE, cache, size=SIZE, on_error="skip")) == COUNT - 1
    assert "skipped 1 image that could not be read:" in capsys.readouterr().err
    assert len(open_tokens(folder, PALETTE, cache, size=SIZE, on_error="skip")) == COUNT - 1
    with pytest.raises(InputError, match="unreadable images were skipped"):
        open_tokens(folder, PALETTE, cache, size=SIZE)


def test_open_tokens_needs_a_place(folder, tmp_path):
    with pytest.raises(InputError, match="say cache_dir"):
        open_tokens(folder)
    with pytest.raises(InputError, match="exists and holds no tokens"):
        open_tokens(folder, cache_dir=folder)
    assert isinstance(open_tokens(folder, PALETTE, tmp_path / "t", size=SIZE), TokenDataset)
