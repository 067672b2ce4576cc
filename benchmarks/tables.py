"""How the pages of benchmarks write figures and tables."""

from collections.abc import Iterable, Mapping
from typing import Any

ONCE = "†"  # behind a ratio to a peer that ran a single time


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; figures stand to the right."""
    head = list(head)
    lines = [head, ["---" if i < 2 else "---:" for i in range(len(head))], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Three digits in the unit that suits."""
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{figure(seconds * factor)} {unit}"


def figure(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def ratio(report: Mapping[str, Any]) -> str:
    return f"{figure(report['ratio'])} ×" + f" {ONCE}" * once(report)


def memory(report: Mapping[str, Any]) -> str:
    peak = report.get("peak_memory_mb")
    return "" if peak is None else f"{peak:,.1f} MB"


def once(report: Mapping[str, Any]) -> bool:
    """Whether a peer ran a single time, before the rounds."""
    return report.get("rounds") == 1
