"""Models with sparse attention: the definition in float64, every form of a pattern, copies, graphs and bits."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from definition import assert_defined, cross_entropy, opinionated, pixels, transcript

from igpt_fast import BlockMask, ops
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.ops._native import use_backend
from igpt_fast.ops.attention import head_groups
from igpt_fast.patterns import Pattern, block_mask, layers, neighborhood, row

# More than one tile of 64 slots, and not a multiple of it.
SIZES = {"layers": 3, "width": 48, "heads": 6, "colors": 11, "size": (9, 10)}
PATTERNS = {
    "one": "row|neighborhood(5)",
    "alternating": ["row", "column", "dense"],
    "by head": [["row", "local(7)"]],
    "by layer and head": [["row", "row", "column"], "neighborhood(3)", [None, "blocks(3)"]],
}


def make(dtype=torch.float64, **fields) -> ImageGPT:
    torch.manual_seed(0)
    return opinionated(ImageGPT(Config(**{**SIZES, **fields})).to(dtype))


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("name", PATTERNS)
def test_forward_loss_and_features_equal_the_definition(name, objective):
    model = make(pattern=PATTERNS[name], objective=objective)
    tokens = pixels(model, 2)
    logits = assert_defined(model, tokens)
    dense = dataclasses.replace(model.config, pattern=None)
    model.config = dense
    assert np.abs(transcript(model, tokens)[0] - logits).max() > 0.1, "the pattern must matter"


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_give_the_definitions_logits_and_gradients(name, objective):
    model = make(torch.float32, pattern=PATTERNS[name], objective=objective)
    exact, tokens = copy.deepcopy(model).double(), pixels(model, 2)
    keep = None if objective == "ar" else torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) > 0.4
    grads = []
    for each in (model, exact):
        each.loss(tokens, keep).backward()
        grads.append({name: p.grad.double() for name, p in each.named_parameters()})
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name
    with torch.no_grad():
        truth = exact(tokens, keep)
        assert (model(tokens, keep) - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_gradient_is_the_slope_of_the_loss():
    model = make(pattern=PATTERNS["by layer and head"])
    tokens = pixels(model, 2)
    model.loss(tokens).backward()
    generator = torch.Generator().manual_seed(3)
    for name in ("blocks.0.attn.qkv.weight", "blocks.2.attn.qkv.weight", "wpe"):
        p = model.get_parameter(name)
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for step in (1e-5, -2e-5, 1e-5):  # the last leaves it as it was
            with torch.no_grad():
                p += step * direction
            values.append(cross_entropy(transcript(model, tokens)[0], tokens).mean())
        slope = (p.grad * direction).sum().item()
        assert abs(slope - (values[0] - values[1]) / 2e-5) <= 1e-5 * max(1, abs(slope)), name


def test_a_pixel_is_seen_by_those_whom_the_pattern_names():
    model = make(layers=1, pattern="row")
    tokens = pixels(model, n=1)
    other = tokens.clone()
    other[0, 4, 3] = (other[0, 4, 3] + 1) % 11
    changed = (model(tokens) != model(other)).any(-1)[0].view(9, 10).nonzero().tolist()
    assert changed == [[4, col] for col in range(4, 10)]


@pytest.mark.parametrize("cycle", [("a", "b"), ("a", "a", "b"), ("a", None, "b", "a"), ("a", "a", None, None), ("a",)])
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 7])
def test_head_groups_share_out_the_heads(cycle, heads):
    made = {text: text and BlockMask.compile("row", (2, 2)) for text in cycle}
    masks = [made[text] for text in cycle]
    found = {}
    for part, mask in head_groups(masks, heads):
        for head in range(heads)[part]:
            assert head not in found
            found[head] = mask
    assert [found[head] for head in range(heads)] == [masks[head % len(masks)] for head in range(heads)]
    assert len(head_groups(masks, heads)) <= len(cycle)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_heads_under_several_masks_are_single_calls_without_copies(backend):
    masks = [BlockMask.compile(text, (9, 10)) for text in ("row", "column")]
    cycle = [masks[0], masks[0], masks[1], None]
    qkv = torch.randn(2, 90, 3, 6, 8, requires_grad=True)
    dout = torch.randn(2, 90, 6, 8)
    with use_backend(backend):
        o = ops.attention_packed(qkv, cycle)
        (grad,) = torch.autograd.grad(o, qkv, dout)
        with torch.no_grad():
            assert torch.equal(ops.attention_packed(qkv, cycle), o)
        assert o.is_contiguous() and grad.is_contiguous()
        for head in range(6):
            part = qkv.detach()[:, :, :, head : head + 1].clone().requires_grad_()
            alone = ops.attention_packed(part, cycle[head % 4])
            torch.testing.assert_close(o[:, :, head], alone[:, :, 0], rtol=0, atol=0)
            (want,) = torch.autograd.grad(alone, part, dout[:, :, head : head + 1])
            torch.testing.assert_close(grad[:, :, :, head], want[:, :, :, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no mask was given"):
        ops.attention_packed(qkv, [])
    with pytest.raises(InputError, match="the mask was compiled for 4 tokens"):
        ops.attention_packed(qkv, [None, BlockMask.compile("row", (2, 2))])


def test_copies_pickles_and_other_dtypes_compute_the_same_and_no_state_holds_a_mask():
    model = make(torch.float32, pattern=PATTERNS["by layer and head"])
    tokens = pixels(model, 2)
    want = model(tokens)  # the masks are there now
    assert model.state_dict().keys() == make(torch.float32).state_dict().keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        assert torch.equal(other(tokens), want)
    assert model.to(torch.bfloat16)(tokens).dtype == torch.bfloat16
    assert len(pickle.dumps(model)) < 2 * sum(p.nbytes for p in model.parameters()) + 20_000


def test_two_runs_and_other_threads_give_the_same_bits():
    tokens, runs = pixels(make(), 2), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            model = make(torch.float32, pattern=PATTERNS["by layer and head"])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(tokens)
            loss.backward()
            runs.append([loss.detach(), *(block.attn.qkv.weight.grad for block in model.blocks)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_activation_checkpointing_changes_no_bit():
    model, runs = make(torch.float32, pattern=PATTERNS["by layer and head"]), []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        model.loss(pixels(model, 2)).backward()
        runs.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_masks_first_met_in_inference_mode_can_be_trained_with(objective):
    model = make(torch.float32, pattern=PATTERNS["by layer and head"], objective=objective)
    layers._kept.cache_clear()
    block_mask._compiled.cache_clear()
    with torch.inference_mode():
        model.loss(pixels(model, 1))
    torch.compile(model.loss, backend="aot_eager")(pixels(model, 1)).backward()
    assert model.wte.grad.isfinite().all()


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_torch_compile_sees_one_graph(objective):
    model = make(torch.float32, pattern=PATTERNS["by layer and head"], objective=objective)
    tokens, keep = pixels(model, 2), None if objective == "ar" else torch.arange(180).view(2, 90) % 3 > 0
    whole, grads = torch.compile(model.loss, backend="aot_eager", fullgraph=True), []
    layers._kept.cache_clear()
    block_mask._compiled.cache_clear()
    for loss in (whole, model.loss):  # the graph first: no mask has been compiled for it by then
        model.zero_grad()
        value = loss(tokens, keep)
        value.backward()
        grads.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for compiled, eager in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


@pytest.mark.parametrize("slots", [1, 5, 64, 65, 89, 90])
def test_the_start_of_a_mask_is_the_start_of_its_matrix(slots):
    mask = BlockMask.compile("row|neighborhood(5)", (9, 10))
    first = mask.first(slots)
    assert torch.equal(first.dense(), mask.dense()[:slots, :slots])
    assert first.tokens == slots and first.pairs == int(first.dense().sum())
    for bad in (0, 91):
        with pytest.raises(InputError, match=f"{bad} slots were asked"):
            mask.first(bad)
    with pytest.raises(InputError, match="causal=False"):
        BlockMask.compile("row", (9, 10), causal=False).first(5)


def test_a_checkpoint_holds_the_pattern_and_old_ones_are_dense(tmp_path):
    model = make(torch.float32, pattern=PATTERNS["by layer and head"])
    saved = save_checkpoint(tmp_path, 5, model)
    loaded = load_checkpoint(tmp_path).model
    assert loaded.config == model.config and hash(loaded.config) == hash(model.config)
    assert torch.equal(loaded(pixels(model, 2)), model(pixels(model, 2)))
    old = json.loads((saved / "config.json").read_text())
    del old["pattern"], old["positions"]
    assert Config.from_dict(old) == Config(**SIZES)


@pytest.mark.parametrize(
    ("pattern", "form"),
    [
        ("dense", None),
        ([None, "dense"], None),
        (" row|neighborhood( 7 ) ", "row | neighborhood(7)"),
        (row() | neighborhood(7), "row | neighborhood(7)"),
        (["row", "row"], "row"),
        ([["row", "row"]], "row"),
        (("row", None, "row"), ("row", None)),
        ([["row", "column", "row"]], (("row", "column", "row"),)),
        ([["row", "column", "row", "column"], "row"], (("row", "column"), "row")),
    ],
)
def test_one_form_for_each_meaning(pattern, form):
    config = Config(**SIZES, pattern=pattern)
    assert config.pattern == form
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("rwo", "did you mean 'row'"),
        ("neighborhood(6)", "odd whole number of at least 1, such as 7"),
        ("row column", "cannot be read"),
        ("", "cannot be read"),
        (7, "pattern is 7; give a text"),
        ([], "lists 0 for 3 layers; list 1 to 3"),
        (["row"] * 4, "lists 4 for 3 layers"),
        ([["row"] * 7], "lists 7 for 6 heads; list 1 to 6"),
        ([[["row"]]], r"pattern is \['row'\]"),
        (Pattern.own(lambda q, k: q.row == k.row), "a predicate of your own, which a saved model cannot name"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        Config(**SIZES, pattern=pattern)
