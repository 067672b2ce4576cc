"""One run of training: the step that it has come to, and what is due after each."""

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast.atomic import remove_leftovers
from igpt_fast.batches import Batch, fingerprint
from igpt_fast.checkpoint import Checkpoint, drop_old, list_checkpoints, save_checkpoint, step_of, update_state
from igpt_fast.config import Config
from igpt_fast.console import Bar, progress, say
from igpt_fast.errors import InputError
from igpt_fast.interrupt import Stop, Stopped
from igpt_fast.made import OPTIONS
from igpt_fast.metrics import Metrics
from igpt_fast.model import ImageGPT
from igpt_fast.optimizer import adam, restore, state_tensors
from igpt_fast.pictures import save_grid
from igpt_fast.processes import Processes
from igpt_fast.run import (
    Result,
    circumstances,
    diverged,
    drop_later_pictures,
    introduction,
    picture_of,
    refuse_differences,
    refuse_idle_steps,
    say_differences,
    write_options,
)
from igpt_fast.sample import drawing_dtype, sample
from igpt_fast.task import Learned, PixelTask

SAMPLES = 16  # images in a picture of samples


class Loop:
    """One run: the model, the optimizer, and the step that they have come to."""

    def __init__(
        self,
        task: PixelTask,
        run: Path,
        config: Config,
        processes: Processes,
        checkpoint: Checkpoint | None,
        start: ImageGPT | None,
        stop: Stop,
        command: dict[str, Any],
    ) -> None:
        self.task, self.run, self.config, self.stop = task, run, config, stop
        self.processes, self.device, self.command = processes, processes.device, command
        self.batches, self.options, self.palette = task.batches, task.batches.options, task.batches.dataset.palette
        data = fingerprint(self.batches.dataset)
        self.fixed = data | {name: getattr(self.options, name) for name in self.options.FIXED} | task.fixed()
        self.step, state = 0, {"fixed": self.fixed, "window": [], "elapsed": 0.0}
        if checkpoint:
            self.step, state = checkpoint.step, checkpoint.state
            if "fixed" not in state:
                raise InputError(f"{checkpoint.path} holds weights alone: begin a run with them, as --init (init=)")
            # What older runs do not note is as it is now; they did not shift.
            older = {"shift": 0, **{name: self.fixed.get(name) for name in ("validation images", "names")}}
            unsaid = {name: value for name, value in older.items() if name not in state["fixed"]}
            refuse_differences(run, {**state["fixed"], **unsaid}, self.fixed)
            task.restore(state.get("task", {}))
            refuse_idle_steps(run, self.step, self.options, state["free"], task.done)
            say(f"going on from {checkpoint.path}")
            say_differences(state["free"], self._circumstances())
            if task.best is not None and task.best not in map(step_of, list_checkpoints(run)):
                say(f"the best weights so far, of step {task.best}, are gone: the best of what follows counts")
                task.forget_best()
        self.window: list[Any] = [tuple(of_step) for of_step in state["window"]]  # losses, norm: since the last row
        self.began = time.monotonic() - state["elapsed"]
        self.timed = (0, 0.0)  # steps since the last row, and the seconds that they took
        self._build(checkpoint, start)
        self.metrics = Metrics(run, self.step, writes=processes.first)
        if processes.first:
            remove_leftovers(run, picture_of(run, 0).parent, *list_checkpoints(run))
            drop_later_pictures(run, self.step)
            write_options(run, config, self.options, data, command)
            task.write_images(run)

    def _build(self, checkpoint: Checkpoint | None, start: ImageGPT | None) -> None:
        """The model, its average when ema is on, and the optimizer: fresh by the seed, given, or as they were saved."""
        if start is not None:
            model = start
        elif checkpoint is None:
            with torch.random.fork_rng(devices=[]):  # of the CPU, where weights are drawn
                torch.default_generator.manual_seed(self.options.seed)
                model = ImageGPT(self.config)
        else:
            model = checkpoint.model
        model.preprocessing, model.palette = self.batches.dataset.preprocessing, self.palette
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
        model = {f"{name} of the model": value for name, value in self.config.to_dict().items()}
        sees = {"sight of the run": (self.run / OPTIONS).exists(), "number of its rows": len(self.metrics.rows)}
        self.processes.refuse_differences({**asdict(options), **self.fixed, **model, "step": self.step, **sees})
        learned = self.processes.averaging(Learned(self.task, self.model))
        counts = self.model.num_parameters(), len(self.batches.indices), len(self.batches.held_out)
        where, more = f"on {self.processes}, into {self.run}", self.task.introduction(self.config, options)
        say(introduction(self.config, options, *counts, where, more))
        try:
            with progress(options.steps, "steps", "train", start=self.step) as bar:
                self._milestones(bar)  # those of the checkpoint's step that were cut short
                if self.step:  # before, there is nothing to save
                    self.stop.check()
                while self.step < options.steps and not self.task.done:
                    began = time.monotonic()
                    self.window.append(self._update(learned))
                    self.step += 1
                    # Reading a number waits for a GPU, so there it is read only before what would wait, too.
                    if self.device.type == "cpu" or self._at_milestone():
                        self._read_window()
                        bar.fields["loss"] = self.window[-1][0]
                    bar.to(self.step)
                    self.timed = (self.timed[0] + 1, self.timed[1] + time.monotonic() - began)
                    self._milestones(bar)
                    self.stop.check()
        except Stopped:
            say(f"stopped at step {self.step} of {options.steps}: saved in {self._save()}")
            several = f", by torchrun as before ({self.processes.count} processes)" if self.processes.count > 1 else ""
            say(f"go on with: {self.command.get('resume', 'resume=True')}{several}")
            self.processes.meet()  # whoever started them may end all when one ends
            self.stop.leave()
        self.processes.meet()  # the last checkpoint is written
        return Result(
            model=self.average,
            run=self.run,
            checkpoint=list_checkpoints(self.run)[-1],
            step=self.step,
            loss=self.metrics.last("loss"),
            val_loss=self.metrics.last("val_loss"),
            train=len(self.batches.indices),
            val=len(self.batches.held_out),
            seconds=time.monotonic() - self.began,
            rows=self.metrics.rows,
        )

    def _update(self, learned: nn.Module) -> tuple[Tensor, ...]:
        """One optimizer step → its losses and its gradient's norm, on the device. Stopped leaves the weights alone."""
        options, processes = self.options, self.processes
        batch = self.batches.of_step(self.step).each(lambda t: processes.share(t).to(self.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(self.task.losses), device=self.device)
        images, size = len(batch.tokens), len(batch.tokens) // options.accumulate
        for start in range(0, images, size):
            if start:
                self.stop.check()
            with processes.accumulating(learned, more=start + size < images):
                losses = self._learn(learned, batch.each(lambda t, part=slice(start, start + size): t[part]))
                (losses[0] / options.accumulate).backward()
            total += torch.stack(losses).detach() / options.accumulate
        total = processes.sum(total) / processes.count
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), options.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(self.step, self.config.width)
        self.optimizer.step()
        if options.ema:
            decay = min(options.ema, (1 + self.step) / (10 + self.step))  # the first weights are not worth remembering
            with torch.no_grad():
                torch._foreach_lerp_([*self.average.parameters()], [*self.named.values()], 1 - decay)
        return *total, norm.detach()

    def _learn(self, learned: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        with self._autocast():
            return learned(*batch)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _milestones(self, bar: Bar) -> None:
        """What is due after this step and not there yet: a row, validation, pictures, a checkpoint."""
        options, last = self.options, self.step == self.options.steps
        if last or self._due(options.log_every):
            self._log(bar)
        due = len(self.batches.held_out) and (last or self._due(options.val_every))
        if due and self.task.judged != self.step:
            self._validate(bar)
            if self.task.done and not last:
                last = True
                self._log(bar)
        if options.sample_every and (last or self._due(options.sample_every)) and self.processes.first:
            self._draw()
        if last or self._due(options.save_every) or (self.step and self.task.best == self.step):
            self._save()

    def _at_milestone(self) -> bool:
        """Whether `_milestones` has anything to do after this step."""
        every = (getattr(self.options, f"{what}_every") for what in ("log", "val", "sample", "save"))
        return self.step == self.options.steps or any(map(self._due, every))

    def _due(self, every: int) -> bool:
        return bool(every and self.step) and self.step % every == 0

    def _read_window(self) -> None:
        """Makes the window's tensors numbers. InputError when one is not finite: before anything of it is saved."""
        read = [tuple(map(float, values)) for values in self.window]
        first = self.step - len(read) + 1
        for step, (loss, *_, norm) in enumerate(read, start=first):
            self._refuse_garbage(step, "loss", loss)
            self._refuse_garbage(step, "gradient's norm", norm)
        self.window = list(read)

    def _refuse_garbage(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise diverged(self.run, f"the {what} is {value} at step {step}", self.options, self.config.width, step)

    def _log(self, bar: Bar) -> None:
        if not self.window:
            return
        self._read_window()
        means = [sum(values) / len(values) for values in zip(*self.window, strict=True)]
        (steps, seconds), self.window, self.timed = self.timed, [], (0, 0.0)
        row = {
            "step": self.step,
            **dict(zip(self.task.losses, means[:-1], strict=True)),
            "lr": self.options.rate(self.step - 1, self.config.width),
            "grad_norm": means[-1],
            "images_per_second": round(steps * self.options.batch / seconds, 2) if seconds else None,
            "elapsed": round(time.monotonic() - self.began, 2),
        }
        self.metrics.append(row)
        bar.to(self.step, **{"loss": row["loss"], "images/s": row["images_per_second"]})

    @torch.no_grad()
    def _validate(self, bar: Bar) -> None:
        names = self.task.measures
        if (row := self.metrics.of(self.step, names[0])) is not None:  # killed before a checkpoint could say so
            self.task.judge(self.step, row)
            return
        total = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        at_once = self.options.batch // (self.options.accumulate * self.processes.count)
        for number, batch in enumerate(self.batches.validation(at_once)):
            self.stop.check()
            if number % self.processes.count == self.processes.rank:
                with self._autocast():
                    found = self.task.measure(self.average, batch.each(lambda t: t.to(self.device)))
                total += torch.stack(found).double()
        means = (self.processes.sum(total) / len(self.batches.held_out)).tolist()
        measured = dict(zip(names, means, strict=True))
        self._refuse_garbage(self.step, "validation loss", means[0])
        self.task.judge(self.step, measured)
        self.metrics.append({"step": self.step, **measured, "elapsed": round(time.monotonic() - self.began, 2)})
        bar.to(self.step, **{name.replace("_", " "): mean for name, mean in measured.items()})

    def _draw(self) -> None:
        """samples/step-….png, where the model can be sampled from at all, and loss.png; cut short by a signal."""
        path = picture_of(self.run, self.step)
        if self.config.objective == "ar" and not path.exists():
            dtype = drawing_dtype(self.device)
            model = self.average if dtype is self.average.wte.dtype else copy.deepcopy(self.average).to(dtype)
            try:
                tokens = sample(model, SAMPLES, seed=self.options.seed, progress=self.stop.check_alone)
            except Stopped:  # all processes hear of it at their next check
                return
            save_grid(path, self.palette.decode(tokens.cpu()))
        self.task.draw(self.run, self.metrics.rows, self.config)

    def _save(self) -> Path:
        """The checkpoint of this step, unless it is there already."""
        self._read_window()
        if not self.processes.first:
            return self.run
        keep, best = self.options.keep, self.task.best
        if (saved := list_checkpoints(self.run)) and step_of(saved[-1]) == self.step:
            update_state(saved[-1], {"task": self.task.state()}, best)
            drop_old(self.run, keep, best)  # which the process that saved it may not have come to
            return saved[-1]
        tensors = state_tensors(self.optimizer, self.named)
        if self.options.ema:
            tensors |= {f"weights.{name}": parameter for name, parameter in self.named.items()}
        state = {"fixed": self.fixed, "free": self._circumstances(), "window": self.window}
        state |= {"task": self.task.state(), "elapsed": time.monotonic() - self.began}
        self.metrics.sync()
        self.task.draw(self.run, self.metrics.rows, self.config)
        return save_checkpoint(self.run, self.step, self.average, self.palette, state, tensors, keep, best)

    def _circumstances(self) -> dict[str, Any]:
        return circumstances(self.options, self.device, self.processes.count)
