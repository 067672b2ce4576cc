"""How long a call takes, and how much memory it needs, on the CPU or a GPU."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from igpt_fast.device import resident, restart_peak
from igpt_fast.errors import InputError

Call = Callable[[], Any]
CPU = torch.device("cpu")


# What a GPU reads between two timed calls: several times the largest L2, so that inputs come from device memory; by
# reading, not writing, so that nothing is left to be written back while the clock runs.
FLUSH_BYTES = 512 << 20


def seconds_per_call(run: Call, loops: int, device: str) -> float:
    """Seconds per call of `loops` calls: by the clock; on a GPU see gpu_seconds_per_call."""
    if device == "cuda":
        return gpu_seconds_per_call(run, loops)
    began = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - began) / loops


def gpu_seconds_per_call(run: Call, loops: int) -> float:
    """The mean of `loops` calls, each alone between two events of its own, with cold caches.

    The GPU is held until the host has queued the whole call, so that what is measured is the GPU's work and not Python.
    The two events themselves cost about a microsecond, the same for everybody.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(loops)]
    began = time.perf_counter()
    run()
    ahead = time.perf_counter() - began  # seconds that the host needs to queue a call
    for begin, end in events:
        torch.cuda._sleep(int(min(2 * ahead, 2e-3) * 2e9))  # cycles of a clock of at most 2 GHz
        _flush_buffer().max()
        began = time.perf_counter()
        begin.record()
        run()
        end.record()
        ahead = time.perf_counter() - began
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / loops


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")


def gpu_load(run: Call, seconds: float = 0.2) -> dict[str, Any]:
    """Clocks, power and energy while `run` is called over and over; nothing where nvidia-ml-py is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        before, began, calls, found = pynvml.nvmlDeviceGetTotalEnergyConsumption(card), time.perf_counter(), 0, {}
        while time.perf_counter() - began < seconds:
            for _ in range(8):
                run()
            calls += 8
            if not found and time.perf_counter() - began > seconds / 2:
                found = {
                    "sm_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
                    "memory_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
                    "watts": pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
                }
        torch.cuda.synchronize()
        joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3
        return {**found, "joules_per_call": joules / calls}
    except Exception as error:  # a figure beside the measurement: no reason of any kind may cost the measurement
        return {"missing": f"{type(error).__name__}: {error}"}


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory_mb(run: Call, device: str) -> float | None:
    """What one call needs beyond what was held before it, its results included, in 10^6 bytes; None: nobody can say.

    On the CPU it is the process's own high-water mark, which the kernel resets on request: whoever allocates is seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        restart_peak(CPU)
        before = resident()
        run()
        return max(0, resident(most=True) - before) / 1e6
    except (InputError, OSError):
        return None
