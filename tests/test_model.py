"""The model against SPEC's own formulas in float64 numpy, its exact counts and start, and every way to misuse it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from definition import assert_defined, cross_entropy, opinionated, pixels, transcript
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast import ops
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT


def tiny(seed=0, **fields) -> ImageGPT:
    torch.manual_seed(seed)
    sizes = {"layers": 2, "width": 24, "heads": 3, "colors": 11, "size": (3, 4), **fields}
    return opinionated(ImageGPT(Config(**sizes)).double())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_forward_loss_and_features_equal_the_definition(objective, bias):
    model = tiny(objective=objective, bias=bias, mlp_width=40)
    tokens = pixels(model, 4)
    assert_defined(model, tokens)
    if objective == "ar":
        return
    keep = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    logits, _ = transcript(model, tokens, keep)
    np.testing.assert_allclose(model(tokens, keep).detach().numpy(), logits, rtol=0, atol=1e-9)
    masked = ~keep.flatten(1).numpy()
    want = np.mean([row[hidden].mean() for row, hidden in zip(cross_entropy(logits, tokens), masked, strict=True)])
    np.testing.assert_allclose(model.loss(tokens, keep).item(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_gradient_is_the_slope_of_the_loss(objective):
    model = tiny(objective=objective, bias=True)
    tokens = pixels(model, 4)
    keep = None if objective == "ar" else torch.rand(4, 12, generator=torch.Generator().manual_seed(2)) > 0.4

    def exact() -> float:
        nats = cross_entropy(transcript(model, tokens, keep)[0], tokens)
        if keep is None:
            return float(nats.mean())
        masked = ~keep.numpy()
        return float(((nats * masked).sum(1) / masked.sum(1)).mean())

    model.loss(tokens, keep).backward()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        step = 1e-5
        with torch.no_grad():
            p += step * direction
            high = exact()
            p -= 2 * step * direction
            low = exact()
            p += step * direction
        slope = (p.grad * direction).sum().item()
        assert abs(slope - (high - low) / (2 * step)) <= 1e-5 * max(1, abs(slope)), name


@pytest.mark.parametrize(
    ("preset", "overrides", "count"),
    [
        ("S", {}, 76_571_648),
        ("M", {}, 455_157_760),
        ("L", {}, 1_362_250_752),
        ("L", {"size": (48, 48)}, 1_364_216_832),
        ("XL", {}, 6_810_875_904),
    ],
)
def test_published_sizes_have_the_published_counts(preset, overrides, count):
    with torch.device("meta"):
        assert ImageGPT(Config.preset(preset, **overrides)).num_parameters() == count


@pytest.mark.parametrize("colors", [2, 10, 512])
def test_a_fresh_model_knows_nothing(colors):
    config = Config(layers=2, width=32, heads=2, colors=colors, size=(8, 8), classes=7)
    model = ImageGPT(config)
    assert abs(model.loss(pixels(model, 4)).item() - math.log(colors)) < 1e-6
    nats = torch.nn.functional.cross_entropy(model.classify(pixels(model, 4)), torch.tensor([0, 6, 3, 1]))
    assert abs(nats.item() - math.log(7)) < 1e-6
    bert = ImageGPT(dataclasses.replace(config, objective="bert"))
    assert abs(bert.loss(pixels(bert, 4), torch.zeros(4, 64, dtype=torch.bool)).item() - math.log(colors)) < 1e-6


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    d, layers = 256, 6
    model = ImageGPT(Config(layers=layers, width=d, heads=4, size=(16, 16), bias=True))
    stds = {"wte": 0.02, "sos": 0.02, "wpe": 0.01, "wtet": 0.0}
    for at in range(layers):
        stds |= {f"blocks.{at}.attn.qkv.weight": d**-0.5, f"blocks.{at}.attn.proj.weight": (d * layers) ** -0.5}
        stds |= {f"blocks.{at}.mlp.fc.weight": 0.02, f"blocks.{at}.mlp.proj.weight": 0.02}
    for name, p in model.named_parameters():
        if name in stds:
            five_sigma = 5 / math.sqrt(2 * p.numel())
            assert abs(p.std().item() - stds[name]) <= five_sigma * stds[name], name
            assert abs(p.mean().item()) <= 5 * stds[name] / math.sqrt(p.numel()), name
        else:
            assert bool((p == (0 if name.endswith("bias") else 1)).all()), name


@settings(deadline=None, max_examples=20)
@given(pixel=st.integers(0, 11), seed=st.integers(0, 99))
def test_a_pixel_changes_only_what_comes_after_it(pixel, seed):
    model = tiny(seed)
    tokens = pixels(model, n=1)
    other = tokens.clone().flatten()
    other[pixel] = (other[pixel] + 1) % model.config.colors
    same = (model(tokens) == model(other.view(tokens.shape))).all(-1)[0]
    assert same[: pixel + 1].all()
    assert not same[pixel + 1 :].any()


def test_flat_and_square_tokens_of_any_integer_dtype_are_the_same():
    model = tiny()
    tokens = pixels(model, 4)
    for same in (tokens.flatten(1), tokens.int(), tokens.to(torch.int16), tokens.to(torch.uint8)):
        assert torch.equal(model(tokens), model(same))
        assert torch.equal(model.loss(tokens), model.loss(same))


def test_one_layer_of_features_is_that_row_and_needs_no_block_above(monkeypatch):
    model = tiny(layers=3)
    tokens = pixels(model, 4)
    every = model.features(tokens)
    assert every.shape == (4, 4, 24)
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for layer in range(4):
        ran.clear()
        assert torch.equal(model.features(tokens, layer), every[layer])
        assert ran == list(range(layer))
    for layer in (-1, 4):
        with pytest.raises(InputError, match="layers 0 to 3"):
            model.features(tokens, layer)
    assert model.bfloat16().features(tokens).dtype == torch.float32


def test_classifier_pools_the_final_norm():
    model = tiny(classes=5)
    tokens = pixels(model, 4)
    want = transcript(model, tokens)[1][-1] @ model.wclf.detach().numpy().T
    np.testing.assert_allclose(model.classify(tokens).detach().numpy(), want, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="classes="):
        tiny().classify(tokens)


def test_bert_draws_its_mask_from_the_generator():
    model = tiny(objective="bert", size=(8, 8))
    tokens = pixels(model, 4)
    losses = [model.loss(tokens, generator=torch.Generator().manual_seed(seed)).item() for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    keep = torch.rand(4, 64, generator=torch.Generator().manual_seed(5)) > 0.15
    assert model.loss(tokens, keep).item() == losses[0]


def test_bert_image_without_a_masked_pixel_counts_as_zero():
    model = tiny(objective="bert")
    tokens = pixels(model, n=2)
    keep = torch.ones(2, 12, dtype=torch.bool)
    assert model.loss(tokens, keep).item() == 0.0
    keep[1, 3] = False
    alone = model.loss(tokens[1:], keep[1:]).item()
    assert alone > 0
    assert model.loss(tokens, keep).item() == pytest.approx(alone / 2, rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_activation_checkpointing_changes_no_bit(objective, autocast):
    model = tiny(objective=objective, width=32, heads=4, layers=3).float()
    tokens = pixels(model, 4)
    runs = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(tokens, generator=torch.Generator().manual_seed(0))
        loss.backward()
        runs.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_checkpointing_recomputes_every_block():
    model = tiny(layers=3)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))  # a recomputed block stops before its end
    model.loss(pixels(model, 4)).backward()
    assert len(calls) == 3
    model.activation_checkpointing = True
    model.loss(pixels(model, 4)).backward()
    assert len(calls) == 3 + 6


def test_autocast_keeps_the_stream_in_float32_and_hands_bfloat16_to_the_linears():
    model = tiny(width=32, heads=4).float()
    tokens = pixels(model, 4)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((out[0].dtype, out[1].dtype)))
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.proj):
            linear.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    blocks, linears = seen[3::4], seen[0::4] + seen[1::4] + seen[2::4]
    assert set(blocks) == {(torch.float32, torch.bfloat16)}
    assert set(linears) == {(torch.bfloat16, torch.bfloat16)}
    plain = model(tokens)
    assert (logits - plain).abs().max() < 0.05 * plain.abs().max()


def test_attention_reads_what_the_linear_wrote(monkeypatch):
    model = tiny()
    seen, made = [], []
    attention = ops.attention_packed

    def spy(qkv, **options):
        seen.append(qkv)
        return attention(qkv, **options)

    monkeypatch.setattr(ops, "attention_packed", spy)
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, args, out: made.append(out))
    model(pixels(model, 4))
    assert len(seen) == 2
    for qkv, out in zip(seen, made, strict=True):
        assert qkv.shape == (4, 12, 3, 3, 8)
        assert qkv.is_contiguous()
        assert qkv.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_torch_compile_sees_one_graph(objective):
    model = tiny(objective=objective, width=32, heads=4, bias=True).float()
    tokens, keep = pixels(model, 4), None if objective == "ar" else torch.arange(48).view(4, 12) % 3 > 0
    whole = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    grads = []
    for loss in (model.loss, whole):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(tokens, keep)
        value.backward()
        grads.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02 * eager.abs().max().item())


def test_tokens_that_do_not_fit_are_refused():
    model = tiny()
    tokens = pixels(model, 4)
    for bad, message in (
        (tokens + 4, r"token 1[1-4] is out of range: a palette of 11 has tokens 0 to 10"),
        (tokens - 11, r"token -\d+ is out of range"),
        (tokens[:, :2], r"\[N, 12\]"),
        (tokens.flatten(), r"\[N, 12\]"),
        (tokens.flatten(1)[:, :11], r"\[4, 11\]"),
        (tokens.transpose(1, 2), r"\[4, 4, 3\]"),
        (tokens.double(), "integers"),
        (tokens > 3, "integers"),
    ):
        for use in (model, model.loss, model.features):
            with pytest.raises(InputError, match=message):
                use(bad)


def test_a_mask_that_does_not_fit_is_refused():
    bert, tokens = tiny(objective="bert"), pixels(tiny(), 4)
    with pytest.raises(InputError, match="bool"):
        bert.loss(tokens, torch.ones(4, 12))
    with pytest.raises(InputError, match="bool"):
        bert(tokens, torch.ones(4, 11, dtype=torch.bool))
    with pytest.raises(InputError, match="objective='bert'"):
        tiny().loss(tokens, torch.ones(4, 12, dtype=torch.bool))
    with pytest.raises(InputError, match="hidden was given without the keep"):
        bert.loss(tokens, hidden=bert.hidden(tokens))


def test_tokens_may_be_numpys_of_any_integers():
    model, tokens = ImageGPT(Config(layers=1, width=8, heads=1, colors=11, size=(2, 3))), np.arange(6).reshape(1, 2, 3)
    want = model.loss(torch.from_numpy(tokens))
    for dtype in (np.uint16, np.int32):
        assert model.loss(tokens.astype(dtype)) == want == model.loss(torch.from_numpy(tokens.astype(dtype)))
