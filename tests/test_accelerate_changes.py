"""accelerate: what somebody has changed in a model, or watches, before or after, is computed as it is."""

import copy
import sys

import pytest
import torch
from test_accelerate import MODERN, NO_DROPOUT, both, hf, ids, reasons  # noqa: F401
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import igpt_fast as igpt
from igpt_fast.accelerate.plain import scale
from igpt_fast.accelerate.theirs import theirs as them

transformers = pytest.importorskip("transformers", minversion="4.57")
from transformers.models.imagegpt import modeling_imagegpt as modeling  # noqa: E402


def forget():
    """What is known of the transformers that is installed."""
    sys.modules["igpt_fast.accelerate.theirs"]._theirs = None  # the package's attribute of this name is the function


@torch.no_grad()
def step(model, x, **options):
    """The logits of one token after eight."""
    cache = model(x[:, :8], use_cache=True).past_key_values
    return model(x[:, 8:9], past_key_values=cache, **options)[0]


class Doubled(modeling.ImageGPTLayerNorm):
    def forward(self, tensor):
        return 2 * super().forward(tensor)


class Uniform(modeling.ImageGPTAttention):
    def _attn(self, query, key, value, *args):
        return super()._attn(query * 0, key, value, *args)


def linear(conv):
    made = nn.Linear(*conv.weight.shape)
    made.weight, made.bias = nn.Parameter(conv.weight.t()), conv.bias
    return made


def at(path, change):
    """`change` of the module at the first block's path."""

    def changed(model):
        *parents, name = path.split(".")
        parent = model.transformer.h[0].get_submodule(".".join(parents))
        setattr(parent, name, change(getattr(parent, name)))

    return changed


def doubled(ln):
    made = Doubled(64)
    made.weight = ln.weight
    return made


def reverse(model):
    model.transformer.h = nn.ModuleList(reversed(model.transformer.h))


def own_attn(model):
    attn, kind = model.transformer.h[0].attn, modeling.ImageGPTAttention
    attn._attn = lambda q, *rest: kind._attn(attn, q * 2, *rest)


CHANGES = {
    "LayerNorm": at("ln_1", lambda _: nn.LayerNorm(64)),
    "no norm": at("ln_2", lambda _: nn.Identity()),
    "doubled norm": at("ln_1", doubled),
    "linear c_proj": at("attn.c_proj", linear),
    "linear c_attn": at("attn.c_attn", linear),
    "linear c_fc": at("mlp.c_fc", linear),
    "eps": at("ln_1.eps", lambda _: 1.0),
    "biased head": lambda model: setattr(model, "lm_head", nn.Linear(64, 32)),
    "reversed": reverse,
    "both directions": lambda model: model.transformer.h[1].attn.bias.fill_(True),
    "class of attention": lambda model: setattr(model.transformer.h[0].attn, "__class__", Uniform),
    "own _attn": own_attn,
    "unscaled": lambda model: setattr(model.transformer.h[0].attn, "scale_attn_weights", False),
}
if not MODERN:
    CHANGES["pruned"] = lambda model: model.prune_heads({0: [1], 1: [1]})


