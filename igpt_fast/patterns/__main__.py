"""python -m igpt_fast.patterns "row|neighborhood(7)" --side 64: what a pattern costs, and a picture of it."""

import argparse
import json
import re
import sys
import time

from igpt_fast.errors import InputError
from igpt_fast.patterns.block_mask import BlockMask
from igpt_fast.patterns.orders import tiles_by_order
from igpt_fast.patterns.parse import parse
from igpt_fast.patterns.picture import draw
from igpt_fast.patterns.predicates import PATTERNS
from igpt_fast.patterns.tables import parts_of


def main(argv: list[str] | None = None) -> int:
    """Prints the costs and writes the picture; 2, with one line that says why, when that cannot be."""
    names = "\n".join(f"  {name:14} {(make.__doc__ or '').splitlines()[0]}" for name, make in PATTERNS.items())
    parser = argparse.ArgumentParser(
        prog="python -m igpt_fast.patterns",
        description="What a sparse attention pattern costs on a grid of pixels, and a picture of it.",
        epilog=f"patterns, to be joined by | and &:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", help='such as "row|neighborhood(7)"')
    parser.add_argument(
        "--side", type=int, nargs="+", default=[64], metavar="N", help="the grid: a side, or height width"
    )
    parser.add_argument("--bert", action="store_true", help="all pixels at once, not one after the other")
    parser.add_argument("-o", "--out", metavar="PNG", help="the picture (<pattern>-<side>.png)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    try:
        size = tuple(options.side * 2 if len(options.side) == 1 else options.side)
        if len(size) != 2 or min(size) < 1:
            raise InputError(f"--side is {' '.join(map(str, options.side))}; give a side, or height and width")
        pattern = parse(options.pattern)
        began = time.perf_counter()
        mask = BlockMask.compile(pattern, size, causal=not options.bert)
        costs = _costs(pattern.text, mask, size, time.perf_counter() - began)
        out = options.out or f"{re.sub(r'[^a-z0-9]+', '-', pattern.text).strip('-')}-{'x'.join(map(str, size))}.png"
        draw(mask, size, pattern.text).save(out, format="PNG")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**costs, "picture": out}) if options.json else f"{_table(costs)}\npicture: {out}")
    return 0


def _costs(text: str, mask: BlockMask, size: tuple[int, int], seconds: float) -> dict:
    rows = len(mask.tensors[0]) - 1
    counts = tiles_by_order(mask.raster.tensors, size)
    dense = rows * (rows + 1) // 2 if mask.causal else rows * rows
    return {
        "pattern": text,
        "size": size,
        "tokens": mask.tokens,
        "pair_density": mask.pair_density(),
        "tiles": counts if mask.order in counts else {**counts, mask.order: mask.tiles()},
        "order": mask.order,
        "tiles_of_dense": dense,
        "masks": sum(len(tables[6]) for tables in parts_of(mask.tensors)),
        "bytes": sum(t.numel() * t.element_size() for t in mask.tensors),
        "speedup": 1 / mask.density(),
        "compile_seconds": seconds,
    }


def _table(costs: dict) -> str:
    dense, tiles = costs["tiles_of_dense"], costs["tiles"]
    height, width = costs["size"]
    lines = [
        f"{costs['pattern']} on {height} x {width}: {costs['tokens']:,} tokens",
        f"pairs seen            {costs['pair_density']:8.2%} of dense attention's",
        "tiles of 64 x 64, by token order:",
        *(f"  {name:19} {n / dense:8.2%}{'  taken' if name == costs['order'] else ''}" for name, n in tiles.items()),
        f"distinct masks        {costs['masks']:8,}   tables {costs['bytes'] / 1e3:,.1f} kB",
        f"predicted             {costs['speedup']:8.1f} x dense attention's speed",
        f"compiled in           {costs['compile_seconds']:8.2f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
