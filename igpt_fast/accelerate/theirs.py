"""What is transformers' own: its classes, the forward of one module that stands in for its own, and who watches it."""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from igpt_fast.errors import InputError

OLDEST = (4, 57)
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


@functools.cache
def theirs() -> SimpleNamespace:
    """transformers' classes; InputError where it is missing or too old."""
    try:
        import transformers
        from transformers.activations import QuickGELUActivation
        from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
        from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
        from transformers.models.imagegpt import modeling_imagegpt
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise InputError(
            f"accelerate needs transformers 4.57 or newer ({error}); pip install 'igpt-fast[hf]'"
        ) from None
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < OLDEST:
        raise InputError(f"accelerate needs transformers 4.57 or newer, this is {transformers.__version__}; upgrade it")
    own = {name: getattr(modeling_imagegpt, name) for name in dir(modeling_imagegpt) if name.startswith("ImageGPT")}
    return SimpleNamespace(
        **own,
        own=frozenset(own.values()),
        Conv1D=Conv1D,
        QuickGELU=QuickGELUActivation,
        CausalLMOutput=CausalLMOutputWithCrossAttentions,
        DynamicCache=DynamicCache,
        DynamicLayer=DynamicLayer,
        EncoderDecoderCache=EncoderDecoderCache,
        StaticCache=StaticCache,
    )


class Forward:
    """A module's new forward. It does not keep the module alive, and it copies and pickles together with it."""

    def __init__(self, module: weakref.ref, run: Callable[..., Any]) -> None:
        self._module, self._run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._module(), *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: generate and the Trainer read from it which arguments a model takes."""
        return inspect.signature(self.__wrapped__)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        module = self._module()
        return type(module).forward.__get__(module)

    def __deepcopy__(self, memo: dict) -> "Forward":
        return Forward(weakref.ref(copy.deepcopy(self._module(), memo)), self._run)

    def __reduce__(self) -> tuple:
        return _forward_of, (self._module(), self._run)


def _forward_of(module: nn.Module, run: Callable[..., Any]) -> Forward:
    return Forward(weakref.ref(module), run)


def plain(module: nn.Module) -> bool:
    """Whether nobody would notice that the module's call is left out: no hooks, no forward of somebody else's."""
    own = module.__dict__
    return not any(map(own.get, HOOKS)) and ("forward" not in own or type(own["forward"]) is Forward)


@functools.cache
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)


def bind(self: nn.Module, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    return _signature(type(self)).bind(self, *args, **kwargs)
