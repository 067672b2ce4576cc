"""The demo: everything that the package does, in about a minute and a half, on real scans that need no download.

scikit-learn's 1,797 handwritten digits → palette → tokens → train → sample → complete → probe → one page to look at.
"""

import json
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast import __version__
from igpt_fast.atomic import write_atomically
from igpt_fast.config import Config
from igpt_fast.console import progress, say
from igpt_fast.data import TokenDataset, tokenize
from igpt_fast.demo_page import Findings, Stage, render
from igpt_fast.device import processor
from igpt_fast.errors import InputError
from igpt_fast.ops._native import backend_for
from igpt_fast.palette import Palette
from igpt_fast.pictures import curve_png_bytes, save_grid
from igpt_fast.probe import figure_png, probe
from igpt_fast.regression import load_sklearn
from igpt_fast.sample import complete, sample
from igpt_fast.train import train

COLORS = 16  # the scans have 17 shades
MODEL = {"layers": 8, "width": 64, "heads": 4}
BATCH, LEARNING_RATE, VALIDATIONS = 32, 2e-3, 18
# What one ordinary core is taken to do. Steps are counted, not time, so that a seed gives the same page twice.
STEPS_PER_SECOND = 9
THREADS = 1  # matrices so small gain little from a second one, and lose much when that must wait for a busy core
HELD_OUT = 0.2  # by name: validated, completed and tested on, never learned from
SAMPLES, COMPLETIONS, KEEP = 40, 6, 0.5
FEW = 10  # labels of each digit for one of the two probes
MARK = "demo.json"  # tells a directory that a demo wrote, and may replace, from any other


@dataclass(frozen=True)
class DemoResult:
    """Where the page is, and the numbers on it."""

    page: Path
    numbers: dict[str, Any]  # what DIR/demo.json holds


