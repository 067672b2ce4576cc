"""Every command in README.md and docs/ exists, with the options that it is shown with."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from igpt_fast.cli import app
from igpt_fast.patterns import PATTERNS, compiled

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


ROWS = {
    cells[0].strip("` ").replace("\\|", "|"): cells[2:6]
    for line in (ROOT / "docs" / "patterns.md").read_text().splitlines()
    if line.startswith("| `") and (cells := re.split(r" (?<!\\)\| ", line.removeprefix("| ")))
}


def test_the_page_of_patterns_has_them_all():
    assert not PATTERNS.keys() - ROWS.keys()
    pictures = list((ROOT / "docs" / "images").glob("pattern-*.png"))
    page = (ROOT / "docs" / "patterns.md").read_text()
    assert all(f"(images/{picture.name})" in page for picture in pictures)
    assert all(f"(images/pattern-{name.replace('_', '-')}.png)" in page for name in PATTERNS)
    assert all(picture.stat().st_size <= 32_000 for picture in pictures)


@pytest.mark.parametrize("name", ROWS)
def test_densities_on_the_page(name):
    """Pairs and tiles as the page has them, at 32 × 32 and 64 × 64."""
    masks = [compiled(name, (side, side)) for side in (32, 64)]
    assert ROWS[name] == [f"{share:.1%}" for m in masks for share in (m.pair_density(), m.density())]
