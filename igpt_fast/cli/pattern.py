"""`igpt-fast pattern`: what a sparse attention pattern costs on a grid of pixels, and a picture of it."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from igpt_fast.atomic import write_atomically
from igpt_fast.cli.inputs import check_place
from igpt_fast.cli.learning import Objective
from igpt_fast.cli.options import JsonOption, SizeOption, parse_size, print_json
from igpt_fast.console import answer, say
from igpt_fast.errors import InputError
from igpt_fast.patterns.block_mask import BlockMask
from igpt_fast.patterns.orders import tiles_by_order
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.picture import draw
from igpt_fast.patterns.predicates import PATTERNS
from igpt_fast.pictures import to_png_bytes

MOST = 1 << 16  # pixels: a minute of compiling, which grows with their square


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("pattern")(pattern)


def pattern(
    text: Annotated[
        str,
        typer.Argument(metavar="PATTERN", help=f"Joined by | and &: {', '.join(PATTERNS)}.", show_default=False),
    ],
    size: SizeOption = "64",
    objective: Annotated[
        Objective, typer.Option("--objective", help="ar: a pixel sees those before it. bert: it sees all.")
    ] = Objective.ar,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.png", show_default="PATTERN-HxW.png", help="Where to draw it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a sparse attention pattern costs on a grid of pixels, and draw what a pixel sees.

    Attention costs what tiles of 64 x 64 pairs there are, which depends on the order of the pixels; the best is taken.

    Example: igpt-fast pattern "row|neighborhood(7)" --size 64
    """
    grid, chosen = parse_size(size), parse(text)
    if grid[0] * grid[1] > MOST:
        raise InputError(f"--size {size} has {grid[0] * grid[1]:,} pixels; a pattern is compiled for {MOST:,} at most")
    name = re.sub(r"[^a-z0-9]+", "-", chosen.text).strip("-")
    out = Path(f"{name}-{grid[0]}x{grid[1]}.png") if out is None else out
    check_place(out, ".png")
    began = time.perf_counter()
    mask = BlockMask.compile(chosen, grid, causal=objective is Objective.ar)
    found = costs(chosen.text, mask, grid, time.perf_counter() - began)
    write_atomically(out, to_png_bytes(np.asarray(draw(mask, grid, chosen.text))))
    for line in table(found):
        answer(line, as_json)
    say(f"wrote {out}")
    if as_json:
        print_json(**found, picture=str(out))


def costs(text: str, mask: BlockMask, size: tuple[int, int], seconds: float) -> dict[str, Any]:
    """The figures of a mask on a grid (height, width) that took so many seconds to compile, by name."""
    rows = mask.rows
    counts = tiles_by_order(mask.raster.tensors, size)
    return {
        "pattern": text,
        "size": size,
        "tokens": mask.tokens,
        "pair_density": mask.pair_density(),
        "tiles": counts if mask.order in counts else {**counts, mask.order: mask.tiles()},
        "order": mask.order,
        "tiles_of_dense": rows * (rows + 1) // 2 if mask.causal else rows * rows,
        "masks": sum(len(part.bits) for part in mask.parts),
        "bytes": sum(t.numel() * t.element_size() for t in mask.tensors),
        "speedup": 1 / mask.density(),
        "compile_seconds": seconds,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Those figures as lines for a person."""
    dense, tiles = found["tiles_of_dense"], found["tiles"]
    height, width = found["size"]
    return [
        f"{found['pattern']} on {height} x {width}: {found['tokens']:,} tokens",
        f"pairs seen            {found['pair_density']:8.2%} of dense attention's",
        "tiles of 64 x 64, by token order:",
        *(f"  {name:19} {n / dense:8.2%}{'  taken' if name == found['order'] else ''}" for name, n in tiles.items()),
        f"distinct masks        {found['masks']:8,}   tables {found['bytes'] / 1e3:,.1f} kB",
        f"predicted             {found['speedup']:8.1f} x dense attention's speed",
        f"compiled in           {found['compile_seconds']:8.2f} s",
    ]
