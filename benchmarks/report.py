"""What was measured, from benchmarks/results/*.json: the tables of docs/benchmarks.md, and the README's one.

python -m benchmarks.report                # prints all tables
python -m benchmarks.report --summary      # prints the summary
python -m benchmarks.report --write        # puts each between the two benchmarks: markers of its page
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import best_of
from benchmarks.summary import summary
from benchmarks.tables import ONCE, duration, figure, memory, once, ratio, table
from igpt_fast.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

# What leads the table; all other ops follow in the order of their names.
FIRST = (
    "training step",
    "training step, peak memory of the process",
    "sampling, whole images",
    "palette encode",
    "palette fit",
)


def main(argv: list[str] | None = None) -> int:
    """Prints or writes the tables; 2 when there is nothing to report or no place to write it to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="What was measured, as tables.")
    parser.add_argument(
        "results", nargs="*", type=Path, help="result files (all of benchmarks/results, but quick.json)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--summary", action="store_true", help="print the README's table")
    what.add_argument("--write", action="store_true", help="write both pages: docs/benchmarks.md and README.md")
    options = parser.parse_args(argv)
    found = [load(path) for path in options.results or sorted(RESULTS.glob("*.json"))]
    chosen = [data for data in found if data and (options.results or not data["quick"])]
    if not chosen:
        return _fail("there are no results yet; make some with `pytest benchmarks/ --benchmark-only`")
    if not options.write:
        print(summary(chosen) if options.summary else everything(chosen))
        return 0
    pages = {ROOT / "docs" / "benchmarks.md": everything(chosen), ROOT / "README.md": summary(chosen)}
    for page in pages:
        if not re.search(f"{BEGIN}.*{END}", page.read_text(encoding="utf-8"), re.S):
            return _fail(f"{page} lacks {BEGIN} or, after it, {END}: put both where the tables shall stand")
    for page, text in pages.items():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(page, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())
    return 0


def everything(machines: Sequence[Mapping[str, Any]]) -> str:
    """A section a machine, then what the columns mean."""
    entries = [entry for data in machines for entry in data["entries"].values()]
    return "\n\n".join([*map(section, machines), legend(entries)])


def load(path: Path) -> dict[str, Any] | None:
    """The results in a file, settled, or None when it holds something else."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not {"machine", "runs", "entries"} <= data.keys():
        return None
    settle(data["entries"].values())
    return data


def settle(entries: Iterable[dict[str, Any]]) -> None:
    """A peer that ran once, cold, gets the least time that it took for the same work in any of these entries.

    Dense attention is the same work beside every pattern of a size; any other peer's is its own row's.
    """
    least: dict[tuple[str, ...], float] = {}
    single = [(name, entry) for entry in entries for name, report in entry["peers"].items() if once(report)]
    for name, entry in single:
        work = _work(name, entry)
        least[work] = min(entry["peers"][name]["seconds"], least.get(work, math.inf))
    for name, entry in single:
        seconds = least[_work(name, entry)]
        entry["peers"][name] |= {"seconds": seconds, "ratio": seconds / entry["seconds"]}
        entry |= best_of(entry["peers"])


def _work(peer: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What a peer does in an entry."""
    op = entry["op"].removeprefix(f"pattern {entry['sparse']['pattern']}") if _dense(peer, entry) else entry["op"]
    return (peer, op, *(entry[name] for name in ("shape", "dtype", "device")))


