"""What a person sees while something long runs: a bar with rate and time left on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout holds what was asked for and nothing else.
"""

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

WINDOW = 30.0  # seconds over which the rate is measured: long enough to be calm, short enough to follow a change
REDRAW = 0.1  # seconds between two computations of the text: advancing must cost next to nothing
# Seconds between two plain lines at first; later a twentieth of the time run, so that logs stay short.
LINE_EVERY = 10.0
LINE_AT_LEAST = 600.0  # and never less often than this


# Control characters, line separators, those that turn the direction of writing, and what of a name is no UTF-8.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_silent = False


class Said(logging.Handler):
    """What the package logs, as a line for a person."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


@contextmanager
def silent() -> Iterator[None]:
    """Within it nothing is said or shown: another process speaks for this one."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def say(text: str = "") -> None:
    """Prints one line (or several) for a person on stderr; above the bar when one is shown."""
    if not _silent:
        with suppress(OSError):  # who read it has gone, or its disk is full: no reason to end hours of work
            print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def answer(text: str, as_json: bool = False) -> None:
    """Prints what a command was asked for on stdout; on stderr where stdout is a program's that reads --json."""
    if as_json:
        say(text)
    elif not _silent:
        write(printable(text, keep="\n\t"))


def write(text: str) -> None:
    """Prints a line on stdout. Raises OSError, naming it, where nothing can be written there, as on a full disk."""
    with naming_stdout():
        print(text, flush=True)


@contextmanager
def naming_stdout() -> Iterator[None]:
    """What is printed within it and cannot be written ends in an OSError that names stdout."""
    try:
        yield
    except BrokenPipeError:  # whoever reads has read enough
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


def printable(text: str, keep: str = "") -> str:
    """`text`, in which characters that a terminal would obey, such as those of a file's name, are spelled out."""
    return _OBEYED.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def interactive() -> bool:
    """True when stderr is a terminal that can redraw a line, and there is something to be said."""
    return not _silent and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:00:10`, `2 days 1:00:00`: seconds as a person reads them."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    clock = f"{hours}:{minutes:02d}:{whole % 60:02d}" if days or hours else f"{minutes}:{whole % 60:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


def number(value: object) -> str:
    """A figure for a person: `12,345`, `3.142`, `0.00123`; anything that is no number as it is."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def counted(count: int, unit: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number(count)} {unit}{'s' * (count != 1)}"


def few_of(names: Iterable[str], most: int = 8) -> str:
    """`cats, dogs, …`: the first of them, printable."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


class Bar:
    """What `progress` hands out. `done` and `total` count units; `fields` are shown behind the time left."""

    def __init__(self, total: int | None, unit: str, description: str, start: int) -> None:
        self.total, self.unit, self.description = total, unit, description
        self.done = self.first = start
        self.fields: dict[str, object] = {}
        self.began = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self.began, start)])
        self._shown = 0.0

    def advance(self, n: int = 1, **fields: object) -> None:
        """`n` more units are done; `fields` (such as loss=2.1) replace those of the same name."""
        self.to(self.done + n, **fields)

    def to(self, done: int, total: int | None = None, **fields: object) -> None:
        """`done` units are done out of `total` (unchanged when None): fits as a `progress(done, total)` callback."""
        self.done = done
        self.total = self.total if total is None else total
        self.fields.update(fields)
        now = time.monotonic()
        if now - self._shown < REDRAW and done != self.total:
            return
        self._shown = now
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW:
            self._marks.popleft()
        self._show()

    def rate(self) -> float:
        """Units a second over the last half minute; 0.0 while unknown."""
        (since, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - since) if now > since else 0.0

    def counts(self) -> str:
        """`12/500 images`, or `12 images` while the total is unknown."""
        return f"{number(self.done)}{'' if self.total is None else '/' + number(self.total)} {self.unit}"

    def text(self) -> str:
        """`3.2 images/s · 1:20 left · loss 2.1`."""
        rate, parts = self.rate(), []
        if rate > 0:
            parts.append(f"{number(float(rate))} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return " · ".join(parts + self._fields())

    def summary(self) -> str:
        """The last line: how much was done, in how long, and the average rate over the whole."""
        seconds = time.monotonic() - self.began
        average = f", {number((self.done - self.first) / seconds)} {self.unit}/s" if seconds > 0 else ""
        return ", ".join([f"{self.description}: {self.counts()} in {duration(seconds)}{average}", *self._fields()])

    def _fields(self) -> list[str]:
        """`loss 2.1`; a rate, known by its slash, as `12 images/s`."""
        pairs = ((name, number(value)) for name, value in self.fields.items())
        return [f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in pairs]

    def _show(self) -> None:
        """Overridden: draws the bar or writes a line when one is due."""


class _Lines(Bar):
    _line = 0.0

    def _show(self) -> None:
        now = time.monotonic()
        every = min(max(LINE_EVERY, (now - self.began) / 20), LINE_AT_LEAST)
        if now - max(self._line, self.began) >= every and self.done != self.total:
            self._line = now
            say(f"{self.description}: {self.counts()} · {self.text()}")


class _Live(Bar):
    def __init__(self, total: int | None, unit: str, description: str, start: int, live: Progress) -> None:
        super().__init__(total, unit, description, start)
        self._live = live
        self._task = live.add_task(description, total=total, completed=start, text="", counts=self.counts())

    def _show(self) -> None:
        self._live.update(
            self._task, completed=self.done, total=self.total, text=self.text(), counts=self.counts(), refresh=False
        )


@contextmanager
def progress(total: int | None, unit: str = "images", description: str = "", start: int = 0) -> Iterator[Bar]:
    """A progress bar for the body of a `with`; `total` None when unknown, `start` what was done before (a resumed run).

    On a terminal a live bar with the count, the rate, the time left and the bar's fields; elsewhere a plain line now
    and then. A body that ends well leaves one summary line. Yields the Bar: `.advance(n, **fields)` it, or set it
    with `.to(done)`.
    """
    if not interactive():
        bar: Bar = _Lines(total, unit, description, start)
        yield bar
        say(bar.summary())
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        *map(_plain, ("counts", "text")),
    )
    # stdout is left alone: it belongs to the answer.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as live:
        bar = _Live(total, unit, description, start, live)
        yield bar
    say(bar.summary())


def _plain(field: str) -> TextColumn:
    """A column that shows a task's field as it is, without reading markup into it."""
    return TextColumn(f"{{task.fields[{field}]}}", markup=False)
