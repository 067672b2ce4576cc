"""`igpt-fast demo`: all of it at once, on images that are there."""

from pathlib import Path
from typing import Annotated

import typer

from igpt_fast.cli.options import JsonOption, SeedOption, print_json
from igpt_fast.console import say
from igpt_fast.demo import demo as run_demo


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to write.")] = Path("demo"),
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="S",
            help="Train for about S seconds of an ordinary core: a number of steps, the same on every machine.",
        ),
    ] = 50.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train, sample, complete and probe on 1,797 scans of handwritten digits, and write a page about it.

    The scans come with scikit-learn, so this needs no data and no network.

    Example: igpt-fast demo --out demo
    """
    result = run_demo(out, seconds=seconds, seed=seed)
    say(f"wrote {result.page}: open it in a browser")
    if as_json:
        print_json(page=str(result.page), **result.numbers)
