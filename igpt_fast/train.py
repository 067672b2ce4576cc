"""Training: `train(dataset, run, config, …)`.

A run that was stopped, or killed, and resumed from its last checkpoint takes the same steps as one that never was; to
the bit on the CPU with as many threads. What a step sees depends on its number alone (batches.py), and a checkpoint
holds all else that it reads.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from igpt_fast.batches import Batches
from igpt_fast.checkpoint import Checkpoint, load_checkpoint
from igpt_fast.config import Config
from igpt_fast.data import TokenDataset
from igpt_fast.errors import InputError
from igpt_fast.interrupt import Stop
from igpt_fast.joined import refuse_misfit, warn_of_twins
from igpt_fast.loop import Loop
from igpt_fast.made import OPTIONS
from igpt_fast.model import ImageGPT
from igpt_fast.modules import tensors_to_save
from igpt_fast.options import Options
from igpt_fast.processes import Processes, together
from igpt_fast.run import (
    IN_PYTHON,
    Result,
    broken_off,
    check_run,
    locked,
    read_options,
    refuse_differences,
    refuse_new,
    refuse_unequal_shares,
)
from igpt_fast.task import PixelTask
from igpt_fast.weights import reshaped

Prepared = tuple[PixelTask, Config, ImageGPT | None]


def train(
    dataset: TokenDataset,
    run: str | Path,
    config: Config | None = None,
    *,
    resume: bool = False,
    init: ImageGPT | None = None,
    device: str | torch.device | Processes = "auto",
    command: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Trains an Image GPT on `dataset`. All it makes lies under `run`: checkpoints, samples, metrics.jsonl, …

    config: the model's shape, which must fit the dataset's size and colours; may be None when resuming, and with init:
    a model whose weights are copied to begin with, at the dataset's size and by config's pattern, which may be others
    (see igpt_fast.weights.reshaped). options: fields of igpt_fast.options.Options. command: what else shall stand in
    train.json; its "resume" is what a stopped run tells the user to type. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save a
    checkpoint and raise KeyboardInterrupt or SystemExit(143 of SIGTERM); a second stops at once. In each of the
    processes that torchrun starts, this trains with the others (igpt_fast.processes): options.batch images a step in
    all. Raises InputError for bad options, a run that holds a checkpoint (without resume) or none (with), a resume that
    would change the model or the data, a checkpoint that cannot be read or written, a loss that is not finite.
    """
    chosen, run = Options(**options), Path(run)

    def prepare(checkpoint: Checkpoint | None) -> Prepared:
        shape, start = _beginning(dataset, run, config, checkpoint, init)
        batches = Batches(dataset, chosen, shape.objective)
        if checkpoint is None and processes.first:
            warn_of_twins(dataset, batches.indices, dataset.split("val", chosen.val_fraction), " held out")
        return PixelTask(batches), shape, start

    with together(device) as processes:
        return carry_out(prepare, run, chosen, processes, resume, command)[0]


def carry_out(
    prepare: Callable[[Checkpoint | None], Prepared],
    run: Path,
    options: Options,
    processes: Processes,
    resume: bool,
    command: Mapping[str, Any] | None,
) -> tuple[Result, PixelTask]:
    """Runs a task → how it ended, and the task itself.

    prepare: from the checkpoint that a resumed run goes on from, the task, the model's shape, and the model that it
    begins with, None for that of the checkpoint or for fresh weights. Otherwise as `train`.
    """
    stop = Stop(processes.largest)
    with ExitStack() as held:
        try:
            with processes.first_goes_ahead():
                check_run(run, resume)
                checkpoint = load_checkpoint(run) if resume else None
                refuse_unequal_shares(options, processes.count)
                task, config, start = prepare(checkpoint)
                if processes.first:
                    run.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(run))
                    refuse_new(run, checkpoint)
                noted = dict(command or {})
                if resume and command is None and (run / OPTIONS).is_file():
                    noted = dict(read_options(run)["command"])
                if start is not None:
                    noted.setdefault("init", IN_PYTHON)
                loop = Loop(task, run, config, processes, checkpoint, start, stop, noted)
            with stop:
                return loop.go(), task
        except OSError as error:  # a disk that is full, or gone
            raise broken_off(run, error) from error


def _beginning(
    dataset: TokenDataset, run: Path, config: Config | None, checkpoint: Checkpoint | None, init: ImageGPT | None
) -> tuple[Config, ImageGPT | None]:
    """The model's shape, and the model that a run with `init` begins with. InputError where they do not fit."""
    if checkpoint and init is not None:
        raise InputError("init changes nothing when resuming: the run has its own weights; leave it out")
    if config is None and init is not None:
        config = replace(init.config, size=dataset.size, classes=0)
    if config is None:
        if checkpoint is None:
            raise InputError("a new run needs a config: the model's layers, width and heads")
        config = checkpoint.model.config
    if config.classes:
        raise InputError(f"classes is {config.classes}: train learns pixels; igpt_fast.finetune learns classes too")
    if checkpoint:
        refuse_differences(run, checkpoint.model.config.to_dict(), config.to_dict())
    refuse_misfit(dataset, config, None if init is None else init.palette)
    if init is None:
        return config, None
    return config, own_copy(init, config)


def own_copy(init: ImageGPT, config: Config) -> ImageGPT:
    """A float32 model of `config` to train, with the weights of another (see igpt_fast.weights.reshaped).

    All of it learns. InputError where checkpoints have no room for what was added to it, as adapters.
    """
    tensors_to_save(init)
    start = reshaped(init, config)
    return (copy.deepcopy(start) if start is init else start).float().requires_grad_()
