"""The README's table: what a user does most, by machine, beside the best of the peers and Hugging Face's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.tables import figure, table

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
        "ImageGPT (HF). Memory: how many times as much they need."
    )


def _chosen(data: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (entry for entry in data["entries"].values() if entry["op"] in OPS and entry["ratio"])


def _rank(entry: Mapping[str, Any]) -> tuple[int, str]:
    return OPS.index(entry["op"]), entry["dtype"]


def _what(entry: Mapping[str, Any]) -> str:
    return entry["op"] if entry["dtype"] == "uint8" else f"{entry['op']}, {entry['dtype']}"


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['gpu'] or machine['cpu']}, {machine['backends'][0]}"


def _cell(entry: Mapping[str, Any]) -> str:
    theirs = [r["ratio"] for name, r in entry["peers"].items() if name.startswith(PEER) and r.get("ratio")]
    if entry["best_peer"].startswith(PEER):
        return f"HF {figure(entry['ratio'])} ×"
    return f"{figure(entry['ratio'])} ×" + (f" (HF {figure(min(theirs))} ×)" if theirs else "")


def _goals(entries: Iterable[Mapping[str, Any]]) -> str:
    met = [goal["met"] for entry in entries for goal in entry["goals"] if goal["met"] is not None]
    return f"{sum(met)} of {len(met)}"
