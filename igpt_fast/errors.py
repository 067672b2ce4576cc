"""The one exception that means: the caller can mend this."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A mistake in what was given. The message is one line: what is wrong, where, and what to do about it.

    The command line prints it after `error:` and exits with code 2.
    """


@contextmanager
def reading(where: object, remedy: str) -> Iterator[None]:
    """Around a parser of a stranger's bytes: whatever they make it raise becomes an InputError that names `where`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or (repr(error) if isinstance(error, KeyError) else str(error))
        reason = next(iter(said.splitlines()), "") or type(error).__name__
        raise InputError(f"{where} cannot be read ({reason}); {remedy}") from error
