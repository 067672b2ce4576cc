"""Every command in README.md and docs/ exists, with the options that it is shown with."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from igpt_fast.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    pytest.param(line.strip(), id=f"{page.name}:{number}")
    for page in PAGES
    for number, line in enumerate(page.read_text().splitlines(), 1)
    if re.match(r"    igpt-fast \w", line)
]


@pytest.mark.parametrize("line", LINES)
def test_commands_exist(line):
    _, name, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
