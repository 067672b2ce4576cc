"""The one exception that means: the caller can mend this."""


class InputError(ValueError):
    """A mistake in what was given. The message is one line: what is wrong, where, and what to do about it.

    The command line prints it after `error:` and exits with code 2.
    """
