"""Weights into models and back: transformers' models and their state dicts, and, by `open_model`, whatever holds some.

The names and layouts of both sides are in igpt_fast/pretrained/names.py.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from igpt_fast.checkpoint import CONFIG, STATE, Checkpoint, find_best, load_checkpoint
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.made import CHECKPOINTS, is_run
from igpt_fast.model import ImageGPT
from igpt_fast.modules import tensors_to_save
from igpt_fast.positions import resized
from igpt_fast.pretrained import refuse_heads
from igpt_fast.pretrained.names import WPE, Theirs, infer_config, to_ours, to_theirs
from igpt_fast.pretrained.settings import check_supported, grid_of, read_class_names

log = logging.getLogger("igpt_fast")


def from_hf(
    source: nn.Module | Mapping[str, Tensor],
    heads: int | None = None,
    size: tuple[int, int] | None = None,
    eps: float | None = None,
) -> ImageGPT:
    """An ImageGPT with the weights of a transformers ImageGPT model, or of its state dict; in their dtype, on the CPU.

    A model brings its number of heads, its eps and the names of its classes with it; for a state dict give `heads` (S
    and M have 8, L has 16) and, when it is not 1e-5, `eps`. `size` (height, width) is needed when the positions are not
    a square. Key names may lack `transformer.`; the mask buffers of old files are skipped. A classifier has no output
    table: ours is then zero. Raises InputError that names what is missing, unknown or not supported.
    """
    headless, names = False, None
    if isinstance(source, nn.Module):
        if heads is not None or eps is not None:
            raise InputError("a model brings its own heads and eps; leave out heads= and eps=, or give its state dict")
        check_supported(source.config, "the model's config")
        heads, eps, headless = source.config.n_head, source.config.layer_norm_epsilon, not hasattr(source, "lm_head")
        names = {"id2label": {str(row): name for row, name in source.config.id2label.items()}}
        if other := {module.eps for module in source.modules() if hasattr(module, "eps")} - {eps}:
            raise InputError(f"the model's norms have eps {other.pop()}, its config says {eps}; correct either")
        source = source.state_dict()
    theirs = Theirs(source)
    if heads is None:
        raise InputError("a state dict does not say how many attention heads it has; pass heads= (S and M: 8, L: 16)")
    grid = grid_of(theirs.shape(WPE, 2)[0], size, "the state dict")
    config = infer_config(theirs, heads=heads, size=grid, eps=1e-5 if eps is None else eps)
    config, ours = to_ours(theirs, config, headless or bool(config.classes))
    model = ImageGPT.empty(config, ours["wte"].dtype, "cpu")
    model.load_state_dict(ours)
    model.class_names = read_class_names(names or {}, config.classes, "the model's config")
    return model


def to_hf_state_dict(model: ImageGPT) -> dict[str, Tensor]:
    """The state dict that transformers' ImageGPTForCausalImageModeling loads. Biases that ours lacks are zero.

    A classifier head becomes score.weight. Raises InputError for a BERT model: transformers has no such ImageGPT.
    """
    if model.config.objective != "ar":
        raise InputError("transformers' ImageGPT has no BERT mode; only objective='ar' models can be converted")
    if model.config.pattern is not None:
        log.warning("transformers has no patterns: with these weights it computes dense attention")
    return to_theirs(tensors_to_save(model), model.config)


def open_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    size: tuple[int, int] | None = None,
    heads: int | None = None,
) -> Checkpoint:
    """A model and its palette, from whatever holds one: a run (its best checkpoint, where it names one, else its
    newest), a checkpoint, or published weights.

    size: (height, width) that the position embeddings are brought to, by `igpt_fast.positions.resized`.
    Published weights (see ImageGPT.from_pretrained, which also says what heads is for) have no step. Raises InputError
    that names the file and what to do.
    """
    path = Path(source)
    if (
        (path / STATE).is_file()
        or (path / CHECKPOINTS).is_dir()
        or path.name == CHECKPOINTS
        or _is_our_config(path / CONFIG)
    ):
        refuse_heads(source, heads)
        found = load_checkpoint(find_best(path), device)
        config = replace(found.model.config, size=size or found.model.config.size)
        return replace(found, model=reshaped(found.model, config))
    if is_run(path):
        raise InputError(f"{source} is a run that has saved no checkpoint yet; start it again (see --save-every)")
    model = ImageGPT.from_pretrained(source, size=size, heads=heads, device=device)
    return Checkpoint(model, model.palette, state={}, step=None, path=path)


def reshaped(model: ImageGPT, config: Config) -> ImageGPT:
    """A model of `config` with the weights of another, whose size, pattern and classes may differ; itself if none does.

    Positions come to another size as `igpt_fast.positions.resized` says. Where the number of classes differs, the head
    is left out, or new: zero. Raises InputError that names what else differs.
    """
    if model.config == config:
        return model
    refuse_other_shape(model.config, config)
    tensors = tensors_to_save(model)
    if model.config.size != config.size:
        tensors = resized(tensors, model.config.size, config.size)
    other = ImageGPT.empty(config, model.wte.dtype, model.wte.device)
    if config.classes == model.config.classes:
        other.class_names = model.class_names
    elif config.classes:
        tensors["wclf"] = torch.zeros(config.classes, config.width)
    other.load_state_dict({name: tensors[name] for name in dict(other.named_parameters())})
    other.palette, other.preprocessing = model.palette, model.preprocessing
    return other


def refuse_other_shape(has: Config, wants: Config) -> None:
    """InputError that names what `reshaped` cannot change, where two models differ in it."""
    asked = wants.to_dict()
    for name, value in has.to_dict().items():
        if name not in ("size", "pattern", "classes") and asked[name] != value:
            raise InputError(f"the weights to begin with have {name} {value}, not {asked[name]}; use the same {name}")


def _is_our_config(path: Path) -> bool:
    """Whether a config.json is a checkpoint's: then state.json is missing beside it, and load_checkpoint says so."""
    try:
        return "layers" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False
