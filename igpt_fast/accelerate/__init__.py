"""A Hugging Face ImageGPT on our kernels: the same object, class, weights and outputs; only what computes is exchanged.

`accelerate` gives the modules of a transformers ImageGPT another `forward`, each on its instance and nothing else, so
that weights, names, hooks, devices, saving and generation stay transformers' own. What our kernels do not compute goes
through the module's original forward, and the reason is logged once.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from igpt_fast.accelerate import forwards
from igpt_fast.accelerate.dropout import drawn
from igpt_fast.accelerate.theirs import Forward, theirs
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
    """Takes `accelerate` back → the same object, every module with the forward that it had."""
    for module in model.modules():
        if type(module.__dict__.get("forward")) is Forward:
            del module.forward
    return model


accelerate.undo = undo


def _replace(module: nn.Module, kind: type, run: Callable[..., Any]) -> None:
    """Gives one module `run` for its forward, unless somebody else has already changed what its forward is."""
    if type(module).forward is not kind.forward:
        say_slower(f"accelerate leaves {type(module).__name__} as it is: its forward is not {kind.__name__}'s")
    elif "forward" not in module.__dict__:
        module.forward = Forward(weakref.ref(module), run)
    elif type(module.forward) is not Forward:
        say_slower(f"accelerate leaves {type(module).__name__} as it is: another library has replaced its forward")
