"""Folders, archives, arrays and single files are one list of the same images; what is wrong with one is said."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast.classes import by_folder
from igpt_fast.errors import InputError
from igpt_fast.found import HIDDEN, OTHER, REPLACED
from igpt_fast.made import MADE
from igpt_fast.palette import Palette
from igpt_fast.sources import Source, open_source

NAMES = ["b/zebra.png", "b/ant.PNG", "a/x/deep.png", "a/one.png", "c/ü n.png"]
SORTED = ["a/one.png", "a/x/deep.png", "b/ant.PNG", "b/zebra.png", "c/ü n.png"]
ARCHIVES = ["stored.zip", "deflated.zip", "plain.tar", "packed.tar.gz", "packed.tgz", "packed.tar.bz2", "packed.tar.xz"]


def pixels_of(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos")


def make_folder(root: Path) -> Path:
    """Five images in three class folders, and things that are none."""
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(pixels_of(name)))
    (root / "notes.txt").write_text("not an image")
    (root / "b" / ".thumb.png").write_bytes(b"hidden")
    return root


def pack(folder: Path, out: Path, prefix: str = "") -> Path:
    """Every file below folder into an archive, in an order that is not sorted."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name[::-1])
    if out.suffix == ".zip":
        method = zipfile.ZIP_DEFLATED if "deflated" in out.name else zipfile.ZIP_STORED
        with zipfile.ZipFile(out, "w", method) as archive:
            for file in files:
                archive.write(file, prefix + str(file.relative_to(folder)))
    else:
        mode = "w:" + {".tar": "", ".tgz": "gz"}.get(out.suffix, out.suffix[1:])
        with tarfile.open(out, mode) as archive:
            for file in files:
                archive.add(file, prefix + str(file.relative_to(folder)))
    return out


def check(source: Source, names: list[str] = SORTED) -> None:
    assert source.names == names
    for index, name in enumerate(names):
        assert (source.read(index) == pixels_of(name.removeprefix("wrap/"))).all(), name


def test_folder(folder):
    source = open_source(folder)
    check(source)
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert source.ignored == {HIDDEN: 1, OTHER: 1}
    assert len(source) == 5
    assert not source.sequential


@pytest.mark.parametrize("colors", [2, 9, 512])
def test_what_igpt_fast_made_is_left_out_and_counted(folder, colors):
    palette = Palette(np.linspace(-1, 1, 3 * colors, dtype=np.float32).reshape(-1, 3))
    palette.save(folder / "palette.npy")
    Image.fromarray(palette.picture()).save(folder / "palette.png")
    stamp = open_source(folder).stamp
    for run in (folder, folder / "runs/one"):
        (run / "samples").mkdir(parents=True)
        for name in ("loss.png", "samples/step-000005.png"):
            (run / name).write_bytes(png(pixels_of(name)))
        for name in ("train.json", "metrics.jsonl"):
            (run / name).write_text("{}")
    (folder / "runs/one/drawn.png").write_bytes(b"by igpt-fast sample")
    np.save(folder / "a/one.npy", palette.centers)  # a user's, beside an image of another size
    np.save(folder / "a/x/deep.npy", np.zeros((7, 9)))
    (folder / "b/train.json").write_text("annotations of the user's")
    source = open_source(folder)
    check(source)
    assert source.stamp == stamp and source.classes == ["a", "b", "c"]
    assert source.ignored == {HIDDEN: 1, OTHER: 1 + 1 + 2 + 2 + 1, MADE: 1 + 2 + 5}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_equal_the_folder(folder, tmp_path, kind):
    source = open_source(pack(folder, tmp_path / kind))
    check(source)
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert source.ignored == {HIDDEN: 1, OTHER: 1}
    assert source.sequential == kind.startswith("packed")
    if source.sequential:
        offsets = np.array([source.refs[i][0] for i in source.reading_order()])
        assert (np.diff(offsets) > 0).all()  # each read goes on where the last one ended


@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar"])
def test_a_wrapping_folder_is_no_class(folder, tmp_path, kind):
    source = open_source(pack(folder, tmp_path / kind, prefix="wrap/"))
    check(source, [f"wrap/{name}" for name in SORTED])
    assert source.classes == ["a", "b", "c"]


def test_a_tar_of_the_current_directory(folder, tmp_path):
    check(open_source(pack(folder, tmp_path / "plain.tar", prefix="./")))


def test_labels():
    def labels(*names: str) -> tuple:
        numbers, classes = by_folder(list(names))
        return None if numbers is None else numbers.tolist(), classes

    assert labels("a.png", "b.png") == (None, None)
    assert labels("x/a.png", "x/b.png") == (None, None)  # one class tells nothing
    assert labels("w/v/x/a.png", "w/v/y/b.png") == ([0, 1], ["x", "y"])
    assert labels("top.png", "x/a.png", "y/b.png") == ([-1, 0, 1], ["x", "y"])
    assert labels("top.png", "x/a.png") == (None, None)


def test_the_order_is_that_of_names_wherever_files_lie(tmp_path):
    for name in ["10.png", "9.png", "B.png", "a.png"]:
        (tmp_path / name).write_bytes(png(pixels_of(name)))
    check(open_source(tmp_path), ["10.png", "9.png", "B.png", "a.png"])


