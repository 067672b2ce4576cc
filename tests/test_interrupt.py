"""Signals that ask a run to stop: noted, acted on at a good moment, and told on."""

import os
import signal

import pytest

from igpt_fast.interrupt import STOPPING, Stop, Stopped


def test_a_signal_that_comes_while_processes_agree_is_not_forgotten():
    def largest(value: int) -> int:
        if not value:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    with Stop(largest) as stop:
        stop.check()
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(SystemExit):
            stop.leave()


@pytest.mark.parametrize("which", STOPPING)
def test_every_signal_that_ends_a_job_stops_a_run(which):
    before = signal.signal(which, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with Stop() as stop:
            os.kill(os.getpid(), which)
            with pytest.raises(Stopped):
                stop.check()
            ends = KeyboardInterrupt if which == signal.SIGINT else SystemExit
            with pytest.raises(ends) as ended:
                stop.leave()
    finally:
        signal.signal(which, before)
    assert which == signal.SIGINT or ended.value.code == 128 + which


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
