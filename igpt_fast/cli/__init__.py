"""The command line: `igpt-fast COMMAND`. One module per group; this file wires them."""

import inspect
import io
import logging
import os
import re
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from igpt_fast import __version__
from igpt_fast.cli import (
    classify,
    convert,
    data,
    demo,
    evaluate,
    features,
    finetune,
    info,
    pattern,
    plan,
    probe,
    sample,
    train,
)
from igpt_fast.console import Said, say
from igpt_fast.device import keep_memory
from igpt_fast.errors import InputError
from igpt_fast.interrupt import sigterm_exits
from igpt_fast.processes import world_size

# What takes less memory, by command.
LESS = {
    "train": "a smaller --batch, --width, --layers or --size, more --accumulate, or --activation-checkpointing",
    "finetune": "a smaller --batch, more --accumulate, or --activation-checkpointing",
    "classify": "a smaller --batch",
    "features": "a smaller --batch, --limit, or fewer --layers",
    "plan": "a smaller --width, --layers or --size, or --activation-checkpointing",
    "sample": "a smaller -n or --batch, or --dtype bfloat16",
    "complete": "fewer photos, a smaller -n or --batch, or --dtype bfloat16",
    "palette": "a smaller --size or --limit, or fewer --workers",
    "tokenize": "a smaller --size, or fewer --workers",
}


# Commands that share their work among the processes of torchrun, and info, which is the same in each.
SEVERAL = ("train", "finetune", "eval", "classify", "probe", "info")


class _Group(TyperGroup):
    """Says what ends a command where Typer would be silent (Ctrl-C) or show a traceback (want of memory)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _end_by_ctrl_c()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search(r"can't allocate memory|out of memory", str(error)):
                raise
            less = LESS.get(ctx.invoked_subcommand, "a smaller model or fewer images at once")
            raise InputError(f"{ctx.invoked_subcommand}: there is not enough memory: {less} takes less") from error


app = typer.Typer(
    cls=_Group,
    name="igpt-fast",
    help="Image GPT, fast: train on a folder of images, sample, complete, probe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _end_by_ctrl_c() -> NoReturn:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _version(value: bool) -> None:
    if value:
        print(f"igpt-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    command = context.invoked_subcommand
    if command in SEVERAL or "RANK" not in os.environ or world_size() == 1:
        return
    # Each says so: torchrun ends all with the first that ends.
    alone = "; --first gives each machine a share" if command == "sample" else ""
    only = f"of several only {', '.join(SEVERAL)}"
    raise InputError(f"{command} runs in one process, {only}: start it without torchrun{alone}")


_GROUPS = data, pattern, plan, train, sample, probe, features, demo, finetune, classify, evaluate, convert, info
for _group in _GROUPS:
    _group.register(app)
for _command in app.registered_commands:  # Typer would keep the line breaks of a docstring where a terminal has its own
    _paragraphs = inspect.cleandoc(_command.callback.__doc__).split("\n\n")
    _command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs)


def main() -> None:
    """Entry point of `igpt-fast`. Bad input: one `error:` line, exit code 2. IGPT_TRACEBACK=1: the traceback."""
    for name in ("stdout", "stderr"):  # closed ones are None, which nobody can print to
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that we print; stderr knows a way
    keep_memory()
    logging.getLogger("igpt_fast").addHandler(said := Said())
    try:
        if "" in sys.argv[1:]:  # a variable that is not set, as in --out "$RUN"; a path of nothing is the folder here
            raise InputError("one of the words is empty, perhaps a variable that is not set; give it, or leave it out")
        with sigterm_exits():
            app()
    except KeyboardInterrupt:  # before there was a command
        _end_by_ctrl_c()
    except (InputError, OSError) as error:
        if os.environ.get("IGPT_TRACEBACK") == "1":
            raise
        name = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        say(f"error: {name}")
        sys.exit(2)
    finally:
        logging.getLogger("igpt_fast").removeHandler(said)