def test_macosx_droppings_and_later_entries(folder, tmp_path):
    path = pack(folder, tmp_path / "stored.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/b/zebra.png", b"x")
        archive.writestr("b/._zebra.png", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/one.png", png(pixels_of("b/zebra.png")))
    source = open_source(path)
    assert source.names == SORTED
    assert (source.read(0) == pixels_of("b/zebra.png")).all()  # the later of two
    assert source.ignored == {HIDDEN: 3, OTHER: 1, REPLACED: 1}


def test_a_knot_of_links_is_refused(tmp_path):
    make_folder(tmp_path / "album")
    (tmp_path / "photos").mkdir()
    for number in range(16):
        (tmp_path / "photos" / f"{number}").symlink_to(tmp_path / "album")
    assert len(open_source(tmp_path / "photos")) == 16 * len(NAMES)
    (tmp_path / "photos" / "16").symlink_to(tmp_path / "album")
    with pytest.raises(InputError, match="links lead here in more than 16 ways; give a folder without"):
        open_source(tmp_path / "photos")


def test_single_file(folder):
    source = open_source(folder / "a" / "one.png")
    assert (source.names, source.labels, source.classes) == (["one.png"], None, None)
    assert (source.read(0) == pixels_of("a/one.png")).all()
    assert source.where(0) == str(folder / "a" / "one.png")


def test_paths_that_hold_no_images(tmp_path):
    cases = {
        "missing": "no such file or folder",
        "empty": "empty; give a folder",
        "texts": "no image among its 2 files",
        "movie.mp4": "not a kind of file that holds images",
        "none.zip": r"the file is empty \(0 bytes\)",
        "none.tar": r"the file is empty \(0 bytes\)",
        "hollow.zip": "empty; give a folder",
        "fake.zip": "cannot be read .*make or copy it again",
        "fake.tar": "cannot be read .*make or copy it again",
        "fake.npy": "cannot be read .*make or copy it again",
        "fake.npz": "cannot be read .*make or copy it again",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "texts" / ".b.png").touch()
    for name in ("movie.mp4", "none.zip", "none.tar"):
        (tmp_path / name).touch()
    zipfile.ZipFile(tmp_path / "hollow.zip", "w").close()
    for name in ("fake.zip", "fake.tar", "fake.npy", "fake.npz"):
        (tmp_path / name).write_bytes(b"nothing of the sort" * 100)
    for name, reason in cases.items():
        with pytest.raises(InputError, match=reason) as error:
            open_source(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)), name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [*ARCHIVES, "x.npy", "x.npz"])
def test_a_file_cut_short_is_never_taken_for_a_whole_one(folder, tmp_path, kind):
    path = tmp_path / kind
    if kind in ARCHIVES:
        pack(folder, path)
    else:
        save = np.save if kind == "x.npy" else np.savez
        save(path, np.zeros((3, 5, 7, 3), np.uint8)) if save is np.save else save(path, x=np.zeros((3, 5, 7), np.uint8))
    whole = path.read_bytes()
    # A tar may end in more zeros than it needs, but two blocks of them it has.
    least = len(whole) - 1 if kind != "plain.tar" else len(whole.rstrip(b"\0")) // 512 * 512
    for length in sorted({least, least // 2, least // 3, 700 if least > 700 else 1, 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=str(path)):
            open_source(path)


def test_a_damaged_tar_header_is_not_its_end(folder, tmp_path):
    path = pack(folder, tmp_path / "plain.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[3].offset
    data[offset + 148] ^= 0xFF  # the checksum
    path.write_bytes(data)
    with pytest.raises(InputError, match="broken or cut"):
        open_source(path)


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip"])
def test_damage_inside_a_zip_names_the_image(folder, tmp_path, kind):
    path = pack(folder, tmp_path / kind)
    source = open_source(path)
    data = bytearray(path.read_bytes())
    offset = source.refs[2][0]
    data[offset + 30 + len("b/ant.PNG") + 20] ^= 0xFF
    path.write_bytes(data)
    source.reader.close()
    with pytest.raises(InputError, match=rf"{kind}: b/ant\.PNG: cannot be read .*mend or remove the file$"):
        source.read(2)
    assert (source.read(3) == pixels_of("b/zebra.png")).all()


def test_zips_that_need_more_than_deflate(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(folder / "a/one.png", "one.png")
    with pytest.raises(InputError, match=r"one\.png is compressed by method 14; pack the images again"):
        open_source(tmp_path / "x.zip")
    path = pack(folder, tmp_path / "stored.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of an encrypted entry
    path.write_bytes(data)
    with pytest.raises(InputError, match="is encrypted"):
        open_source(path)


def test_a_source_can_be_sent_to_a_process(folder, tmp_path):
    for path in (folder, pack(folder, tmp_path / "stored.zip"), pack(folder, tmp_path / "packed.tar.gz")):
        source = open_source(path)
        source.read(0)  # opens the file
        check(pickle.loads(pickle.dumps(source)))


def test_the_stamp_tells_changes(folder):
    before = open_source(folder).stamp
    assert open_source(folder).stamp == before
    (folder / "notes.txt").write_text("changed, but no image")
    assert open_source(folder).stamp == before
    os.utime(folder / "a/one.png", ns=(1, 1))
    assert open_source(folder).stamp != before
