"""accelerate: calls that are no plain ones: recorded, transformed, wrapped, of copies, with other arguments."""

import copy
import functools
import gc
import pickle
import types

import pytest
import torch
from test_accelerate import MODERN, NO_DROPOUT, both, hf, ids, reasons  # noqa: F401
from torch import func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import igpt_fast as igpt
from igpt_fast.accelerate.forwards import _open
from igpt_fast.accelerate.theirs import Forward

transformers = pytest.importorskip("transformers", minversion="4.57")


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def called(model, parameters, x):
    return func.functional_call(model, parameters, (x,), {"return_dict": False})[0]


def traced(model, x, y):
    run = lambda tokens: model(tokens, return_dict=False)[0]  # noqa: E731
    return torch.jit.trace(run, x, check_trace=False)(y)


def recorded(model, x, y):
    return make_fx(lambda tokens: model(tokens, return_dict=False)[0])(x)(y)


def dual(model, x, y):
    """The tangent of the logits along the token embeddings."""
    embedded = model.transformer.wte(x).detach()
    with forward_ad.dual_level():
        given = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        out = model(inputs_embeds=given, return_dict=False)[0]
        return forward_ad.unpack_dual(out).tangent


def jvp(model, x, y):
    at = weights(model)
    return func.jvp(lambda p: called(model, p, x), (at,), ({name: torch.ones_like(p) for name, p in at.items()},))[1]


def vmap(model, x, y):
    several = {name: torch.stack((p, p * 2)) for name, p in weights(model).items()}
    return func.vmap(lambda p: called(model, p, x))(several)


def grad(model, x, y):
    found = func.grad(lambda p: called(model, p, x).square().mean())(weights(model))
    return torch.cat([g.flatten() for g in found.values()])


def fake(model, x, y):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        out = model(x, return_dict=False)[0]
    return torch.ones(out.shape)


def meta(model, x, y):
    model = copy.deepcopy(model).to("meta")
    out = model(x.to("meta"), labels=y.to("meta"))
    assert out.loss.is_meta and out.logits.is_meta
    return torch.ones(out.logits.shape)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("run", [traced, recorded, dual, jvp, vmap, grad, fake, meta], ids=lambda f: f.__name__)
def test_what_only_torchs_own_ops_can_do(run, reasons):  # noqa: F811
    theirs, ours = (model.requires_grad_(False) for model in both())
    x, y = ids(), ids()
    want, got = (run(model, x, y) for model in (theirs, ours))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))
    assert "runs its own forward" in reasons()


def test_a_mask_for_other_slots_is_transformers_to_judge():
    theirs, ours = both()
    x = ids(2, 10)
    for slots in (5, 15):
        found = []
        for model in (theirs, ours):
            try:
                found.append(model(x, attention_mask=torch.ones(2, slots, dtype=torch.long)).logits)
            except (RuntimeError, ValueError) as error:  # so does 4.57
                found.append(type(error))
        assert found[0] is found[1] or torch.allclose(*found, atol=2e-5)


def test_a_mask_is_read_anew_when_it_changes_or_more_of_it_counts():
    mask = torch.zeros(1, 1, 4, 4)
    assert _open(mask, 4)
    mask[..., 2] = -1e9
    assert not _open(mask, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 3] = -1e9
    assert _open(mask, 3) and not _open(mask, 4)


def test_what_transformers_has_breaks_no_graph():
    found = torch._dynamo.explain(both()[1])(ids())
    torch._dynamo.reset()
    assert not [reason for reason in map(str, found.break_reasons) if "SimpleNamespace" in reason or "lru_" in reason]


