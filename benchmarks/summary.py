"""The README's table: what a user does most, by machine, beside the best of the peers and Hugging Face's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.tables import ONCE, ratio, table

OPS = (
    "training step",
    "training step, peak memory of the process",
    "sampling, whole images",
    "palette encode, photographs",
    "palette fit",
    "accelerate, forward",
    "accelerate, training step",
    "accelerate, training step, dropout 0.1",
    "accelerate, generate 256 tokens",
)
PEER = "HF "  # how the names of Hugging Face's begin


def summary(machines: Sequence[Mapping[str, Any]]) -> str:
    """The table of the machines that have measured any of OPS."""
    found = [(data, {_what(entry): entry for entry in _chosen(data)}) for data in machines]
    found = [(data, entries) for data, entries in found if entries]
    rows = {what: _rank(entry) for _, entries in found for what, entry in entries.items()}
    lines = [
        [what, *(_cell(entries[what]) if what in entries else "" for _, entries in found)]
        for what in sorted(rows, key=rows.__getitem__)
    ]
    lines.append(["goals met, all comparisons", *(_goals(data["entries"].values()) for data, _ in found)])
    return table(("", *(_machine(data["machine"]) for data, _ in found)), lines) + (
        "\n\nHow many times as fast as the best peer; behind it, where that is somebody else, as Hugging Face's "
        f"ImageGPT or its image processor (HF). Memory: how many times as much they need. {ONCE} The peer ran once, "
        "cold."
    )


def _chosen(data: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (entry for entry in data["entries"].values() if entry["op"] in OPS and entry["ratio"])


def _rank(entry: Mapping[str, Any]) -> tuple[int, str]:
    return OPS.index(entry["op"]), entry["dtype"]


def _what(entry: Mapping[str, Any]) -> str:
    where = "" if entry["device"] == "cpu" else f", {entry['device']}"
    return entry["op"] + ("" if entry["dtype"] == "uint8" else f", {entry['dtype']}") + where


def _machine(machine: Mapping[str, Any]) -> str:
    return machine["gpu"] or f"{machine['cpu']}, {machine['backends'][0]}"


def _cell(entry: Mapping[str, Any]) -> str:
    best = ratio(entry["peers"][entry["best_peer"]])
    theirs = [r for name, r in entry["peers"].items() if name.startswith(PEER) and r.get("ratio")]
    if entry["best_peer"].startswith(PEER):
        return f"HF {best}"
    return best + (f" (HF {ratio(min(theirs, key=lambda r: r['ratio']))})" if theirs else "")


def _goals(entries: Iterable[Mapping[str, Any]]) -> str:
    met = [goal["met"] for entry in entries for goal in entry["goals"] if goal["met"] is not None]
    return f"{sum(met)} of {len(met)}"
