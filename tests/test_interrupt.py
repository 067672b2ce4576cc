"""Signals that ask a run to stop: noted, acted on at a good moment, and told on."""

import os
import signal

import pytest

from igpt_fast.interrupt import STOPPING, Stop, Stopped, sigterm_exits


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


def test_a_second_signal_does_what_it_always_does():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_exits_within_and_does_what_it_did_behind():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, sigterm_exits():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_a_terminal_that_goes_ends_it_too_but_not_under_nohup():
    def missed(*_: object) -> None:  # the default would end the tests, too
        raise AssertionError

    before = signal.signal(signal.SIGHUP, missed)
    try:
        with pytest.raises(SystemExit) as ended, sigterm_exits():
            signal.raise_signal(signal.SIGHUP)
        assert ended.value.code == 129 and signal.getsignal(signal.SIGHUP) is missed
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with sigterm_exits():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