def test_a_compiled_model_reads_every_mask():
    theirs, ours = both()
    x, mask = ids(), torch.ones(2, 32, dtype=torch.long)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        for hidden in (0, 5):
            mask = mask.clone()
            mask[0, :hidden] = 0
            want = theirs(x, attention_mask=mask).logits
            assert torch.allclose(compiled(x, attention_mask=mask).logits, want, atol=2e-5)
        ours.transformer.h[0].attn.bias.fill_(True)
        theirs.transformer.h[0].attn.bias.fill_(True)
        assert torch.allclose(compiled(x).logits, theirs(x).logits, atol=2e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("labels", ["none counts", "an ignored one is impossible", "uint8"])
def test_losses_and_gradients_of_ignored_and_small_labels(labels):
    models, x, found = both(**NO_DROPOUT), ids(), []
    given = x.to(torch.uint8) if labels == "uint8" else x.clone()
    if labels == "none counts":
        given.fill_(-100)
    if labels == "an ignored one is impossible":
        given[:, 5] = -100
    for model in models:
        if labels == "an ignored one is impossible":  # what stands in for an ignored label is as good as any
            rule = torch.zeros(2, 32, 32)
            rule[:, 4, 0] = -torch.inf
            model.lm_head.register_forward_hook(lambda m, i, out, rule=rule: out + rule)
        loss = model(x, labels=given).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-5, equal_nan=True) for pair in zip(*found, strict=True))
    assert all(grad.isfinite().all() for grad in found[1][1:])


def prepared(model):
    """A model under mixed precision, as Hugging Face's accelerate does it."""

    def in_float32(forward):
        @functools.wraps(forward)
        def run(*args, **kwargs):
            out = forward(*args, **kwargs)
            out.logits = out.logits.float()
            return out

        return run

    model._original_forward = model.forward
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__), model)
    model.forward = types.MethodType(in_float32(model.forward.__func__), model)
    return model


def unwrapped(model):
    forward, original = model.forward, model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = types.MethodType(forward, model)
    return model


def test_mixed_precision_of_another_library(reasons):  # noqa: F811
    (theirs, ours), x = both(), ids()
    want = theirs(x).logits
    ours = prepared(ours)
    got = ours(x).logits
    assert got.dtype is torch.float32 and 0 < (got - want).abs().max() < 0.1
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x).logits.any() and torch.equal(ours(x).logits, got)
    igpt.accelerate.undo(twin)
    assert "another library has wrapped its forward" in reasons() and "forward" in twin.__dict__
    ours = unwrapped(ours)
    assert torch.allclose(ours(x).logits, want, atol=2e-5)
    assert torch.allclose(pickle.loads(pickle.dumps(ours))(x).logits, want, atol=2e-5)
    assert type(igpt.accelerate(ours).forward) is Forward
    unwrapped(prepared(ours))
    assert "forward" not in igpt.accelerate.undo(ours).__dict__


def test_shallow_copies_and_forwards_that_outlive_their_model():
    theirs, ours = both()
    x, ours = ids(), copy.copy(ours)
    gc.collect()
    for call in (ours, igpt.accelerate(hf()).forward):
        gc.collect()
        with pytest.raises(igpt.InputError, match="model of this forward is gone; keep it"):
            call(x)
    assert torch.allclose(igpt.accelerate(ours)(x).logits, theirs(x).logits, atol=2e-5)


@torch.no_grad()
def test_arguments_of_a_step():
    (theirs, ours), x = both(), ids()

    def step(model, x, legacy=False, **options):
        cache = model(x[:, :8], use_cache=True, return_dict=True).past_key_values
        cache = cache.self_attention_cache.to_legacy_cache() if legacy else cache
        return model(x[:, 8:9], past_key_values=cache, use_cache=True, **options)

    soft = torch.ones(2, 9)
    soft[0, 2] = 0.5
    calls = [(x.int(), {}), (x, {"attention_mask": soft}), (x, {"attention_mask": torch.ones(2, 9, dtype=torch.bool)})]
    calls += [] if MODERN else [(x, {"legacy": True})]
    for tokens, options in calls:
        want, got = (step(model, tokens, **options).logits for model in (theirs, ours))
        assert torch.allclose(want, got, atol=2e-5), options
    with pytest.raises(RuntimeError, match="Float"):
        step(ours, x.float())
    theirs, ours = both(torchscript=True)
    assert type(step(ours, x)) is type(step(theirs, x))
