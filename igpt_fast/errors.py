"""The one exception that means: the caller can mend this."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """A mistake in what was given. The message is one line: what is wrong, where, and what to do about it.

    The command line prints it after `error:` and exits with code 2.
    """


def whole(name: str, value: Any, least: int, most: int | None = None, otherwise: str = "") -> int:
    """`value` as an int. InputError when it is no whole number, or none from `least` to `most`.

    otherwise: what else may be given, as ", or leave it out".
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{name} is {value!r}; use a whole number of at least {least}{otherwise}")
    if most is not None and number > most:
        raise InputError(f"{name} is {value!r}; use at most {most:,}{otherwise}")
    return number


def real(name: str, value: object) -> None:
    """InputError, naming it, for what cannot be compared with numbers, such as None or text."""
    if not hasattr(type(value), "__float__"):
        raise InputError(f"{name} is {value!r}; use a number")


def reason_of(error: Exception) -> str:
    """What went wrong, without the name of a file or its number."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def as_input_error(where: object, remedy: str) -> Iterator[None]:
    """Around a parser of a stranger's bytes: whatever they make it raise becomes an InputError that names `where`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = repr(error) if isinstance(error, KeyError) else reason_of(error)
        reason = next(iter(said.splitlines()), "") or type(error).__name__
        raise InputError(f"{where} cannot be read ({reason}); {remedy}") from error
