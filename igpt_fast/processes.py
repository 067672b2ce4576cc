"""Several processes, each on a device of its own: what torchrun starts, on one machine or on many.

In training all take every step together. Each learns from its share of the step's images, and torch's
DistributedDataParallel averages the gradients while the backward pass still runs; so all hold the same weights. Where a
model is measured, each looks at its share of the images. The first process alone writes and speaks.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from igpt_fast.console import silent
from igpt_fast.device import pick_device
from igpt_fast.errors import InputError

PATIENCE = timedelta(hours=12)  # how long one waits while another makes tokens; one that dies is noticed at once
TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process, beside WORLD_SIZE


class Processes:
    """Those that work together, seen from one of them: number `rank` of `count`."""

    def __init__(self, device: torch.device, rank: int = 0, count: int = 1) -> None:
        self.device, self.rank, self.count, self.first = device, rank, count, rank == 0
        self.on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", count)) if count > 1 else 1
        # What the hosts say to each other never waits for a GPU.
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None

    def __str__(self) -> str:
        """Where the computing is done, for a person."""
        return str(self.device) if self.count == 1 else f"{self.count} processes ({self.device.type})"

    def largest(self, value: int) -> int:
        """The largest of all processes' values, in each of them."""
        if self.count == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._hosts)
        return int(shared)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes of a tensor on their devices, in its place; the host does not wait for it."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def share(self, tokens: Tensor) -> Tensor:
        """This process's part of a step's images [N, …] → [N / count, …]; N is a multiple of count."""
        return tokens.chunk(self.count)[self.rank] if self.count > 1 else tokens

    def fill(self, found: np.ndarray) -> None:
        """Puts the rows rank, rank + count, … of every process's own array into place, in each of them."""
        for rank in range(self.count if self.count > 1 else 0):
            rows = torch.from_numpy(found[rank :: self.count].copy())
            dist.broadcast(rows, rank, group=self._hosts)
            found[rank :: self.count] = rows.numpy()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Within it the first process is done before the others begin. Where it fails they end without a word."""
        if self.first:
            failed = 1
            try:
                yield
                failed = 0
            finally:
                self.largest(failed)
        elif self.largest(0):
            raise SystemExit(1)
        else:
            yield

    def refuse_differences(self, what: Mapping[str, Any]) -> None:
        """InputError, in all processes alike, that names the first thing in which one differs from the first."""
        if self.count == 1:
            return
        all_have: list[Any] = [None] * self.count
        dist.all_gather_object(all_have, dict(what), group=self._hosts)
        for rank, has in enumerate(all_have):
            for name in dict.fromkeys([*all_have[0], *has]):
                if has.get(name) != all_have[0].get(name):
                    raise InputError(
                        f"process {rank} has another {name} than process 0, {has.get(name)} for "
                        f"{all_have[0].get(name)}: all must be given the same command, and see the same files"
                    )

    def averaging(self, module: nn.Module) -> nn.Module:
        """The module, but its backward pass leaves the mean of all processes' gradients."""
        return DistributedDataParallel(module, gradient_as_bucket_view=True) if self.count > 1 else module

    def accumulating(self, loss: nn.Module, more: bool) -> AbstractContextManager[Any]:
        """DistributedDataParallel's no_sync while `more` parts of a step follow: its last part averages for all."""
        return loss.no_sync() if more and isinstance(loss, DistributedDataParallel) else nullcontext()

    def meet(self) -> None:
        """Returns when all processes have come here."""
        self.largest(0)


def world_size() -> int:
    """How many processes torchrun has started, this one included. InputError where WORLD_SIZE is no such number."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InputError(f"WORLD_SIZE is {text!r}, not a number of processes; unset it, or start them by torchrun")
    return int(text)


@contextmanager
def together(device: "str | torch.device | Processes") -> Iterator[Processes]:
    """This process and those that torchrun has started beside it, until it ends; all but the first are silent.

    device: as for pick_device; `Processes.device` is this process's own, the GPU of its number on its machine. Or those
    that are together already, and stay so. A default process group that is there already is used, and stays. Raises
    InputError where a process has no GPU, and when another one has ended.
    """
    if isinstance(device, Processes):
        yield device
        return
    there = dist.is_available() and dist.is_initialized()
    if not there and world_size() == 1:
        yield Processes(pick_device(device))
        return
    if missing := [] if there else [name for name in TORCHRUN if name not in os.environ]:
        raise InputError(f"WORLD_SIZE asks for several processes, but {missing[0]} is not set: start them by torchrun")
    device = pick_device(_own(device, chosen=there))
    if not there:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    failed = True
    try:
        processes = Processes(device, dist.get_rank(), dist.get_world_size())
        with nullcontext() if processes.first else silent():
            yield processes
        failed = False
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise InputError(_of_others(error)) from error
    finally:
        if not there:
            _leave(device, failed)


def _of_others(error: RuntimeError) -> str:
    """What to say where the processes could not talk to each other: mostly because one is gone, which gloo tells."""
    if not isinstance(error, dist.DistBackendError):
        return "another of the processes has ended, see what it said; --resume goes on with a run"
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((" ".join(said[k : k + 2]) for k, line in enumerate(said) if line.startswith("Last error")), "")
    reason = ": ".join(filter(None, [*said[:1], last]))
    return (
        f"NCCL failed ({reason}), or another of the processes has ended, see what it said; --resume goes on with a run"
    )


def _leave(device: torch.device, failed: bool) -> None:
    """Ends the default process group. NCCL's waits for all processes, so one that has failed must not ask it to."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)  # since torch 2.6
    if not failed or device.type != "cuda":
        dist.destroy_process_group()
    elif abort is not None:
        abort()


def _own(device: str | torch.device, chosen: bool = False) -> str | torch.device:
    """The GPU of this process, where one is asked for; no other is touched.

    chosen: whether who started the processes may have chosen it: then the one that is given or current is meant.
    """
    if not (torch.cuda.is_available() if str(device) == "auto" else str(device).startswith("cuda")):
        return device
    if ":" in str(device) and not chosen:
        raise InputError(f"--device {device} is one GPU, and here are several processes: leave it out, or say cuda")
    if chosen and (":" in str(device) or "LOCAL_RANK" not in os.environ):
        own = torch.device(device) if ":" in str(device) else torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(own)
        return own
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if not gpus:
        return device
    if number >= gpus:
        raise InputError(f"process {number} of this machine has no GPU: there are {gpus}; use --nproc-per-node {gpus}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
