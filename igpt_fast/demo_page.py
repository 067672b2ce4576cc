"""The demo's page: one HTML file with its pictures inside, that asks no server for anything."""

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from igpt_fast.config import Config
from igpt_fast.demo_style import STYLE, figure, grid, img, section
from igpt_fast.probe import ProbeResult
from igpt_fast.regression import Score


@dataclass(frozen=True)
class Stage:
    """One part of the demo and the seconds that it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Findings:
    """What the page tells. Images: uint8 [..., H, W, 3]. Losses: nats per pixel. Distances: grey levels per pixel."""

    config: Config
    parameters: int
    steps: int
    batch: int
    seed: int
    learned_from: int  # images
    held_out: int
    loss: float
    val_loss: float
    position_loss: float  # of knowing only how often each place has each colour
    samples: np.ndarray
    real: np.ndarray  # held-out scans to put beside them
    copies: int  # samples that equal an image that was learned from
    sample_distance: float  # from a sample to the nearest of those, median
    real_distance: float  # from a held-out scan to the nearest of those, median
    originals: np.ndarray  # [digits, H, W, 3]
    completions: np.ndarray  # [digits, n, H, W, 3]
    probe: ProbeResult  # with every label
    few: ProbeResult  # with few labels of each digit
    loss_png: bytes
    probe_png: bytes
    stages: list[Stage]
    machine: dict[str, str]

    def seconds(self, name: str | None = None) -> float:
        """Of the stage of that name, or of all together."""
        return sum(stage.seconds for stage in self.stages if name in (None, stage.name))

    def numbers(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON can hold it."""
        names = (
            "parameters",
            "steps",
            "batch",
            "seed",
            "learned_from",
            "held_out",
            "loss",
            "val_loss",
            "position_loss",
        )
        names += ("copies", "sample_distance", "real_distance", "machine")
        stages = {stage.name: round(stage.seconds, 3) for stage in self.stages}
        rest = {
            "config": self.config.to_dict(),
            "probe": self.probe.to_dict(),
            "few": self.few.to_dict(),
            "seconds": stages,
        }
        return {name: getattr(self, name) for name in names} | rest


def render(f: Findings) -> str:
    """The page as HTML text: every picture is a data: URI, every style inline, and there is no script."""
    sections = (_loss(f), _samples(f), _completions(f), _probe(f), _timings(f), _machine(f), _yours())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>igpt-fast: digits that nobody wrote</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_opening(f)}
{"".join(sections)}
</main>
</body>
</html>
"""


def _opening(f: Findings) -> str:
    best, training, chance = f.few.best, f.seconds("training"), math.log(f.config.colors)
    tiles = (
        (f"{training:.0f} s", f"of training, {f.seconds():.0f} s in all"),
        (f"{f.val_loss:.3f}", f"nats per pixel on scans it never saw; chance is {chance:.3f}"),
        (f"{f.copies} of {len(f.samples)}", "drawn digits are copies of a scan it learned from"),
        (_percent(best.accuracy), f"of held-out scans named after {f.few.per_class} examples of each digit"),
    )
    cells = "".join(f"<li><b>{amount}</b> <span>{text}</span></li>" for amount, text in tiles)
    return f"""<header>
<p class="kicker">igpt-fast demo</p>
<h1>Digits that nobody wrote</h1>
{grid(f.samples[:8], "a digit that the model drew", "strip")}
<p class="lead">These eight were drawn by a network of {f.parameters:,} weights. It looked at {f.learned_from:,} small
scans of handwritten digits for {_duration(training)} and learned one thing only: to guess the next pixel from the ones
before it, row by row. Nobody told it what a digit is, or that there are ten.</p>
<p>From that alone it can <a href="#samples">draw digits from nothing</a> and <a href="#completions">finish a digit of
which it sees the upper half</a>. Where a blind guess has {f.config.colors} shades to choose from, it is as unsure as
between {math.exp(f.val_loss):.1f}. And on the way it <a href="#probe">worked out something about digits</a>. Shown only
{_number(f.few.per_class)} labelled examples of each, a linear classifier that reads the network's layers names held-out
digits: {_climb(f.few)}. {_rival(f.few)}</p>
<ul class="tiles">{cells}</ul>
</header>
"""


def _loss(f: Findings) -> str:
    chance = math.log(f.config.colors)
    gap = "; the gap is what it has begun to learn by heart" if f.loss < 0.97 * f.val_loss else ""
    return section(
        "loss",
        "Learning to guess the next pixel",
        f"""<p>The loss says how surprised the model is by each true pixel, in nats: 0 would be certainty, and a blind
