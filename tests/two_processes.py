"""What torchrun starts twice for tests/test_processes.py, with TOKENS and OUT: trains every variant into OUT."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import FAST, VARIANTS, variant

from igpt_fast.errors import InputError
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train


def main(tokens: str, out: Path) -> None:
    """Into OUT/NAME of each variant; OUT/error-RANK.txt is what a process says that was given another seed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # as a user's own script would
    dataset = TokenDataset(tokens)
    for name in VARIANTS:
        config, options = variant(name)
        train(dataset, out / name, config, device="cpu", **{**options, "accumulate": options["accumulate"] // 2})
    rank = dist.get_rank()
    for what, run, seed in (("seed", out / "seed", rank), ("sight", out / f"own-{rank}", 0)):
        try:
            train(dataset, run, config, device="cpu", **{**FAST, "seed": seed})
        except InputError as error:
            (out / f"{what}-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
