"""Everything that a machine with a GPU can say about the kernels, in one command that ends inside nine minutes.

    make gpu-check OUT=dir [PART=build|tests|layouts|sanitizer|rates|benchmarks] [PYTHON=python3]

It needs no network: nvcc, and a python3 with torch, pytest, hypothesis, pybind11, cmake, ninja and setuptools. The
package goes into build/gpu-check/tree beside copies of tests and benchmarks, for this GPU's architecture alone; nothing
else on the machine changes. dir gets gpu-check.json, table.txt, benchmarks.json and logs/. Exit status: 0 all passed, 1
not, 2 there is no GPU. `make gpu-record OUT=dir` then keeps in verified.json which kernels hardware agreed with.
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu import parts, report
from gpu.build import (
    CALLS,
    DRIVE,
    HARDWARE,
    RATES,
    ROOT,
    SCRATCH,
    TREE,
    Machine,
    bench_built,
    build,
    environment,
    tool,
    worst,
)
from gpu.parts import FAILED, NOT_RUN, PASSED, TIMED_OUT, Clock, Done, Part

TOTAL = 505.0  # seconds: the rest of nine minutes is for asking about the GPU, and for ending what hangs

FACTS = """
import json, platform, torch
assert torch.cuda.is_available(), "torch sees no GPU" + (": it is built for the CPU" if not torch.version.cuda else "")
p = torch.cuda.get_device_properties(0)
x = torch.ones(8, device="cuda"); assert float((x + x).sum()) == 16
print(json.dumps({"gpu": p.name, "capability": [p.major, p.minor], "memory_gib": round(p.total_memory / 2**30, 1),
    "multiprocessors": p.multi_processor_count, "torch": torch.__version__, "cuda": torch.version.cuda,
    "python": platform.python_version()}))
"""


# ---- tests, layouts, benchmarks: pytest in the tree ----


def pytest(clock: Clock, name: str, *arguments: str | Path, limit: float | None = None, **env: str) -> dict[str, Any]:
    """One run of pytest → its counts, and the names of what failed. limit: as Clock.command's."""
    xml = SCRATCH / f"{name}.xml"
    xml.unlink(missing_ok=True)
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu.hardware", f"--junitxml={xml}"]
    if find_spec("pytest_benchmark") is None:  # which the project's settings mention
        line += ["-o", "addopts=-q --strict-markers"]
    bench = str(SCRATCH / "simt") if bench_built() else "none"
    done = clock.command(name, [*line, *arguments], TREE, limit, IGPT_SIMT_DIR=bench, **env)
    found = {"status": done.status, **counts(xml)}
    if done.code == 5:  # pytest's word for nothing collected
        found["status"] = NOT_RUN
    elif done.status != PASSED:
        found["tail"] = done.tail()
    return found


def counts(xml: Path) -> dict[str, Any]:
    """Passed, failed and skipped of a junit file."""
    if not xml.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    cases = list(ElementTree.parse(xml).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = {"failures": [c.get("name") for c in bad][:40]} if bad else {}
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, **names}


def by_function(path: Path) -> dict[str, str]:
    """The tests of a file → what pytest calls them."""
    return {f"{path.stem}-{name}": f"{path}::{name}" for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}


