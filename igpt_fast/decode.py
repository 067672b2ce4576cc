"""Many images to pixels of one size: in this process, or in worker processes that read and decode in parallel.

A worker is a plain child process that speaks over its pipes: it needs no guard in the caller's script, ends with its
parent however that ends, and has one job at a time, so memory does not grow with the number of images. Results come in
the order of the jobs: what is yielded does not depend on the number of workers.
"""

import hashlib
import logging
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image

from igpt_fast.errors import InputError
from igpt_fast.image_files import BYTES, DARK, OUTSIDE, PAGES, read_image
from igpt_fast.images import Preprocessing, random_view, resize_image
from igpt_fast.reader import Reader, fetch
from igpt_fast.sources import Source

CHUNK = 64  # images a job, or views of them: seconds of work for large photos, and at 32×32 a result of 196 kB
FEW = 500  # images: below, starting workers takes longer than they save
MOST_WORKERS = 32  # beyond, the pipes and not the decoders are the limit
# What read_image notes: images that it is about, and what to know.
LOST = {
    DARK: (
        "images of 16 bits use less than an eighth of their values, and come out almost black, or of one gray",
        "--value-range (value_range) says which values are black and white, 0,4095 for the 12 bits of most scans",
    ),
    OUTSIDE: (
        "images lie outside --value-range (value_range), or in a small part of it, and come out of one shade",
        "give the values that they have; files of several kinds of numbers want one each",
    ),
    BYTES: (
        "images have 8 bits, or say themselves what is white",
        "--value-range (value_range) leaves those as they are",
    ),
    PAGES: ("files hold several pages or frames", "the first of each is read"),
}
_told: set[str] = set()
log = logging.getLogger("igpt_fast")


@dataclass(frozen=True)
class Decoder:
    """What a worker has to know: where the bytes are, and what to make of them."""

    reader: Reader
    preprocessing: Preprocessing

    def __call__(self, items: list[tuple[str, object]]) -> tuple[np.ndarray, list[tuple[int, str]], Counter[str]]:
        """items: (name for errors, what Reader.fetch takes, or what it gave or raised) for each image.

        Returns uint8 [n · preprocessing.each, H, W, 3] of those that could be decoded, (place in items, message) of the
        others, and how often read_image has noted what.
        """
        pixels, failures, notes, how = [], [], Counter(), self.preprocessing
        for place, (where, item) in enumerate(items):
            try:
                if isinstance(item, InputError):
                    raise item
                data = item if isinstance(item, (bytes, np.ndarray)) else fetch(self.reader, item, where)
                image = read_image(data, where, how.background, how.value_range, how.bands)
                pixels += self._views(data, image) or [resize_image(image, how.size, how.resize, where)]
                notes.update(image.info)
            except InputError as error:
                failures.append((place, str(error)))
        return np.array(pixels, np.uint8).reshape(-1, *how.size, 3), failures, notes

    def _views(self, data: bytes | np.ndarray, image: Image.Image) -> list[np.ndarray]:
        """The random crops that are asked for: the image's own, whatever its name and its neighbours."""
        seed = hashlib.blake2b(data, digest_size=16).digest() if self.preprocessing.views else b""
        random = np.random.default_rng(list(seed))
        return [random_view(image, self.preprocessing.size, random) for _ in range(self.preprocessing.views)]


@dataclass(frozen=True)
class Decoded:
    """A part of a source: indices int64 [n] with their pixels uint8 [n · preprocessing.each, H, W, 3], and (index,
    message) of the rest.
    """

    indices: np.ndarray
    pixels: np.ndarray
    failures: list[tuple[int, str]]

    @property
    def seen(self) -> int:
        """Images gone through, decoded or not."""
        return len(self.indices) + len(self.failures)


