"""Weights out of the files of Hugging Face's layout: safetensors first, else a pickle that may hold only tensors.

A large model lies in several files; an index says which key lies in which.
"""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from igpt_fast.errors import InputError, as_input_error
from igpt_fast.pretrained.names import Theirs

CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
WEIGHTS = (SAFETENSORS, SAFETENSORS + INDEX, BIN, BIN + INDEX)  # in the order in which they are looked for
AGAIN = "copy it again from where it came from"

Find = Callable[[str], Path | None]  # from a file's name to where it lies, None when it is not there


def read_weights(find: Find, source: str) -> Theirs:
    """Every tensor of the first of WEIGHTS that is there. source: what `find` looks in, for errors.

    Raises InputError that names the file, and the key where there is one.
    """
    name = next((name for name in WEIGHTS if find(name)), None)
    if name is None:
        raise InputError(f"{source} holds no weights; expected {SAFETENSORS} or {BIN}, or the {INDEX} of either")
    path = find(name)
    files = _read_index(path, find) if name.endswith(INDEX) else {path: None}
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file, promised in files.items():
        found = _read_pickle(file) if file.suffix == ".bin" else _read_safetensors(file)
        if lost := sorted((promised or set()) - found.keys()):
            raise InputError(f"{file} has no {lost[0]}, which {path.name} says it has; {AGAIN}")
        if twice := sorted(found.keys() & tensors.keys()):
            raise InputError(f"{file} holds {twice[0]}, and so does {where[twice[0]]}; {AGAIN}")
        tensors |= found
        where |= dict.fromkeys(found, str(file))
    if not tensors:
        raise InputError(f"{path} holds no tensor")
    return Theirs(tensors, where)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError, naming the file, when it is none."""
    with as_input_error(path, AGAIN):
        value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise InputError(f"{path} is no JSON object; {AGAIN}")
    return value


def _read_index(path: Path, find: Find) -> dict[Path, set[str]]:
    """The files that an index names, in order, each with the keys that it should hold."""
    places = read_json(path).get("weight_map")
    suffix = Path(path.name.removesuffix(INDEX)).suffix
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path} has no weight_map; {AGAIN}")
    keys: dict[str, set[str]] = {}
    for key, name in places.items():
        if not _is_file_name(name, suffix):
            shown = repr(name)[:80]
            raise InputError(f"{path} says that {key} lies in {shown}, which is no name of a {suffix} file beside it")
        keys.setdefault(name, set()).add(key)
    files = {}
    for name in sorted(keys):
        if (file := find(name)) is None:
            key = min(keys[name])
            raise InputError(f"{path} says that {key} lies in {name}, which is missing; add that file")
        files[file] = keys[name]
    return files


def _is_file_name(name: Any, suffix: str) -> bool:
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= 255  # longer, a file system refuses to be asked for it


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with as_input_error(path, AGAIN), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_pickle(path: Path) -> dict[str, Tensor]:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):  # CVE-2025-32434: before, weights_only could be made to run code
        raise InputError(f"{path} is a pickle, which torch {torch.__version__} cannot read safely; use torch 2.6")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            if packed := zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if changed := archive.testzip():  # torch looks at no CRC-32
                        raise ValueError(f"the CRC-32 of {changed} differs")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # whatever a stranger's bytes make of the reader
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "Weights only load failed" in reason:
            reason = "it holds more than tensors, and loading that could run code"
        raise InputError(f"{path} cannot be read ({reason}); {AGAIN}, or as {SAFETENSORS}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not a state dict")
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{path} holds {key!r} as {type(tensor).__name__}, not as a dense tensor")
    return found