guess among {f.config.colors} shades costs ln {f.config.colors} = {chance:.3f}. Knowing how often each place of the
picture has each shade, and nothing else, costs {f.position_loss:.3f}. After {f.steps:,} steps of {f.batch} scans the
model is at <b>{f.val_loss:.3f}</b> on {f.held_out} scans that it never learned from, and at {f.loss:.3f} on those that
it did{gap}.</p>
{figure(f.loss_png, "Loss over training steps, on scans learned from and on held-out scans, with two baselines")}""",
    )


def _samples(f: Findings) -> str:
    drawn, real = grid(f.samples, "a digit that the model drew", "eight"), grid(f.real, "a real scan", "eight")
    equal = "equals" if f.copies == 1 else "equal"
    return section(
        "samples",
        "Drawn from nothing",
        f"""<p>The model starts with an empty picture and draws pixel after pixel, each by the chances that it sees at
that moment. Beside its digits are real scans, of those that were held out.</p>
<div class="pair"><figure>{drawn}<figcaption>Drawn by the model</figcaption></figure>
<figure>{real}<figcaption>Real scans</figcaption></figure></div>
<p>Are they copies? {_number(f.copies).capitalize()} of the {len(f.samples)} {equal} a scan that the model learned from.
From the nearest of those scans a drawn digit typically differs by {f.sample_distance:.0f} grey levels (of 255) a pixel,
and a real held-out scan by {f.real_distance:.0f}.</p>""",
    )


def _completions(f: Findings) -> str:
    n, half = f.completions.shape[1], f.config.size[0] // 2
    rows = ""
    for digit, (original, completed) in enumerate(zip(f.originals, f.completions, strict=True)):
        given = f'<span class="half">{img(original[:half], "its upper half")}</span>'
        cells = (img(original, f"a real {digit}"), given, "", *(img(image, "a completion") for image in completed))
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
    return section(
        "completions",
        "Finished from the upper half",
        f"""<p>One held-out scan of each digit. The model is given the upper half and draws the lower one,
{_number(n)} times. Many upper halves fit more than one digit, and then a good model does not insist on one.</p>
<table class="grid"><thead>
<tr><th>scan</th><th>given</th><th class="gap"></th><th colspan="{n}">what the model made of it</th></tr></thead>
<tbody>{rows}</tbody></table>""",
    )


def _probe(f: Findings) -> str:
    few, full, rows = f.few, f.probe, ""
    first = (*few.layers, few.pixels, few.majority)
    for a, b in zip(first, (*full.layers, full.pixels, full.majority), strict=True):
        cells = (
            html.escape(a.name),
            *(_accuracy(score, score is result.best) for score, result in ((a, few), (b, full))),
        )
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
    return section(
        "probe",
        "What it knows without having been told",
        f"""<p>Training never saw a label. To ask what the layers hold all the same, each layer's activity is averaged