def default_workers(images: int) -> int:
    """Processes for this many images when nobody says: one a core that this process may use, none for few images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if images < FEW else min(cores, MOST_WORKERS)


def decode(
    source: Source, preprocessing: Preprocessing, workers: int | None = None, indices: np.ndarray | None = None
) -> Iterator[Decoded]:
    """Decodes and resizes a source's images part by part; memory holds at most 64 of them, or of their views, a worker.

    preprocessing: how; with on_error "raise" the first corrupt image raises InputError, with "skip" it is reported in
    `failures`. workers: processes, 0 for none, None for one a core. indices: which images, all when None. They come in
    the order in which the source reads fast: that of names, but for compressed tars and .npz that of the file. How
    many files had several pages, of which the first is read, or 16-bit values that come out almost black, is logged.
    """
    if workers is not None and (not isinstance(workers, Integral) or workers < 0):
        raise InputError(f"workers is {workers}; use 0 for none, or how many processes decode")
    wanted = np.arange(len(source)) if indices is None else np.unique(indices)
    order = source.reading_order()
    order = order[np.isin(order, wanted)]
    step = max(1, CHUNK // preprocessing.each)
    chunks = [order[start : start + step] for start in range(0, len(order), step)]
    workers = default_workers(len(order)) if workers is None else workers
    decoder, notes = Decoder(source.reader, preprocessing), Counter()
    jobs = ([_item(source, int(index)) for index in chunk] for chunk in chunks)
    results = _in_workers(decoder, jobs, min(workers, len(chunks))) if workers else (decoder(job) for job in jobs)
    try:
        for chunk, (pixels, failures, noted) in zip(chunks, results, strict=True):
            notes.update(noted)
            if failures and preprocessing.on_error == "raise":
                raise InputError(f"{failures[0][1]}, or leave such files out with --on-error skip")
            good = np.delete(chunk, [place for place, _ in failures])
            yield Decoded(good, pixels, [(int(chunk[place]), message) for place, message in failures])
        tell_lost(str(source.path), notes)
    finally:
        results.close()  # now: whoever keeps an exception keeps this frame
        source.reader.close()


def tell_lost(where: str, notes: Counter[str]) -> None:
    """Logs, once, how many images read_image has noted something about."""
    for what, (text, remedy) in LOST.items():
        message = f"{where}: {notes[what]:,} {text}: {remedy}"
        if notes[what] and message not in _told:  # a palette is fitted to images that are then tokenised
            _told.add(message)
            log.warning(message)


def _item(source: Source, index: int) -> tuple[str, object]:
    """What a worker gets for an image: where it lies, or its bytes when only one process can read them in order."""
    where, ref = source.where(index), source.refs[index]
    if not source.sequential:
        return where, ref
    try:
        return where, fetch(source.reader, ref, where)
    except InputError as error:
        return where, error


def _in_workers(decoder: Decoder, jobs: Iterator[list], count: int) -> Iterator[tuple]:
    """decoder(job) for every job, in order: job k goes to worker k mod count, once that has delivered its last."""
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(decoder))
        busy = [worker for worker, job in zip(workers, jobs, strict=False) if worker.send(job)]
        while busy:
            worker = busy.pop(0)
            result = worker.receive()
            job = next(jobs, None)
            if job is not None and worker.send(job):
                busy.append(worker)
            yield result
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A child process that decodes."""

    def __init__(self, decoder: Decoder) -> None:
        # The package's own __init__ would bring torch: seconds and hundreds of megabytes that no decoder needs. A bare
        # module of its name, knowing only its folder, stands in for it.
        code = (
            "import sys; sys.path[:] = sys.argv[2:]; import types; package = types.ModuleType('igpt_fast'); "
            "package.__path__ = [sys.argv[1]]; sys.modules['igpt_fast'] = package; "
            "from igpt_fast.decode import serve; serve()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then stops its workers
        )
        self.send(decoder)

    def send(self, message: object) -> bool:
        try:
            pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return True

    def receive(self) -> tuple[np.ndarray, list[tuple[int, str]], Counter[str]]:
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended() from error

    def _ended(self) -> InputError:
        code = self._process.wait()
        return InputError(
            f"a process that decodes images ended by itself (exit code {code}), perhaps for want of memory; "
            "try --workers 0"
        )

    def stop(self) -> None:
        self._process.kill()  # it holds nothing worth keeping
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # what was still in the buffer has no reader any more
            self._process.stdin = None


def serve() -> None:
    """The worker's side: reads a Decoder, then jobs, from stdin until it ends; writes each job's result to stdout."""
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the results
    try:
        decoder = pickle.load(inbox)
        while True:
            pickle.dump(decoder(pickle.load(inbox)), outbox, pickle.HIGHEST_PROTOCOL)
            outbox.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone
