"""The model under torch's tools (torch.func, fake tensors, FLOP counters, export), and given what Python may give."""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import igpt_fast as igpt
from igpt_fast import ops
from igpt_fast.ops._native import use_backend
from igpt_fast.patterns import block_mask, layers

TOKENS = torch.arange(48).reshape(4, 3, 4) * 5 % 8


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = igpt.ImageGPT(igpt.Config(layers=2, width=16, heads=2, colors=8, size=(3, 4)))
    torch.nn.init.normal_(model.wtet, std=0.3)
    return model


def patterned():
    torch.manual_seed(0)
    model = igpt.ImageGPT(igpt.Config(layers=1, width=16, heads=2, colors=8, size=(3, 4), pattern="row|local(5)"))
    torch.nn.init.normal_(model.wtet, std=0.3)
    layers._kept.cache_clear()  # so that torch's tools meet it first
    block_mask._compiled.cache_clear()
    return model


def test_patterns_are_compiled_whoever_asks_first():
    weights, loss = of_weights(model := patterned())
    grads = torch.func.grad(loss)(weights)
    with use_backend("reference"):
        wanted = torch.autograd.grad(model(TOKENS).sin().mean(), list(model.parameters()))
    assert all(torch.allclose(grads[name], g, atol=1e-6) for name, g in zip(weights, wanted, strict=True))
    weights, loss = of_weights(patterned())
    assert torch.func.jvp(loss, (weights,), (grads,))[1] > 0
    with torch.device("meta"):
        empty = patterned()
    assert empty(torch.zeros(2, 12, dtype=torch.int64, device="meta")).is_meta
    assert make_fx(patterned())(TOKENS)(TOKENS).shape == (4, 12, 8)


def of_weights(model):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights, lambda w, tokens=TOKENS: torch.func.functional_call(model, w, (tokens,)).sin().mean()


def test_torch_func_transforms_it(model):
    weights, loss = of_weights(model)
    grads = torch.func.grad(loss)(weights)
    of_images = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, TOKENS[:, None])
    tangent = torch.func.jvp(loss, (weights,), (grads,))[1]
    with use_backend("reference"):
        wanted = dict(zip(weights, torch.autograd.grad(
            model(TOKENS).sin().mean(), list(model.parameters())), strict=True))  # fmt: skip
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=1e-6) and torch.allclose(of_images[name].mean(0), grad, atol=1e-6)
    assert tangent == pytest.approx(sum(float(g.square().sum()) for g in wanted.values()), rel=1e-4)


def test_fake_and_meta_tensors_have_their_shapes(model):
    with FakeTensorMode():
        fake = igpt.ImageGPT(model.config)
        assert fake(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 12, 8)
    with torch.device("meta"):
        empty = igpt.ImageGPT(model.config)
    logits = empty(torch.zeros(2, 12, dtype=torch.int64, device="meta"))
    assert logits.shape == (2, 12, 8) and logits.is_meta


def test_the_loss_of_each_image_has_its_gradient(model):
    """Nobody can look at targets that torch.func batches, nor at those that have no values."""
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}

    def loss(weights, tokens):
        return torch.func.functional_call(Loss(model), weights, (tokens[None],))

    of_images = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, TOKENS)
    wanted = torch.autograd.grad(model.loss(TOKENS), list(model.parameters()))
    assert all(torch.allclose(of_images[name].mean(0), g, atol=1e-5) for name, g in zip(weights, wanted, strict=True))
    logits = torch.randn(4, 12, 8)
    for run in (ops.cross_entropy, lambda x, t: ops.linear_cross_entropy(x, logits[0, :, :8], t).mean()):
        wanted = torch.stack([run(x, t) for x, t in zip(logits, TOKENS.flatten(1), strict=True)])
        assert torch.allclose(torch.func.vmap(run)(logits, TOKENS.flatten(1)), wanted, atol=1e-6)
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.func.vmap(ops.cross_entropy)(logits, TOKENS.flatten(1) - 100)


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.loss(tokens)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_fake_and_meta_tensors_have_a_loss(model, objective):
    config = dataclasses.replace(model.config, objective=objective)
    with FakeTensorMode():
        assert igpt.ImageGPT(config).loss(torch.zeros(2, 12, dtype=torch.int64)).shape == ()
    with torch.device("meta"):
        empty = igpt.ImageGPT(config)
        loss = empty.loss(torch.zeros(2, 12, dtype=torch.int64))
    assert loss.is_meta and all(g.is_meta for g in torch.autograd.grad(loss, list(empty.parameters())))
    given = (TOKENS, TOKENS > 2) if objective == "bert" else (TOKENS,)
    full = igpt.ImageGPT(config)
    traced = make_fx(lambda *given: full.loss(*given))(*given)
    assert torch.allclose(traced(*given), full.loss(*given))


def test_flop_are_counted_with_attentions(model):
    with FlopCounterMode(display=False) as ours:
        model(TOKENS)
    with use_backend("reference"), FlopCounterMode(display=False) as plain:
        model(TOKENS)
    linear = 2 * 4 * 12 * (2 * 12 * 16 * 16 + 16 * 8)
    assert ours.get_total_flops() == plain.get_total_flops() > linear


def test_a_dynamic_batch_is_exported(model):
    program = export(model, (TOKENS,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},)).module()
    for tokens in (TOKENS, TOKENS[:3], TOKENS.repeat(3, 1, 1)):
        assert torch.allclose(program(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_exports_keep_the_kernel_of_attention(model, strict):
    ops_of = {str(node.target) for node in export(model, (TOKENS,), strict=strict).graph.nodes}
    assert "igpt.attention.default" in ops_of
    wide = igpt.ImageGPT(dataclasses.replace(model.config, width=24))  # a head dim that no kernel serves
    ops_of = {str(node.target) for node in export(wide, (TOKENS,), strict=strict).graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in ops_of


def test_arrays_of_any_layout_are_tokens(model, tmp_path):
    array, wanted = TOKENS.numpy(), model(TOKENS.flip(2))
    np.save(tmp_path / "t.npy", array[:, :, ::-1])
    sealed = array[:, :, ::-1].copy()
    sealed.flags.writeable = False
    same = [array[:, :, ::-1], array[:, :, ::-1].astype(">i8"), np.load(tmp_path / "t.npy", mmap_mode="r"), sealed]
    same.append(sealed.tolist())
    with torch.inference_mode():
        for given in same:
            assert torch.equal(model(given), wanted)
    with pytest.raises(igpt.InputError, match=r"is a OptimizedModule.*its \._orig_mod is one"):
        igpt.sample(torch.compile(model))
    for bad in (["a"], [[1], [1, 2]], np.array([object()]), None):
        with pytest.raises(igpt.InputError, match=r"tokens (are|have)"):
            model(bad)


def test_features_of_every_position_have_the_pooled_ones_for_mean(model):
    every = model.features(TOKENS, pool=False)
    assert every.shape == (3, 4, 12, 16) and torch.equal(every.mean(2), model.features(TOKENS))
    assert torch.equal(model.features(TOKENS, 1, pool=False), every[1])
    assert torch.equal(model.features(TOKENS, [2, 0], pool=False), every[[2, 0]])
    model.blocks[1].forward = None  # which layers 0 and 1 do not ask for
    assert torch.equal(model.features(TOKENS, (0, 1)), every[:2].mean(2))
    for layer in ([0, 3], [], [1.0], 1.0, 3, -1):
        with pytest.raises(igpt.InputError, match="this model has layers 0 to 2"):
            model.features(TOKENS, layer)


def test_tied_tables_are_drawn_from_and_saved(model, tmp_path):
    model.wtet = model.wte
    images = igpt.sample(model, n=2)
    model.save_pretrained(tmp_path / "tied")
    again = igpt.ImageGPT.from_pretrained(tmp_path / "tied")
    assert torch.equal(again.wtet, model.wte) and torch.equal(igpt.sample(again, n=2), images)


@pytest.mark.parametrize(("wanted", "dtype"), [
    ("bfloat16", torch.bfloat16), ("auto", torch.float32), (None, torch.float32), (torch.float64, torch.float64),
])  # fmt: skip
def test_dtypes_have_names(model, tmp_path, wanted, dtype):
    model.save_pretrained(tmp_path / "m")
    assert igpt.ImageGPT.from_pretrained(tmp_path / "m", dtype=wanted).wte.dtype is dtype


def test_what_no_weights_can_have_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    for dtype in ("int8", torch.int8, "bf16", "nn", 3):
        with pytest.raises(igpt.InputError, match=r"dtype is .*give float32, bfloat16"):
            igpt.ImageGPT.from_pretrained(tmp_path / "m", dtype=dtype)
    with pytest.raises(igpt.InputError, match="the meta device holds no weights"):
        igpt.ImageGPT.from_pretrained(tmp_path / "m", device="meta")


def test_only_our_models_are_drawn_from(model):
    for draw in (igpt.sample, lambda other: igpt.complete(other, TOKENS)):
        with pytest.raises(igpt.InputError, match=r"the model is a Linear; give an igpt_fast\.ImageGPT"):
            draw(torch.nn.Linear(2, 2))
        for wrapped, name in ((torch.compile(model), "_orig_mod"), (torch.nn.DataParallel(model), "module")):
            with pytest.raises(igpt.InputError, match=rf"is a \w+; give an igpt_fast.ImageGPT \(its \.{name} is one\)"):
                draw(wrapped)
    for n in (2.0, "2", None):
        with pytest.raises(igpt.InputError, match="n is"):
            igpt.sample(model, n=n)


def test_a_keep_is_looked_at_where_hidden_is_known_too(model):
    hidden = model.hidden(TOKENS)
    with pytest.raises(igpt.InputError, match="keep was given to an autoregressive model"):
        model.loss(TOKENS, TOKENS > 2, hidden=hidden)
    bert = igpt.ImageGPT(dataclasses.replace(model.config, objective="bert"))
    with pytest.raises(igpt.InputError, match=r"keep is torch.int64 \[\d+, 3, 4\]; give bool \["):
        bert.loss(TOKENS, (TOKENS > 2).long(), hidden=bert.hidden(TOKENS))
