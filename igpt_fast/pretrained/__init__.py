"""Published weights, from and to disk: Hugging Face's layout, the hub's repositories, OpenAI's checkpoints.

    source → files (safetensors, pickles) or bundle (TensorFlow) → names or openai (our names) → Pretrained

Knows no model: what it reads is a Config and tensors by our names, all of them, or an InputError.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from igpt_fast.atomic import move_into_place, refuse_others, sync, work_directory, write_atomically
from igpt_fast.config import Config
from igpt_fast.errors import InputError, reason_of
from igpt_fast.palette import FILES as PALETTES
from igpt_fast.palette import HF_CONFIG, Palette
from igpt_fast.positions import resized
from igpt_fast.pretrained.bundle import find_bundle
from igpt_fast.pretrained.files import CONFIG, SAFETENSORS, Find, read_json, read_weights
from igpt_fast.pretrained.hub import find_in_hub, is_hub_name
from igpt_fast.pretrained.names import HEAD, SCORE, to_ours, to_theirs
from igpt_fast.pretrained.openai import read_openai
from igpt_fast.pretrained.settings import OURS, read_class_names, read_preprocessing, read_settings, write_settings

__all__ = ["Pretrained", "read_pretrained", "write_pretrained"]

log = logging.getLogger("igpt_fast")

HEADLESS = (["ImageGPTForImageClassification"], ["ImageGPTModel"])  # what theirs saves without an output table


@dataclass(frozen=True)
class Pretrained:
    """What lay at `source`: tensors by our names, on the CPU, in one dtype; palette None when there is none."""

    config: Config
    tensors: dict[str, Tensor]
    palette: Palette | None
    source: str
    class_names: tuple[str, ...] | None = None  # of a classifier head, where a file says them
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # how the images were read, where a file says it


def read_pretrained(source: str | Path, size: tuple[int, int] | None = None, heads: int | None = None) -> Pretrained:
    """Reads a directory in Hugging Face's layout, a repository of the hub, or one of OpenAI's checkpoints.

    source: a directory; `owner/name`, with `@revision` when it is not the main one; or the prefix of a checkpoint, as
    model.ckpt-1000000. size: (height, width) of the positions, when they are not a square and no file says it; else
    the size that they are brought to. heads: for a checkpoint whose shapes do not tell it. Raises InputError, naming
    the file and the key, for whatever is missing, cut short, changed, of another shape or not supported; nothing that a
    file holds is executed.
    """
    path = Path(source)
    if path.is_dir() and (path / CONFIG).is_file():
        refuse_heads(source, heads)
        return _read_layout(_find_in(path), str(source), size)
    if prefix := find_bundle(path):
        config, tensors = read_openai(prefix, heads, size)
        return _checked(config, tensors, _palette(_find_in(prefix.parent)), str(prefix), size)
    if path.exists() or not is_hub_name(str(source)):
        if (path / "checkpoints").is_dir():
            way = f"igpt_fast.weights.open_model({str(source)!r}).model, or `igpt-fast convert {source} DIR` first"
            raise InputError(f"{source} is a training run: {way}")
        what = f"has no {CONFIG}" if path.is_dir() else "is no directory" if path.exists() else "is not there"
        raise InputError(
            f"{source} {what}; give a directory with {CONFIG} and {SAFETENSORS}, a name on the Hugging Face hub such "
            "as openai/imagegpt-small, or the prefix of a TensorFlow checkpoint such as model.ckpt-1000000"
        )
    refuse_heads(source, heads)
    return _read_layout(find_in_hub(str(source)), str(source), size)


def refuse_heads(source: str | Path, heads: int | None) -> None:
    """Raises InputError when a number of heads is given for a model whose config says it."""
    if heads is not None:
        raise InputError(f"{source}: heads changes nothing, for its {CONFIG} says how many there are; leave it out")


def write_pretrained(
    path: str | Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    palette: Palette | None = None,
    overwrite: bool = False,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a directory in Hugging Face's layout, which appears when it is complete.

    An output table of zeros, as of a model that was read without one, is left out: what reads it then says so too.
    tensors: by our names. overwrite: replaces a directory that holds nothing but what this function writes.
    class_names: of a classifier head. preprocessing: of the images. Raises InputError, leaving all as it was, when
    there is something at `path`, or the disk is full.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    if config.pattern is not None:
        log.warning("%s: transformers has no patterns and computes dense attention; from_pretrained reads them", path)
    if config.classes:
        log.warning("%s: its classes were learned behind sos, which transformers' image processor leaves out", path)
    if palette is not None and len(palette) != config.colors:
        raise InputError(f"the palette has {len(palette)} colours and the model {config.colors}; save the one it has")
    dtype, headless = str(tensors["wte"].dtype).removeprefix("torch."), not tensors["wtet"].any()
    if headless and not config.classes:
        log.warning("%s: its output table is zero and left out; transformers draws a random one for pixels", path)
    settings: dict[str, Any] = {CONFIG: write_settings(config, dtype, headless, class_names, preprocessing)}
    if palette is not None:
        settings[HF_CONFIG] = palette.to_hf(config.size)
    try:
        with work_directory(path) as work:
            theirs = to_theirs(tensors, config)
            if headless:
                del theirs[HEAD]
            save_file(theirs, work / SAFETENSORS, metadata={"format": "pt"})
            sync(work / SAFETENSORS)
            for name, values in settings.items():
                write_atomically(work / name, (json.dumps(values, indent=2) + "\n").encode())
            shutil.copymode(work / CONFIG, work / SAFETENSORS)  # which safetensors lets nobody else read
            move_into_place(work, path)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else reason_of(error)
        raise InputError(f"{path}: the weights cannot be written ({reason}); choose another place") from error


def _read_layout(find: Find, source: str, size: tuple[int, int] | None) -> Pretrained:
    """Hugging Face's layout, wherever its files are found."""
    path = find(CONFIG)
    settings = read_json(path)
    theirs = read_weights(find, source)
    palette = _palette(find)
    fields = read_settings(settings, str(path), _grid(find, settings), size)
    try:
        classes = theirs.shape(SCORE, 2)[0] if SCORE in theirs.tensors else 0
        config = Config(**fields, classes=classes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    architectures = settings.get("architectures")
    bare = isinstance(architectures, list) and architectures[:1] in HEADLESS
    headless = theirs.headless() and (bool(classes) or bare)
    if headless:
        log.warning("%s has no output table (it is no causal model): ours is zero, fit for features only", source)
    if config.classes and OURS not in settings:
        log.warning("%s: if its classes were learned without sos before the pixels, others are named here", source)
    config, ours = to_ours(theirs, config, headless)
    names = read_class_names(settings, config.classes, str(path))
    preprocessing = read_preprocessing(settings, str(path))
    return replace(_checked(config, ours, palette, source, size), class_names=names, preprocessing=preprocessing)


def _grid(find: Find, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (height, width) that the processor brings images to, when it fits the positions and is no square."""
    size = read_json(path).get("size") if (path := find(HF_CONFIG)) else None
    grid = (size.get("height"), size.get("width")) if isinstance(size, dict) else ()
    if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        return None
    return grid if grid[0] * grid[1] == settings.get("n_positions") else None


def _find_in(folder: Path) -> Find:
    return lambda name: folder / name if (folder / name).is_file() else None


def _palette(find: Find) -> Palette | None:
    """The palette beside the weights, where there is one."""
    place = next(filter(None, map(find, PALETTES)), None)
    return None if place is None else Palette.load(place)


def _checked(
    config: Config, tensors: dict[str, Tensor], palette: Palette | None, source: str, size: tuple[int, int] | None
) -> Pretrained:
    if palette is not None and len(palette) != config.colors:
        raise InputError(f"{source}: its palette has {len(palette)} colours, the model is of {config.colors}")
    if size is not None and (at := replace(config, size=size)) != config:
        config, tensors = at, resized(tensors, config.size, at.size)
    return Pretrained(config, tensors, palette, source)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    if not path.is_dir() or path.is_symlink():
        raise InputError(f"{path} is there and is no directory; choose another place")
    refuse_others(path, "|".join(map(re.escape, (CONFIG, HF_CONFIG, SAFETENSORS))))
    if not overwrite:
        raise InputError(
            f"{path} holds weights already; choose another place, or replace them with --overwrite (overwrite=True)"
        )
