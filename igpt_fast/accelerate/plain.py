"""Whether modules are as transformers made them, without hooks or patched forwards that one may not pass over."""

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from igpt_fast.accelerate.theirs import ATTENTION, Forward, theirs
from igpt_fast.modules import HOOKS, is_watched
from igpt_fast.ops._native import makes_its_own

NUMBERS = "eps", "layer_idx", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"

# Of an attention: its mask buffer, that one's memory and version, and whether it is causal.
_known: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is a `kind` whose call does no more than transformers' forward: no hooks, no other forward."""
    own = module.__dict__
    return (
        type(module) is kind
        and kind.forward is theirs().forwards[kind]
        and ("forward" not in own or type(own["forward"]) is Forward)
        and not is_watched(module)
    )


def changed(attn: nn.Module) -> str | None:
    """Why an attention does not compute what transformers' does; None when it does."""
    kind, own = type(attn), attn.__dict__
    for name, function in theirs().attention.items():
        if name in own or getattr(kind, name, None) is not function:
            return f"somebody has exchanged its {name}"
    return None if _is_causal(attn) else "somebody has changed its causal mask"


def exchanged(cache: Any) -> bool:
    """Whether somebody has exchanged how a cache takes keys and values, which then may not be those that it gets."""
    if any("update" in vars(one) for one in (cache, *cache.layers)):
        return True
    return any(kind.update is not own for kind, own in theirs().updates.items())


def _is_causal(attn: nn.Module) -> bool:
    """Whether an attention's mask buffer [1, 1, T, T] shows what comes before and nothing else. It is read once."""
    bias = attn.bias
    if torch.compiler.is_compiling():
        return _is_lower_triangle(bias)
    state, known = (bias.data_ptr(), 0 if bias.is_inference() else bias._version), _known.get(attn)
    if known is None or known[0]() is not bias or known[1] != state:
        known = _known[attn] = weakref.ref(bias), state, _is_lower_triangle(bias)
    return known[2]


def _is_lower_triangle(bias: Tensor) -> bool:
    return bias.dtype is torch.bool and torch.equal(bias, torch.ones_like(bias).tril())


def scale(attn: nn.Module) -> float:
    """What an attention's scores are multiplied by, in the transformers that is installed."""
    root = attn.head_dim**0.5
    if theirs().cuts_root and not attn.reorder_and_upcast_attn:
        root = int(root)
    found = 1 / root if attn.scale_attn_weights else 1.0
    return found / (attn.layer_idx + 1) if attn.scale_attn_by_inverse_layer_idx else found


def why_not_plain(model: nn.Module) -> str | None:
    """Why a model is not the plain one that decode_step computes; None when it is."""
    for module, kind in _roles(model):
        if not plain(module, kind):
            return f"somebody watches or replaced its {kind.__name__}"
    if any(module.max_norm is not None for module in (model.transformer.wte, model.transformer.wpe)):
        return "an embedding of it renormalises its rows"
    if any(map(makes_its_own, model.parameters())):
        return "weights of it are of a type with ops of its own"
    if any(module.training for module in model.modules()):
        return "it is in training mode, or a module of it is"
    body, blocks, eps = model.transformer, model.transformer.h, model.transformer.ln_f.eps
    if model.lm_head.bias is not None or any(ln.eps != eps for block in blocks for ln in (block.ln_1, block.ln_2)):
        return "its head has a bias, or its norms have not one eps"
    for place, attn in enumerate(block.attn for block in blocks):
        if reason := changed(attn):
            return reason
        D = attn.head_dim
        if model.config.add_cross_attention or not math.isclose(scale(attn), D**-0.5):
            return "its attention is not scaled by 1 / sqrt(head dim), or is crossed"
        if attn.layer_idx != place or attn.num_heads * D != body.wte.embedding_dim:
            return "its blocks are in another order, or lack heads"
    return None


def _roles(model: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """The modules that a decoding step stands for, and what each must be; a module comes before its own."""
    them, body = theirs(), model.transformer
    yield body, them.ImageGPTModel
    yield from ((body.wte, nn.Embedding), (body.wpe, nn.Embedding), (body.drop, nn.Dropout))
    for block in body.h:
        yield block, them.ImageGPTBlock
        yield from ((block.ln_1, them.ImageGPTLayerNorm), (block.ln_2, them.ImageGPTLayerNorm))
        yield from ((block.attn, them.ImageGPTAttention), (block.mlp, them.ImageGPTMLP))
        attn, mlp = block.attn, block.mlp
        yield from ((linear, them.Conv1D) for linear in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
        yield from ((drop, nn.Dropout) for drop in (attn.attn_dropout, attn.resid_dropout, mlp.dropout))
        yield mlp.act, them.QuickGELU
    yield from ((body.ln_f, them.ImageGPTLayerNorm), (model.lm_head, nn.Linear))


_steps = 0  # of all optimizers: those that are fused change weights and leave their versions


@functools.cache
def _count_steps() -> None:
    def count(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


class State:
    """What tells one state of a model from another: its weights, its modules, and who watches them."""

    def __init__(self, model: nn.Module) -> None:
        _count_steps()
        self._modules = list(model.modules())
        self._dicts = [module.__dict__ for module in self._modules]
        self._hooks = [own[name] for own in self._dicts for name in HOOKS]
        self._owned = [own[kept] for own in self._dicts for kept in ("_parameters", "_buffers") if own[kept]]
        self._tensors = [t for owned in self._owned for t in owned.values() if t is not None]
        self._numbers = [(own, name) for own in self._dicts for name in NUMBERS if name in own]
        self._known = self._now()

    def holds(self) -> bool:
        """Asked at every step: a few hundred modules in some 0.1 ms."""
        return self._known == self._now()

    def _now(self) -> tuple[Any, ...]:
        dicts, them = self._dicts, theirs()
        return (
            _steps,
            bool(_has_any_global_hook()),
            [kind.forward for kind in them.forwards],
            [getattr(them.ImageGPTAttention, name, None) for name in ATTENTION],
            list(map(type, self._modules)),
            list(map(len, dicts)),
            list(map(len, self._hooks)),
            [own.get("forward") for own in dicts],
            [own["training"] for own in dicts],
            [own[name] for own, name in self._numbers],
            [id(child) for own in dicts for child in own["_modules"].values()],
            [id(t) for owned in self._owned for t in owned.values()],
            [t.data_ptr() for t in self._tensors],
            [0 if t.is_inference() else t._version for t in self._tensors],
        )
