"""The training step: how long it takes, and how much memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.harness import Case, Close, Goal, Score, best_of, served_by
from benchmarks.pattern_peers import MASKED, Dense, Either
from benchmarks.training import (
    BATCH,
    BF16,
    COMPILED,
    FLOAT32,
    HF,
    HF_AS_IT_COMES,
    OURS,
    OURS_DENSE,
    PLAIN,
    peers_precision,
)


@pytest.mark.parametrize("precision", [BF16, FLOAT32])
def test_step(compare, device, quick, precision):
    model = training.small_model(quick, device)
    tokens = training.tokens_for(model.config, device)
    dtype, theirs = {BF16: torch.bfloat16, FLOAT32: torch.float32}[precision], peers_precision(precision, device)
    truth = training.truth(model, tokens)

    def against(peer):
        return lambda entry: entry["peers"][peer].get("ratio")

    def loss_off(result):
        """With dropout a side draws its own: then the loss is judged, by a wide margin."""
        return abs(float(result[0]) / float(truth[0]) - 1)

    how = f"training step in {precision}"
    compare(
        Case(
            op="training step",
            shape=training.describe(model.config),
            dtype=precision,
            device=device,
            backend=served_by("attention_bwd", torch.empty(0, dtype=dtype, device=device)),
            ours=training.step(OURS, model, tokens, precision),
            peers={
                side: training.step(side, model, tokens, theirs, quick)
                for side in (PLAIN, COMPILED, HF, HF_AS_IT_COMES)
            },
            judge=Close(truth, dtype, yardstick=theirs == precision),
            judges={HF_AS_IT_COMES: Score(loss_off, 0.05, 0.05)},
            work={"images/s": BATCH, "GFLOP/s": training.flop(model.config)},
            note="" if theirs == precision else f"peers in {theirs}, far faster here for them",
            goals=[
                Goal(f"{how} against HF ImageGPT as it comes", against(HF_AS_IT_COMES), 3.0),
                Goal("the same, HF without its dropout", against(HF), 3.0),
                Goal(f"{how} against plain torch with SDPA", against(PLAIN), 1.3),
            ] if device == "cpu" else [],
            rounds=(7, 9),  # on a shared machine the median of three says little
            seconds=45.0,
        )
    )  # fmt: skip


def test_sparse_step(compare, device, quick):
    """64 × 64 pixels, two images: a pattern beside dense attention. Four thousand pixels: the truth is in float32."""
    model = training.small_model(quick, device, 64, "row | neighborhood(7)")
    tokens = training.tokens_for(model.config, device, 2)
    theirs = peers_precision(BF16, device)
    sparse, dense = (training.truth(model, tokens, s, torch.float32) for s in (training.seen_by(model), None))

    def side(name):
        run = training.step(name, model, tokens, BF16 if name == OURS_DENSE else theirs, quick)
        return run if name == MASKED else lambda: Dense(run())

    goals = {OURS_DENSE: 1.7, PLAIN: 3.0}
    compare(
        Case(
            op="training step, row | neighborhood(7)",
            shape=training.describe(model.config, 2),
            dtype=BF16,
            device=device,
            backend=served_by("attention_bwd", torch.empty(0, dtype=torch.bfloat16, device=device)),
            ours=training.step(OURS, model, tokens, BF16),
            peers={name: side(name) for name in (MASKED, OURS_DENSE, PLAIN)},
            judge=Either(Close(sparse, torch.bfloat16, theirs == BF16), Close(dense, torch.bfloat16)),
            work={"images/s": 2, "GFLOP/s": training.flop(model.config, 2)},
            note="" if theirs == BF16 else f"torch in {theirs}, far faster here for it",
            goals=[
                Goal(f"training with a pattern against {peer}", lambda e, p=peer: e["peers"][p].get("ratio"), least)
                for peer, least in goals.items()
            ] if device == "cpu" else [],
            rounds=(3, 5),
            seconds=30.0,
        )
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory(record, benchmark, quick):
    """Each side in a process of its own, which ends with it: nothing that another side left behind is counted."""

    def peak(side):
        # Not ru_maxrss: a child starts with its parent's.
        precision = BF16 if side == OURS else peers_precision(BF16, "cpu")
        command = [sys.executable, "-m", "benchmarks.training", side, precision, *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    benchmark.group = "training step, peak memory"
    ours = benchmark.pedantic(peak, args=(OURS,), rounds=1)
    sides = (PLAIN,) if quick else (PLAIN, HF, HF_AS_IT_COMES)
    reports = {}
    for side in sides:
        report = peak(side)
        if "missing" not in report:
            report = {"peak_memory_mb": report["peak_mb"], "increase_mb": report["increase_mb"], "right": True}
            report["ratio"] = report["peak_memory_mb"] / ours["peak_mb"]
            report["increase_ratio"] = report["increase_mb"] / ours["increase_mb"]
        reports[side] = report
    entry = {
        "op": "training step, peak memory of the process",
        "shape": training.describe(training.small_model(quick).config),
        "dtype": BF16,
        "device": "cpu",
        "note": f"above the built model {ours['increase_mb']:.0f} MB",
        "peak_memory_mb": ours["peak_mb"],
        "increase_mb": ours["increase_mb"],
        "full_size": not quick,
        "peers": reports,
        **best_of(reports),
    }

    def of(peer, what="ratio"):
        return lambda entry: entry["peers"].get(peer, {}).get(what)

    goals = [
        Goal("peak memory of HF's training step as it comes against ours", of(HF_AS_IT_COMES), 2.0),
        Goal("the same, HF without its dropout", of(HF), 2.0),
    ]
    entry["goals"] = [goal.verdict(entry, not quick) for goal in goals]
    record(entry)
