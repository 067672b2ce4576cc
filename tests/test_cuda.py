"""Ops on tensors of a real GPU: their values, CUDA graphs, other streams, mixed devices.

The ops' tests proper run on a GPU by check.backends(), on copies of CPU tensors.
"""

import copy
import subprocess
import sys

import pytest
import torch
from test_backends import calls

from igpt_fast import Config, ImageGPT, InputError, accelerate, ops, replay
from igpt_fast.cached import Decoder, prefill
from igpt_fast.ops._native import BACKENDS, use_backend
from igpt_fast.sample import complete, sample

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS or not torch.cuda.is_available(), reason="no GPU here, or built without CUDA"
)


def on(device, x):
    """x, or what is in it, as tensors on `device`."""
    if isinstance(x, tuple | list):
        return type(x)(on(device, y) for y in x)
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def flat(out):
    out = [out] if isinstance(out, torch.Tensor) else out
    return [o for o in out if isinstance(o, torch.Tensor) and o.numel()]


# Of these the outputs after the first so many are a kernel's notes for its own backward pass.
PUBLIC = {"linear_cross_entropy": 1}


@pytest.mark.parametrize("name", calls())
def test_values_are_the_cpus(name):
    for args in calls()[name]:
        theirs, op = on("cuda", args), getattr(torch.ops.igpt, name)
        with use_backend("reference"):
            out = op(*args)
        found = op(*theirs)
        # An op without a result changes its arguments.
        want = flat(args if out is None else out)[: PUBLIC.get(name)]
        got = flat(theirs if out is None else found)[: PUBLIC.get(name)]
        for w, g in zip(want, got, strict=True):
            assert g.is_cuda and torch.allclose(g.cpu(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_steps_are_recorded_on_the_gpu_of_their_tensors():
    model = ImageGPT(Config(layers=1, width=64, heads=2, colors=8, size=(8, 8))).bfloat16()
    drawn = [sample(model.to(f"cuda:{at}"), 3, seed=1).cpu() for at in (0, 1)]
    assert torch.equal(*drawn)


def test_a_process_that_has_only_imported_may_fork_workers_for_the_gpu():
    script = """if True:
        import os, torch, igpt_fast
        if (child := os.fork()) == 0:
            torch.ones(1).cuda()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0"""
    subprocess.run([sys.executable, "-c", script], check=True)


# Forward and backward of what has a CUDA kernel, on two inputs each: functions of (random tensors) → results.
def norm(x, y):
    return ops.rms_norm(x, torch.ones_like(x[0]), residual=y)


def gelu(x, y):
    return (ops.bias_quick_gelu(x, y[0].clone()),)


def loss(x, y):
    return (ops.cross_entropy(x, y.argmax(1)),)


def draw(x, y):
    return (ops.sample_tokens(x.detach(), y[:, 0].detach().double().sigmoid(), 0.9, 20, 0.9),)


def nearest(x, y):
    return (ops.palette_assign(x.detach()[:, :3].contiguous(), y.detach()[:, :3].contiguous()),)


def lloyd(x, y):
    colors = (x.detach()[:, :3].sigmoid() * 255).to(torch.uint8)
    return ops.kmeans_step(
        colors, torch.ones(len(x), dtype=torch.int64, device=x.device), y.detach()[:, :3].contiguous()
    )


def head(x, y):
    return (ops.linear_cross_entropy(x.bfloat16(), y.bfloat16(), y.argmax(1) % len(y)),)


def attend(x, y):
    q, k, v = (t.bfloat16().view(1, len(t), -1, 64).transpose(1, 2) for t in (x, y, x))
    return (ops.attention(q, k, v),)


def step(x, y, in_bytes=False):
    """A decoding step at lengths that only the device knows: slots filled, one more appended, then attended to."""
    x, y = (t.detach()[:64, :128].bfloat16() for t in (x, y))
    cache = torch.zeros(2, 2, 4, 160, 32, device=x.device).to(torch.float8_e4m3fn if in_bytes else x.dtype)
    scales = [*torch.zeros(2, 2, 4, 3, device=x.device)] if in_bytes else []
    lengths = (y[:2, 0].float().sigmoid() * 30).int() + 129
    ops.cache_append(*cache, *x.repeat(8, 1).view(2, 2, 4, 128, 32), 0, None, scales)
    ops.cache_append(*cache, *y[:4].view(2, 2, 4, 1, 32), 0, lengths - 1, scales)
    q, prefix = x[:2].view(2, 4, 1, 32), [] if in_bytes else [c[:1] for c in cache]
    few = ops.attention_decode(q, *cache, 160, None, lengths, None, prefix, scales)  # split over the sequence
    each = torch.arange(160, device=x.device) % 2
    k, v = (c.view(torch.uint8)[each].view(c.dtype) for c in cache)
    rest = lengths[each], None, (), [s[each] for s in scales]
    return few, ops.attention_decode(q[each], k, v, 160, None, *rest)


def step_in_bytes(x, y):
    return step(x, y, in_bytes=True)


def one_linear(x, y):
    x, y = (t.detach()[:64].bfloat16() for t in (x, y))
    return (ops.linear(x, y, y[:, 0].contiguous(), norm=y[0], residual=x[:, :64].contiguous(), gelu=True),)


def drop(x, y):
    qkv = torch.stack((x, y, x), 1).bfloat16().view(1, len(x), 3, -1, 64)
    return (ops.attention_dropout(qkv, 0.25, 7),)


FUNCTIONS = [norm, gelu, loss, draw, nearest, lloyd, head, attend, drop, one_linear, step, step_in_bytes]


def both_passes(fn, x, y):
    out = list(fn(x, y))
    if out[0].requires_grad:
        out += torch.autograd.grad([o for o in out if o.requires_grad], [x], [torch.ones_like(o) for o in out])
    return [o.detach() for o in out]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_cuda_graph_replays_it(fn):
    static = [torch.randn(64, 128, device="cuda", requires_grad=i == 0) for i in range(2)]
    with use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both_passes(fn, *static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both_passes(fn, *static)
        fresh = [torch.randn_like(t).requires_grad_(t.requires_grad) for t in static]
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both_passes(fn, *fresh), strict=True))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_it_runs_on_torchs_current_stream(fn):
    x, y = (torch.randn(4096, 512, device="cuda", requires_grad=i == 0) for i in range(2))
    with use_backend("cuda"):
        want = both_passes(fn, x, y)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            late = torch.zeros_like(x).requires_grad_()
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                late.copy_(x)  # whoever runs on another stream reads zeros
            got = both_passes(fn, late, y)
        side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("pattern", [None, "neighborhood(3)"])
def test_images_are_drawn_by_a_cuda_graph(pattern, caplog, monkeypatch):
    """Or else by the same steps one by one, to the same pixels; without a pattern, where completions share what they
    know, and with a cache of pages.
    """
    config = Config(layers=2, width=64, heads=2, colors=16, size=(40, 8), pattern=pattern)
    model = ImageGPT(config).to("cuda", torch.bfloat16)
    with caplog.at_level("WARNING", "igpt_fast"):
        replayed = sample(model, n=3, seed=1)
        completed = complete(model, replayed, keep=0.5, n=2, seed=1)
    assert "one by one" not in caplog.text
    monkeypatch.setattr(replay, "recorded", lambda step, device: step)
    assert torch.equal(sample(model, n=3, seed=1), replayed)
    assert torch.equal(complete(model, replayed, keep=0.5, n=2, seed=1), completed)


@torch.inference_mode()
@pytest.mark.parametrize("pattern", [None, "neighborhood(3)"])
def test_steps_whose_slots_the_device_counts_give_the_models_logits(pattern, device="cuda"):
    """Of bfloat16, as those of whole images at once: no farther from float64 than twice that."""
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=2, width=64, heads=2, colors=16, size=(40, 8), pattern=pattern)).bfloat16()
    torch.nn.init.normal_(model.wtet, std=0.2)
    pixels = torch.randint(16, (3, 320))
    with use_backend("reference"):
        truth = copy.deepcopy(model).double()(pixels)
        whole = (model(pixels) - truth).abs().max()
    model, pixels = model.to(device), pixels.to(device)
    _, cache = prefill(model, pixels[:, :250])
    decoder = Decoder(model, cache)
    for t in range(250, 270):
        at = torch.full((1,), t + 1, device=device)
        held = decoder.weights, at, model.config.eps, decoder.masks, cache.pages, cache.prefix
        logits = ops.decode_step(cache.data, pixels[:, t], *held)
        assert (logits.double().cpu() - truth[:, t + 1]).abs().max() <= 2 * whole


