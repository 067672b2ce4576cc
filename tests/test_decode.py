"""Decoding in workers gives what decoding here gives; no worker outlives its parent; memory holds a few jobs only."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast import decode as module
from igpt_fast.decode import FEW, MOST_WORKERS, Decoder, decode, default_workers
from igpt_fast.errors import InputError
from igpt_fast.images import Preprocessing
from igpt_fast.sources import Source, fetch, open_source

COUNT = 23
CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", CHUNK)


def make_folder(root: Path, broken: tuple[int, ...] = ()) -> Path:
    root.mkdir()
    for number in range(COUNT):
        path = root / f"{number:02d}.png"
        Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:40])
    return root


def make_npz(path: Path) -> Path:
    """Read by one process only, which sends the pixels to the workers."""
    rows = np.arange(COUNT, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    np.savez_compressed(path, x=rows)
    return path


def collect(
    source: Source, workers: int | None = None, indices: object = None, **preprocessing: object
) -> tuple[list[int], list[bytes], list[tuple[int, str]]]:
    found, pixels, failures = [], [], []
    for part in decode(source, Preprocessing((8, 8), **preprocessing), workers, indices):
        assert len(part.indices) == len(part.pixels)
        assert part.seen <= CHUNK
        found += part.indices.tolist()
        pixels += [image.tobytes() for image in part.pixels]
        failures += part.failures
    return found, pixels, failures


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_the_number_of_workers_does_not_matter(tmp_path, kind):
    source = open_source(make_folder(tmp_path / "x") if kind == "folder" else make_npz(tmp_path / "x.npz"))
    alone = collect(source, workers=0)
    assert alone[0] == list(range(COUNT))
    assert [p[0] for p in alone[1]] == list(range(COUNT))  # every image is its own
    for workers in (1, 2, 30):
        assert collect(source, workers=workers) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images(tmp_path, workers):
    source = open_source(make_folder(tmp_path / "x", broken=(5, 6, 17)))
    with pytest.raises(InputError, match=r"x/05\.png: .*--on-error skip"):
        collect(source, workers=workers)
    indices, pixels, failures = collect(source, workers=workers, on_error="skip")
    assert indices == [n for n in range(COUNT) if n not in (5, 6, 17)]
    assert [p[0] for p in pixels] == indices
    assert [index for index, _ in failures] == [5, 6, 17]
    assert all(f"{index:02d}.png: " in why for index, why in failures)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_one_reading_process_is_the_images(tmp_path, monkeypatch, workers):
    source = open_source(make_npz(tmp_path / "x.npz"))

    def failing(reader: object, ref: tuple, where: str) -> object:
        if where.endswith("00000009"):
            raise InputError(f"{where}: gone")
        return fetch(reader, ref, where)

    monkeypatch.setattr(module, "fetch", failing)
    indices, _, failures = collect(source, workers=workers, on_error="skip")
    assert failures == [(9, f"{tmp_path}/x.npz: image 00000009: gone")]
    assert len(indices) == COUNT - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_many_views_are_no_larger_jobs(tmp_path, workers):
    source = open_source(make_folder(tmp_path / "x"))
    for views, most in ((2, CHUNK), (3, 3), (9, 9)):
        parts = [len(part.pixels) for part in decode(source, Preprocessing((8, 8), views=views), workers)]
        assert max(parts) == most and sum(parts) == COUNT * views


def test_the_file_is_closed_when_decoding_ends(tmp_path):
    source = open_source(make_npz(tmp_path / "x.npz"))
    parts = decode(source, Preprocessing((8, 8)), workers=0)
    next(parts)
    assert source.reader._stream is not None
    parts.close()
    assert source.reader._stream is None


def test_some_images_only(tmp_path):
    source = open_source(make_folder(tmp_path / "x"))
    assert collect(source, indices=np.array([20, 3, 3, 11]), workers=0)[0] == [3, 11, 20]
    assert collect(source, indices=np.array([], np.int64), workers=2) == ([], [], [])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_only_a_few_jobs_are_under_way(tmp_path, monkeypatch, workers, kind):
    """However many images there are, those handed out but not yet received are at most one job a worker."""
    source = open_source(make_folder(tmp_path / "x") if kind == "folder" else make_npz(tmp_path / "x.npz"))
    handed_out, item = [], module._item
    monkeypatch.setattr(module, "_item", lambda source, index: handed_out.append(index) or item(source, index))
    received, most = 0, 0
    for part in decode(source, Preprocessing((8, 8)), workers=workers):
        received += part.seen
        most = max(most, len(handed_out) - received)
    assert received == len(handed_out) == COUNT
    assert most <= CHUNK * workers


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"size": (0, 8)}, "size"),
        ({"size": (8,)}, "size"),
        ({"resize": "stretch"}, "paper, hf, none"),
        ({"background": "nocolour"}, "background"),
        ({"on_error": "ignore"}, "raise or skip"),
        (
            {"value_range": (5, 5)},
            r"value_range \(5, 5\) is not two numbers: the value of black, then a larger one of white",
        ),
        ({"value_range": (0, float("nan"))}, "value_range .* is not two numbers"),
        ({"value_range": (0, 1, 2)}, "value_range .* is not two numbers"),
        ({"bands": (1, 2)}, r"bands \(1, 2\) are not one band or three"),
        ({"bands": (0,)}, "of which the first of an image is 1"),
    ],
)
def test_impossible_options(option, reason):
    with pytest.raises(InputError, match=reason):
        Preprocessing(**option)


def children() -> set[int]:
    """This process's children that still run."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended just now
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(entry.name))
    return found


