"""One comparison: is everybody right, then interleaved rounds, then peak memory.

The rules. Ours and its peers run in one process on the same random data: in every round pytest-benchmark times ours,
then each peer is timed, so that a slow minute of the machine falls on all of them. Each side first runs until it is
warm. What counts is the median of the rounds, and a ratio is one median over another of the same rounds, never across
runs; only who takes minutes runs Once, and is marked. Nobody is timed before its result was held against float64 (or,
where results are integers, against the exact ones); a peer whose result is wrong is reported as wrong and is nobody's
rival.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import floor
from benchmarks.measure import Call, gpu_load, peak_memory_mb, seconds_per_call, wait
from igpt_fast.ops._native import backend_for


@dataclass(frozen=True)
class Missing:
    """A peer that cannot take part, and why: it is reported, not left out."""

    reason: str


@dataclass(frozen=True)
class Once:
    """A peer that runs for so long that one run, before the rounds, has to do: the report marks it, see its settle."""

    run: Call


@dataclass(frozen=True)
class Close:
    """Judges floating results [outputs]: the largest error of each, as a share of its largest true value in float64."""

    truth: Sequence[Tensor]
    dtype: torch.dtype
    yardstick: bool = True  # whether the peers compute in the same dtype, so that their error is a measure for ours

    def errors(self, result: Any) -> list[float]:
        outs = [result] if isinstance(result, Tensor) else list(result)
        assert [o.shape for o in outs] == [t.shape for t in self.truth], "another shape than the truth's"
        pairs = [(o.detach().to(t.device).double(), t.double()) for o, t in zip(outs, self.truth, strict=True)]
        return [float((o - t).abs().max() / t.abs().max()) for o, t in pairs]

    def passes(self, errors: list[float], peers: Sequence[list[float]]) -> bool:
        """Ours: at most twice the error of the first peer that ran, and 4 ulp. Each output on its own; NaN fails."""
        yardstick = peers[0] if peers and self.yardstick else [math.sqrt(torch.finfo(self.dtype).eps)] * len(errors)
        slack = 4 * torch.finfo(self.dtype).eps
        return all(ours <= 2 * theirs + slack for ours, theirs in zip(errors, yardstick, strict=True))

    def tolerates(self, errors: list[float]) -> bool:
        """A peer: half of the digits of its dtype are right."""
        return all(e <= math.sqrt(torch.finfo(self.dtype).eps) for e in errors)


@dataclass(frozen=True)
class Exact:
    """Judges integer results by the share that differs: none of ours may, of a peer's one in a thousand."""

    truth: Tensor

    def errors(self, result: Any) -> list[float]:
        found = torch.as_tensor(result).to(self.truth.device).reshape(self.truth.shape)
        return [float((found != self.truth).double().mean())]

    def passes(self, errors: list[float], peers: Sequence[list[float]]) -> bool:
        return errors == [0.0]

    def tolerates(self, errors: list[float]) -> bool:
        return errors[0] <= 1e-3


@dataclass(frozen=True)
class Score:
    """Judges by a number that is better the smaller it is: at most `most` for ours, `most_peer` for a peer."""

    score: Callable[[Any], float]
    most: float
    most_peer: float

    def errors(self, result: Any) -> list[float]:
        return [float(self.score(result))]

    def passes(self, errors: list[float], peers: Sequence[list[float]]) -> bool:
        return errors[0] <= self.most

    def tolerates(self, errors: list[float]) -> bool:
        return errors[0] <= self.most_peer


@dataclass(frozen=True)
class Goal:
    """What a finished entry must show. measure: the entry → a number; sense: "at least" or "at most"."""

    what: str
    measure: Callable[[Mapping[str, Any]], float | None]
    target: float
    unit: str = "×"
    sense: str = "at least"

    def verdict(self, entry: Mapping[str, Any], full_size: bool) -> dict[str, Any]:
        """The goal beside what was measured; met is None where the sizes are not those the goal speaks of."""
        value = self.measure(entry)
        met = None
        if full_size and value is not None:
            met = value >= self.target if self.sense == "at least" else value <= self.target
        fields = {"what": self.what, "sense": self.sense, "goal": self.target, "unit": self.unit}
        return {**fields, "measured": value, "met": met}


