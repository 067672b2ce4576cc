"""What torchrun starts twice for tests/test_processes.py: with TOKENS, tokens with labels, and OUT, trains into OUT."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import CLASSES, EARLY, FAST, FEW, VARIANTS, variant

from igpt_fast.errors import InputError
from igpt_fast.finetune import finetune
from igpt_fast.model import ImageGPT
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train


def main(tokens: str, labelled: str, out: Path) -> None:
    """Into OUT/NAME of each variant, and of fine-tuning into OUT/classes and OUT/early.

    OUT/WHAT-RANK.txt is what a process says that was given another seed, rate, pattern, or folder.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # as a user's own script would
    dataset = TokenDataset(tokens)
    for name in VARIANTS:
        config, options = variant(name)
        train(dataset, out / name, config, device="cpu", **{**options, "accumulate": options["accumulate"] // 2})
    torch.manual_seed(0)
    for name, options in (("classes", CLASSES), ("early", EARLY)):
        finetune(ImageGPT(FEW), TokenDataset(labelled), out / name, device="cpu", **options)
    rank = dist.get_rank()
    pattern = replace(config, pattern="row" if rank else None)
    for what, run, shape, options in (
        ("seed", out / "seed", config, {"seed": rank}),
        ("lr", out / "lr", config, {"lr": 1e-3 * (1 + rank)}),
        ("pattern", out / "pattern", pattern, {}),
        ("sight", out / f"own-{rank}", config, {}),
    ):
        try:
            train(dataset, run, shape, device="cpu", **{**FAST, **options})
        except InputError as error:
            (out / f"{what}-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
