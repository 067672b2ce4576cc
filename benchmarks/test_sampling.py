"""Sampling: drawing tokens from logits, one cached step in the middle of an image, whole images, and completions."""

import copy
from functools import partial

import pytest
import torch

import igpt_fast as igpt
from benchmarks import peer_models, peers
from benchmarks.harness import Case, Close, Goal, Missing, Score, dtype_name, served_by, steps_served_by
from benchmarks.training import BATCH, describe, small_model, tokens_for
from igpt_fast import ops
from igpt_fast.cached import Decoder, decode_one_token, prefill
from igpt_fast.ops.projection import bf16_is_slow


def inverse_cdf(logits, uniforms, top_k):
    """What sample_tokens must give: in float64, the first token whose cumulative share exceeds the uniform."""
    p = logits.double().softmax(-1)
    if top_k:
        p *= p >= p.topk(top_k).values[:, -1:]
    cdf = p.cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)


@pytest.mark.parametrize("top_k", [None, 100], ids=["plain", "top-k"])
@torch.no_grad()
def test_sample_tokens(compare, device, top_k):
    logits = torch.randn(BATCH, 512, device=device)
    uniforms = torch.rand(BATCH, dtype=torch.float64, device=device)
    assert torch.equal(ops.sample_tokens(logits, uniforms, top_k=top_k), inverse_cdf(logits, uniforms, top_k))
    may_come = logits.topk(top_k or 512).indices

    def wrong(tokens):
        """Peers draw numbers of their own: what can be held against them are tokens that must not come."""
        return 1 - float((tokens[:, None] == may_come).any(1).double().mean())

    compare(
        Case(
            op="sample_tokens" + f", top_k = {top_k}" * bool(top_k),
            shape=f"{BATCH} × 512",
            dtype="float32",
            device=device,
            backend=served_by("sample_tokens", logits),
            ours=lambda: ops.sample_tokens(logits, uniforms, top_k=top_k),
            peers={"softmax + torch.multinomial": peers.call(peer_models.draw, logits, top_k)},
            judge=Score(wrong, 0.0, 0.0),
            work={"tokens/s": BATCH},
            seconds=1.0,
        )
    )


PLAIN, HF = "torch SDPA and a cache", "HF ImageGPT and its cache"


def dtypes_of_peers(dtype, device):
    """Beside ours float32, which may be the faster one; it alone where torch multiplies bf16 far slower."""
    return [torch.float32] if device == "cpu" and bf16_is_slow() else list(dict.fromkeys((dtype, torch.float32)))


def in_dtypes(name, dtype, device, make):
    """A peer in each of them, named by it where ours is not float32.   make: a dtype → the peer"""
    named = dtype is not torch.float32
    return {name + f", {dtype_name(d)}" * named: make(d) for d in dtypes_of_peers(dtype, device)}


def cast(model, dtype):
    """A peer's model in a dtype, or Missing as it is."""
    return model if isinstance(model, Missing) else copy.deepcopy(model).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@torch.inference_mode()
def test_step(compare, device, quick, dtype):
    """In the middle of the image, so that its time is a whole image's average, as attention grows with the position."""
    model = small_model(quick, device).eval().to(dtype)
    half = model.config.tokens // 2
    tokens = tokens_for(model.config, device)
    known, pixel = tokens[:, : half - 1], tokens[:, half - 1]
    uniforms = torch.rand(BATCH, dtype=torch.float64, device=device)
    _, cache = prefill(model, known)
    decoder = Decoder(model, cache)

    def ours():
        cache.length = half  # the same step again
        logits = decode_one_token(decoder, pixel)
        ops.sample_tokens(logits, uniforms)
        return logits

    plain, hf = peer_models.PlainGPT(model.config, model.state_dict()), peer_models.hf_model(model)
    exact = cast(plain, torch.float64)
    slots = peer_models.shifted(tokens[:, : half + 1], model.config.colors)
    compare(
        Case(
            op="sampling, one cached step",
            shape=f"{describe(model.config)}, pixel {half}",
            dtype=dtype_name(dtype),
            device=device,
            backend=steps_served_by(pixel.to(dtype)),
            ours=ours,
            peers={
                **in_dtypes(PLAIN, dtype, device, lambda d: peer_models.plain_step(cast(plain, d), known, pixel)),
                **in_dtypes(HF, dtype, device, lambda d: peer_models.hf_step(cast(hf, d), known, pixel)),
            },
            judge=Close([exact(slots)[:, -1]], dtype, yardstick=dtype in dtypes_of_peers(dtype, device)),
            work={"steps/s": 1},
        )
    )


def broken_images(config, known, tokens) -> float:
    """0 where these are images of the palette behind what is known, and not of one colour; else 1."""
    tokens = tokens.reshape(-1, config.tokens)
    fine = len(tokens) == len(known) and 0 <= tokens.min() <= tokens.max() < config.colors
    fine = fine and torch.equal(tokens[:, : known.shape[1]], known)
    return 0.0 if fine and tokens[:, known.shape[1] :].unique().numel() > 1 else 1.0


GENERATE = "HF generate, use_cache=True"


def compare_images(compare, model, dtype, device, op, known, ours, goals=()):
    """Images behind known pixels [N, K], ours by a model of that dtype."""
    config, (count, first) = model.config, known.shape
    steps = config.tokens - first
    plain, hf = peer_models.PlainGPT(config, model.state_dict()), peer_models.hf_model(model)
    mine = cast(model, dtype)
    where = " behind a half that all share" if first else ""
    compare(
        Case(
            op=op,
            shape=f"{describe(config, count)}, {steps} steps{where}",
            dtype=dtype_name(dtype),
            device=device,
            backend=steps_served_by(torch.empty(0, device=device, dtype=dtype)),
            ours=partial(ours, mine),
            peers={
                **in_dtypes(PLAIN, dtype, device, lambda d: peer_models.plain_images(cast(plain, d), known)),
                **in_dtypes(GENERATE, dtype, device, lambda d: peer_models.generate(cast(hf, d), known, steps)),
            },
            judge=Score(partial(broken_images, config, known), 0.0, 0.0),
            work={"images/s": count, "steps/s": steps},
            goals=list(goals) if device == "cpu" else [],
            rounds=(2, 2),  # each of hundreds of steps
            memory=False,  # the cached step tells what a step needs; running all of this once more would tell no more
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_images(compare, device, quick, dtype):
    """From nothing to whole images, all steps of all positions: what a user waits for."""
    model, nothing = small_model(quick, device).eval(), torch.empty(BATCH, 0, dtype=torch.int64, device=device)
    what = f"cached sampling in {dtype_name(dtype)} at batch 4 against HF generate"

    def ratio(entry):
        """To HF in its faster dtype."""
        theirs = (report for name, report in entry["peers"].items() if name.startswith(GENERATE))
        return min((report["ratio"] for report in theirs if "ratio" in report), default=None)

    goal = Goal(what, ratio, 4.0)
    ours = partial(igpt.sample, n=BATCH, batch=BATCH)
    compare_images(compare, model, dtype, device, "sampling, whole images", nothing, ours, [goal])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_completions(compare, device, quick, dtype):
    """Eight of one half image, which the default of the command line asks for."""
    model, count = small_model(quick, device).eval(), 8
    tokens = tokens_for(model.config, device, batch=1)
    known = tokens[:, : model.config.tokens // 2].expand(count, -1).contiguous()

    def ours(mine):
        return igpt.complete(mine, tokens, keep=0.5, n=count)

    compare_images(compare, model, dtype, device, "sampling, completions", known, ours)
