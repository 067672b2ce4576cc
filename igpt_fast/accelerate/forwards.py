"""What the modules of an accelerated transformers ImageGPT compute instead of their own forward.

Each function stands for one module's forward: first the module, then what that takes. It may call submodules only
through `_linear` and the like, which go around a submodule's own call only where nobody watches or replaced it.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from igpt_fast import ops
from igpt_fast.accelerate.decode import decode
from igpt_fast.accelerate.dropout import dropout
from igpt_fast.accelerate.plain import changed, exchanged, plain, scale
from igpt_fast.accelerate.theirs import bind, theirs
from igpt_fast.modules import is_watched
from igpt_fast.ops._again import forget
from igpt_fast.ops._heads import slices
from igpt_fast.ops._native import say_slower
from igpt_fast.ops.attention_dropout import has_attention_dropout_kernel

IGNORED = -100  # the label that transformers' loss leaves out


def table() -> dict[type, Callable[..., Any]]:
    """Of each of their classes the function that stands for its forward."""
    them = theirs()
    return {
        them.ImageGPTLayerNorm: norm,
        them.ImageGPTAttention: attention,
        them.ImageGPTMLP: mlp,
        them.ImageGPTBlock: block,
        them.ImageGPTForCausalImageModeling: causal_lm,
    }


def norm(self: nn.Module, tensor: Tensor) -> Tensor:
    """ImageGPTLayerNorm."""
    y = ops.rms_norm(tensor, self.weight, self.eps, dtype=torch.promote_types(tensor.dtype, self.weight.dtype))
    return _shown_to(self, y)


def head(self: nn.Linear, input: Tensor) -> Tensor:
    """The head's nn.Linear."""
    return ops.projection(input, self.weight, self.bias)


def mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """ImageGPTMLP: c_fc's bias is added by the activation."""
    if not plain(self.act, theirs().QuickGELU):
        say_slower(f"the MLP runs its own activation: {type(self.act).__name__} is not quick_gelu, or is hooked")
        hidden_states = self.act(_linear(self.c_fc, hidden_states))
    elif plain(self.c_fc, theirs().Conv1D):
        hidden_states = ops.projection(hidden_states, self.c_fc.weight.t())
        hidden_states = ops.bias_quick_gelu(hidden_states, self.c_fc.bias)
    else:
        hidden_states = ops.bias_quick_gelu(self.c_fc(hidden_states))
    return dropout(self.dropout, _linear(self.c_proj, hidden_states))


