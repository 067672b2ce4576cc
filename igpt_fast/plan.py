"""What a training run would take here: some of its work is done on images of noise, the rest is arithmetic."""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from igpt_fast.cached import cache_slots
from igpt_fast.config import Config
from igpt_fast.console import Bar, progress
from igpt_fast.device import free_memory_of, memory_of, peak_of, pick_device, restart_peak
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.optimizer import adam
from igpt_fast.options import Options
from igpt_fast.patterns import compiled

STATE_BYTES = 16  # of a parameter: itself, its gradient and Adam's two moments, in float32
ENOUGH = 0.9  # of the memory is planned with: the rest is other programs'
NOISE = 32 << 20  # bytes by which the peak of a process varies
REPEATS = 3  # timings of the largest part; their median counts


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are of the device's memory: of the GPU what torch holds, else all of this process."""

    parameters: int
    flop_per_image: float  # forward and backward, products only
    step_seconds: float
    steps: int
    batch: int
    part: int  # images of a step that go side by side
    # So many did; fewer than `part` where time or memory did not allow it: then figures are in proportion.
    measured: int
    peak_bytes: int
    free_bytes: int  # what no other program holds
    device_bytes: int
    image_bytes: int  # what one more image side by side takes; an estimate where too few were measured to tell
    fits: int  # images side by side that fit into nine tenths of what is free, by image_bytes
    checkpoint_bytes: int
    cache_bytes: int  # keys and values of an image while it is drawn in bfloat16; 0 for a model that draws none

    @property
    def seconds(self) -> float:
        """Of all steps, without validation and pictures."""
        return self.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        rates = {"images_per_second": self.batch / self.step_seconds, "seconds": self.seconds}
        return {**asdict(self), **rates, "flop_per_second": self.flop_per_image * self.batch / self.step_seconds}


def plan(config: Config, options: Options, device: str | torch.device = "auto", seconds: float = 30.0) -> Plan:
    """Does a step's forward and backward passes of ever more images side by side, until they are as many as a step has.

    options: as for train. seconds: about how long it may take; a single part of one image is always measured. Raises
    InputError where the weights alone do not fit into memory, or one image beside them.
    """
    device = pick_device(device)
    count, free = parameters(config), free_memory_of(device)
    state = count * (STATE_BYTES + 4 * bool(options.ema))
    least = state + _image_bytes(config, options, device)
    if least > ENOUGH * free:
        one = (least - state) / 1e9
        raise InputError(
            f"{count:,} parameters, their gradients and Adam's moments take {state / 1e9:,.1f} GB, an image about "
            f"{one:,.1f} GB, and {device} has {free / 1e9:,.1f} GB free: use a smaller model, or a machine with more"
        )
    part = options.batch // options.accumulate
    with progress(part, "images", "side by side") as bar:
        found = _Measure(config, options, device, free).upto(part, seconds, bar)
    size = found.sizes[-1]
    image = found.image()
    of_part, peak = found.times[-1] * part / size, found.peaks[-1] + image * (part - size)
    return Plan(
        parameters=count,
        flop_per_image=3 * forward_flop(config),
        step_seconds=options.accumulate * of_part + found.update,
        steps=options.steps,
        batch=options.batch,
        part=part,
        measured=size,
        peak_bytes=round(peak),
        free_bytes=free,
        device_bytes=memory_of(device),
        image_bytes=round(image),
        fits=max(1, size + math.floor((ENOUGH * free - found.peaks[-1]) / image)),
        checkpoint_bytes=count * (12 + 4 * bool(options.ema)),
        cache_bytes=2 * 2 * config.layers * config.width * cache_slots(config) if config.objective == "ar" else 0,
    )


def parameters(config: Config) -> int:
    """How many numbers a model of `config` learns; none is made."""
    with torch.device("meta"):
        return ImageGPT(config).num_parameters()


def forward_flop(config: Config) -> float:
    """FLOP of the products of one image's forward pass; of attention's, those of the pairs that are seen."""
    c, causal = config, config.objective == "ar"
    linears = c.layers * (4 * c.width**2 + 2 * c.width * c.mlp_width) + c.colors * c.width
    dense = c.tokens * (c.tokens + 1) / 2 if causal else c.tokens**2
    pairs = 0.0
    for layer in range(c.layers):
        texts = c.patterns(layer)
        seen = [dense if text is None else compiled(text, c.size, causal).pairs for text in texts]
        pairs += sum(seen[head % len(seen)] for head in range(c.heads))
    return 2 * c.tokens * linears + 4 * c.head_dim * pairs


