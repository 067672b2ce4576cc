"""Stopping well: the first Ctrl-C or SIGTERM is noted and acted on at a good moment, a second one stops at once.

So are SIGUSR1, by which a cluster's scheduler warns of the end of a job, and the SIGHUP of a terminal that goes.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


class Stopped(Exception):
    """A signal has asked to stop."""


class Stop:
    """Within a `with`, notes the first signal of STOPPING; a second one does what it always does. Where nohup wants
    SIGHUP to be ignored, it is.

    Signals reach the main thread only: in another thread nothing is noted. agree: the largest of the signals that
    several processes have noted, 0 for none, by the one noted here: then all of them stop at the same `check`.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self.signal, self.agree = 0, agree
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = [which for which in STOPPING if not (deaf and which == signal.SIGHUP)]
            self._before = {which: signal.signal(which, self._note) for which in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            # None stands for a handler that was not set from Python: the default is the nearest that can be set.
            signal.signal(which, signal.SIG_DFL if handler is None else handler)

    def _note(self, which: int, _: FrameType | None) -> None:
        self.signal = which
        self.__exit__()

    def check(self) -> None:
        """Raises Stopped once a signal was noted; in all processes, which come here together."""
        if agreed := self.agree(self.signal):  # one that comes while they agree waits for the next check
            self.signal = agreed
            raise Stopped

    def check_alone(self, *_: int) -> None:
        """Raises Stopped once a signal was noted here; fits as a progress callback."""
        if self.signal:
            raise Stopped

    def leave(self) -> None:
        """Raises what the noted signal means to a caller: KeyboardInterrupt, or SystemExit of 128 + the signal."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Within it SIGTERM, and the SIGHUP of a terminal that goes, raise SystemExit(128 + the signal), so that what was
    begun is cleaned up as after Ctrl-C.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [which for which in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(which) is not signal.SIG_IGN]
        before = {which: signal.signal(which, _exit) for which in heard}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, signal.SIG_DFL if handler is None else handler)


def _exit(which: int, _: FrameType | None) -> None:
    raise SystemExit(128 + which)
