"""Settings that all tests share."""

import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Two threads only slow down a model as small as those of the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def igpt(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    from igpt_fast import cli  # not above: a bare machine with a GPU has no typer, and no use for it

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["igpt-fast", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        return (end.value.code or 0, *capsys.readouterr())

    return call
