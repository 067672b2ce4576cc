"""Checkpoints of a training run: a directory each that is there whole or not at all.

RUN/checkpoints/step-00000500/ holds model.safetensors (what sampling and probing read), config.json, palette.npy,
classes.json (the names of a classifier's classes), optimizer.safetensors (what only training needs) and state.json:
step, training state, and every other file's length and SHA-256, so that a file that was cut short or changed is found
when it is read. Nothing is pickled.

A save writes into a directory with a temporary name, makes it durable, renames it, and only then removes old
checkpoints: a full disk or a killed process at any moment leaves the previous ones as they were.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from igpt_fast.atomic import sync, work_directory, write_atomically
from igpt_fast.config import Config
from igpt_fast.errors import InputError, reason_of
from igpt_fast.made import CHECKPOINTS
from igpt_fast.model import ImageGPT
from igpt_fast.modules import tensors_to_save
from igpt_fast.palette import Palette

log = logging.getLogger("igpt_fast")

FORMAT = 1  # of the directory; a reader refuses a later one by name
NAME = "step-{:08d}"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, PALETTE, CLASSES, STATE = "config.json", "palette.npy", "classes.json", "state.json"
TEMPORARY = ".tmp-"  # what a directory's name begins with while it is written or removed


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns. `state` is the dict that was saved; `palette` None when none was."""

    model: ImageGPT
    palette: Palette | None
    state: dict[str, Any]
    step: int | None  # None: published weights, which no run of ours has made
    path: Path

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors by their flat names, on the CPU; empty when none were saved. Raises InputError."""
        record = read_record(self.path)
        if OPTIMIZER not in record["files"]:
            return {}
        _verify(self.path, record, OPTIMIZER)
        with _opened(self.path / OPTIMIZER) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def save_checkpoint(
    run: str | Path,
    step: int,
    model: ImageGPT,
    palette: Palette | None = None,
    state: Mapping[str, Any] | None = None,
    optimizer_tensors: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    best: int | None = None,
) -> Path:
    """Saves RUN/checkpoints/step-… and then removes all but the newest `keep`. Returns the checkpoint's directory.

    state: what JSON can hold. best: the step, this or a saved one, that stays too, and that `find_best` finds. One
    process at a time may save into a run. Raises InputError when that step is already saved or when writing fails (a
    full disk, say); everything that was there before is then still there.
    """
    if keep < 1:
        raise InputError(f"keep is {keep}; keep at least 1 checkpoint")
    folder, name = Path(run) / CHECKPOINTS, NAME.format(step)
    target, temporary = folder / name, folder / f"{TEMPORARY}{name}-{os.getpid()}"
    if target.exists():
        raise InputError(f"{target} is already there; remove it to save that step again")
    try:
        _clean(folder)
        with work_directory(target, temporary):
            record = {"step": step, "state": dict(state or {}), **({} if best is None else {"best": best})}
            _write_files(temporary, record, model, palette, optimizer_tensors)
            sync(temporary)
            os.rename(temporary, target)
            sync(folder)
    except (OSError, SafetensorError) as error:
        left = list_checkpoints(run)
        way = f"{left[-1]} is intact: make room, then go on with --resume" if left else "make room, then start again"
        raise InputError(f"cannot save step {step} in {folder}: {reason_of(error)}; {way}") from error
    drop_old(run, keep, best)
    return target


def drop_old(run: str | Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the newest `keep` and the best one, and what saves that were cut short left."""
    for old in [path for path in list_checkpoints(run)[:-keep] if step_of(path) != best]:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a checkpoint's name.
        os.rename(old, old.with_name(f"{TEMPORARY}{old.name}"))
    _clean(Path(run) / CHECKPOINTS)


def update_state(directory: Path, changes: Mapping[str, Any], best: int | None) -> None:
    """Puts `changes` into the state of a checkpoint, and the run's best step, unless they stand there already."""
    record = read_record(directory)
    rest = {name: value for name, value in record.items() if name != "best"}
    new = {**rest, "state": {**record["state"], **changes}, **({} if best is None else {"best": best})}
    if (new := json.loads(json.dumps(new, allow_nan=False))) != record:
        write_atomically(directory / STATE, _encoded(new))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The newest checkpoint of a run, or the one whose directory is given, checked in full; the model is on `device`.

    Raises InputError that names the file and what to do when there is none, or a file is missing, cut short, changed,
    or does not fit the model of config.json.
    """
    directory = find_checkpoint(path)
    record = read_record(directory)
    for name in record["files"]:
        _verify(directory, record, name, contents=name != OPTIMIZER)  # its are when they are asked for
    config = Config.from_dict(json.loads((directory / CONFIG).read_bytes()))
    model = ImageGPT.empty(config, torch.float32, device)
    copy_tensors(directory, dict(model.named_parameters()))
    palette = model.palette = Palette.load(directory / PALETTE) if PALETTE in record["files"] else None
    model.preprocessing = record.get("reading") or {}
    model.class_names = tuple(json.loads((directory / CLASSES).read_bytes())) if CLASSES in record["files"] else None
    return Checkpoint(model, palette, record["state"], record["step"], directory)


def copy_tensors(directory: Path, into: Mapping[str, Tensor]) -> None:
    """Copies model.safetensors into tensors of the same names and shapes; InputError that names every misfit."""
    with _opened(directory / MODEL) as file, torch.no_grad():
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {name: tuple(tensor.shape) for name, tensor in into.items()}
        if found != wanted:
            misfits = [
                f"{name} is {_shape(found.get(name))} instead of {_shape(wanted.get(name))}"
                for name in sorted(found.keys() | wanted.keys())
                if found.get(name) != wanted.get(name)
            ]
            more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
            what = f"{directory / MODEL} does not fit {CONFIG}: {', '.join(misfits[:3])}{more}"
            raise InputError(f"{what}; {_way_out(directory)}")
        for name, tensor in into.items():
            # Copied, never mapped: a parameter's alignment would follow the file, and with it the bits of a matmul.
            tensor.copy_(file.get_tensor(name))


def list_checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoint directories, oldest first; a save that was cut short is not among them."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())
    return sorted(found, key=step_of)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory meant by a run's directory (its newest) or by a checkpoint's own. Raises InputError."""
    path = Path(path)
    if (path / STATE).is_file() or (path / CONFIG).is_file():
        return path
    run = path.parent if path.name == CHECKPOINTS and not (path / CHECKPOINTS).is_dir() else path
    if found := list_checkpoints(run):
        return found[-1]
    what = "is not there" if not path.exists() else "holds no checkpoint"
    raise InputError(f"{path} {what}; give the --out of a training run that has saved, or one of its checkpoints")


