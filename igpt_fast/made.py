"""What lies among a user's images but was made by igpt-fast: a training run's pictures, and the picture of a palette.
The names of a run's files.

Needs no torch: the processes that decode images import it.
"""

import io
import math
from pathlib import Path

import numpy as np

MADE = "made by igpt-fast"  # why it is left out
OPTIONS, METRICS, CHECKPOINTS = "train.json", "metrics.jsonl", "checkpoints"  # of a run
RUN = frozenset({OPTIONS, METRICS, CHECKPOINTS})
CURVE, ACCURACY, CONFUSION, SAMPLES = "loss.png", "accuracy.png", "confusion.png", "samples"
PICTURES = frozenset({CURVE, ACCURACY, CONFUSION, SAMPLES})  # of a run
SWATCH = 16  # pixels of a side of a colour in a palette's picture
PALETTE_BYTES = 128 + 4096 * 12  # the largest palette.npy: its header, and 4096 colours of three floats


def made_here(folder: Path, names: set[str], given: bool) -> set[str]:
    """Those of `names`, which `folder` holds, that igpt-fast made: all of a run, or, of the folder that was `given` as
    images and is a run as well, the run's pictures; and pictures of palettes.
    """
    if is_run(folder, names) and not given:
        return names
    own = PICTURES if is_run(folder, names) else set()
    stems = {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
    return own | {f"{stem}.png" for stem in stems if f"{stem}.png" in names and _is_palette(folder / stem)}


def is_run(folder: Path, names: set[str] | None = None) -> bool:
    """Whether a folder is that of a run, by two of three names: one may be lost, or the user's own."""
    found = {name for name in RUN if (folder / name).exists()} if names is None else RUN & names
    return len(found) > 1


def swatches(colors: int) -> tuple[int, int]:
    """Rows and columns of the colours in a palette's picture."""
    columns = math.ceil(math.sqrt(2 * colors))
    return math.ceil(colors / columns), columns


def _is_palette(stem: Path) -> bool:
    """Whether STEM.npy is a palette and STEM.png what `igpt-fast palette` draws of it (see Palette.picture)."""
    file, picture = Path(f"{stem}.npy"), Path(f"{stem}.png")
    try:
        if not (file.is_file() and picture.is_file()) or file.stat().st_size > PALETTE_BYTES:
            return False
        colors = np.lib.format.read_array(io.BytesIO(file.read_bytes()), allow_pickle=False)
        with open(picture, "rb") as stream:
            head = stream.read(24)
    except (OSError, ValueError, EOFError):
        return False
    if colors.dtype != np.float32 or colors.ndim != 2 or colors.shape[1] != 3 or not len(colors):
        return False
    rows, columns = swatches(len(colors))
    size = SWATCH * columns, SWATCH * rows
    return head[:4] == b"\x89PNG" and (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:], "big")) == size
