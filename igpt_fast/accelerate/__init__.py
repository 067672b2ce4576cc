"""A Hugging Face ImageGPT on our kernels: the same object, class, weights and outputs; only what computes is exchanged.

`accelerate` gives the modules of a transformers ImageGPT another `forward`, each on its instance and nothing else, so
that weights, names, hooks, devices, saving and generation stay transformers' own. What our kernels do not compute goes
through the module's original forward, and the reason is logged once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from igpt_fast.accelerate import forwards
from igpt_fast.accelerate.dropout import drawn
from igpt_fast.accelerate.theirs import Forward, Standin, is_ours, theirs
from igpt_fast.errors import InputError
from igpt_fast.ops._native import say_slower


def accelerate(model: nn.Module) -> nn.Module:
    """Puts a transformers ImageGPT on our kernels, in place → the same object.

    model: an ImageGPTForCausalImageModeling, ImageGPTModel, ImageGPTForImageClassification, or a module that holds one
    (PEFT's, for example). No weight is copied or changed; a second call changes nothing. Training, generation, saving
    and copying go on as before; `accelerate.undo` takes it back. Raises InputError for anything else, and where
    transformers is missing or older than 4.57.
    """
    them = theirs()
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(m, them.ImageGPTModel) for m in modules):
        raise InputError(f"{type(model).__name__} holds no transformers ImageGPT; give one to accelerate")
    for module in list(model.modules()):
        for kind, run in forwards.table().items():
            if isinstance(module, kind):
                _replace(module, kind, run)
        if isinstance(module, them.ImageGPTForCausalImageModeling):
            _replace(module.lm_head, nn.Linear, forwards.head)
        if isinstance(module, them.ImageGPTModel):
            _replace(module.drop, nn.Dropout, drawn)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Takes `accelerate` back → the same object, every module with the forward that it had.

    A forward of ours that another library has wrapped stays, with a word: only that library can take its own back.
    """
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if is_ours(forward):
            del module.forward
        elif any(map(is_ours, _unwrapped(forward))):
            say_slower(f"undo leaves {type(module).__name__} accelerated: another library has wrapped its forward")
    return model


accelerate.undo = undo


def _unwrapped(forward: Any) -> Iterator[Any]:
    """What a forward wraps, layer by layer."""
    while (forward := getattr(forward, "__wrapped__", None)) is not None:
        yield forward


def _replace(module: nn.Module, kind: type, run: Callable[..., Any]) -> None:
    """Gives one module `run` for its forward, unless somebody else has already changed what its forward is."""
    name, now = type(module).__name__, module.__dict__.get("forward")
    if type(module).forward is not theirs().forwards[kind]:
        say_slower(f"accelerate leaves {name} as it is: its forward is not {kind.__name__}'s")
    elif now is None or is_ours(now):  # maybe bound to the module that this is a copy.copy of
        module.forward = Forward(module, Standin(kind, run))
    else:
        say_slower(f"accelerate leaves {name} as it is: another library has replaced its forward")