def _dense(peer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a peer beside a pattern sees everything."""
    return "sparse" in entry and peer.endswith(", dense")


def section(data: Mapping[str, Any]) -> str:
    """One machine: what it is, its goals, its comparisons, and who did not take part."""
    entries = sorted(data["entries"].values(), key=_rank)
    parts = [heading(data, entries)]
    if rows := [_goal(goal) for entry in entries for goal in entry["goals"]]:
        parts.append(table(("goal", "asked", "measured", ""), rows))
    timed = [entry for entry in entries if entry.get("seconds") or entry.get("peak_memory_mb")]
    head = ("", "sizes", "igpt-fast", "rate", "best peer", "ratio", "peak memory", "the peer's")
    leading = [_row(entry) for entry in timed if _rank(entry)[0] < len(FIRST)]
    if leading:
        parts.append(table(head, leading))
    if sparse := [entry for entry in timed if "sparse" in entry]:
        parts.append(f"<details><summary>Sparse patterns ({len(sparse)} comparisons)</summary>\n\n{patterns(sparse)}")
        parts.append("</details>")
    if others := [_row(entry) for entry in timed if _rank(entry)[0] == len(FIRST) and "sparse" not in entry]:
        parts.append(
            f"<details><summary>Op by op ({len(others)} comparisons)</summary>\n\n{table(head, others)}\n\n</details>"
        )
    kinds = ("Did not take part", _absent), ("Timed, not judged", _unjudged)
    said = [(what, sorted({line for entry in entries for line in of(entry)})) for what, of in kinds]
    if others := [f"{what}: {'; '.join(lines)}." for what, lines in said if lines]:
        parts.append(" ".join(others))
    return "\n\n".join(parts)


def legend(entries: Iterable[Mapping[str, Any]]) -> str:
    """What the columns mean."""
    text = (
        "Ratio: the best peer's median time over ours (for memory, its peak over ours), in interleaved rounds of one "
        "process; above 1 ours is better. Peak memory: what a call needs beyond what was there before it, results "
        "included; of a process, all of it. Every peer, with quartiles and errors, is in `benchmarks/results/`."
    )
    if single := [_dense(name, entry) for entry in entries for name in entry["peers"] if once(entry["peers"][name])]:
        text += f" {ONCE} The peer ran once, cold, before the rounds"
        text += "; dense attention once beside each pattern, of which the least time counts." if any(single) else "."
    return text


def heading(data: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> str:
    """Machine, versions and commits in a few lines."""
    machine, runs = data["machine"], data["runs"]
    newest = runs[max(runs)]
    where = f"{machine['gpu']}, {machine['cpu']}" if machine["gpu"] else machine["cpu"]
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    lines = [f"**{where}, {machine['cores']} cores{memory}**, {machine['threads']} threads, {machine['system']}; "]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items() if version[:3] != "not")
    lines.append(f"backends {', '.join(machine['backends'])}; {versions}. ")
    used = sorted({entry["run"] for entry in entries})
    lines.append("Measured: " + "; ".join(_run(runs[r], machine["cores"]) for r in used) + ".")
    quick = "**A quick run: tiny sizes, two rounds. These figures mean nothing.**\n\n" if data["quick"] else ""
    return quick + "".join(lines)


def patterns(entries: Iterable[Mapping[str, Any]]) -> str:
    """The table of sparse patterns, a pattern and a size a row, by size; a peer's column says how often ours is faster.

    entries: those of benchmarks/test_patterns.py, which carry the pattern and its densities as "sparse".
    """
    peers = ("ours, dense", "torch SDPA, dense", "torch SDPA, boolean mask", "FlexAttention, compiled")
    rows = []
    for entry in sorted(entries, key=lambda e: (e["sparse"]["side"], e["op"])):
        about, found = entry["sparse"], [entry["peers"].get(peer, {}) for peer in peers]
        rows.append(
            [
                entry["op"].removeprefix("pattern "),
                f"{about['side']} × {about['side']}" + (f", {entry['device']}" if entry["device"] != "cpu" else ""),
                f"{about['tiles']:.1%}",
                duration(entry["seconds"]) if entry.get("seconds") else "",
                *(ratio(r) if r.get("right") and "ratio" in r else "" for r in found),
                memory(entry),
                memory(found[1]),
            ]
        )
    head = ("pattern", "pixels", "tiles", "igpt-fast", *peers, "peak memory", "dense SDPA's")
    return table(head, rows)


def _rank(entry: Mapping[str, Any]) -> tuple[int, str]:
    place = next(
        (i for i, op in enumerate(FIRST) if entry["op"] == op or entry["op"].startswith(op + ", ph")), len(FIRST)
    )
    return place, entry["op"]  # sorting is stable: cases of an op stay in the order in which they were measured


def _goal(goal: Mapping[str, Any]) -> list[str]:
    value = "not measured" if goal["measured"] is None else f"{figure(goal['measured'])} {goal['unit']}"
    verdict = {True: "met", False: "**not met**", None: "not judged"}[goal["met"]]
    return [goal["what"], f"{goal['sense']} {goal['goal']:g} {goal['unit']}", value, verdict]


def _row(entry: Mapping[str, Any]) -> list[str]:
    best = entry["peers"].get(entry["best_peer"], {})
    sizes = ", ".join(part for part in (entry["shape"], entry["dtype"], entry["note"]) if part)
    if entry["device"] != "cpu":
        sizes += f", {entry['device']}"
    if entry.get("backend") == "reference":
        sizes += ", in plain torch"
    return [
        entry["op"],
        sizes,
        duration(entry["seconds"]) if entry.get("seconds") else "",
        "; ".join([f"{figure(value)} {unit}" for unit, value in entry.get("rates", {}).items()] + _floor(entry)),
        entry["best_peer"] or "none",
        ratio(best) if entry["ratio"] else "",
        memory(entry),
        memory(best),
    ]


def _floor(entry: Mapping[str, Any]) -> list[str]:
    least = entry.get("floor")
    return [f"{least['share']:.0%} of the floor by {least['by']}"] if least else []


def _absent(entry: Mapping[str, Any]) -> Iterable[str]:
    for name, report in entry["peers"].items():
        if "missing" in report:
            yield f"{name} ({report['missing']})"
        elif not report.get("right") and "unjudged" not in report:
            yield f"{name} in {entry['op']} (timed, but its result differs, error {report['error']:.2g})"


def _unjudged(entry: Mapping[str, Any]) -> Iterable[str]:
    """Peers whose result says nothing, with the reason that their report gives."""
    for name, report in entry["peers"].items():
        if "unjudged" in report:
            yield f"{name} in {entry['op']} ({report['unjudged']})"


def _run(run: Mapping[str, Any], cores: int) -> str:
    name, _, rest = run["commit"].partition(" ")
    busy = f", on a machine that was busy (load {run['load']:g})" if run["load"] > cores / 4 else ""
    return f"{run['date'][:10]} at commit `{name[:9]}`" + (f" {rest}" if rest else "") + busy


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
