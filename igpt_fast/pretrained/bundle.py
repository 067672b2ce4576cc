"""TensorFlow's tensor bundle, the format of its checkpoints, read without TensorFlow.

PREFIX.index is a table of sorted keys in LevelDB's format: blocks, an index of them, a footer of 48 bytes. The empty
key holds a BundleHeaderProto (number of shards, byte order), every other a BundleEntryProto (dtype, shape, shard,
offset, length, CRC-32C). PREFIX.data-00000-of-00032 and so on hold the tensors, raw. Every block and every tensor has
a masked CRC-32C, and all of them are checked.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from igpt_fast.errors import InputError, as_input_error

MAGIC = 0xDB4775248B80FB57
INDEX = ".index"
# DataType of TensorFlow → torch, for what a weight can be.
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}
AGAIN = "copy the checkpoint again from where it came from"


@dataclass(frozen=True)
class Entry:
    """One tensor of a bundle: where it lies and what it is."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    length: int
    crc: int
    sliced: bool


def find_bundle(path: Path) -> Path | None:
    """The prefix of the checkpoint that `path` names: itself, its .index, or its folder when that holds just one.

    None when there is no bundle. Raises InputError for a folder that holds several.
    """
    if path.name.endswith(INDEX) and path.name != INDEX and path.is_file():
        return path.with_name(path.name.removesuffix(INDEX))
    if Path(f"{path}{INDEX}").is_file():
        return path
    found = sorted(path.glob("?*" + INDEX)) if path.is_dir() else []
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} checkpoints; name one, as {found[-1].with_suffix('')}")
    return found[0].with_name(found[0].name.removesuffix(INDEX)) if found else None


class Bundle:
    """A checkpoint, its index read. entries: what it holds, by name. Raises InputError that names file and key."""

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.path = prefix, prefix.with_name(prefix.name + INDEX)
        self._crc32c = _load_crc32c()
        with as_input_error(self.path, AGAIN):
            entries = dict(self._table(self.path.read_bytes()))
            header = _message(entries.pop(b"", b""))
            self.shards = _first(header, 1, 0)
            if _first(header, 2, 0) != 0 or self.shards < 1:
                raise ValueError("it is not of a machine whose numbers start with their lowest byte")
            self.entries = {key.decode(): _entry(value) for key, value in sorted(entries.items())}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, checked and copied into memory."""
        entry, path = self.entries[name], self.shard_path(self.entries[name].shard)
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or entry.sliced:
            what = "in slices" if entry.sliced else f"in TensorFlow's dtype number {entry.dtype}"
            raise InputError(f"{self.path}: {name} is stored {what}, which is not supported")
        if entry.length != math.prod(entry.shape) * dtype.itemsize or min(entry.shape, default=0) < 0:
            raise InputError(f"{self.path}: {name} has shape {list(entry.shape)} in {entry.length:,} bytes; {AGAIN}")
        try:
            with open(path, "rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.length)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(f"{path}, which holds {name}, {reason}; {AGAIN}") from error
        if len(data) != entry.length:
            raise InputError(f"{path} is cut short: {name} should end at byte {entry.offset + entry.length:,}; {AGAIN}")
        if _mask(self._crc32c(data)) != entry.crc:
            raise InputError(f"{path} was changed: the CRC-32C of {name} differs; {AGAIN}")
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.shape)

    def shard_path(self, shard: int) -> Path:
        """The data file number `shard`."""
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.shards:05d}")

    def _table(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The table's keys and values."""
        if len(data) < 48 or struct.unpack("<Q", data[-8:])[0] != MAGIC:
            raise ValueError("it does not end as an index of TensorFlow does")
        _, at = _handle(data, len(data) - 48)  # of the metaindex, which is empty
        (offset, length), _ = _handle(data, at)
        for _, handle in self._block(data, offset, length):
            (offset, length), _ = _handle(handle, 0)
            yield from self._block(data, offset, length)

    def _block(self, data: bytes, offset: int, length: int) -> Iterator[tuple[bytes, bytes]]:
        """A block's keys and values. Keys share their beginnings with those before them."""
        block, tail = data[offset : offset + length], data[offset + length : offset + length + 5]
        if len(block) != length or len(tail) != 5:
            raise ValueError("a block lies outside the file")
        if _mask(self._crc32c(block + tail[:1])) != struct.unpack("<I", tail[1:])[0]:
            raise ValueError("the CRC-32C of a block differs")
        if tail[0] != 0:
            raise ValueError("its blocks are compressed, which TensorFlow's writer does not do")
        restarts = struct.unpack("<I", block[-4:])[0]
        at, end, key = 0, length - 4 * (restarts + 1), b""
        while at < end:
            shared, at = _varint(block, at)
            rest, at = _varint(block, at)
            size, at = _varint(block, at)
            if shared > len(key) or at + rest + size > end:
                raise ValueError("an entry lies outside its block")
            key = key[:shared] + block[at : at + rest]
            yield key, block[at + rest : at + rest + size]
            at += rest + size


def _load_crc32c() -> Callable[[bytes], int]:
    try:
        from google_crc32c import value
    except ImportError as error:
        raise InputError(
            "google-crc32c is not installed, which checks TensorFlow's checkpoints; run: pip install igpt-fast[openai]"
        ) from error
    return value


def _mask(crc: int) -> int:
    """How TensorFlow writes a CRC-32C down."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


_WIDTHS = {1: 8, 2: None, 5: 4}  # of a protocol buffer's fields by their kind; the second says it itself


def _entry(data: bytes) -> Entry:
    fields = _message(data)
    shape = _message(_first(fields, 2, b""))
    sizes = tuple(_signed(_first(_message(dim), 1, 0)) for number, dim in shape if number == 2)
    return Entry(
        dtype=_first(fields, 1, 0),
        shape=sizes,
        shard=_first(fields, 3, 0),
        offset=_first(fields, 4, 0),
        length=_first(fields, 5, 0),
        crc=_first(fields, 6, 0),
        sliced=any(number == 7 for number, _ in fields),
    )


def _message(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: (number, value)."""
    fields, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in _WIDTHS:
            size, at = _varint(data, at) if kind == 2 else (_WIDTHS[kind], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("an entry is cut short")
            value = value if kind == 2 else int.from_bytes(value, "little")
        else:
            raise ValueError("an entry is none")
        fields.append((tag >> 3, value))
    return fields


def _first(fields: list[tuple[int, int | bytes]], number: int, default: int | bytes) -> int | bytes:
    """The value of field `number`. Raises ValueError when it is of another kind than `default`."""
    value = next((value for found, value in fields if found == number), default)
    if type(value) is not type(default):
        raise ValueError("an entry's field is of another kind")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    length, at = _varint(data, at)
    return (offset, length), at