over the picture and given to the simplest of classifiers, a logistic regression. It is shown {few.train:,} labelled
scans, {_number(few.per_class)} of each digit, and tested on {few.test} that neither it nor the model has seen. Layer 0
is the embedding of single pixels, before any of them has met another; layer {few.depth} is the last. Of the held-out
scans it names <b>{_climb(few)}</b>. {_rival(few)}</p>
{figure(f.probe_png, "Accuracy of a linear classifier by layer, with raw pixels and the most frequent class")}
<p>With all {full.train:,} labels it is {_climb(full)}. {_rival(full)}</p>
<table><thead>
<tr><th>classifier on</th><th>{few.per_class} labels of each digit</th><th>all {full.train:,} labels</th></tr>
</thead><tbody>{rows}</tbody></table>
<p class="note">With 95 % intervals, for the choice of test scans. In bold, the layer that validation among the labelled
scans prefers: the test scans had no say in it. With many labels a classifier can dig single pixels back out of an
average, at layer 0 too; with few, only what lies on the surface counts, and that is what the layers differ in. Raw
pixels are a strong rival here: the scans are centred and of one size, so that a pixel means the same in every scan,
whereas an average over the picture knows of places only what the network wrote into it. On larger, freer images the
order turns: linear probes of the paper's largest model at 32×32 reach 96.3 % on CIFAR-10.</p>""",
    )


def _timings(f: Findings) -> str:
    rows = "".join(f"<tr><td>{stage.name}</td><td>{stage.seconds:.1f} s</td></tr>\n" for stage in f.stages)
    total = f"<tr{_BEST}><td>together</td><td>{f.seconds():.1f} s</td></tr>"
    return section("timings", "What took how long", f"<table><tbody>{rows}{total}</tbody></table>")


def _machine(f: Findings) -> str:
    facts = {**f.machine, "model": f"{f.config.shape_text}, {f.parameters:,} weights", "seed": str(f.seed)}
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>\n" for name, value in facts.items())
    return section("machine", "On what", f"<dl>{rows}</dl>")


def _yours() -> str:
    return section(
        "yours",
        "Now with your own images",
        f"""<p>A folder, a .zip or a .tar of images will do. Class folders give the labels, which only the last command
needs.</p>
<pre><code>{html.escape(COMMANDS)}</code></pre>
<p class="note">The scans of this page are the test part of “Optical Recognition of Handwritten Digits” (E. Alpaydin,
C. Kaynak, UCI Machine Learning Repository, 1998), as it comes with scikit-learn.</p>""",
    )


_BEST = ' class="best"'


def _climb(p: ProbeResult) -> str:
    """The layer that validation prefers, and where the layers start from."""
    best, first = p.best, p.layers[0]
    start = f", up from {_percent(first.accuracy)} at layer {first.layer}" if best.low > first.high else ""
    return f"{_percent(best.accuracy)} from layer {best.layer}{start}"


def _rival(p: ProbeResult) -> str:
    """Layers against pixels in one sentence that says no more than the intervals allow."""
    best, pixels = p.best, p.pixels
    if best.low > pixels.high:
        verdict = "the network's own features are clearly the better ones"
    elif best.high < pixels.low:
        verdict = "on scans as tidy as these, the pixels themselves are clearly the better features"
    else:
        verdict = f"with {p.test} scans to test on, too close to call"
    return f"Raw pixels, classified in the same way, give {_percent(pixels.accuracy)}: {verdict}."


def _accuracy(score: Score, bold: bool) -> str:
    share = f"<b>{_percent(score.accuracy)}</b>" if bold else _percent(score.accuracy)
    return f'{share} <span class="interval">{100 * score.low:.1f} – {100 * score.high:.1f}</span>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(count: int) -> str:
    """Small numbers as words."""
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if 0 <= count < len(words) else f"{count:,}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


COMMANDS = """igpt-fast palette photos/ --colors 512 --size 32 --out palette.npy
igpt-fast tokenize photos/ --palette palette.npy --size 32 --out tokens
igpt-fast train tokens --out run --layers 8 --width 256 --heads 4 --steps 5000
igpt-fast sample run -n 16 --out samples.png
igpt-fast complete run photo.png --keep 0.5 -n 8 --out completions.png
igpt-fast probe run tokens --out probe.png"""