@pytest.mark.parametrize("when", ["before", "after", "amid"])
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_modules_compute_what_they_are(name, when):
    models, found = both(), []
    if when == "before":
        igpt.accelerate.undo(models[1])
    x = ids()
    for model in models:
        torch.manual_seed(1)
        model(x)
        cache = model(x[:, :8], use_cache=True).past_key_values
        if when == "amid" and name not in ("pruned", "reversed"):  # which no cache outlives
            model(x[:, 8:9], past_key_values=cache)
        before = model(x).logits
        CHANGES[name](model)
        if model is models[1] and when == "before":
            igpt.accelerate(model)
        found.append([model(x).logits, step(model, x)])
        if when == "amid" and name not in ("pruned", "reversed"):
            found[-1].append(model(x[:, 9:10], past_key_values=cache).logits)
        assert name.startswith("linear") or not torch.allclose(found[-1][0], before, atol=1e-3)
    assert all(torch.allclose(*pair, atol=3e-5) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("first", ["patch", "accelerate"])
@pytest.mark.parametrize("name", ["ImageGPTMLP", "ImageGPTLayerNorm", "ImageGPTAttention", "ImageGPTBlock", "Conv1D"])
def test_classes_that_somebody_patched_are_not_overruled(name, first, monkeypatch):
    kind = getattr(modeling, name)
    real = kind.forward

    def patched(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    theirs = hf()
    ours, x = copy.deepcopy(theirs), ids()
    if first == "accelerate":
        igpt.accelerate(ours)
        step(ours, x)
    else:
        forget()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", patched)
        igpt.accelerate(ours)
        close = [torch.allclose(f(ours, x), f(theirs, x), atol=1e-4, rtol=1e-4) for f in (lambda m, x: m(x)[0], step)]
    forget()
    assert all(close)


@pytest.mark.parametrize("path", ["attn.attn_dropout", "attn.resid_dropout", "mlp.dropout"])
@torch.no_grad()
def test_a_dropout_follows_its_own_flag(path):
    model, x = igpt.accelerate(hf(**dict.fromkeys(NO_DROPOUT, 0.5))), ids()
    want = model(x).logits, step(model, x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.allclose(model(x).logits, want[0], atol=1e-5)
    model.eval()
    cache = model(x[:, :8], use_cache=True).past_key_values
    model(x[:, 8:9], past_key_values=cache)
    model.transformer.h[0].get_submodule(path).train()  # as Monte-Carlo dropout does
    for got, other in zip((model(x).logits, step(model, x)), want, strict=True):
        assert (got - other).abs().max() > 1e-2
    logits = [model(x[:, 9:10], past_key_values=copy.deepcopy(cache)).logits for _ in range(2)]
    assert not torch.equal(*logits)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_of_attention_sees_its_weights(everywhere, reasons):  # noqa: F811
    models, x, seen = both(), ids(), []
    for model in models:
        log = []
        hook = lambda module, args, out, log=log: log.append((type(module), out))  # noqa: E731
        attn = model.transformer.h[0].attn
        handle = register_module_forward_hook(hook) if everywhere else attn.register_forward_hook(hook)
        try:
            with torch.no_grad():
                model(x)
                step(model, x)
        finally:
            handle.remove()
        seen.append(log)
    assert [kind for kind, _ in seen[0]] == [kind for kind, _ in seen[1]]
    weights = [[out[1] for kind, out in log if kind is modeling.ImageGPTAttention] for log in seen]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*weights, strict=True))
    assert "a hook would see its weights" in reasons()


@pytest.mark.parametrize("precision, error", [("tables in bfloat16", 3e-2), ("float64 under autocast", 1e-7)])
def test_mixed_dtypes(precision, error):
    models, x, found = both(), ids(), []
    for model in models:
        if precision == "tables in bfloat16":
            model.transformer.wte.bfloat16(), model.transformer.wpe.bfloat16()
        else:
            model.double()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "tables in bfloat16"):
            found.append([model(x).logits, step(model, x)])
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype and torch.allclose(ours, theirs, atol=error)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_scores_are_scaled_as_the_installed_transformers_does(cut, upcast, monkeypatch):
    """By the root of the head dim, or, up to 5.12, by its integer part."""
    if cut:
        monkeypatch.setattr(modeling, "torch_float", int)
    forget()
    theirs, ours = both(n_embd=40, n_head=5, reorder_and_upcast_attn=upcast)
    x = ids()
    close = [torch.allclose(f(ours, x), f(theirs, x), atol=3e-5) for f in (lambda m, x: m(x)[0], step)]
    factor = scale(ours.transformer.h[0].attn)
    cut = them().cuts_root and not upcast
    forget()
    assert all(close) and factor == pytest.approx(1 / 2 if cut else 8**-0.5)
