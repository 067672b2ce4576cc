"""One run of training: the step that it has come to, and what is due after each."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast.batches import Batch, Batches, fingerprint
from igpt_fast.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from igpt_fast.config import Config
from igpt_fast.console import Bar, progress, say
from igpt_fast.interrupt import Stop, Stopped
from igpt_fast.model import ImageGPT
from igpt_fast.optimizer import adam, restore, state_tensors
from igpt_fast.options import FIXED
from igpt_fast.pictures import save_grid
from igpt_fast.processes import Processes
from igpt_fast.run import (
    OPTIONS,
    Metrics,
    Result,
    circumstances,
    diverged,
    drop_later_pictures,
    introduction,
    refuse_differences,
    refuse_idle_steps,
    save_loss_curve,
    say_differences,
    write_options,
)
from igpt_fast.sample import drawing_dtype, sample

SAMPLES = 16  # images in a picture of samples


class Loop:
    """One run: the model, the optimizer, and the step that they have come to."""

    def __init__(
        self,
        batches: Batches,
        run: Path,
        config: Config,
        processes: Processes,
        checkpoint: Checkpoint | None,
        start: ImageGPT | None,
        stop: Stop,
        command: dict[str, Any],
    ) -> None:
        self.batches, self.run, self.config, self.stop = batches, run, config, stop
        self.processes, self.device = processes, processes.device
        self.options, self.command, self.palette = batches.options, command, batches.dataset.palette
        data = fingerprint(batches.dataset)
        self.fixed = data | {name: getattr(self.options, name) for name in FIXED}
        self.step, state = 0, {"fixed": self.fixed, "window": [], "elapsed": 0.0}
        if checkpoint:
            self.step, state = checkpoint.step, checkpoint.state
            refuse_differences(run, state["fixed"], self.fixed)
            refuse_idle_steps(run, self.step, self.options, state["free"])
            say(f"going on from {checkpoint.path}")
            say_differences(state["free"], self._circumstances())
        self.window: list[Any] = [tuple(pair) for pair in state["window"]]  # (loss, norm) of steps since the last row
        self.began = time.monotonic() - state["elapsed"]
        self.timed = (0, 0.0)  # steps since the last row, and the seconds that they took
        self._build(checkpoint, start)
        self.metrics = Metrics(run, self.step, writes=processes.first)
        if processes.first:
            drop_later_pictures(run, self.step)
            write_options(run, config, self.options, data, command)

    def _build(self, checkpoint: Checkpoint | None, start: ImageGPT | None) -> None:
        """The model, its average when ema is on, and the optimizer: fresh by the seed, given, or as they were saved."""
        if start is not None:
            model = start
        elif checkpoint is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.seed)
                model = ImageGPT(self.config)
        else:
            model = checkpoint.model
        self.model = model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if self.options.ema else self.model
        self.model.activation_checkpointing = self.options.activation_checkpointing
        self.named = dict(self.model.named_parameters())
        self.optimizer = adam(self.named)
        if checkpoint is None:
            return
        restore(self.optimizer, self.named, tensors := checkpoint.optimizer_tensors(), self.step)
        if self.options.ema:  # model.safetensors holds the average
            for name, parameter in self.named.items():
                parameter.data.copy_(tensors[f"weights.{name}"])

    def go(self) -> Result:
        """Trains to the last step, or until asked to stop."""
        options = self.options
        sees = {"sight of the run": (self.run / OPTIONS).exists()}
        self.processes.refuse_differences({**self.fixed, "step": self.step, **sees})
        learned = self.processes.averaging(self.model)
        counts = self.model.num_parameters(), len(self.batches.indices), len(self.batches.held_out)
        say(introduction(self.config, options, *counts, where=f"on {self.processes}, into {self.run}"))
        try:
            with progress(options.steps, "steps", "train", start=self.step) as bar:
                self._milestones(bar)  # those of the checkpoint's step that were cut short
                if self.step:  # before, there is nothing to save
                    self.stop.check()
                while self.step < options.steps:
                    began = time.monotonic()
                    self.window.append(self._update(learned))
                    self.step += 1
                    # Reading a number waits for a GPU, so there it is read only when a row is due.
                    if self.device.type == "cpu" or self._due(options.log_every):
                        self._read_window()
                        bar.fields["loss"] = self.window[-1][0]
                    bar.to(self.step)
                    self.timed = (self.timed[0] + 1, self.timed[1] + time.monotonic() - began)
                    self._milestones(bar)
                    self.stop.check()
        except Stopped:
            say(f"stopped at step {self.step} of {options.steps}: saved in {self._save()}")
            say(f"go on with: {self.command.get('resume', 'resume=True')}")
            self.processes.meet()  # whoever started them may end all when one ends
            self.stop.leave()
        self.processes.meet()  # the last checkpoint is written
        loss, val_loss = self.metrics.last("loss"), self.metrics.last("val_loss")
        seconds, checkpoint = time.monotonic() - self.began, list_checkpoints(self.run)[-1]
        return Result(self.average, self.run, checkpoint, self.step, loss, val_loss, seconds, self.metrics.rows)

    def _update(self, learned: nn.Module) -> tuple[Tensor, Tensor]:
        """One optimizer step → its loss and its gradient's norm, on the device. Stopped leaves the weights alone."""
        options, processes = self.options, self.processes
        tokens, keep = self.batches.of_step(self.step)
        tokens, keep = self._moved((processes.share(tokens), None if keep is None else processes.share(keep)))
        self.optimizer.zero_grad(set_to_none=True)
        total, size = torch.zeros((), device=self.device), len(tokens) // options.accumulate
        for start in range(0, len(tokens), size):
            if start:
                self.stop.check()
            part = slice(start, start + size)
            with processes.accumulating(learned, more=start + size < len(tokens)):
                loss = self._loss(learned, tokens[part], None if keep is None else keep[part]) / options.accumulate
                loss.backward()
            total += loss.detach()
        total = processes.sum(total) / processes.count
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), options.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(self.step, self.config.width)
        self.optimizer.step()
        if options.ema:
            decay = min(options.ema, (1 + self.step) / (10 + self.step))  # the first weights are not worth remembering
            with torch.no_grad():
                for average, parameter in zip(self.average.parameters(), self.named.values(), strict=True):
                    average.lerp_(parameter, 1 - decay)
        return total, norm.detach()

    def _moved(self, batch: Batch) -> Batch:
        tokens, keep = batch
        return tokens.to(self.device), None if keep is None else keep.to(self.device)

    def _loss(self, model: Callable[..., Tensor], tokens: Tensor, keep: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            return model(tokens, keep=keep)

    def _milestones(self, bar: Bar) -> None:
        """What is due after this step and not there yet: a row, validation, pictures, a checkpoint."""
        options, last = self.options, self.step == self.options.steps
        if self.window and (last or self._due(options.log_every)):
            self._log(bar)
        due = len(self.batches.held_out) and (last or self._due(options.val_every))
        if due and not self.metrics.has(self.step, "val_loss"):
            self._validate(bar)
        if options.sample_every and (last or self._due(options.sample_every)) and self.processes.first:
            self._draw()
        if last or self._due(options.save_every):
            self._save()

    def _due(self, every: int) -> bool:
        return bool(every and self.step) and self.step % every == 0

    def _read_window(self) -> None:
        """Makes the window's tensors numbers. InputError when one is not finite: before anything of it is saved."""
        read = [(float(loss), float(norm)) for loss, norm in self.window]
        first = self.step - len(read) + 1
        for step, (loss, norm) in enumerate(read, start=first):
            self._refuse_garbage(step, "loss", loss)
            self._refuse_garbage(step, "gradient's norm", norm)
        self.window = list(read)

    def _refuse_garbage(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise diverged(self.run, f"the {what} is {value} at step {step}", self.options, self.config.width, step)

    def _log(self, bar: Bar) -> None:
        self._read_window()
        losses, norms = zip(*self.window, strict=True)
        (steps, seconds), self.window, self.timed = self.timed, [], (0, 0.0)
        row = {
            "step": self.step,
            "loss": sum(losses) / len(losses),
            "lr": self.options.rate(self.step - 1, self.config.width),
            "grad_norm": sum(norms) / len(norms),
            "images_per_second": round(steps * self.options.batch / seconds, 2) if seconds else None,
            "elapsed": round(time.monotonic() - self.began, 2),
        }
        self.metrics.append(row)
        bar.to(self.step, **{"loss": row["loss"], "images/s": row["images_per_second"]})

    @torch.no_grad()
    def _validate(self, bar: Bar) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(self.batches.validation(self.options.batch // self.options.accumulate)):
            self.stop.check()
            if number % self.processes.count == self.processes.rank:
                tokens, keep = self._moved(batch)
                total += self._loss(self.average.loss, tokens, keep).double() * len(tokens)
        loss = self.processes.sum(total).item() / len(self.batches.held_out)
        self._refuse_garbage(self.step, "validation loss", loss)
        self.metrics.append({"step": self.step, "val_loss": loss, "elapsed": round(time.monotonic() - self.began, 2)})
        bar.to(self.step, **{"val loss": loss})

    def _draw(self) -> None:
        """samples/step-….png, where the model can be sampled from at all, and loss.png; cut short by a signal."""
        path = self.run / "samples" / f"step-{self.step:06d}.png"
        if self.config.objective == "ar" and not path.exists():
            dtype = drawing_dtype(self.device)
            model = self.average if dtype is self.average.wte.dtype else copy.deepcopy(self.average).to(dtype)
            try:
                tokens = sample(model, SAMPLES, seed=self.options.seed, progress=self.stop.check_alone)
            except Stopped:  # all processes hear of it at their next check
                return
            save_grid(path, self.palette.decode(tokens.cpu()))
        save_loss_curve(self.run, self.metrics.rows, self.config.colors)

    def _save(self) -> Path:
        """The checkpoint of this step, unless it is there already."""
        self._read_window()
        if not self.processes.first:
            return self.run
        if (saved := list_checkpoints(self.run)) and int(saved[-1].name[5:]) == self.step:
            return saved[-1]
        tensors = state_tensors(self.optimizer, self.named)
        if self.options.ema:
            tensors |= {f"weights.{name}": parameter for name, parameter in self.named.items()}
        state = {"fixed": self.fixed, "free": self._circumstances(), "window": self.window}
        state["elapsed"] = time.monotonic() - self.began
        self.metrics.sync()
        save_loss_curve(self.run, self.metrics.rows, self.config.colors)
        return save_checkpoint(self.run, self.step, self.average, self.palette, state, tensors, self.options.keep)

    def _circumstances(self) -> dict[str, Any]:
        return circumstances(self.options, self.device, self.processes.count)