def test_a_graph_generates_what_transformers_generates(caplog, monkeypatch):
    """An accelerated model's steps are replayed, to the tokens of the same steps one by one, and near transformers'."""
    transformers = pytest.importorskip("transformers", minversion="4.57")
    config = transformers.ImageGPTConfig(n_layer=2, n_embd=64, n_head=2, n_positions=300, vocab_size=33)
    model = transformers.ImageGPTForCausalImageModeling(config).to("cuda", torch.bfloat16).eval()
    start = torch.full((3, 1), 32, device="cuda")
    options = {"max_new_tokens": 280, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(start, **options)
    accelerate(model)
    with caplog.at_level("WARNING", "igpt_fast"):
        replayed = model.generate(start, **options)
    assert "one by one" not in caplog.text and "module by module" not in caplog.text
    assert torch.equal(replayed[:, :4], want[:, :4])  # later ones may part where two logits are near each other
    monkeypatch.setattr(replay, "recorded", lambda step, device: step)
    assert torch.equal(model.generate(start, **options), replayed)


MEMORY = torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0
ROWS = (1 << 21) + 8  # of 1024 columns: more elements than 31 bits count


@pytest.mark.skipif(MEMORY < 40, reason=f"needs a GPU of 40 GiB, this has {MEMORY}")
@pytest.mark.parametrize("fn", [norm, gelu, loss], ids=lambda f: f.__name__)
def test_more_elements_than_31_bits_count(fn):
    """The last rows of a giant are what they are alone."""
    x = torch.randn(ROWS, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_()
    y = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    if fn is not gelu:
        y = y.expand(ROWS, 1024)
    with use_backend("cuda"):
        if fn is loss:
            y = y.argmax(1)
            giant, small = (ops.cross_entropy(a, b, "none") for a, b in ((x, y), (x[-8:], y[-8:])))
        elif fn is norm:
            giant, small = (norm(a, b)[0] for a, b in ((x, y), (x[-8:], y[-8:])))
        else:
            giant, small = (gelu(a, y)[0] for a in (x, x[-8:]))
        assert torch.equal(giant[-8:], small)
        want = torch.autograd.grad(small, x, torch.ones_like(small))[0][-8:].clone()
        assert torch.equal(torch.autograd.grad(giant, x, torch.ones_like(giant))[0][-8:], want)


@pytest.mark.skipif(MEMORY < 40, reason=f"needs a GPU of 40 GiB, this has {MEMORY}")
def test_more_pixels_than_31_bits_count():
    pixels = torch.randint(256, (1 << 20, 3), device="cuda", dtype=torch.uint8).repeat(1025, 1)
    palette = torch.rand(5, 3, device="cuda") * 2 - 1
    with use_backend("cuda"):
        tokens = ops.palette_assign(pixels, palette, torch.int16)
        assert torch.equal(tokens[-1000:], ops.palette_assign(pixels[-1000:].clone(), palette, torch.int16))


def test_mixed_devices_are_named():
    with pytest.raises(InputError, match="weight is on cpu, x on cuda:0"):
        ops.rms_norm(torch.ones(2, 4, device="cuda"), torch.ones(4))


def test_a_model_learns_the_same_there():
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=2, width=64, heads=2, colors=16, size=(4, 4), bias=True))
    torch.nn.init.normal_(model.wtet)
    tokens = torch.randint(16, (2, 16))
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        value = model.loss(tokens.to(device))
        grads = torch.autograd.grad(value, list(model.parameters()))
        results.append([value.cpu(), *(g.cpu() for g in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
