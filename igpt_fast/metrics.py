"""metrics.jsonl of a run: what was measured while it trained.

One JSON object a line: training rows (step, loss, lr, grad_norm, images_per_second, elapsed) and validation rows (step,
val_loss, elapsed). Losses are nats per pixel. Fine-tuning has its own: loss, the sum of pixel_loss and of class_loss in
nats per image; val_class_loss, val_accuracy.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt_fast.atomic import write_atomically
from igpt_fast.errors import InputError
from igpt_fast.made import METRICS


class Metrics:
    """metrics.jsonl: `rows` as written, oldest first. Those after `step`, where a run resumes, are dropped at once.

    writes: whether this process is the one that does.
    """

    def __init__(self, run: Path, step: int, writes: bool = True) -> None:
        self.path, self.writes = run / METRICS, writes
        self.rows = [row for row in read_metrics(run) if row["step"] <= step] if step else []
        if writes:
            write_atomically(self.path, b"".join(map(_line, self.rows)))

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row, on disk when this returns (as far as a killed process goes; `sync` is for a dead machine)."""
        self.rows.append(row)
        if self.writes:
            with open(self.path, "ab") as file:
                file.write(_line(row))

    def sync(self) -> None:
        """Makes every row durable, so that none is younger on disk than a checkpoint."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def of(self, step: int, key: str) -> dict[str, Any] | None:
        """The row of that step that holds `key`."""
        return next((row for row in self.rows if row["step"] == step and key in row), None)

    def last(self, key: str) -> float | None:
        """The newest value under `key`, None when there is none."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl, without a last line that a killed process left unfinished. Raises InputError."""
    path, rows = Path(run) / METRICS, []
    if not path.exists():
        return rows
    for index, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        try:
            row = json.loads(line)
            numbers = [value for name, value in row.items() if name.endswith(("loss", "accuracy", "elapsed"))]
            if type(row["step"]) is not int or not all(map(_is_number, numbers)):
                raise ValueError("its step, a loss, an accuracy or elapsed is no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break
            raise InputError(f"{path}, line {index + 1} is no row of metrics: mend or remove that line") from error
    return rows


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