def test_workers_end_when_decoding_does(tmp_path):
    source, before = open_source(make_folder(tmp_path / "x")), children()
    parts = decode(source, Preprocessing((8, 8)), workers=2)
    next(parts)
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()  # light: no decoder needs it
    parts.close()  # as Ctrl-C would
    assert children() == before
    collect(source, workers=2)
    assert children() == before
    (tmp_path / "x" / sorted(os.listdir(tmp_path / "x"))[0]).write_bytes(b"no image")
    with pytest.raises(InputError) as kept:  # and with it the frame that started workers
        list(decode(open_source(tmp_path / "x"), Preprocessing((8, 8)), workers=2))
    assert kept and children() == before
    for wrong in (-1, 1.5):
        with pytest.raises(InputError, match=f"workers is {wrong}; use 0 for none"):
            next(decode(source, Preprocessing((8, 8)), workers=wrong))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_lost_is_told_once(tmp_path, caplog, workers):
    for k in range(70):
        Image.fromarray(np.full((4, 4), 16 * k, np.uint16)).save(tmp_path / f"{k}.png")
    source = open_source(tmp_path)
    for _ in range(2):
        parts = list(decode(source, Preprocessing((4, 4)), workers=workers))
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "70 images of 16 bits use less than an eighth of their values" in told[0]
    assert "--value-range" in told[0] and sum(len(p.indices) for p in parts) == 70
    np.save(tmp_path / "bytes.npy", np.zeros((3, 4, 4, 1), np.uint8))
    caplog.clear()
    list(decode(open_source(tmp_path / "bytes.npy"), Preprocessing((4, 4), value_range=(0, 9)), workers=workers))
    assert ["3 images have 8 bits" in r.getMessage() for r in caplog.records] == [True]
    bright = np.concatenate(
        [p.pixels for p in decode(source, Preprocessing((4, 4), value_range=(0, 2047)), workers=workers)]
    )
    assert bright.max() == round(16 * 69 / 2047 * 255)


def test_a_worker_that_dies_is_reported(tmp_path):
    source = open_source(make_folder(tmp_path / "x"))
    worker = module._Worker(Decoder(source.reader, Preprocessing((8, 8))))
    try:
        worker._process.kill()
        with pytest.raises(InputError, match=r"ended by itself \(exit code -9\).*--workers 0"):
            worker.receive()
    finally:
        worker.stop()


def test_workers_end_with_a_killed_parent(tmp_path):
    """kill -9 gives the parent no chance to stop them: they see their pipe end."""
    folder, ready = make_folder(tmp_path / "x"), tmp_path / "ready"
    script = (  # torch, which the package's __init__ imports, is of no concern here and slow to come
        "import os, sys, types, time; p = types.ModuleType('igpt_fast'); p.__path__ = [sys.argv[1]]\n"
        "sys.modules['igpt_fast'] = p\n"
        "from igpt_fast import decode, images, sources\n"
        "parts = decode.decode(sources.open_source(sys.argv[2]), images.Preprocessing((8, 8)), workers=2)\n"
        "start = decode._Worker.__init__\n"
        "pids = []\n"
        "def started(self, decoder):\n"
        "    start(self, decoder)\n"
        "    pids.append(str(self._process.pid))\n"
        "decode._Worker.__init__ = started\n"
        "decode.CHUNK = 4\n"
        "next(parts)\n"
        "open(sys.argv[3] + '.tmp', 'w').write(' '.join(pids))\n"
        "os.rename(sys.argv[3] + '.tmp', sys.argv[3])\n"
        "time.sleep(60)\n"
    )
    package = Path(module.__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", script, str(package), str(folder), str(ready)])
    try:
        wait_for(ready.exists)
        pids = [int(pid) for pid in ready.read_text().split()]
        assert len(pids) == 2
        assert all(runs(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(runs(pid) for pid in pids))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_workers_by_default(monkeypatch):
    assert default_workers(FEW - 1) == 0 < default_workers(FEW)
    assert 1 <= default_workers(10**6) <= (os.cpu_count() or 1)
    for cores in (3, 99):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        assert default_workers(10**6) == min(cores, MOST_WORKERS)
