"""The words of the demo's page: they follow the numbers, and claim no more than the intervals allow."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
import typer

from igpt_fast import cli
from igpt_fast.config import Config
from igpt_fast.demo_page import COMMANDS, Findings, Stage, _climb, _rival, render
from igpt_fast.probe import ProbeResult
from igpt_fast.regression import score

PROBED = ProbeResult(
    layers=(
        score("layer 0", np.arange(100) < 30, layer=0, validation=0.3),
        score("layer 1", np.arange(100) < 80, layer=1, validation=0.8),
    ),
    pixels=score("raw pixels", np.arange(100) < 82),
    majority=score("majority class", np.arange(100) < 10),
    depth=1,
    classes=("0", "1"),
    left_out={},
    unlabelled=0,
    train=100,
    test=100,
    test_fraction=0.2,
    per_class=10,
    seed=0,
    feature_bytes=1,
    seconds=1.0,
)


def words(**changes) -> str:
    """The page of made-up findings, without its tags."""
    blank = np.zeros((10, 8, 8, 3), np.uint8)
    findings = Findings(
        config=Config(layers=1, width=8, heads=1, colors=16, size=(8, 8)),
        parameters=1234,
        steps=50,
        batch=4,
        seed=0,
        learned_from=1000,
        held_out=100,
        loss=1.2,
        val_loss=1.2,
        position_loss=1.6,
        samples=blank,
        real=blank,
        copies=0,
        sample_distance=26.0,
        real_distance=18.0,
        originals=blank,
        completions=blank[:, None],
        probe=PROBED,
        few=PROBED,
        loss_png=b"",
        probe_png=b"",
        stages=[Stage("training", 61.0), Stage("sampling", 2.0)],
        machine={"processor": "a <fast> one"},
    )
    page = render(dataclasses.replace(findings, **changes))
    return " ".join(re.sub("<[^>]*>", "", page[page.index("<body>") :]).split())


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        (82, "give 82.0 %: with 100 scans to test on, too close to call."),
        (99, "give 99.0 %: on scans as tidy as these, the pixels themselves are clearly the better features."),
        (20, "give 20.0 %: the network's own features are clearly the better ones."),
    ],
)
def test_the_verdict_says_no_more_than_the_intervals_allow(right, verdict):
    rival = dataclasses.replace(PROBED, pixels=score("raw pixels", np.arange(100) < right))
    assert _rival(rival).endswith(verdict) and verdict in words(few=rival)


def test_a_climb_is_told_only_where_there_is_one():
    assert _climb(PROBED) == "80.0 % from layer 1, up from 30.0 % at layer 0"
    near = score("layer 0", np.arange(100) < 75, layer=0, validation=0.3)
    assert _climb(dataclasses.replace(PROBED, layers=(near, PROBED.layers[1]))) == "80.0 % from layer 1"


def test_the_words_follow_the_numbers():
    plain, other = words(), words(copies=1, loss=0.9, stages=[Stage("training", 600.0)])
    assert "None of the 10 equal a scan" in plain and "One of the 10 equals a scan" in other
    assert "learn by heart" not in plain and "learn by heart" in other
    assert "handwritten digits for 61 seconds" in plain and "handwritten digits for 10.0 minutes" in other
    assert "as unsure as between 3.3." in plain and "ln 16 = 2.773" in plain
    assert "61 s of training, 63 s in all" in plain and "together63.0 s" in plain


def test_foreign_words_are_escaped():
    assert "a &lt;fast&gt; one" in words()


def test_the_commands_at_the_end_are_commands():
    known = typer.main.get_command(cli.app).commands
    assert {line.split()[1] for line in COMMANDS.splitlines()} >= {"tokenize", "train", "sample", "complete", "probe"}
    for line in COMMANDS.splitlines():
        program, name, *rest = shlex.split(line)
        assert program == "igpt-fast"
        known[name].make_context(name, rest)
