"""What is transformers' own: its classes and their functions, and what stands for the forward of one of its modules."""

import copy
import inspect
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from igpt_fast.errors import InputError
from igpt_fast.ops._native import say_slower, why_plain

OLDEST = (4, 57)
ATTENTION = "_attn", "_upcast_and_reordered_attn", "_merge_heads"  # what their attention's forward calls of its own


_theirs: SimpleNamespace | None = None


def theirs() -> SimpleNamespace:
    """transformers' classes; InputError where it is missing or too old."""
    global _theirs
    if _theirs is None:  # not functools.cache, into which torch.compile looks at every call, and breaks its graph
        _theirs = _read_theirs()
    return _theirs


def _read_theirs() -> SimpleNamespace:
    try:
        import transformers
        from transformers.activations import QuickGELUActivation
        from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
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
    modules = [kind for kind in own.values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    kinds = *modules, Conv1D, QuickGELUActivation, nn.Dropout, nn.Embedding, nn.Linear
    return SimpleNamespace(
        **own,
        forwards={kind: _unchanged(kind, "forward") for kind in kinds},
        attention={name: _unchanged(own["ImageGPTAttention"], name) for name in ATTENTION},
        updates={kind: _unchanged(kind, "update") for kind in (DynamicCache, DynamicLayer)},
        # Up to 5.12 attention divides by the root of the head dim without its fraction.
        cuts_root=getattr(modeling_imagegpt, "torch_float", float)(1.5) == 1,
        # Whether a config of torchscript=True makes it return tuples, as in 4.57.
        knows_torchscript="use_return_dict" in inspect.unwrap(own["ImageGPTModel"].forward).__code__.co_names,
        Conv1D=Conv1D,
        QuickGELU=QuickGELUActivation,
        CausalLMOutput=CausalLMOutputWithCrossAttentions,
        Cache=Cache,
        DynamicCache=DynamicCache,
        DynamicLayer=DynamicLayer,
        EncoderDecoderCache=EncoderDecoderCache,
        StaticCache=StaticCache,
    )


def _unchanged(kind: type, name: str) -> Callable[..., Any] | None:
    """A function of a class; None where somebody has exchanged it already."""
    found, home = getattr(kind, name, None), kind.__module__
    made = getattr(found, "__globals__", {}).get("__name__", "")  # functools.wraps copies __module__
    decorated = made.startswith("transformers.") and home.startswith("transformers.")  # by their own
    return found if made == home or decorated else None


class Standin:
    """What stands for the forward of a class: `run`, a function that takes the module first.

    Where our kernels would be noticed it is the class's own forward, and the reason is logged.
    """

    __name__ = "forward"  # by which a method of it pickles

    def __init__(self, kind: type, run: Callable[..., Any]) -> None:
        self._kind, self._run, self._own = kind, run, theirs().forwards[kind]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        reason = "somebody has exchanged its class's" if forward is not self._own else _beyond(args, kwargs)
        if reason is None:
            return self._run(module, *args, **kwargs)
        say_slower(f"{type(module).__name__} runs its own forward: {reason}")
        return forward(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return _signature(self._kind)

    def __reduce__(self) -> tuple:
        return Standin, (self._kind, self._run)


def _beyond(args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why a call must consist of torch's own ops; None when it need not."""
    if reason := why_plain():
        return reason
    first = args[0] if args else next(iter(kwargs.values()), None)
    meta = getattr(first, "is_meta", False) and not torch.compiler.is_compiling()
    return "it is on the meta device" if meta else None


_OF_FUNCTIONS = {"__name__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__annotations__"}


class Forward:
    """A module's new forward. It does not keep the module alive, and it copies and pickles together with it.

    It has a bound method's __func__, the stand-in, and __self__: libraries wrap the one and bind it to the other. What
    else a function has is the original's.
    """

    def __init__(self, module: nn.Module, standin: Standin) -> None:
        self._module, self._standin = weakref.ref(module), standin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._standin(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Standin:
        return self._standin

    @property
    def __self__(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise InputError(
                "the model of this forward is gone; keep it, and where this is a copy by copy.copy, accelerate the copy"
            )
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: generate and the Trainer read from it which arguments a model takes."""
        return inspect.signature(self.__wrapped__)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FUNCTIONS:
            return getattr(self.__wrapped__, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        module = self.__self__
        return type(module).forward.__get__(module)

    def __deepcopy__(self, memo: dict) -> "Forward":
        return Forward(copy.deepcopy(self.__self__, memo), self._standin)

    def __reduce__(self) -> tuple:
        return Forward, (self.__self__, self._standin)


def is_ours(forward: Any) -> bool:
    """Whether a forward is a stand-in, or one that is bound to a module."""
    return isinstance(getattr(forward, "__func__", forward), Standin)


_signatures: dict[type, inspect.Signature] = {}  # no functools.cache here either


def _signature(kind: type) -> inspect.Signature:
    if kind not in _signatures:
        _signatures[kind] = inspect.signature(kind.forward)
    return _signatures[kind]


def bind(self: nn.Module, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    return _signature(type(self)).bind(self, *args, **kwargs)
