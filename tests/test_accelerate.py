"""accelerate: a transformers ImageGPT keeps its values, types and habits on our kernels."""

import copy
import io
import pickle

import pytest
import torch

import igpt_fast as igpt
from igpt_fast.accelerate.dropout import dropout
from igpt_fast.accelerate.theirs import Forward
from igpt_fast.ops import _native

transformers = pytest.importorskip("transformers", minversion="4.57")
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling  # noqa: E402

# 4.57's own ImageGPT fails with use_cache=False, 5.x's own cross-attention with a cache.
MODERN = int(transformers.__version__.split(".")[0]) >= 5
SIZES = {"vocab_size": 33, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = ["ImageGPTForCausalImageModeling", "ImageGPTModel", "ImageGPTForImageClassification"]


def hf(kind: str = KINDS[0], **changes):
    """A small model of theirs whose every parameter is random, biases and norms too."""
    model = getattr(transformers, kind)(ImageGPTConfig(**{**SIZES, "num_labels": 3, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def both(*args, **changes):
    """(theirs, the same accelerated)"""
    model = hf(*args, **changes)
    return model, igpt.accelerate(copy.deepcopy(model))


def ids(rows: int = 2, count: int = 32):
    return torch.randint(32, (rows, count))


def close(ours, theirs, exact, dtype=None):
    """|ours - float64| <= 2 |theirs - float64| + 8 ulp, of the dtype that products are made in."""
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    limit = 2 * (theirs.double() - exact).abs().max() + 8 * torch.finfo(dtype or ours.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= limit


@pytest.fixture
def reasons(monkeypatch):
    """What was logged as slower."""
    monkeypatch.setattr(_native, "_said", set())
    return lambda: " ".join(_native._said)


@pytest.mark.parametrize("kind", KINDS)
def test_class_and_state_stay_and_undo_restores(kind):
    theirs, ours = both(kind)
    assert type(ours) is type(theirs)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert igpt.accelerate(ours) is ours  # a second time
    assert any("forward" in m.__dict__ for m in ours.modules())
    assert igpt.accelerate.undo(ours) is ours
    assert [set(m.__dict__) for m in ours.modules()] == [set(m.__dict__) for m in theirs.modules()]
    x = ids()
    assert torch.equal(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_outputs(precision):
    theirs, ours = both()
    exact = copy.deepcopy(theirs).double()
    x = ids()
    if precision == "bfloat16":
        theirs, ours = theirs.bfloat16(), ours.bfloat16()
        exact.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        a, b = (m(x, labels=x, output_hidden_states=True, use_cache=True) for m in (theirs, ours))
    truth = exact(x, labels=x, output_hidden_states=True, use_cache=True)
    assert type(b) is type(a) and [*b] == [*a] and type(b.past_key_values) is type(a.past_key_values)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    close(b.logits, a.logits, truth.logits, dtype)
    close(b.loss, a.loss, truth.loss, dtype)
    for mine, other, true in zip(b.hidden_states, a.hidden_states, truth.hidden_states, strict=True):
        close(mine, other, true, dtype)
    kept = lambda out: getattr(out.past_key_values, "self_attention_cache", out.past_key_values).layers  # noqa: E731
    for mine, other, true in zip(kept(b), kept(a), kept(truth), strict=True):
        close(mine.keys, other.keys, true.keys, dtype)
        close(mine.values, other.values, true.values, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True] if MODERN else [False], ids=lambda on: "checkpointing" * on)
def test_gradients(kind, checkpointing):
    theirs, ours = both(kind, **NO_DROPOUT)
    exact = copy.deepcopy(theirs).double()
    x, grads = ids(), []
    for model in (theirs, ours, exact):
        if checkpointing and model is ours:
            model.gradient_checkpointing_enable()
        out = model.train()(x)[0]
        torch.manual_seed(1)
        (out * torch.randn_like(out, dtype=torch.float32)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, true in grads[2].items():
        if true is None:
            assert grads[1][name] is None
        else:
            close(grads[1][name], grads[0][name], true)


def test_float64_agrees_to_its_own_precision():
    theirs, ours = both(**NO_DROPOUT)
    x = ids()
    losses = [m.double().train()(x, labels=x).loss for m in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-12)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-7, atol=1e-10)


def test_labels_that_are_ignored_and_tuples():
    theirs, ours = both()
    x = ids()
    labels = x.clone()
    labels[0, 3:9] = -100
    assert torch.allclose(ours(x, labels=labels).loss, theirs(x, labels=labels).loss)
    a, b = (m(x, labels=labels, return_dict=False) for m in (theirs, ours))
    assert isinstance(b, tuple) and len(b) == len(a)
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a[:2], b[:2], strict=True))
    assert ours(x, labels=torch.full_like(x, -100)).loss.isnan()


@pytest.mark.parametrize("changes", [
    {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True},
    {"activation_function": "gelu"}, {"n_inner": 96},
], ids=lambda c: next(iter(c)))  # fmt: skip
def test_configurations(changes):
    theirs, ours = both(**changes)
    x = ids()
    assert torch.allclose(ours(x).logits, theirs(x).logits, atol=2e-5)


def test_what_takes_the_original_path_says_why(reasons):
    theirs, ours = both()
    x = ids()
    a, b = (m(x, output_attentions=True) for m in (theirs, ours))
    assert len(b.attentions) == 2 and torch.allclose(a.attentions[1], b.attentions[1], atol=1e-6)
    assert "output_attentions" in reasons()
    mask = torch.ones_like(x)
    assert torch.allclose(ours(x, attention_mask=mask).logits, theirs(x, attention_mask=mask).logits, atol=2e-5)
    assert "mask" not in reasons()
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    a, b = (m(x, attention_mask=mask, position_ids=places).logits for m in (theirs, ours))
    assert torch.allclose(a, b, atol=2e-5) and "the attention mask hides something" in reasons()
    for end in (10, 12):
        with torch.no_grad():
            past = ours(x[:, :8]).past_key_values
            more = ours(x[:, 8:end], past_key_values=past).logits
        assert torch.allclose(more, theirs(x[:, :end]).logits[:, 8:], atol=2e-5) and "several queries" in reasons()


def test_cross_attention_takes_the_original_path(reasons):
    theirs, ours = both("ImageGPTModel", add_cross_attention=True)
    x, states = ids(), torch.randn(2, 7, 64)
    a, b = (m(x, encoder_hidden_states=states, use_cache=not MODERN)[0] for m in (theirs, ours))
    assert torch.allclose(a, b, atol=2e-5) and "cross-attention" in reasons()


def test_hooks_are_called_and_change_what_they_change():
    theirs, ours = both()
    x, seen = ids(), {theirs: [], ours: []}
    for model in seen:
        for name, module in model.named_modules():
            log = seen[model]
            module.register_forward_hook(lambda m, i, o, name=name, log=log: log.append(name))
        model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda m, i, o: o * 2)
    assert torch.allclose(theirs(x).logits, ours(x).logits, atol=2e-5)
    assert seen[ours] == seen[theirs]


def test_copies_pickles_and_files(tmp_path):
    theirs, ours = both()
    x = ids()
    want = theirs(x).logits
    again = pickle.loads(pickle.dumps(ours))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(ours), again, torch.load(buffer, weights_only=False)):
        assert type(model.forward) is Forward and model.forward.__wrapped__.__self__ is model
        assert torch.allclose(model(x).logits, want, atol=2e-5)
    ours.save_pretrained(tmp_path)
    loaded = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ImageGPTForCausalImageModeling"]
    assert torch.equal(loaded(x).logits, want)


def test_refuses_what_is_no_imagegpt_and_leaves_what_others_replaced(reasons):
    with pytest.raises(igpt.InputError, match="holds no transformers ImageGPT"):
        igpt.accelerate(torch.nn.Linear(2, 2))
    model = hf()
    mine = model.transformer.h[0].mlp.forward
    model.transformer.h[0].mlp.forward = lambda x: mine(x) * 2
    x = ids()
    want = model(x).logits
    assert torch.allclose(igpt.accelerate(model)(x).logits, want, atol=2e-5)
    assert "another library has replaced its forward" in reasons()
    igpt.accelerate.undo(model)
    assert "forward" in model.transformer.h[0].mlp.__dict__


def test_attention_dropout_follows_the_seed(reasons):
    ours = igpt.accelerate(hf(attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)).train()
    x, found = ids(), []
    for seed, backend in ((1, "auto"), (1, "auto"), (2, "auto"), (1, "reference")):
        torch.manual_seed(seed)
        with _native.use_backend(backend):
            loss = ours(x, labels=x).loss
            loss.backward()
        found.append((loss, ours.transformer.h[0].attn.c_attn.weight.grad))
        ours.zero_grad(set_to_none=True)
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1], strict=True)) and found[0][0] != found[2][0]
    assert "no kernel here has its dropout" in reasons()  # of the reference: there it draws as theirs does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_draws_its_share_and_its_gradient_has_the_same_mask(dtype):
    module, x = torch.nn.Dropout(0.1), torch.ones(64, 1001, dtype=dtype, requires_grad=True)
    y = dropout(module, x)
    assert y.dtype is dtype and sorted({*y.detach().flatten().tolist()})[0] == 0
    kept = (y != 0).double().mean()
    assert abs(kept - 0.9) < 5 * (0.09 / y.numel()) ** 0.5 + 2**-16
    assert abs(y.double().max() - 1 / 0.9) < 1e-2
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)
    assert not dropout(torch.nn.Dropout(1.0), x).any()
    for idle in (torch.nn.Dropout(0.0), torch.nn.Dropout(0.1).eval()):
        assert dropout(idle, x) is x


@pytest.mark.parametrize("backend", ["auto", "reference"])  # our kernels, torch's SDPA
def test_dropout_reaches_every_place_that_theirs_reaches(backend):
    """The mean over many draws is the output without dropout, and as far from it as theirs: to first order of p."""
    theirs, ours = both(attn_pdrop=0.05, resid_pdrop=0.05, embd_pdrop=0.05)
    x = ids(1, 16).expand(400, -1)
    want = theirs(x[:1]).logits
    with _native.use_backend(backend):
        spread = [(m.train()(x).logits - want).square().mean().sqrt() for m in (theirs, ours)]
    assert 0.9 < spread[1] / spread[0] < 1.1
