"""accelerate: generate, cached steps, and what becomes of caches."""

import copy
import sys

import pytest
import torch
from check import backends
from test_accelerate import MODERN, both, hf, ids, reasons  # noqa: F401

import igpt_fast as igpt
from igpt_fast import ops, reference
from igpt_fast.accelerate import decode
from igpt_fast.ops import _native

transformers = pytest.importorskip("transformers", minversion="4.57")
from transformers import DynamicCache, StaticCache, set_seed  # noqa: E402

GENERATE = {"bos_token_id": 32, "eos_token_id": None, "pad_token_id": None, "n_positions": 300}


@pytest.fixture(params=["host", "device"])
def steps(request, monkeypatch):
    """The slots of the steps that were one call; as on a CPU, and as on a GPU, whose steps count them on the device."""
    found, real = [], decode.ops.decode_step
    record = lambda *args, **kwargs: (found.append(int(args[3])), real(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(decode.ops, "decode_step", record)
    if request.param == "device":
        monkeypatch.setattr(decode, "counts_on_device", lambda cache: True)
    return found


def start(rows=2):
    return torch.full((rows, 1), 32)


@pytest.mark.parametrize("options", [
    {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 5, "temperature": 0.7}, {"num_beams": 3},
    {"num_beams": 2, "do_sample": True}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False},
], ids=str)  # fmt: skip
def test_generate_gives_the_same_tokens(options, steps):
    theirs, ours = both(**GENERATE)
    found = []
    for model in (theirs, ours):
        set_seed(3)
        mask = torch.ones_like(start())
        found.append(model.generate(start(), attention_mask=mask, max_new_tokens=12, **options))
    assert torch.equal(*found)
    assert steps == ([] if "use_cache" in options else [*range(1, 12)])


def test_a_long_cache_outgrows_its_room(steps, monkeypatch):
    monkeypatch.setattr(decode, "ROOM", 8)
    theirs, ours = both(**GENERATE)
    found = [m.generate(start(1), max_new_tokens=70, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*found) and len(steps) == 69


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_give_the_logits_of_the_whole(dtype, steps):
    exact, ours = both(**GENERATE)
    ours, x = ours.to(dtype), ids(2, 20)
    exact = copy.deepcopy(ours).double()
    igpt.accelerate.undo(exact)
    past, found = None, []
    for at in range(20):
        out = ours(x[:, at : at + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits[:, 0])
    assert len(steps) == 19 and found[0].dtype is dtype
    error = (torch.stack(found, 1).double() - exact(x).logits).abs().max()
    assert error < 40 * torch.finfo(dtype).eps
    assert type(out) is type(igpt.accelerate.undo(ours)(x))


@torch.no_grad()
def test_counted_steps_run_a_gpus_kernels(monkeypatch):
    """On the bench: bf16, a head dim that they serve, a cache that outgrows its room. Linears are torch's there."""
    backends("attention_decode")  # makes the bench known
    single = sys.modules[ops.decode_step.__module__]
    monkeypatch.setattr(single, "_OURS", single._OURS._replace(linear=reference.linear.linear))
    monkeypatch.setattr(decode, "counts_on_device", lambda cache: True)
    monkeypatch.setattr(decode, "ROOM", 8)
    upcast = {"reorder_and_upcast_attn": True}  # or 4.57 cuts the root of 32
    ours = igpt.accelerate(hf(**GENERATE, n_head=2, **upcast)).to(torch.bfloat16)
    exact, x, past, found = igpt.accelerate.undo(copy.deepcopy(ours).double()), ids(2, 20), None, []
    with _native.use_backend("simt", poison=True):
        for at in range(20):
            out = ours(x[:, at : at + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[:, 0])
    assert decode._buffers[getattr(past, "self_attention_cache", past)]._counted is not None
    assert (torch.stack(found, 1).double() - exact(x).logits).abs().max() < 40 * torch.finfo(torch.bfloat16).eps


@torch.no_grad()
def test_caches_that_others_change_or_keep(steps):
    model, x = igpt.accelerate(hf(**GENERATE)), ids(2, 12)
    whole = lambda tokens: model(tokens).logits[:, -1]  # noqa: E731

    def step(cache, token):
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1]

    cache = DynamicCache(config=model.config)
    model(x[:, :6], past_key_values=cache, use_cache=True)
    step(cache, x[:, 6:7])
    old, before = cache.layers[0].keys, cache.layers[0].keys.clone()
    assert type(cache.layers[0]).__name__ == "DynamicLayer" and old.shape == (2, 4, 7, 16)
    other = copy.deepcopy(cache)
    cache.crop(-2)
    assert torch.allclose(step(cache, x[:, 9:10]), whole(torch.cat((x[:, :5], x[:, 9:10]), 1)), atol=1e-5)
    assert torch.equal(old, before)  # whoever kept the old tensors still has what they held
    assert torch.allclose(step(other, x[:, 7:8]), whole(x[:, :8]), atol=1e-5)
    other.reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(step(other, x[[1, 0], 8:9]), whole(x[[1, 0], :9]), atol=1e-5)
    other.batch_repeat_interleave(2)
    twice = x.repeat_interleave(2, 0)[[2, 3, 0, 1]]
    assert torch.allclose(step(other, twice[:, 9:10]), whole(twice[:, :10]), atol=1e-5)
    assert len(steps) == 5


@torch.no_grad()
def test_new_weights_reach_the_next_step(steps):
    model, x = igpt.accelerate(hf(**GENERATE)), ids(1, 6)
    cache = model(x[:, :4], use_cache=True).past_key_values
    model(x[:, 4:5], past_key_values=cache)
    model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    model.lm_head.weight.mul_(2.0)
    twin = copy.deepcopy(cache)
    got = model(x[:, 5:6], past_key_values=cache).logits
    assert torch.allclose(got, igpt.accelerate.undo(model)(x[:, 5:6], past_key_values=twin).logits, atol=1e-5)
    assert len(steps) == 2


@torch.no_grad()
def test_a_model_put_into_training_amid_steps_takes_no_more(steps):
    model, x = igpt.accelerate(hf(**GENERATE)), ids(1, 6)
    cache = model(x[:, :4], use_cache=True).past_key_values
    model(x[:, 4:5], past_key_values=cache)
    model.train()
    model(x[:, 5:6], past_key_values=cache)
    assert steps == [4]


@pytest.mark.usefixtures("reasons")
@torch.no_grad()
def test_what_is_no_plain_step_goes_module_by_module(steps):
    theirs, ours = both(**GENERATE)
    x = ids(2, 6)
    mask = torch.ones_like(x)
    mask[0, 0] = 0

    def step(model, **options):
        cache = model(x[:, :5], use_cache=True).past_key_values
        return model(x[:, 5:6], past_key_values=cache, **options).logits

    places = torch.full((2, 1), 9)
    for options in ({"attention_mask": mask}, {"position_ids": places}, {"output_hidden_states": True}):
        assert torch.allclose(step(ours, **options), step(theirs, **options), atol=1e-5)
    found = []
    for model in (ours, theirs):
        cache = model(x[:, :5], use_cache=True).past_key_values
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(x[:, 5:6], past_key_values=cache).logits)
    assert found[0].dtype is found[1].dtype and torch.allclose(*found, atol=0.1) and not steps
    calls = []
    ours.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    step(ours)
    assert len(calls) == 2 and not steps
    with torch.enable_grad():  # a step whose gradient may be wanted
        assert step(ours).requires_grad and not steps


@pytest.mark.usefixtures("reasons")
def test_a_static_cache_gives_the_images_of_a_dynamic_one():
    """transformers' own are others: its ImageGPT takes a static cache's empty slots for known pixels."""
    theirs, ours = both(**GENERATE)
    x = ids(2, 5)
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 9, "do_sample": False}
    want = theirs.generate(x, **options)
    assert torch.equal(ours.generate(x, cache_implementation="static", **options), want)
    cache = StaticCache(config=ours.config, max_cache_len=16)
    where = {} if MODERN else {"cache_position": torch.arange(5)}
    with torch.no_grad():
        got = ours(x, past_key_values=cache, **where).logits
    assert torch.allclose(got, theirs(x).logits, atol=1e-5)