def block(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
    """ImageGPTBlock: the sum of stream and attention is made by the norm that reads it."""
    given = bind(self, hidden_states, *args, **kwargs).arguments
    kind = theirs().ImageGPTLayerNorm
    seen = not (plain(self.ln_1, kind) and plain(self.ln_2, kind))
    if seen:
        say_slower("a block leaves its sums to torch: somebody watches or replaced one of its norms")
    crossed = given.get("encoder_hidden_states") is not None
    if seen or crossed or (self.gradient_checkpointing and self.training):  # which the original takes care of
        return type(self).forward(self, hidden_states, *args, **kwargs)
    names = "layer_past", "attention_mask", "head_mask", "use_cache", "output_attentions", "cache_position"
    x = ops.rms_norm(hidden_states, self.ln_1.weight, self.ln_1.eps, dtype=_normed(hidden_states, self.ln_1))
    attn: Callable[..., Any] = self.attn
    if self._forward_hooks and plain(self.attn, theirs().ImageGPTAttention):
        say_slower("attention takes transformers' own path: a hook of its block would see its weights")
        attn = functools.partial(type(self.attn).forward, self.attn)
    mixed, *rest = attn(_shown_to(self.attn, x), **{name: given[name] for name in names if name in given})
    if torch.promote_types(mixed.dtype, hidden_states.dtype) is hidden_states.dtype:
        dtype = _normed(hidden_states, self.ln_2)
        x, hidden_states = ops.rms_norm(mixed, self.ln_2.weight, self.ln_2.eps, residual=hidden_states, dtype=dtype)
    else:
        hidden_states = mixed + hidden_states
        x = self.ln_2(hidden_states)
    return hidden_states + self.mlp(_shown_to(self.mlp, x)), *rest


def _shown_to(module: nn.Module, x: Tensor) -> Tensor:
    """x, which hooks of the module see and may write to."""
    if is_watched(module) and not torch.compiler.is_compiling():
        forget(x)
    return x


def _normed(x: Tensor, ln: nn.Module) -> torch.dtype:
    """The dtype in which the linear behind a norm reads what the norm makes of x."""
    dtype, kind = torch.promote_types(x.dtype, ln.weight.dtype), x.device.type
    autocast = dtype is not torch.float64 and torch.is_autocast_enabled(kind)  # which leaves float64 as it is
    return torch.get_autocast_dtype(kind) if autocast else dtype


def attention(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """ImageGPTAttention, or its original where `_why_not` names a reason."""
    given = bind(self, hidden_states, *args, **kwargs).arguments
    cache = given.get("layer_past")
    if cache is not None and isinstance(cache, theirs().EncoderDecoderCache):
        cache = cache.self_attention_cache
    past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
    reason = _why_not(self, given, cache, past, hidden_states.shape[1])
    if reason:
        say_slower(f"attention takes transformers' own path: {reason}")
        return type(self).forward(self, hidden_states, *args, **kwargs)
    qkv = _linear(self.c_attn, hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
    q, k, v = slices(qkv)
    if cache is not None:
        extra = ({"cache_position": given["cache_position"]},) if "cache_position" in given else ()
        k, v = cache.update(k, v, self.layer_idx, *extra)
    factor = scale(self)
    if past:
        mixed = _newest(q, k[:, :, : past + 1], v[:, :, : past + 1], factor).transpose(1, 2)
    elif self.attn_dropout.training and self.attn_dropout.p > 0:
        mixed = _dropped(qkv, self.attn_dropout.p, factor)
    else:
        mixed = ops.attention_packed(qkv, scale=factor)
    return dropout(self.resid_dropout, _linear(self.c_proj, mixed.flatten(2))), None


def _dropped(qkv: Tensor, p: float, scale: float) -> Tensor:
    """Causal attention with dropout of its weights.   qkv [B, T, 3, H, D] → [B, T, H, D]"""
    recorded = qkv.is_cuda and torch.cuda.is_current_stream_capturing()
    if has_attention_dropout_kernel(qkv, scale) and not recorded:
        return ops.attention_dropout(qkv, p, int(torch.randint(1 << 62, ())), scale)
    why = "a CUDA graph would draw with one seed for ever" if recorded else "no kernel here has its dropout"
    say_slower(f"attention with dropout runs on torch's SDPA: {why}")
    q, k, v = slices(qkv)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, scale=scale).transpose(1, 2)


def _newest(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query over a cache."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return ops.attention(q, k, v, causal=False, scale=scale)
    return ops.attention_decode(q, k, v, k.shape[2], scale)


def _why_not(self: nn.Module, given: dict[str, Any], cache: Any, past: int, queries: int) -> str | None:
    """Why ours does not compute this call of attention; None when it does."""
    if self.is_cross_attention or given.get("encoder_hidden_states") is not None:
        return "it is cross-attention"
    if given.get("output_attentions"):
        return "its weights were asked for (output_attentions)"
    if given.get("head_mask") is not None:
        return "a head mask was given"
    if cache is not None and type(cache) not in (theirs().DynamicCache, theirs().StaticCache):
        return f"the cache is a {type(cache).__name__}"
    if cache is not None and exchanged(cache):
        return "somebody has exchanged the cache's update"
    if past and queries > 1:
        return "several queries follow cached keys"
    if self._forward_hooks or _has_any_global_hook():
        return "a hook would see its weights"
    if not plain(self.attn_dropout, nn.Dropout):
        return "somebody watches or replaced its dropout"
    dropping = self.attn_dropout.training and self.attn_dropout.p > 0
    if dropping and (past or self.attn_dropout.p == 1):
        return "attention dropout on cached keys, or of all weights"
    if reason := changed(self):
        return reason
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[-1] not in (1, past + queries) and type(cache) is not theirs().StaticCache:
        return f"the attention mask is for {mask.shape[-1]} slots"
    if mask is not None and not _open(mask, past + queries):
        return "the attention mask hides something"
    return None


_last_mask: list = [None, 0, 0, True]  # a weak reference to the last mask, its version, the slots, what _open found


def _open(mask: Tensor, slots: int) -> bool:
    """Whether a mask to be added hides none of the first slots, behind which a static cache is empty.

    A forward pass gives every layer the same mask: it is read once.
    """
    if torch.compiler.is_compiling():  # which would take what it found at the first call for ever
        return not bool(mask[..., :slots].any())
    version = 0 if mask.is_inference() else mask._version
    last, *known, found = _last_mask
    if last is None or last() is not mask or known != [version, slots]:
        found = not bool(mask[..., :slots].any())
        _last_mask[:] = weakref.ref(mask), version, slots, found
    return found


def causal_lm(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """ImageGPTForCausalImageModeling: a whole decoding step at once where it can, and the loss."""
    bound = bind(self, *args, **kwargs)
    given = bound.arguments
    if _says_only_causal(given.get("attention_mask"), given.get("past_key_values")):
        given["attention_mask"] = None
    found = decode(self, given)
    if found is not None:
        return found
    labels, ids = given.get("labels"), given.get("input_ids")
    ours = labels is not None and ids is not None and labels.shape == ids.shape and not labels.is_floating_point()
    if ours:
        given["labels"] = None
    out = type(self).forward(*bound.args, **bound.kwargs)
    if not ours:
        return out
    loss = _loss(out[0], labels)
    if isinstance(out, tuple):
        return loss, *out
    return type(out)(loss=loss, **{name: value for name, value in out.items() if name != "loss"})


def _says_only_causal(mask: Tensor | None, cache: Any) -> bool:
    """Whether a mask [B, 1, Q, K] tells the causal order and nothing else.

    generate makes one for a static cache. transformers' ImageGPT then takes its first row for all queries: its images
    are wrong, or it stops (4.57). Left out, they are those of a dynamic cache.
    """
    if mask is None or mask.ndim != 4 or not isinstance(cache, theirs().StaticCache):
        return False
    queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[2:])
    seen = mask if mask.dtype is torch.bool else mask == 0
    return bool((seen == (keys <= int(cache.get_seq_length()) + queries[:, None])).all())


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over slots 0..T-2 of the cross-entropy of the label one later, without those that are ignored.

    logits [B, T, V]   labels [B, T]   → a scalar of the dtype that torch's own loss has
    """
    targets = F.pad(labels.long()[..., 1:], (0, 1), value=IGNORED).to(logits.device)
    counted = targets != IGNORED
    nats = ops.cross_entropy(logits, targets.masked_fill(~counted, 0), reduction="none")
    autocast = torch.is_autocast_enabled(logits.device.type)
    return (nats.where(counted, 0).sum() / counted.sum()).to(torch.float32 if autocast else logits.dtype)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """A Conv1D's product, by projection where the module is as transformers made it."""
    if plain(module, theirs().Conv1D):
        return ops.projection(x, module.weight.t(), module.bias)
    return module(x)
