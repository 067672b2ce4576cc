"""Tokens on disk: a directory of memory-mapped shards with what is needed to understand them.

meta.json        size, colors, number of images, rows of each shard, classes, how the images were made, what was skipped
palette.npy      float32 [colors, 3]
shard-00000.npy  uint16 [n, H, W], and so on, in the order of the source's names
labels.npy       int32 [N], -1 where unknown
names.json       the name of every image, relative to its source
groups.json      of every image, the group that stays together in a split; absent where each image is alone
"""

import hashlib
import io
import json
import operator
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast.errors import InputError, as_input_error
from igpt_fast.images import NOTED, Preprocessing, in_todays_words
from igpt_fast.made import is_run
from igpt_fast.palette import Palette

FORMAT, VERSION = "igpt-fast tokens", 1
CHUNK = 1 << 22  # tokens read at a time for their digests
MOST = 1 << 28  # tokens, 260,000 images of 32 × 32: to look for a few among more takes longer than it is worth
SHARD_BYTES = 128 << 20  # large enough that a million images are few files, small enough to move about


TOKEN_FILES = r"(meta|names|groups)\.json|palette\.npy|labels\.npy|shard-\d+\.npy"


def is_token_directory(path: str | Path) -> bool:
    """True when `path` is a directory that `tokenize` wrote."""
    try:
        return json.loads(Path(path, "meta.json").read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def split_hash(name: str) -> int:
    """What decides an image's split: the first 64 bits of BLAKE2b of its name, as a number from 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class TokenDataset:
    """A token directory, opened without reading or copying its tokens.

    size: (height, width). colors: of the palette. palette. classes: their names, or None. labels: int64 [N], indices
    into classes, -1 where unknown. names: of the images, relative to their source. shards: uint16 [n, H, W] memory
    maps. meta: what meta.json says. origin: what errors call it: its path, but of one that goes away the images' own.
    Raises InputError, naming the file, when one is missing, cut short or contradicts another. Tokens are checked
    against the palette as they are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.origin = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{path}: no such directory of tokens; write one with igpt-fast tokenize")
        self.meta = self._read_meta()
        self.size: tuple[int, int] = tuple(self.meta["size"])
        self.colors: int = self.meta["colors"]
        self.classes: list[str] | None = self.meta["classes"]
        self.palette = Palette.load(self.path / "palette.npy")
        if len(self.palette) != self.colors:
            raise self._broken("palette.npy", f"has {len(self.palette)} colours and not {self.colors}")
        rows = self.meta["shards"]
        self.shards = [self._load(shard_name(k), np.uint16, (n, *self.size)) for k, n in enumerate(rows)]
        self._starts = np.cumsum([0, *rows])
        self.labels = np.array(self._load("labels.npy", np.int32, (len(self),)), np.int64)
        if self.labels.min() < -1 or self.labels.max() >= len(self.classes or []):
            ends, count = f"{self.labels.min()}..{self.labels.max()}", len(self.classes or [])
            raise self._broken("labels.npy", f"has labels {ends}, which {count} classes do not have")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """The tokens of one image, int64 [H, W], as torch's DataLoader asks for them. Raises IndexError."""
        return self.batch(np.array([range(len(self))[operator.index(index)]]))[0]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the images were read, as far as it is noted: fields of igpt_fast.images.Preprocessing, as in JSON."""
        noted = in_todays_words(self.meta)
        return {name: noted[name] for name in NOTED if name in noted}

    @property
    def stamp(self) -> str:
        """That of the Source that they were made of; "" where it is not noted."""
        return self.meta.get("source_stamp", "")

    def made_of(self, stamp: str) -> bool:
        """Whether these are tokens of the images of a Source with that stamp."""
        # Older tokens know a file by its size and its time alone.
        return bool(self.stamp) and self.stamp in (stamp, stamp.rpartition("-")[0])

    def __reduce__(self) -> tuple:
        return TokenDataset, (self.path,)  # a process that is sent one opens the files itself

    @cached_property
    def names(self) -> list[str]:
        """The images' names, in the order of the tokens."""
        return self._texts("names.json")

    @cached_property
    def groups(self) -> list[str] | None:
        """Of each image the group that stays together in every split; None: each image is alone, by its name."""
        return self._texts("groups.json") if (self.path / "groups.json").exists() else None

    @cached_property
    def _hashes(self) -> np.ndarray:
        return np.array([split_hash(name) for name in self.groups or self.names], np.uint64)

    def _texts(self, file: str) -> list[str]:
        with as_input_error(f"{self.path / file}:", self._way()):
            if json.loads((self.path / "meta.json").read_bytes()) != self.meta:
                raise self._broken(file, "was written anew since the tokens were opened")
            texts = json.loads((self.path / file).read_bytes())
            if not _are_texts(texts):
                raise ValueError("it is no list of names")
        if len(texts) != len(self):
            raise self._broken(file, f"holds {len(texts)} names and not {len(self)}")
        return texts

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Tokens of the images `indices` (any order, repeats allowed) as int64 [n, H, W].

        Raises IndexError for an index outside 0..N-1, InputError for a token that the palette does not have.
        """
        indices = np.asarray(indices).reshape(-1)
        if len(indices) and indices.dtype.kind not in "iu":
            raise InputError(f"the indices are {indices.dtype}; give whole numbers, as numpy.flatnonzero of a mask")
        indices = indices.astype(np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"an index of {indices.min()}..{indices.max()} is outside 0..{len(self) - 1}")
        tokens = gather(self.shards, self._starts, indices)
        if tokens.size and tokens.max() >= self.colors:
            bad = int(indices[(tokens >= self.colors).any((1, 2)).argmax()])
            shard = int(np.searchsorted(self._starts, bad, "right")) - 1
            raise self._broken(shard_name(shard), f"image {bad} has token {tokens.max()} of only {self.colors} colours")
        return torch.from_numpy(tokens.astype(np.int64))

    def read_otherwise(self, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """What the images were read with other than `known` has it: each option, as it is typed, and what is known."""
        for name, value in self.preprocessing.items():
            if known.get(name, value) != value:
                yield f"--{name.replace('_', '-')} {value}", known[name]

    def digests(self, indices: np.ndarray) -> Iterator[bytes]:
        """Of the tokens of each of the images `indices`: equal where images are, by whatever names."""
        step = max(1, CHUNK // (self.size[0] * self.size[1]))
        for begin in range(0, len(indices), step):
            for tokens in self.batch(indices[begin : begin + step]).short().numpy():
                yield hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()

    def split(self, name: str, val_fraction: float = 0.1) -> np.ndarray:
        """Indices (int64, ascending) of the "train", "val" or "all" images.

        An image is for validation when `split_hash` of its group, else of its name, which is relative to its source,
        lies in the lowest `val_fraction` of the range. So it never moves to the other side, whatever images come or go
        and whatever the order, and a larger fraction only adds to the smaller one's. With few images or groups the
        share is only roughly `val_fraction`, and may be nothing. Raises InputError for another name or a fraction
        outside 0..1.
        """
        if not 0 <= val_fraction <= 1:
            raise InputError(f"val_fraction {val_fraction} is outside 0..1; give the share of validation images")
        if name == "all":
            return np.arange(len(self))
        if name not in ("train", "val"):
            raise InputError(f"split {name!r} is not known; give train, val or all")
        # Compared as whole numbers, for 2^64 · fraction has no exact float64; a fraction of 1 takes everything.
        limit = int(val_fraction * 2**64)
        val = np.full(len(self), True) if limit >= 2**64 else self._hashes < np.uint64(limit)
        return np.flatnonzero(val if name == "val" else ~val)

    def _read_meta(self) -> dict:
        with as_input_error(f"{self.path / 'meta.json'}:", self._way()):
            meta = json.loads((self.path / "meta.json").read_bytes())
            if meta["format"] != FORMAT or meta["version"] != VERSION:
                raise self._broken("meta.json", f"is {meta['format']} of version {meta['version']}, not {VERSION}")
            height, width = meta["size"]
            whole = all(type(n) is int and n >= 1 for n in (height, width, meta["colors"], *meta["shards"]))
            classes = meta["classes"]
            named = classes is None or (_are_texts(classes) and len(set(classes)) == len(classes))
            told = isinstance(meta.get("source_stamp", ""), str) and isinstance(meta.get("skipped", []), list)
            if not whole or not named or not told or not 1 <= sum(meta["shards"]) == meta["images"]:
                raise ValueError("its entries contradict each other")
        try:
            noted = in_todays_words(meta)
            Preprocessing(meta["size"], **{name: noted[name] for name in NOTED if name in noted})
        except InputError as error:
            raise self._broken("meta.json", str(error)) from error
        return meta

    def _load(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        with as_input_error(f"{self.path / name}:", self._way()):
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
            if array.dtype != dtype or array.shape != shape:
                form = f"{array.dtype} {list(array.shape)} and not {np.dtype(dtype)} {list(shape)}"
                raise self._broken(name, f"holds {form}")
        return array

    def _broken(self, name: str, what: str) -> InputError:
        return InputError(f"{self.path / name}: {what}; {self._way()}")

    def _way(self) -> str:
        """What to do when a file is broken."""
        if self.path.name == "tokens" and is_run(self.path.parent):
            return f"delete {self.path}, which train makes again when it is given the images"
        return "write the tokens again with igpt-fast tokenize"


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:05d}.npy"


def gather(shards: list[np.ndarray], starts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Rows `indices` of the shards laid end to end, the first row of shard k being number starts[k]: [n, H, W]."""
    out = np.empty((len(indices), *shards[0].shape[1:]), shards[0].dtype)
    shard_of = np.searchsorted(starts, indices, "right") - 1
    for shard in np.unique(shard_of):
        here = shard_of == shard
        out[here] = shards[shard][indices[here] - starts[shard]]
    return out


class ShardWriter:
    """Writes tokens of `count` images into shards in any order; at most one batch is held in memory."""

    def __init__(self, folder: Path, count: int, size: tuple[int, int], rows: int | None = None) -> None:
        self._folder, self._count, self._size = folder, count, size
        self._row_bytes = 2 * size[0] * size[1]
        self._rows = rows or max(1, SHARD_BYTES // self._row_bytes)  # images a shard
        self._offset = len(self._header(0))
        self._fit(count)

    def write(self, indices: np.ndarray, tokens: np.ndarray) -> None:
        """Puts tokens (uint16 [n, H, W]) at the places `indices` (int64 [n])."""
        for shard in np.unique(indices // self._rows):
            with open(self._folder / shard_name(shard), "r+b") as file:
                for place in np.flatnonzero(indices // self._rows == shard):
                    file.seek(self._offset + int(indices[place] % self._rows) * self._row_bytes)
                    file.write(np.ascontiguousarray(tokens[place], np.dtype("<u2")))

    def finish(self, kept: np.ndarray) -> list[int]:
        """Closes the gaps: only the images `kept` (ascending) stay. Returns the rows of each shard; all is on disk."""
        if len(kept) < self._count:
            total = range(0, self._count, self._rows)
            shards = [np.load(self._folder / shard_name(k), mmap_mode="r") for k in range(len(total))]
            for start in range(0, len(kept), 1024):  # a place is never behind its image, so nothing unread is replaced
                block = kept[start : start + 1024]
                self.write(np.arange(start, start + len(block)), gather(shards, np.array(total), block))
            for number in range(len(range(0, len(kept), self._rows)), len(total)):
                (self._folder / shard_name(number)).unlink()
        return self._fit(len(kept))

    def _fit(self, count: int) -> list[int]:
        """Gives every shard its header and its length for `count` images."""
        rows = [min(self._rows, count - start) for start in range(0, count, self._rows)]
        for number, n in enumerate(rows):
            path = self._folder / shard_name(number)
            with open(path, "r+b" if path.exists() else "xb") as file:
                file.write(self._header(n))
                length = self._offset + n * self._row_bytes
                file.truncate(length)
                if hasattr(os, "posix_fallocate"):  # a full disk is better met now than in an hour
                    os.posix_fallocate(file.fileno(), 0, length)
                file.flush()
                os.fsync(file.fileno())
        return rows

    def _header(self, rows: int) -> bytes:
        """The .npy header; its length is the same for any number of rows, for NumPy leaves room for it to grow."""
        buffer = io.BytesIO()
        form = {"descr": "<u2", "fortran_order": False, "shape": (rows, *self._size)}
        np.lib.format.write_array_header_1_0(buffer, form)
        return buffer.getvalue()