def apart(clock: Clock, tests: Mapping[str, str], skip: str, env: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    """Each of the tests in a process, so many at once: an illegal instruction breaks the context for all after it."""
    found: dict[str, dict] = {}

    def one(name: str) -> Done:
        found[name] = pytest(clock, name, tests[name], "-k", skip, **env(name))
        return Done(0, 0.0, Path())

    clock.together({name: functools.partial(one, name) for name in tests}, max(2, len(os.sched_getaffinity(0)) // 2))
    return worst({name: f["status"] for name, f in found.items()}) | {"files": found}


LONG = ("test_cuda", "test_attention_decode", "test_attention")  # whose tests run side by side, and first


def tests(machine: Machine, clock: Clock) -> dict[str, Any]:
    """Every test of every op but those of the CPU's kernels."""
    chosen = [p for p in sorted((TREE / "tests").glob("test_*.py")) if "\nfrom check import" in p.read_text()]
    chosen.append(TREE / "tests" / "test_cuda.py")
    nodes: dict[str, str] = {}
    for path in sorted(chosen, key=lambda p: p.stem not in LONG):
        nodes |= by_function(path) if path.stem in LONG else {path.stem: str(path)}
    agreements = {name: SCRATCH / f"{name}.json" for name in nodes}
    for path in agreements.values():
        path.unlink(missing_ok=True)
    skip = "not simt and not avx and not baseline"
    found = apart(clock, nodes, skip, lambda n: {"IGPT_AGREEMENT": str(agreements[n]), "OMP_NUM_THREADS": "2"})
    ops: dict[str, dict[str, int]] = {}
    for path in agreements.values():
        for op, n in (json.loads(path.read_text()) if path.exists() else {}).items():
            ops[op] = {k: ops.get(op, {}).get(k, 0) + n[k] for k in n}
    return found | {"ops": ops}


def layouts(machine: Machine, clock: Clock) -> dict[str, Any]:
    names = ["test_collectives", "test_layouts", *["test_layouts_sm90"] * machine.hopper, "test_faults"]
    skip = "not planted and not deadlock and not failed_one and not catch_their"
    if not machine.hopper:
        skip += " and not product and not ring"
    nodes: dict[str, str] = {}
    for name in names:
        nodes |= by_function(TREE / "tests" / "simt" / f"{name}.py")
    found = apart(clock, nodes, skip, lambda _: {"IGPT_HARDWARE": str(HARDWARE)})
    note = "each held against the bench, bit for bit" if bench_built() else "the bench did not build: formulas alone"
    return found | {"note": note if machine.hopper else f"{note}; not those of sm_90a, which this GPU is not"}


def of_kernels(files: list[Path]) -> list[Path]:
    """Those of the benchmarks' files that a CUDA kernel has: test_attention.py has attention_fwd.cu."""
    kernels = [p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")]
    names = [f"{p.stem.removeprefix('test_')}_" for p in files]
    return [p for p, name in zip(files, names, strict=True) if any(f"{k}_".startswith(name) for k in kernels)]


def by_need(files: list[Path]) -> list[Path]:
    """Those first whose kernels no hardware has seen, and what is built of them."""
    kernels = json.loads((ROOT / report.VERIFIED).read_text())["kernels"]
    new = [name for name, entry in kernels.items() if not entry["commit"]]
    rank = {p: not any(f"{k}_".startswith(f"{p.stem.removeprefix('test_')}_") for k in new) for p in files}
    return sorted(files, key=lambda p: (rank[p] and p.stem != "test_sampling", len(p.read_text())))


def benchmarks(machine: Machine, clock: Clock) -> dict[str, Any]:
    if find_spec("pytest_benchmark") is None:
        return {"status": NOT_RUN, "reason": "pytest-benchmark is not here"}
    results = machine.out.resolve() / "benchmarks.json"
    results.unlink(missing_ok=True)
    options = ["--benchmark-only", "--served-by", "cuda", "-k", "cuda", f"--results={results}"]
    files = by_need(of_kernels(sorted((TREE / "benchmarks").glob("test_*.py"))))
    found: dict[str, dict] = {}
    for i, path in enumerate(files):  # one after the other, in processes of their own: what breaks one hides no other
        share = clock.left() / (len(files) - i) * (2 if i + 1 < len(files) else 1)
        found[path.stem] = pytest(clock, f"benchmark-{path.stem}", path, *options, limit=share)
    entries = len(json.loads(results.read_text())["entries"]) if results.exists() else 0
    return worst({name: f["status"] for name, f in found.items()}) | {"files": found, "entries": entries}


def rates(machine: Machine, clock: Clock) -> dict[str, Any]:
    """What the tensor cores do with operands from shared memory and from registers, which PLAN.md builds upon."""
    if not RATES.exists():
        return {"status": NOT_RUN, "reason": "of sm_90a, which this GPU is not" if not machine.hopper else "not built"}
    done = clock.command("rates", [RATES], SCRATCH)
    if done.status != PASSED:
        return {"status": done.status, "reason": done.tail(1)}
    return {"status": PASSED, "cycles": json.loads(done.log.read_text().split("\n", 1)[1])}


# ---- compute-sanitizer over the recorded calls, one op at a time, so that each has a verdict ----


def sanitizer(machine: Machine, clock: Clock) -> dict[str, Any]:
    program = machine.tools["compute-sanitizer"]
    if not program:
        return {"status": NOT_RUN, "reason": "compute-sanitizer is not here"}
    line = [sys.executable, "-m", "simt.calls", CALLS, "gpu"]
    if clock.command("calls", line, TREE, IGPT_SIMT_DIR="none").code != 0:
        return {"status": FAILED, "reason": "the calls could not be recorded: see logs/calls.txt"}
    ops = list(json.loads((TREE / "benchmarks/results/verified.json").read_text())["kernels"])
    ops = [op for op in ops if not op.endswith("_sm90")]  # an op's kernels for one GPU run where it chooses them

    def check(name: str, which: str, *arguments: str | Path) -> Done:
        # Allocations lie side by side: without room between them a step beside one is a step into the next.
        room = ["--padding", "64"] if which == "memcheck" else []
        return clock.command(f"{which}-{name}", [program, "--tool", which, *room, DRIVE, *arguments], SCRATCH)

    commands = {f"{which} {op}": functools.partial(check, op, which, CALLS, op) for which in TOOLS for op in ops}
    commands |= {
        "racecheck planted": functools.partial(check, "planted", "racecheck", "race"),
        "memcheck planted": functools.partial(check, "planted", "memcheck", "wild"),
    }
    done = clock.together(commands, 4)
    verdicts = {name: verdict(d) for name, d in done.items()}
    for name in ("racecheck planted", "memcheck planted"):  # a check that cannot fail is none
        verdicts[name] = {PASSED: FAILED, FAILED: PASSED}.get(verdicts[name], verdicts[name])
    found = worst(verdicts)
    if found["status"] == NOT_RUN:
        found["reason"] = "compute-sanitizer does not work here: " + done["memcheck planted"].tail(1)
    return found


TOOLS = ("memcheck", "racecheck")


def verdict(done: Done) -> str:
    """By the tool's own summary: without one it has not looked."""
    text = done.log.read_text(errors="replace")
    found = re.search(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+)", text)
    if done.code is None:
        return TIMED_OUT
    if not found or "not supported" in text:
        return NOT_RUN
    return PASSED if int(found[1] or found[2] or 0) == 0 and done.code == 0 else FAILED


PARTS: list[tuple[str, float, Callable[[Machine, Clock], dict[str, Any]]]] = [
    ("build", 180, build),
    ("tests", 100, tests),
    ("layouts", 40, layouts),
    ("sanitizer", 55, sanitizer),
    ("rates", 10, rates),
    ("benchmarks", 120, benchmarks),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=[name for name, *_ in PARTS])
    options = parser.parse_args(argv)
    try:
        asked = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=120)
        facts, why = asked.stdout.strip().splitlines()[-1:], asked.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        facts, why = [], ["torch did not answer within two minutes"]
    if not facts or not facts[0].startswith("{"):
        print(f"gpu-check: no GPU to check here ({why[0] if why else 'no answer'})", file=sys.stderr)
        return 2
    for kind in (signal.SIGINT, signal.SIGTERM):  # also where we began in the background, which ignores the first:
        signal.signal(kind, signal.default_int_handler)  # commands inherit that, and could not be interrupted
    options.out.mkdir(parents=True, exist_ok=True)
    tools = {name: tool(name) for name in ("nvcc", "compute-sanitizer", "cuobjdump")}
    machine = Machine(json.loads(facts[0]), tools, options.out)
    built = TREE.exists() and HARDWARE.exists()
    chosen = [p for p in PARTS if options.part in (None, p[0]) or (p[0] == "build" and not built)]
    made = report.heading(ROOT) | {"machine": machine.facts | report.driver(), "tools": tools}
    made["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    todo = [Part(name, seconds, functools.partial(run, machine)) for name, seconds, run in chosen]
    SCRATCH.mkdir(parents=True, exist_ok=True)
    done = parts.run(todo, made, options.out, TOTAL, environment())
    done["kernels"] = report.kernels(done, ROOT)
    parts.write(done, options.out)
    text = report.table(done, options.out)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return 0 if all(p["status"] in (PASSED, NOT_RUN) for p in done["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
