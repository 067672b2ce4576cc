"""One training step of each side, for test_train.py, and its peak memory in a process of its own.

    python -m benchmarks.training SIDE PRECISION [--quick]

builds that side, takes two steps, and prints JSON: the process's peak, and how much that is above what it held with the
model built, in 10^6 bytes.
"""

import dataclasses
import gc
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import igpt_fast as igpt
from benchmarks import peer_models, peers
from benchmarks.harness import Call, Missing
from benchmarks.pattern_peers import MASKED
from igpt_fast.device import resident, restart_peak
from igpt_fast.ops.projection import bf16_is_slow
from igpt_fast.optimizer import BETAS, adam
from igpt_fast.plan import forward_flop

BATCH = 4
OURS, PLAIN, COMPILED = "igpt-fast", "torch SDPA", "torch SDPA, torch.compile"
OURS_DENSE = "igpt-fast, dense"
HF = "HF ImageGPT, eager"  # without dropout, as Image GPT was trained
HF_AS_IT_COMES = "HF ImageGPT, eager, dropout 0.1"  # as its configuration has it
BF16, FLOAT32 = "bfloat16 autocast", "float32"


def small_model(quick: bool, device: str = "cpu", side: int = 32, pattern: str | None = None) -> igpt.ImageGPT:
    """8 layers, d = 256, 4 heads, 512 colours. Its output table is not zero, as a fresh model's would be."""
    tiny = {"layers": 2, "width": 64, "heads": 2, "colors": 64, "size": (side // 4, side // 4)}
    sizes = {"layers": 8, "width": 256, "heads": 4, "colors": 512, "size": (side, side)} | (tiny if quick else {})
    config = igpt.Config(**sizes, pattern=pattern)
    torch.manual_seed(0)
    model = igpt.ImageGPT(config)
    nn.init.normal_(model.wtet, std=0.05)
    return model.to(device)


def describe(config: igpt.Config, batch: int = BATCH) -> str:
    """The sizes in a line."""
    height, width = config.size
    return f"{config.layers} layers, d = {config.width}, {config.heads} heads, {height} × {width}, batch {batch}"


def tokens_for(config: igpt.Config, device: str = "cpu", batch: int = BATCH) -> Tensor:
    """Random tokens int64 [batch, T]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.colors, (batch, config.tokens), generator=generator).to(device)


def flop(config: igpt.Config, batch: int = BATCH) -> float:
    """FLOP of one step as they are counted for models: three times the forward pass."""
    return 3 * batch * forward_flop(config)


def peers_precision(precision: str, device: str) -> str:
    """What precision serves a peer best: bf16 products that torch does far slower help nobody."""
    return FLOAT32 if device == "cpu" and bf16_is_slow() else precision


def step(side: str, model: igpt.ImageGPT, tokens: Tensor, precision: str, quick: bool = False) -> Call | Missing:
    """A step of one side, its weights taken from `model`: fused Adam → loss, and three gradients.

    The learning rate is 0: steps do all their work, always from the same weights.
    """
    autocast = precision == BF16
    if side == OURS_DENSE:
        weights = model.state_dict()
        model = igpt.ImageGPT(dataclasses.replace(model.config, pattern=None)).to(tokens.device)
        model.load_state_dict(weights)
    if side in (OURS, OURS_DENSE):
        named = dict(model.named_parameters())
        grads = lambda: _grads(named, "wtet", "wte", "blocks.0.attn.qkv.weight")  # noqa: E731
        return _step(model.loss, adam(named), tokens, grads, autocast)
    if side in (HF, HF_AS_IT_COMES):
        hf = peer_models.hf_model(model, dropout=0.0 if side == HF else 0.1)
        if isinstance(hf, Missing):
            return hf
        hf.train()
        named = dict(hf.named_parameters())

        def hf_grads() -> list[Tensor]:
            names = "lm_head.weight", "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"
            wtet, wte, qkv = _grads(named, *names)
            return [wtet, wte[:-1], qkv.t()]

        return _step(lambda x: peer_models.hf_loss(hf, x), _adam(hf), tokens, hf_grads, autocast)
    plain = peer_models.PlainGPT(model.config, model.state_dict())
    if side == MASKED:
        plain.seen = seen_by(model)
    loss = plain.loss
    if side == COMPILED:
        loss = peers.compiled(plain.loss, quick)
        if isinstance(loss, Missing):
            return loss
    return _step(loss, _adam(plain), tokens, lambda: _plain_grads(plain), autocast)


def seen_by(model: igpt.ImageGPT) -> Tensor:
    """bool [T, T]: who sees whom under the one pattern of a model."""
    return igpt.patterns.compiled(model.config.pattern, model.config.size).dense().to(model.wte.device)


def truth(
    model: igpt.ImageGPT, tokens: Tensor, seen: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The loss and the same three gradients, in float64 unless that takes too much memory. seen: as seen_by gives it"""
    plain = peer_models.PlainGPT(model.config, model.state_dict()).to(dtype)
    plain.seen = seen
    loss = plain.loss(tokens)
    loss.backward()
    return [loss.detach(), *_plain_grads(plain)]


def _step(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    grads: Callable,
    autocast: bool,
) -> Call:
    def run() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        return [loss.detach(), *grads()]

    return run


def _adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=BETAS, fused=True)


def _plain_grads(plain: peer_models.PlainGPT) -> list[Tensor]:
    wtet, wte, qkv = _grads(dict(plain.p.items()), "wtet", "wte", "blocks_0_attn_qkv_weight")
    return [wtet, wte[:-1], qkv]


def _grads(named: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [named[name].grad for name in names]


def main() -> None:
    side, precision, quick = sys.argv[1], sys.argv[2], "--quick" in sys.argv[3:]
    model = small_model(quick)
    tokens = tokens_for(model.config)
    run = step(side, model, tokens, precision)
    if isinstance(run, Missing):
        print(json.dumps({"missing": run.reason}))
        return
    if side != OURS:
        del model
    gc.collect()
    restart_peak(torch.device("cpu"))  # what an import needed for a moment is not the steps'
    built = resident() / 1e6
    for _ in range(2):
        run()
    peak = resident(most=True) / 1e6
    print(json.dumps({"peak_mb": peak, "increase_mb": peak - built}))


if __name__ == "__main__":
    main()
