"""--quick, the devices, the `compare` fixture, and the results: benchmarks/results/<machine>.json.

The file holds the newest entry of every comparison made on that machine, each with the run it comes from: its commit,
date and versions. A quick run only shows that everything works, and writes results/quick.json, which git ignores.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from igpt_fast.device import keep_memory, processor
from igpt_fast.ops._native import BACKENDS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "numpy", "scipy", "scikit-learn", "faiss-cpu", "transformers", "pytest-benchmark",
)  # fmt: skip
ENTRIES = pytest.StashKey[dict[str, dict[str, Any]]]()
RUN = pytest.StashKey[dict[str, Any]]()
WRITTEN = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes, two rounds: does every benchmark work?")
    parser.addoption("--served-by", metavar="BACKEND", help="only what this backend serves, such as cuda")
    parser.addoption(
        "--results", type=Path, metavar="FILE", help="where results go (benchmarks/results/<machine>.json)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENTRIES], config.stash[RUN] = {}, run()  # now, not at the end: the sources may change meanwhile
    if config.getoption("benchmark_only"):  # the project's settings turn timing off, for the sake of the test suite
        config.option.benchmark_enable = True
        keep_memory()  # for all sides: else a call's time holds that of clearing pages, which varies
        config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "rounds", "iterations"]


def devices() -> list[str]:
    """Where benchmarks run: the CPU, and a GPU when torch sees one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether sizes are tiny: when asked for, and when pytest-benchmark is off, so that only correctness is checked."""
    options = request.config.option
    return options.quick or (options.benchmark_disable and not options.benchmark_enable)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keeps a finished entry for the results, and shows its figures to pytest-benchmark."""

    def keep(entry: dict[str, Any]) -> dict[str, Any]:
        benchmark.extra_info.update(
            {k: entry[k] for k in ("rates", "ratio", "best_peer", "peak_memory_mb") if k in entry}
        )
        if not benchmark.disabled:
            parts = (entry["op"], entry["shape"], entry["dtype"], entry["device"])
            request.config.stash[ENTRIES][", ".join(part for part in parts if part)] = entry
        return entry

    return keep


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, record: Callable, quick: bool
) -> Callable[[harness.Case], dict[str, Any]]:
    """Runs one comparison and keeps its entry."""
    wanted = request.config.getoption("--served-by")

    def run(case: harness.Case) -> dict[str, Any]:
        if wanted and case.backend != wanted:
            pytest.skip(f"served by {case.backend}, not {wanted}")
        return record(harness.compare(case, benchmark, quick))

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if entries := config.stash[ENTRIES]:
        options = config.option
        whole = not (options.keyword or options.markexpr or options.deselect or session.testsfailed)
        whole = whole and [Path(arg).resolve() for arg in config.args] == [RESULTS.parent]
        path = config.getoption("--results") or place(config.getoption("--quick"))
        config.stash[WRITTEN] = write(path, entries, config.stash[RUN], config.getoption("--quick"), whole)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, entry in config.stash[ENTRIES].items():
        ratio = f"{entry['ratio']:.2f} × {entry['best_peer']}" if entry.get("ratio") else "no peer ran"
        terminalreporter.write_line(f"{name}: {ratio}")
        for goal in entry["goals"]:
            verdict = {True: "met", False: "NOT MET", None: "not judged"}[goal["met"]]
            terminalreporter.write_line(
                f"    {goal['what']}: {goal['measured']} ({goal['sense']} {goal['goal']}): {verdict}"
            )
    if WRITTEN in config.stash:
        terminalreporter.write_line(f"results: {config.stash[WRITTEN]}")


def place(quick: bool) -> Path:
    """This machine's file, or that of quick runs."""
    here = machine()
    threads = f"{here['threads']} thread{'s' * (here['threads'] > 1)}"
    # Virtual machines name all their processors alike, so the kernels' table stands for the kind.
    where = here["gpu"] or f"{here['cpu']} {here['backends'][0]}"
    name = "quick" if quick else re.sub(r"[^a-z0-9]+", "-", f"{where} {threads}".lower())
    return RESULTS / f"{name.strip('-')}.json"


def write(path: Path, entries: dict[str, dict[str, Any]], this: dict[str, Any], quick: bool, whole: bool) -> Path:
    """Puts the entries into a file of results, in place of older ones; after a whole run they are all there is."""
    old = json.loads(path.read_text()) if path.exists() and not whole else {"entries": {}, "runs": {}}
    number = f"{this['date']} {this['commit'][:9]}"
    merged = old["entries"] | {name: {**entry, "run": number} for name, entry in entries.items()}
    used = {entry["run"] for entry in merged.values()}
    runs = {key: value for key, value in {**old["runs"], number: this}.items() if key in used}
    data = {"quick": quick, "machine": machine(), "runs": runs, "entries": merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def machine() -> dict[str, Any]:
    """What the figures depend on and a reader can compare with his own."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": list(BACKENDS) or ["reference"],
        "system": f"{platform.system()} {platform.machine()}",
    }


def run() -> dict[str, Any]:
    """When, from which sources, and with which versions."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "igpt_fast", "csrc", "benchmarks/*.py")
    commit = os.environ.get("IGPT_COMMIT") or git("rev-parse", "HEAD") or "unknown"  # who copies a tree knows best
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + " UTC",
        "commit": commit + (" with uncommitted changes" if changed else ""),
        "command": " ".join(["pytest", *(re.sub(r"/\S*/", "", arg) for arg in sys.argv[1:])]),  # no place of a machine
        "load": round(os.getloadavg()[0], 2),
        "versions": versions,
    }
