"""README.md and docs/: commands exist with the options that they are shown with, figures are those of the results."""

import json
import re
import shlex
import subprocess
import sys
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


@pytest.mark.parametrize(("page", "options"), [("README.md", ["--summary"]), ("docs/benchmarks.md", [])])
def test_tables_are_those_of_the_results(page, options):
    listed = subprocess.run(["git", "ls-files", "benchmarks/results/*.json"], cwd=ROOT, capture_output=True, text=True)
    if not listed.stdout:
        pytest.skip("git does not say here which results belong to the project")
    command = [sys.executable, "-m", "benchmarks.report", *options, *listed.stdout.split()]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    shown = re.search("<!-- benchmarks:begin -->\n(.*)<!-- benchmarks:end -->", (ROOT / page).read_text(), re.S)
    assert shown[1] == made.stdout, "run: python -m benchmarks.report --write"


def test_kernels_that_no_gpu_has_run_are_named():
    kernels = json.loads((ROOT / "benchmarks" / "results" / "verified.json").read_text())["kernels"]
    said = re.search(r"Only the simulator(.*?)## What an H200", (ROOT / "docs" / "gpu.md").read_text(), re.S)[1]
    assert set(re.findall(r"`(\w+)`", said)) == {name for name, found in kernels.items() if not found["commit"]}


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
