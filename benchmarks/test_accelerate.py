"""Hugging Face's ImageGPT, accelerated, against itself as it comes: forward, training step, generate, with peak memory.

Eight layers of S's width and length, biases and all; two images in a batch, four in generate.
"""

import copy

import pytest
import torch
from torch import Tensor

import igpt_fast as igpt
from benchmarks.harness import Call, Case, Close, Goal, Missing, Score, served_by, steps_served_by
from benchmarks.peer_models import generate
from benchmarks.peers import optional

transformers = optional("transformers")
if isinstance(transformers, Missing):
    pytest.skip(transformers.reason, allow_module_level=True)

BATCH, STEPS = 2, 256
# Of the arithmetic, and then of the weights.
PRECISIONS = {
    "bfloat16 autocast": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
HF = "HF ImageGPT, eager"


def hf_model(quick: bool, device: str, dropout: float = 0.0):
    """Theirs, with its usual attention, which is the only one that it has."""
    transformers.utils.logging.set_verbosity_error()
    sizes = {"n_layer": 8, "n_embd": 512, "n_head": 8, "n_positions": 1024, "vocab_size": 513}
    if quick:
        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 65}
    config = transformers.ImageGPTConfig(
        **sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, attn_implementation="eager",
        bos_token_id=sizes["vocab_size"] - 1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.ImageGPTForCausalImageModeling(config).to(device)


def tokens_of(hf) -> Tensor:
    tokens = torch.randint(hf.config.vocab_size - 1, (BATCH, hf.config.n_positions), device=hf.device)
    tokens[:, 0] = hf.config.vocab_size - 1
    return tokens


def shape_of(hf, batch: int = BATCH) -> str:
    c = hf.config
    return f"{c.n_layer} layers, d = {c.n_embd}, {c.n_head} heads, {c.n_positions} slots, batch {batch}"


def pair(hf, dtype: torch.dtype):
    """(accelerated, theirs)"""
    theirs = copy.deepcopy(hf).to(dtype)
    return igpt.accelerate(copy.deepcopy(theirs)), theirs


def ratio(entry):
    return entry["peers"][HF].get("ratio")


def memory(entry):
    ours, theirs = entry.get("peak_memory_mb"), entry["peers"][HF].get("peak_memory_mb")
    return theirs / ours if ours and theirs else None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_forward(compare, device, quick, precision):
    hf = hf_model(quick, device).eval()
    tokens = tokens_of(hf)
    dtype, weights = PRECISIONS[precision]

    def forward(model) -> Call:
        @torch.no_grad()
        def call() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype is not weights):
                return model(tokens, use_cache=False).logits

        return call

    ours, theirs = pair(hf, weights)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(tokens, use_cache=False).logits
    compare(
        Case(
            op="accelerate, forward",
            shape=shape_of(hf),
            dtype=precision,
            device=device,
            backend=served_by("attention_fwd", torch.empty(0, dtype=dtype, device=device)),
            ours=forward(ours),
            peers={HF: forward(theirs)},
            judge=Close([truth], dtype),
            work={"images/s": BATCH},
            goals=_goals(f"accelerate, forward in {precision}", 2.0, device),
            rounds=(3, 9),
            seconds=20.0,
        )
    )


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_step(compare, device, quick, precision, dropout):
    """With dropout, theirs as it comes, each side draws its own: then the loss is judged, by a wide margin."""
    hf = hf_model(quick, device, dropout).train()
    tokens = tokens_of(hf)
    dtype, weights = PRECISIONS[precision]

    def step(model) -> Call:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)

        def call() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=dtype is not weights):
                loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return [loss.detach(), model.transformer.h[0].attn.c_attn.weight.grad]

        return call

    ours, theirs = pair(hf, weights)
    exact = copy.deepcopy(theirs).double().eval()
    truth = step(exact)()
    judge = Score(lambda out: abs(float(out[0]) / float(truth[0]) - 1), 0.05, 0.05)
    compare(
        Case(
            op="accelerate, training step" + f", dropout {dropout}" * bool(dropout),
            shape=shape_of(hf),
            dtype=precision,
            device=device,
            backend=served_by("attention_bwd", torch.empty(0, dtype=dtype, device=device)),
            ours=step(ours),
            peers={HF: step(theirs)},
            judge=judge if dropout else Close(truth, dtype),
            work={"images/s": BATCH},
            goals=_goals(f"accelerate, training step in {precision}, dropout {dropout}", 3.0, device),
            rounds=(3, 9),
            seconds=40.0,
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_generate(compare, device, quick, dtype):
    hf = hf_model(quick, device).eval()
    steps = min(STEPS, hf.config.n_positions)

    def wrong(tokens):
        fine = tokens.shape == (4, steps) and 0 <= tokens.min() <= tokens.max() < hf.config.vocab_size - 1
        return 0.0 if fine and tokens.unique().numel() > 1 else 1.0

    ours, theirs = pair(hf, dtype)
    nothing = torch.empty(4, 0, dtype=torch.int64, device=device)
    name = str(dtype).removeprefix("torch.")
    compare(
        Case(
            op=f"accelerate, generate {steps} tokens",
            shape=shape_of(hf, 4),
            dtype=name,
            device=device,
            backend=steps_served_by(torch.empty(0, dtype=dtype, device=device)),
            ours=generate(ours, nothing, steps),
            peers={HF: generate(theirs, nothing, steps)},
            judge=Score(wrong, 0.0, 0.0),
            work={"images/s": 4 * steps / hf.config.n_positions, "steps/s": steps},
            goals=_goals(f"accelerate, generate in {name} at batch 4", 3.0, device)[:1],
            rounds=(2, 3),
            seconds=20.0,
        )
    )


def _goals(what: str, times: float, device: str) -> list[Goal]:
    goals = [Goal(what, ratio, times), Goal(f"{what}: peak memory", memory, 2.0)]
    return goals if device == "cpu" else []