def _image_bytes(config: Config, options: Options, device: torch.device) -> int:
    """About what the activations of one image take that the backward pass reads, and the gradients of one block."""
    wide = 4 if options.precision == "fp32" else 2
    stream, mlp = 4 // wide, config.mlp_width / config.width  # in numbers of the width; the stream is float32
    # What two norms read, q, k and v, attention's output, what the activation reads; on a GPU also what norms and
    # activation write, which a CPU makes again.
    numbers = 2 * stream + 3 + 1 + mlp + (0 if device.type == "cpu" else 2 + mlp)
    kept = stream + 1 if options.activation_checkpointing else numbers  # of each block; of one, all
    return round(wide * config.tokens * (config.width * (kept * config.layers + 2 * numbers) + 2 * config.colors))


class _Measure:
    """sizes: images side by side; times: seconds of their passes; peaks: bytes meanwhile; update: Adam's seconds."""

    def __init__(self, config: Config, options: Options, device: torch.device, free: int) -> None:
        self.options, self.device, self.free = options, device, free
        self.estimate = _image_bytes(config, options, device)
        self.sizes, self.times, self.peaks, self.update = [], [], [], 0.0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            self.model = ImageGPT(config)
            torch.nn.init.normal_(self.model.wtet, std=0.02)  # of zeros there would be no gradient below it
            self.model.to(device)
            self.tokens = torch.randint(config.colors, (options.batch, *config.size))
        self.average = [p.detach().clone() for p in self.model.parameters()] if options.ema else []
        self.model.activation_checkpointing = options.activation_checkpointing
        self.optimizer = adam(dict(self.model.named_parameters()))

    def upto(self, part: int, seconds: float, bar: Bar) -> "_Measure":
        """Measures 1, 2, 4, … images, and `part` in the end."""
        began, size = time.monotonic(), 1
        try:
            self._passes(1)
            self._timed(self._update)  # Adam makes its moments
        except torch.OutOfMemoryError as error:
            raise self._no_room() from error
        while self._measure(size):
            bar.to(size, seconds=self.times[-1])
            if size == part:
                break
            # The next takes at most twice what this took, and is repeated.
            size, likely = min(2 * size, part), 2 * self.times[-1]
            if time.monotonic() - began + likely > seconds or not self._has_room(size):
                break
        spent = [self.times[-1]]
        while len(spent) < REPEATS and time.monotonic() - began + spent[0] < seconds:
            spent.append(self._timed(lambda: self._passes(self.sizes[-1])))
        self.times[-1] = statistics.median(spent)
        self.update = self._timed(self._update)
        return self

    def _measure(self, size: int) -> bool:
        """Appends what so many images side by side take; False where there is no memory for them."""
        restart_peak(self.device)
        try:
            seconds = self._timed(lambda: self._passes(size))
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            if not self.sizes:
                raise self._no_room() from error
            return False
        self.sizes.append(size)
        self.times.append(seconds)
        self.peaks.append(peak_of(self.device))
        return True

    def _no_room(self) -> InputError:
        way = "use a smaller model or --size, or --activation-checkpointing"
        return InputError(f"there is no memory for one image side by side with the model on {self.device}: {way}")

    def _has_room(self, size: int) -> bool:
        image = self.image()
        return self.peaks[-1] + image * (size - self.sizes[-1]) < ENOUGH * self.free

    def image(self) -> float:
        """Bytes of one more image side by side: as measured, or, where that is lost in the noise, as estimated."""
        grown = self.peaks[-1] - self.peaks[0]
        return grown / (self.sizes[-1] - self.sizes[0]) if grown > NOISE else self.estimate

    def _passes(self, size: int) -> None:
        tokens = self.tokens[:size].to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            loss: Tensor = self.model.loss(tokens)
        loss.backward()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip or math.inf)
        self.optimizer.step()  # at a rate of 0: it does all its work and changes nothing
        with torch.no_grad():
            for average, parameter in zip(self.average, self.model.parameters(), strict=False):
                average.lerp_(parameter, 0.5)

    def _timed(self, run: Any) -> float:
        began = time.monotonic()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic() - began
