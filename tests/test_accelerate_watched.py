"""accelerate: patches, hooks, modes and kinds of tensors that nothing announces are honoured all the same."""

import copy
import functools
import gc
import inspect
import sys
import typing
import weakref

import pytest
import torch
from test_accelerate import MODERN, NO_DROPOUT, both, hf, ids, reasons  # noqa: F401
from test_accelerate_changes import forget, step
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

import igpt_fast as igpt
from igpt_fast import ops
from igpt_fast.accelerate import decode

transformers = pytest.importorskip("transformers", minversion="4.57")
from transformers import DynamicCache  # noqa: E402
from transformers.models.imagegpt import modeling_imagegpt as modeling  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

IDS = ids()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("kind, name", [
    (modeling.ImageGPTAttention, "_attn"), (modeling.ImageGPTAttention, "_merge_heads"), (Conv1D, "forward"),
    (nn.Linear, "forward"), (modeling.ImageGPTMLP, "forward"), (modeling.ImageGPTLayerNorm, "forward"),
])  # fmt: skip
@pytest.mark.parametrize("by", ["wraps", "decorator of torch"])
def test_a_patch_that_bears_the_originals_name_is_not_overruled(kind, name, by, monkeypatch, request):
    old = getattr(kind, name)

    @functools.wraps(old)
    def new(*args, **kwargs):
        found = old(*args, **kwargs)
        return (found[0] * 0.5, *found[1:]) if isinstance(found, tuple) else found * 0.5

    if by != "wraps":
        new = torch.no_grad()(new)
    request.addfinalizer(forget)
    monkeypatch.setattr(kind, name, new)
    forget()
    theirs, ours = both()
    with torch.no_grad():
        close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer_are_seen_by_the_next_step(fused):
    theirs, ours = both()
    with torch.no_grad():
        cache = ours(IDS[:, :8], use_cache=True).past_key_values
        ours(IDS[:, 8:9], past_key_values=cache)
    ours(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(ours.parameters(), lr=0.05, fused=fused).step()
    theirs.load_state_dict(ours.state_dict())
    same = DynamicCache()
    for place, layer in enumerate(cache.layers):
        same.update(layer.keys.clone(), layer.values.clone(), place)
    with torch.no_grad():
        found = [m(IDS[:, 9:10], past_key_values=c).logits for m, c in ((ours, cache), (theirs, same))]
    close(*found)


@pytest.mark.parametrize("inference", [False, True])
def test_a_new_cache_knows_what_no_version_tells(inference):
    """Beside an older one of the same weights."""
    with torch.inference_mode(inference), torch.no_grad():
        theirs, ours = both()
        first, kept = [], []
        for model in (ours, theirs):
            kept.append(cache := model(IDS[:, :8], use_cache=True).past_key_values)
            first.append(model(IDS[:, 8:9], past_key_values=cache).logits)
            for block in model.transformer.h:
                for weight in (block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight):
                    weight.data.mul_(2)
                block.mlp.c_proj.weight.data.neg_()
        close(*first)
        close(step(ours, IDS), step(theirs, IDS))
        assert decode._buffers.get(kept[0]) is not None


def test_a_model_that_has_generated_goes_with_its_last_reference():
    _, ours = both()
    step(ours, IDS)
    held = weakref.ref(ours)
    del ours, _
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("where", ["cache", "layer", "class"])
def test_an_exchanged_update_of_a_cache_is_called(where, monkeypatch):
    calls = []

    def halved(old):
        def update(*args, **kwargs):
            calls.append(1)
            *own, k, v = args[:2] if where != "class" else args[:3]
            return old(*own, k * 0.5, v * 0.7, *args[len(own) + 2 :], **kwargs)

        return update

    found = []
    theirs, ours = both()
    if where == "class":
        kind = transformers.cache_utils.DynamicLayer
        monkeypatch.setattr(kind, "update", halved(kind.update))
    for model in (theirs, ours):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            if where == "cache":
                cache.update = halved(cache.update)
            first = model(IDS[:, :6], past_key_values=cache, use_cache=True).logits
            if where == "layer":
                cache.layers[0].update = halved(cache.layers[0].update)
            rest = [model(IDS[:, k : k + 1], past_key_values=cache).logits for k in range(6, 9)]
        found.append((torch.cat([first, *rest], 1), len(calls)))
        calls.clear()
    close(found[1][0], found[0][0])
    assert found[0][1] == found[1][1] > 0


@pytest.mark.parametrize("path, hook", [("ln_1", "forward"), ("ln_2", "forward"), ("attn", "pre"), ("mlp", "pre")])
def test_gradients_of_what_a_hook_writes_through_data(path, hook):
    found = []
    for model in both(**NO_DROPOUT):
        module = model.transformer.h[1].get_submodule(path)
        if hook == "pre":
            module.register_forward_pre_hook(lambda _, args: args[0].data.mul_(3) is None or None)
        else:
            module.register_forward_hook(lambda _, args, y: y.data.mul_(3) is None or None)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        block = model.transformer.h[1]
        found.append([loss.detach(), block.attn.c_attn.weight.grad, block.mlp.c_fc.weight.grad])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


def test_an_embedding_that_renormalises_does_so_in_steps():
    theirs, ours = both()
    for model in (theirs, ours):
        model.transformer.wte.max_norm = 0.5
    close(step(ours, IDS), step(theirs, IDS))


class Rounded(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return (out * 8).round() / 8 if func in (nn.functional.softmax, torch.softmax) else out


def test_function_modes_are_honoured_and_a_default_device_is_none(caplog):
    theirs, ours = both()
    with torch.no_grad(), torch.device("cpu"):
        close(ours(IDS).logits, theirs(IDS).logits)
    assert "mode" not in caplog.text
    with torch.no_grad(), Rounded():
        close(ours(IDS).logits, theirs(IDS).logits)
    assert "a function mode watches it" in caplog.text


class Wrapped(torch.Tensor):
    """A weight without memory of its own, as quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = torch.utils._pytree.tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        out = func(*bare[0], **bare[1])
        if func in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(out))
        return out


@pytest.mark.parametrize("path", ["lm_head", "transformer.h.0.ln_1", "transformer.h.1.mlp.c_fc"])
def test_weights_of_another_type_compute_in_their_own_way(path):
    theirs, ours = both(n_positions=64)
    for model in (theirs, ours):
        module = model.get_submodule(path)
        module.weight = nn.Parameter(Wrapped(module.weight.detach()), requires_grad=False)
    with torch.no_grad():
        close(ours(IDS).logits, theirs(IDS).logits)
    close(step(ours, IDS), step(theirs, IDS))
    assert ops._native.makes_its_own(ours.get_submodule(path).weight)
    assert not ops._native.makes_its_own(nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("kind", ["hook", "pre-hook of act", "sum"])
def test_what_a_linear_gives_can_be_changed_in_place(kind):
    found = []
    for model in both(**NO_DROPOUT):
        block = model.transformer.h[0]
        if kind == "hook":
            block.mlp.register_forward_hook(lambda _, args, y: y.add_(0.5))
        elif kind == "sum":
            block.mlp.register_forward_hook(lambda _, args, y: y.__iadd__(args[0]))
        else:
            block.mlp.act.register_forward_pre_hook(lambda _, args: args[0].mul_(0.5) is None or None)
        model(IDS, labels=IDS).loss.backward()
        found.append([block.mlp.c_fc.weight.grad, block.ln_1.weight.grad])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


def test_logits_of_slow_bf16_can_be_changed_in_place(monkeypatch):
    monkeypatch.setattr(sys.modules["igpt_fast.ops.projection"], "_SLOW", True)
    _, ours = both(**NO_DROPOUT)
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(IDS).logits
    logits.div_(2.0)
    logits.float().logsumexp(-1).sum().backward()
    assert ours.lm_head.weight.grad.isfinite().all()


def test_a_hook_of_a_block_sees_attentions_weights():
    theirs, ours = both()
    seen = []
    for model in (theirs, ours):
        model.transformer.h[1].register_forward_hook(lambda _, args, out: seen.append(out))
        with torch.no_grad():
            model(IDS)
    for own, found in zip(*seen, strict=True):
        close(found, own)


def test_a_forward_has_what_functions_have():
    theirs, ours = both()
    for name in ("__name__", "__qualname__", "__code__", "__defaults__", "__annotations__"):
        assert getattr(ours.forward, name) == getattr(theirs.forward, name)
    assert typing.get_type_hints(ours.forward).keys() == typing.get_type_hints(theirs.forward).keys()
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert not hasattr(ours.forward, "__closure__") and copy.deepcopy(ours).forward.__name__ == "forward"


def test_caches_of_a_model_share_its_weights():
    _, ours = both()
    with torch.no_grad():
        caches = [ours(IDS[:, :8], use_cache=True).past_key_values for _ in range(2)]
        for cache in caches:
            ours(IDS[:, 8:9], past_key_values=cache)
        one, other = (decode._buffers[cache].all_weights for cache in caches)
        assert one is other
        ours.transformer.h[0].mlp.c_fc.weight.mul_(2)
        ours(IDS[:, 9:10], past_key_values=caches[0])
        assert decode._buffers[caches[0]].all_weights is not other
    held = weakref.ref(decode._buffers[caches[0]].all_weights)
    del caches, cache, one, other
    gc.collect()
    assert held() is None, "they live as long as a cache"


def test_norms_whose_eps_the_config_does_not_say_are_refused():
    model = hf()
    model.transformer.h[0].ln_1.eps = 0.3
    with pytest.raises(igpt.InputError, match=r"norms have eps 0\.3, its config says 1e-05"):
        igpt.weights.from_hf(model)


def test_a_model_without_an_output_table_says_so_when_it_is_saved(tmp_path, caplog):
    config = igpt.Config(layers=1, width=8, heads=1, colors=4, size=(2, 2))
    igpt.ImageGPT(config).save_pretrained(tmp_path / "fresh")
    assert "its output table is zero and left out" in caplog.text
    caplog.clear()
    model = igpt.ImageGPT(config)
    nn.init.ones_(model.wtet)
    model.save_pretrained(tmp_path / "trained")
    assert "output table" not in caplog.text


def test_a_hook_of_the_dropout_of_attention_alone_is_called():
    theirs, ours = both()
    x, seen = IDS, []
    for model in (theirs, ours):
        model.transformer.h[1].attn.attn_dropout.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        model(x)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_a_dropout_of_all_weights_of_attention_is_theirs():
    theirs, ours = both(**{**NO_DROPOUT, "attn_pdrop": 1.0})
    x = IDS
    assert torch.allclose(ours.train()(x).logits, theirs.train()(x).logits, atol=2e-5)