@dataclass(frozen=True)
class Case:
    """One comparison. op, shape, dtype name it; work: amounts per call by unit, such as {"GFLOP/s": 1.07e9}."""

    op: str
    shape: str
    ours: Call
    peers: Mapping[str, Call | Once | Missing]
    judge: Close | Exact | Score
    work: Mapping[str, float]
    judges: Mapping[str, Score] = field(default_factory=dict)  # of peers that draw numbers of their own, by name
    dtype: str = ""
    device: str = "cpu"
    backend: str = ""
    goals: Sequence[Goal] = ()
    note: str = ""
    seconds: float = 4.0  # what all rounds together may take, about
    rounds: tuple[int, int] = (5, 60)
    memory: bool = True
    pause: float = 0.0  # seconds of rest between sides: threads of another OpenMP runtime spin on after their work
    extra: Callable[[str, Any], dict[str, Any]] = field(default=lambda side, result: {})  # more fields from a result


def steps_served_by(t: Tensor) -> str:
    """Who serves a decoding step of that dtype, there: on a CPU one call, on a GPU the kernels of its ops."""
    return served_by("attention_decode" if t.is_cuda else "decode_step", t)


def served_by(op: str, *tensors: Tensor) -> str:
    """The backend that serves this op (a field of csrc/ops.h) for such tensors, by name; "reference" when none does."""
    halves = tensors[0].is_cuda and op.startswith(("attention", "linear_fwd")) and tensors[0].dtype is torch.float32
    backend = backend_for(op, tensors, "its kernels take 16 bits alone" if halves else None)
    return "reference" if backend is None else backend.name