def demo(out: str | Path = "demo", seconds: float = 50.0, seed: int = 0, steps: int | None = None) -> DemoResult:
    """Runs the whole demo and writes it to `out`: index.html with all in it, and beside it what it was made from.

    seconds: of training on an ordinary core; it only decides the number of steps, which `steps` gives directly. An
    `out` that an earlier demo wrote is replaced. Raises InputError when scikit-learn is missing, when `out` holds other
    things, and for a length or a seed out of range.
    """
    out = Path(out)
    if steps is None:
        if not 1 <= seconds <= 86_400:  # also catches NaN
            raise InputError(f"--seconds is {seconds}; use a number from 1 to 86400, such as 60")
        steps = round(seconds * STEPS_PER_SECOND)
    if steps < 1 or not 0 <= seed < 1 << 63:
        raise InputError(f"steps {steps} and seed {seed}: use at least 1 step and a seed from 0 to 2**63 - 1")
    pixels, labels = load_digits()
    _claim(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _write(out, _run(out, pixels, labels, steps, seed))
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, pixels: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Findings:
    """Every stage, one after the other."""
    stages: list[Stage] = []
    with _stage(stages, "palette and tokens"):
        np.savez(out / "digits.npz", images=pixels, labels=labels)
        palette = Palette.fit(pixels, COLORS, seed=seed)
        palette.save(out / "palette.npy")
        dataset = tokenize(
            out / "digits.npz", palette, out / "tokens", size=pixels.shape[1:3], resize="none", workers=0
        )
    config = Config(**MODEL, colors=len(palette), size=dataset.size)
    with _stage(stages, "training"):
        result = train(
            dataset,
            out / "run",
            config,
            steps=steps,
            batch=BATCH,
            lr=LEARNING_RATE,
            val_fraction=HELD_OUT,
            val_every=max(1, steps // VALIDATIONS),
            val_images=0,
            sample_every=0,
            save_every=0,
            seed=seed,
            command={"resume": f"igpt-fast demo --out {shlex.quote(str(out))} (from the start)"},
        )
    model, held_out = result.model, dataset.split("val", HELD_OUT)
    with _stage(stages, "sampling"), progress(SAMPLES * config.tokens, "pixels", "sampling") as bar:
        drawn = sample(model, SAMPLES, seed=seed, progress=bar.to).cpu()
    shown = np.array([held_out[dataset.labels[held_out] == digit][0] for digit in range(10)])
    rest = config.tokens - round(KEEP * config.tokens)
    total = len(shown) * COMPLETIONS * rest
    with _stage(stages, "completing"), progress(total, "pixels", "completing") as bar:
        completed = complete(model, dataset.batch(shown), KEEP, COMPLETIONS, seed=seed, progress=bar.to).cpu()
    with _stage(stages, "probing"):
        few = probe(model, dataset, test_fraction=HELD_OUT, per_class=FEW, seed=seed)
        probed = probe(model, dataset, test_fraction=HELD_OUT, seed=seed)
    frequencies = position_loss(dataset)
    return Findings(
        config=config,
        parameters=model.num_parameters(),
        steps=steps,
        batch=BATCH,
        seed=seed,
        learned_from=len(dataset) - len(held_out),
        held_out=len(held_out),
        loss=result.loss,
        val_loss=result.val_loss,
        position_loss=frequencies,
        samples=palette.decode(drawn).numpy(),
        real=pixels[held_out[:SAMPLES]],
        **_resemblance(dataset, drawn),
        originals=pixels[shown],
        completions=palette.decode(completed).numpy(),
        probe=probed,
        few=few,
        loss_png=_loss_png(result.rows, config.colors, frequencies),
        probe_png=figure_png(few, f"Which digit is it? Told after {FEW} examples of each"),
        stages=stages,
        machine=machine(model.wte.device),
    )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as dark ink on white: uint8 [1797, 8, 8, 3], labels int64 [1797]. InputError without it."""
    load_sklearn()
    from sklearn.datasets import load_digits as load

    digits = load()
    gray = np.rint(255 * (1 - digits.images / 16)).astype(np.uint8)  # they are stored as amounts of ink, 0 to 16
    return np.repeat(gray[..., None], 3, axis=-1), digits.target.astype(np.int64)


def position_loss(dataset: TokenDataset) -> float:
    """Nats per pixel, on the held-out images, of knowing nothing but how often each place of the grid has each colour.

    Counted over the images to learn from, one added to every count.
    """
    learned, held_out = (dataset.batch(dataset.split(part, HELD_OUT)).flatten(1) for part in ("train", "val"))
    counts = torch.nn.functional.one_hot(learned, dataset.colors).sum(0) + 1.0
    return -(counts / counts.sum(1, keepdim=True)).log().gather(1, held_out.T).mean().item()


def machine(device: torch.device) -> dict[str, str]:
    """What this ran on, for people: name → words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"igpt-fast": __version__, "Python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    backend = backend_for("rms_norm_fwd", [torch.empty(1, device=device)])
    return {
        "processor": f"{processor()}; cores: {cores}, threads used: {torch.get_num_threads()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "kernels": backend.name if backend else "plain torch",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


@contextmanager
def _stage(stages: list[Stage], name: str) -> Iterator[None]:
    """Notes how long the body of a `with` took."""
    began = time.monotonic()
    yield
    stages.append(Stage(name, time.monotonic() - began))


def _claim(out: Path) -> None:
    """Makes `out` ready to be written: new, or of an earlier demo, whose run and tokens go. Else InputError."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory to --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(f"{out} holds files that no demo wrote; give another directory to --out, or an empty one")
    write_atomically(out / MARK, b'{"complete": false}\n')
    for folder in ("run", "tokens"):
        if (out / folder).exists():
            shutil.rmtree(out / folder)


def _resemblance(dataset: TokenDataset, drawn: torch.Tensor) -> dict[str, Any]:
    """Are the samples copies? How many equal an image that was learned from, and how far the nearest of those is.

    Distances are medians, in grey levels of 0 to 255 per pixel; those of held-out scans stand beside, for scale.
    """
    shades = dataset.palette.decode(torch.arange(dataset.colors))[:, 0].float()
    learned, real = (dataset.batch(dataset.split(part, HELD_OUT)).flatten(1) for part in ("train", "val"))
    nearest = [
        (torch.cdist(shades[tokens], shades[learned], p=1) / tokens.shape[1]).amin(1)
        for tokens in (drawn.flatten(1), real)
    ]
    copies = int((drawn.flatten(1)[:, None] == learned[None]).all(2).any(1).sum())
    return {
        "copies": copies,
        "sample_distance": nearest[0].median().item(),
        "real_distance": nearest[1].median().item(),
    }


def _loss_png(rows: list[dict[str, Any]], colors: int, frequencies: float) -> bytes:
    curves = {}
    for name, key in (("scans it learned from", "loss"), ("held-out scans", "val_loss")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    levels = {f"chance: ln {colors}": math.log(colors), "how often each place has each colour": frequencies}
    return curve_png_bytes(curves, "step", "loss (nats per pixel)", "How well the next pixel is guessed", levels)


def _write(out: Path, findings: Findings) -> DemoResult:
    """The pictures, the page, and last, which makes the demo complete, the numbers."""
    write_atomically(out / "loss.png", findings.loss_png)
    write_atomically(out / "probe.png", findings.probe_png)
    save_grid(out / "samples.png", findings.samples, columns=8)
    rows = np.concatenate([findings.originals[:, None], findings.completions], axis=1)
    save_grid(out / "completions.png", rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
    page = out / "index.html"
    write_atomically(page, render(findings).encode())
    numbers = {"complete": True, **findings.numbers()}
    write_atomically(out / MARK, (json.dumps(numbers, indent=1) + "\n").encode())
    for stage in findings.stages:
        say(f"  {stage.name:<20}{stage.seconds:6.1f} s")
    return DemoResult(page, numbers)
