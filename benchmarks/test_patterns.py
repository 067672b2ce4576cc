"""Sparse patterns: time and peak memory against dense attention, and against others who are given the same mask.

Beyond 64 × 64 the dense sides run once, before the rounds; a grid of 256 × 256 is there for the curve of time against
size, without dense sides. FLOP are those of the pairs that are seen, 3.5 times the forward pass's with the backward's.
"""

import functools

import pytest
import torch

from benchmarks.attention_peers import tried
from benchmarks.harness import Case, Close, Goal, Missing, Once, served_by
from benchmarks.measure import CPU
from benchmarks.pattern_peers import DENSE, MASKED, SDPA, Dense, Either, exact, sides
from igpt_fast import ops, patterns
from igpt_fast.device import resident, restart_peak

NEAR = "neighborhood(7)"
NAMES = [NEAR if name == "neighborhood" else name for name in patterns.PATTERNS] + [f"row | {NEAR}"]
HEADS, HEAD_DIM, DTYPE = 4, 64, torch.bfloat16


def inputs(tokens, device):
    """q, k, v and the output's gradient [1, H, T, D], the same in every test."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, 1, HEADS, tokens, HEAD_DIM, generator=generator)
    return [t.to(device, DTYPE) for t in made.unbind(0)]


@functools.lru_cache(maxsize=2)
def dense_truth(tokens, device):
    return exact(*inputs(tokens, device), None)


@functools.lru_cache(maxsize=2)
def pattern_truth(name, side, device):
    return exact(*inputs(side * side, device), patterns.compiled(name, (side, side)))


def goals(name, side, density, backward):
    """What the project promises on a CPU, of 64 × 64 pixels forward and backward, and of memory at 128 × 128."""
    found = []
    if backward and side == 64:
        bound = 1.3 * density + 0.03
        share = lambda entry: entry["seconds"] / entry["peers"][DENSE]["seconds"]  # noqa: E731
        found.append(Goal(f"{name}: time of our dense attention", share, bound, sense="at most"))
    if backward and (name, side) == (NEAR, 64):
        found.append(Goal(f"{name}: against dense SDPA", lambda e: e["peers"][SDPA].get("ratio"), 8.0))
    if backward and (name, side) == (NEAR, 128):
        found.append(Goal(f"{name}: peak memory at 128 × 128", lambda e: e["peak_memory_mb"], 500, "MB", "at most"))
    return found


def once(run, peaks, name, device):
    """A peer that runs for seconds: one call, its memory noted."""

    def noted():
        if device == "cpu":
            restart_peak(CPU)
            before = resident()
        result = run()
        if device == "cpu":
            peaks[name] = max(0, resident(most=True) - before) / 1e6
        return result

    return Once(noted)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    ("name", "side"), [*((name, side) for side in (32, 64, 128) for name in NAMES), (NEAR, 256), (f"row | {NEAR}", 256)]
)
def test_pattern(compare, device, quick, name, side, backward):
    full, side = side, side // 8 if quick else side
    mask = patterns.compiled(name, (side, side))
    *args, dout = inputs(side * side, device)
    args = [t.requires_grad_(backward) for t in args]

    def call(fn):
        def run():
            out = fn(*args)
            if not backward:
                return out
            if isinstance(out, Dense):
                return Dense((out.outs.detach(), *torch.autograd.grad(out.outs, args, dout)))
            return (out.detach(), *torch.autograd.grad(out, args, dout))

        return fn if isinstance(fn, Missing) else run

    outputs = slice(None) if backward else slice(1)
    others, peaks, dense = {}, {}, None
    if full < 256:
        dense = Close(dense_truth(side * side, device)[outputs], DTYPE)
        found = sides(name, mask, (side, side), device, quick)
        found = {
            n: fn if n in (DENSE, SDPA) else tried(fn, dout if backward else None, *args) for n, fn in found.items()
        }
        others = {n: call(fn) for n, fn in found.items()}
        if side > 64:
            others = {n: r if isinstance(r, Missing) else once(r, peaks, n, device) for n, r in others.items()}
    yardstick = full < 256 and not isinstance(others[MASKED], Missing)
    truth = Close(pattern_truth(name, side, device)[outputs], DTYPE, yardstick)
    densities = {"pattern": name, "side": side, "pairs": mask.pair_density(), "tiles": mask.density()}
    compare(
        Case(
            op=f"pattern {name}, forward{' and backward' * backward}",
            shape=f"{side} × {side} pixels, {HEADS} heads of {HEAD_DIM}",
            dtype="bfloat16",
            device=device,
            backend=served_by("attention_bwd", *args),
            ours=call(lambda q, k, v: ops.attention(q, k, v, mask)),
            peers=others,
            judge=Either(truth, dense),
            work={"GFLOP/s": HEADS * HEAD_DIM * (14 if backward else 4) * mask.pairs},
            goals=goals(name, side, mask.density(), backward) if device == "cpu" else (),
            note=f"{mask.density():.0%} of the causal tiles",
            seconds=2.0,
            rounds=(5, 20),
            extra=lambda who, _: (
                {"sparse": densities} if who == "ours" else {"peak_memory_mb": peaks[who]} if who in peaks else {}
            ),
        )
    )