def float64(fn: Callable, *args: Any) -> list[Tensor]:
    """What fn gives when its floating arguments are float64: the truth that results are held against."""
    out = fn(*(a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    return [out.detach()] if isinstance(out, Tensor) else [o.detach() for o in out]


def gradients64(fn: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The same for the gradients of fn's floating inputs, given those of its outputs."""
    leaves = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in inputs]
    out = fn(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    return list(torch.autograd.grad(outs, [a for a in leaves if a.requires_grad], [g.double() for g in grads]))


def dtype_name(value: Any) -> str:
    """float32 for torch.float32, …; anything else as it prints, so that it serves as pytest's ids."""
    return str(value).removeprefix("torch.")


UNITS = {"GFLOP/s": 1e9, "GB/s": 1e9, "Mpixel/s": 1e6}


def compare(case: Case, benchmark: Any, quick: bool) -> dict[str, Any]:
    """Runs a case with pytest-benchmark's fixture → its entry for the results. AssertionError when ours is wrong."""
    sides, reports, first = {"ours": case.ours}, {}, {}
    ours, first["ours"] = _timed(case.ours, case.device)
    errors, more = case.judge.errors(ours), case.extra("ours", ours)
    del ours
    trusted = []
    for name, peer in case.peers.items():
        if isinstance(peer, Missing):
            reports[name] = {"missing": peer.reason}
            continue
        result, first[name] = _timed(peer.run if isinstance(peer, Once) else peer, case.device)
        judge = case.judges.get(name, case.judge)
        found = judge.errors(result)
        reports[name] = {"error": max(found), "right": judge.tolerates(found), **case.extra(name, result)}
        del result
        if reports[name]["right"] and judge is case.judge:
            trusted.append(found)
        if isinstance(peer, Once):
            reports[name] |= {"seconds": first[name], "rounds": 1}
        else:
            sides[name] = peer
    assert case.judge.passes(errors, trusted), f"{case.op}: ours is off by {errors}, the peers by {trusted}"
    times = interleave(benchmark, sides, first, case, quick)
    entry = {
        **{name: getattr(case, name) for name in ("op", "shape", "dtype", "device", "backend", "note")},
        **({"error": max(errors), "full_size": not quick} | more),
        **_timing(times["ours"]),
    }
    if case.device == "cuda" and not benchmark.disabled:
        entry["gpu"] = gpu_load(case.ours)
    if case.memory:
        entry["peak_memory_mb"] = peak_memory_mb(case.ours, case.device)
        for name in sides.keys() - {"ours"}:
            reports[name]["peak_memory_mb"] = peak_memory_mb(sides[name], case.device)
    for name, seconds in times.items():
        if name != "ours":
            reports[name] |= _timing(seconds)
    return finish(entry, reports, case, quick)


def finish(entry: dict[str, Any], reports: dict[str, dict[str, Any]], case: Case, quick: bool) -> dict[str, Any]:
    """Adds rates, ratios, the best peer and the goals' verdicts to what was measured."""
    for report in (entry, *reports.values()):
        if report.get("seconds"):
            report["rates"] = {u: amount / UNITS.get(u, 1) / report["seconds"] for u, amount in case.work.items()}
    for report in reports.values():
        if report.get("seconds") and entry.get("seconds"):
            report["ratio"] = report["seconds"] / entry["seconds"]
    entry |= {"peers": reports, **best_of(reports)}
    name = torch.cuda.get_device_name() if case.device == "cuda" else None
    if entry.get("seconds") and case.dtype != "float32" and (least := floor(case.work, name)):
        entry["floor"] = {"seconds": least[0], "by": least[1], "share": least[0] / entry["seconds"]}
    entry["goals"] = [goal.verdict(entry, not quick) for goal in case.goals]
    return entry


def best_of(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The peer that comes closest to ours, or beats it, among those that are right; and by how much ours is better."""
    rivals = {name: report["ratio"] for name, report in reports.items() if report.get("right") and "ratio" in report}
    best = min(rivals, key=rivals.__getitem__, default=None)
    return {"best_peer": best, "ratio": rivals.get(best)}


def interleave(
    benchmark: Any, sides: Mapping[str, Call], first: Mapping[str, float], case: Case, quick: bool
) -> dict[str, list[float]]:
    """Seconds per call of each side, round by round; empty when pytest-benchmark is off (then ours runs once).

    first: seconds of each side's first call, which for a long one is enough to warm it and to plan with.
    """
    loops, round_seconds = {}, 0.0
    on_gpu = case.device == "cuda"
    for name, run in sides.items():
        once = first[name]
        for calls in (1, 3):
            if once < 0.5 and not quick:
                once = max(seconds_per_call(run, calls, case.device), 1e-7)
        if on_gpu:  # each call has its events, and is kept waiting for half a millisecond before it
            loops[name], once = max(1, min(4, round(0.005 / once))), once + 5e-4
        else:
            loops[name] = max(1, round(0.01 / once))  # a round of 10 ms or more is above the clock's noise
        loops[name] = 1 if quick else loops[name]
        round_seconds += loops[name] * once
    least, most = (2, 2) if quick else case.rounds
    seconds = min(case.seconds, 0.8) if on_gpu else case.seconds  # all of them are to fit into two minutes
    rounds = min(most, max(least, int(seconds / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in sides}

    def others(*_: Any) -> None:
        for name, run in sides.items():
            if name != "ours" or on_gpu:  # on a GPU, ours is timed by the device's own events as the others are
                time.sleep(case.pause)
                times[name].append(seconds_per_call(run, loops[name], case.device))
        time.sleep(case.pause)

    target = sides["ours"]

    def waiting() -> Any:
        result = target()
        wait(case.device)
        return result

    benchmark.group = case.op
    benchmark.pedantic(waiting if on_gpu else target, rounds=rounds, iterations=loops["ours"], teardown=others)
    if benchmark.disabled:
        return {name: [] for name in sides}
    if not on_gpu:
        times["ours"] = list(benchmark.stats.stats.data)
    return {name: seconds[:rounds] for name, seconds in times.items()}


def _timed(run: Call, device: str) -> tuple[Any, float]:
    began = time.perf_counter()
    result = run()
    wait(device)
    return result, time.perf_counter() - began


def _timing(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {}
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"seconds": statistics.median(seconds), "quartiles": [low, high], "rounds": len(seconds)}
