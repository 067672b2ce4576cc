"""The command line: `igpt-fast COMMAND`. One module per group; this file wires them."""

import os
import sys

import typer

from igpt_fast import __version__
from igpt_fast.cli import convert, data, evaluate, info, probe, sample, train
from igpt_fast.errors import InputError

app = typer.Typer(
    name="igpt-fast",
    help="Image GPT, fast: train on a folder of images, sample, complete, probe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"igpt-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for _group in (data, train, sample, probe, evaluate, convert, info):
    _group.register(app)


def main() -> None:
    """Entry point of `igpt-fast`. Bad input: one `error:` line, exit code 2. IGPT_TRACEBACK=1: the traceback."""
    try:
        app()
    except (InputError, OSError) as error:
        if os.environ.get("IGPT_TRACEBACK") == "1":
            raise
        name = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {name}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
