"""What a gpu-check found: the table at its end, and the record of which kernels hardware agreed with.

    PYTHONPATH=tests python -m gpu.report dir            # the table once more
    make gpu-record OUT=dir                              # into benchmarks/results: verified.json, and the benchmarks

A verdict belongs to sources, which gpu-check.json names by a hash of csrc/: recording asks for a checkout that holds
exactly them, committed, since the machine with the GPU may have no git.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
VERIFIED = Path("benchmarks") / "results" / "verified.json"


def git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where it cannot."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def sources(root: Path) -> str:
    """A hash of all that is compiled."""
    sum_ = hashlib.sha256()
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.is_file()):
        sum_.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sum_.hexdigest()


def heading(root: Path) -> dict[str, Any]:
    """Which sources a report is about."""
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    commit = os.environ.get("IGPT_COMMIT") or git(root, "rev-parse", "HEAD")  # a copy may have another's .git, or none
    return {"commit": commit, "changed": bool(changed), "sources": sources(root)}


def driver() -> dict[str, Any]:
    """The driver's version and the card's limits, from nvidia-ml-py or nvidia-smi, as far as they are here."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    line = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
        values = done.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return {"driver": None}
    return dict(zip(("driver", "power_limit", "max_sm_clock", "max_memory_clock"), values, strict=False))


def kernels(report: Mapping[str, Any], root: Path) -> dict[str, dict[str, Any]]:
    """Of each kernel of verified.json: how many tests it passed, what compute-sanitizer said, whether all agreed.

    agreed is None where the tests never called it, or where those that failed called others too and some passed.
    """
    found = {}
    ran = report["parts"].get("tests", {}).get("ops", {})
    checked = report["parts"].get("sanitizer", {}).get("pieces", {})
    for op in json.loads((root / VERIFIED).read_text())["kernels"]:
        asked = op.removesuffix("_sm90")  # kernels that the op chooses on Hopper
        if asked != op and report["machine"].get("capability") != [9, 0]:
            asked = ""
        counts = {"passed": 0, "failed": 0, "unclear": 0} | ran.get(asked, {})
        tools = {which: checked.get(f"{which} {asked}", "not run") for which in ("memcheck", "racecheck")}
        agreed = None
        if counts["failed"] or "failed" in tools.values() or (counts["unclear"] and not counts["passed"]):
            agreed = False
        elif counts["passed"] and not counts["unclear"]:
            agreed = "timed out" not in tools.values()
        found[op] = {"agreed": agreed, **counts, **tools}
    return found


def table(report: Mapping[str, Any], out: Path) -> str:
    """Parts, kernels and comparisons in a screenful."""
    machine = report["machine"]
    lines = [
        f"{machine['gpu']}, driver {machine.get('driver') or '?'}, CUDA {machine['cuda']}, torch {machine['torch']}"
    ]
    for name, part in report["parts"].items():
        counts = f"{part['passed']} passed, {part['failed']} failed" if "passed" in part else part.get("reason", "")
        if "files" in part:
            total = {k: sum(f[k] for f in part["files"].values()) for k in ("passed", "failed")}
            counts = f"{total['passed']} passed, {total['failed']} failed"
        seconds = f"{part['seconds']:.0f} s" if "seconds" in part else ""
        lines.append(f"  {name:12} {part['status']:10} {seconds:>6}  {counts.splitlines()[0] if counts else ''}")
    for what, rate in report["parts"].get("rates", {}).get("cycles", {}).items():
        lines.append(f"  {what:60}{rate['cycles']:8.1f} cycles  {rate['mhz']:.0f} MHz")
    lines.append("kernel                  agreed   tests   memcheck   racecheck")
    for op, k in report.get("kernels", {}).items():
        word = {True: "yes", False: "NO", None: "unclear" if k["unclear"] else "not run"}[k["agreed"]]
        total = k["passed"] + k["failed"] + k["unclear"]
        lines.append(f"  {op:22}{word:8}{k['passed']:4}/{total:<5}{k['memcheck']:11}{k['racecheck']}")
    if (out / "benchmarks.json").exists():
        lines += _comparisons(json.loads((out / "benchmarks.json").read_text())["entries"].values())
    return "\n".join(lines)


def _comparisons(entries: Any) -> list[str]:
    lines = [f"{'benchmark':58}{'time':>10}{'rate':>16}{'best peer':>32}{'ratio':>8}"]
    for e in entries:
        name = ", ".join(x for x in (e["op"], e["shape"], e["dtype"]) if x)
        rate = "; ".join(f"{v:.4g} {unit}" for unit, v in e.get("rates", {}).items())
        time = f"{e['seconds'] * 1e6:.1f} us" if e.get("seconds") else "-"
        ratio = f"{e['ratio']:.2f}" if e.get("ratio") else "-"
        lines.append(f"  {name[:56]:56}{time:>10}{rate:>16}{(e.get('best_peer') or 'none')[:30]:>32}{ratio:>8}")
        lines += [f"    goal: {g['what']}: {g['measured']} ({g['sense']} {g['goal']})" for g in e["goals"]]
    return lines


def record(out: Path, root: Path) -> str:
    """Writes the kernels that agreed into verified.json, keeps the benchmarks beside it → what was done.

    ValueError where the sources are others than those that were checked.
    """
    report = json.loads((out / "gpu-check.json").read_text())
    if report["sources"] != sources(root):
        raise ValueError("csrc/ is not what was checked: check out the commit that was, or run gpu-check again")
    if git(root, "status", "--porcelain", "--", "csrc"):
        raise ValueError("csrc/ has changes that are not committed: a record names a commit")
    commit = git(root, "rev-parse", "HEAD")
    if not commit:
        raise ValueError("this is no git checkout: a record names a commit")
    path = root / VERIFIED
    verified = json.loads(path.read_text())
    agreed = [op for op, kernel in report.get("kernels", {}).items() if kernel["agreed"]]
    refused = [op for op, kernel in report.get("kernels", {}).items() if kernel["agreed"] is False]
    for op in agreed:
        entry = {"commit": commit, "device": report["machine"]["gpu"], "date": report["date"][:10]}
        verified["kernels"][op] = entry
    for op in refused:  # what an older commit was found to be says nothing about a kernel that fails now
        verified["kernels"][op] = {"commit": None, "device": None, "date": None}
    rows = ",\n".join(f"    {json.dumps(op)}: {json.dumps(entry)}" for op, entry in verified["kernels"].items())
    partial = path.with_suffix(".partial")
    partial.write_text('{\n  "kernels": {\n' + rows + "\n  }\n}\n")
    os.replace(partial, path)
    if (out / "benchmarks.json").exists():
        name = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
        shutil.copy(out / "benchmarks.json", path.with_name(f"{name}.json"))
    return f"agreed at {commit[:9]}: {', '.join(agreed) or 'none'}; not agreed: {', '.join(refused) or 'none'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.report", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", action="store_true", help="write the kernels that agreed into verified.json")
    options = parser.parse_args(argv)
    try:
        text = (
            record(options.out, ROOT)
            if options.record
            else table(json.loads((options.out / "gpu-check.json").read_text()), options.out)
        )
        print(text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