def find_best(path: str | Path) -> Path:
    """As `find_checkpoint`, but of a run whose newest checkpoint says that another is the best, that. InputError."""
    newest = find_checkpoint(path)
    number = None if newest == Path(path) else read_record(newest).get("best")
    best = newest if number is None else newest.with_name(NAME.format(number))
    if not best.is_dir():
        raise InputError(f"{best} is missing, the run's best: put it back, or give a checkpoint itself, as {newest}")
    return best


def read_record(directory: Path) -> dict[str, Any]:
    """state.json of one checkpoint: format, step, files and state, checked by its own digest. Raises InputError."""
    path = directory / STATE
    if not path.is_file():
        raise _broken(path, "is missing")
    try:
        record = json.loads(path.read_bytes())
        digest = record.pop("digest")
        if record["format"] > FORMAT:
            raise InputError(f"{path} has format {record['format']}; this igpt-fast reads up to {FORMAT}: update it")
        whole = digest == _digest(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise _broken(path, "is cut short or not ours") from error
    if not whole:
        raise _broken(path, "was changed after it was saved")
    return record


def _write_files(
    directory: Path,
    record: dict[str, Any],
    model: ImageGPT,
    palette: Palette | None,
    optimizer_tensors: Mapping[str, Tensor] | None,
) -> None:
    save_file({name: p.detach().contiguous() for name, p in tensors_to_save(model).items()}, directory / MODEL)
    if optimizer_tensors:
        save_file({name: t.detach().contiguous() for name, t in optimizer_tensors.items()}, directory / OPTIMIZER)
    if palette is not None:
        centers = io.BytesIO()  # not Palette.save: its error speaks of another place, of which there is none here
        np.save(centers, palette.centers.numpy())
        write_atomically(directory / PALETTE, centers.getvalue())
    if model.class_names is not None:
        write_atomically(directory / CLASSES, json.dumps(model.class_names).encode())
    write_atomically(directory / CONFIG, json.dumps(model.config.to_dict(), indent=1).encode())
    files = {}
    for path in sorted(directory.iterdir()):
        shutil.copymode(directory / CONFIG, path)  # safetensors lets nobody but the owner read what it writes
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    record = {"format": FORMAT, **record, "reading": model.preprocessing, "files": files}
    record = json.loads(json.dumps(record, allow_nan=False))  # as a reader will see it: tuples become lists
    write_atomically(directory / STATE, _encoded(record))


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps({**record, "digest": _digest(record)}, indent=1).encode()


def _verify(directory: Path, record: dict[str, Any], name: str, contents: bool = True) -> None:
    path, wanted = directory / name, record["files"][name]
    if not path.is_file():
        raise _broken(path, "is missing")
    if (size := path.stat().st_size) != wanted["bytes"]:
        kind = "cut short" if size < wanted["bytes"] else "changed"
        raise _broken(path, f"is {kind}: {size:,} bytes instead of {wanted['bytes']:,}")
    if contents and _sha256(path) != wanted["sha256"]:
        raise _broken(path, "was changed after it was saved (its SHA-256 differs)")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _broken(path, f"cannot be read ({reason_of(error)})") from error


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}; {_way_out(path.parent)}")


def _way_out(directory: Path) -> str:
    """What to do about a broken checkpoint: go back to the one before it, where there is one."""
    beside = list_checkpoints((directory := directory.absolute()).parent.parent)
    earlier = beside[: beside.index(directory)] if directory in beside else []
    if earlier:
        return f"remove {directory} to go on from {earlier[-1].name}, or copy it again from where it came from"
    return "copy the checkpoint again from where it came from, or train anew into another --out"


def _clean(folder: Path) -> None:
    """Removes what saves and removals that were cut short left behind; the next save tries again what fails."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        try:
            shutil.rmtree(leftover)
        except OSError as error:  # as where files of a server are still read by somebody
            log.warning("%s cannot be removed yet (%s)", leftover, reason_of(error))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def step_of(directory: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(directory.name.removeprefix("step-"))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
