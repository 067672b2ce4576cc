"""Time of sparse attention against the image's side, from the results of benchmarks/test_patterns.py.

python -m benchmarks.pattern_curve benchmarks/results/MACHINE.json -o docs/images/pattern-time.png
"""

import argparse
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.report import load
from igpt_fast.atomic import write_atomically

PATTERNS = ("neighborhood(7)", "row | neighborhood(7)", "axial")
DENSE = {"ours, dense": "igpt-fast, dense", "torch SDPA, dense": "torch SDPA, dense"}
Curve = dict[int, float]  # side → seconds


def main(argv: list[str] | None = None) -> int:
    """Draws the curves; 2 when the file holds no such results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pattern_curve", description="Time against side length.")
    parser.add_argument("results", type=Path, help="a file of benchmarks/results")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images/pattern-time.png"), metavar="PNG")
    options = parser.parse_args(argv)
    data = load(options.results)
    found = curves(data) if data else {}
    if not found:
        print(f"error: {options.results} has no results of benchmarks/test_patterns.py", file=sys.stderr)
        return 2
    write_atomically(options.out, draw(found, data["machine"]))
    return 0


def curves(data: Mapping[str, Any]) -> dict[str, Curve]:
    """Name → side → seconds, forward and backward. A dense side is taken from beside the first pattern."""
    found: dict[str, Curve] = {}
    for entry in data["entries"].values():
        if "sparse" not in entry or not entry["op"].endswith("backward"):
            continue
        name, side = entry["sparse"]["pattern"], entry["sparse"]["side"]
        if name in PATTERNS:
            found.setdefault(f"igpt-fast, {name}", {})[side] = entry["seconds"]
        if name == PATTERNS[0]:
            for peer, label in DENSE.items():
                if entry["peers"].get(peer, {}).get("seconds"):
                    found.setdefault(label, {})[side] = entry["peers"][peer]["seconds"]
    return found


def draw(found: Mapping[str, Curve], machine: Mapping[str, Any]) -> bytes:
    """A PNG: both axes logarithmic, a line a name."""
    figure = Figure(figsize=(6.4, 4), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in found.items():
        sides = sorted(curve)
        style = "--" if name in DENSE.values() else "-"
        axes.loglog(sides, [1e3 * curve[side] for side in sides], style, marker="o", markersize=4, label=name)
    ticks = sorted({side for curve in found.values() for side in curve})
    axes.set_xticks(ticks, [str(side) for side in ticks])
    axes.minorticks_off()
    axes.set_xlabel("side of the image, in pixels")
    axes.set_ylabel("forward and backward, ms")
    axes.set_title(f"one layer of 4 heads of 64, batch 1, bfloat16, {machine['threads']} threads", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
