"""How long a call takes, and how much memory it needs, on the CPU or a GPU."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def seconds_per_call(run: Call, loops: int, device: str) -> float:
    """Seconds per call of `loops` calls: by events on a GPU, else by the clock."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / loops
    began = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - began) / loops


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
        before = restart_high_water()
        run()
        return max(0.0, resident_mb("VmHWM") - before)
    except OSError:
        return None


def restart_high_water() -> float:
    """Sets this process's high-water mark (VmHWM) back to what it holds now, and returns that, in 10^6 bytes.

    Memory that was freed is given back first: kept by the allocator, it would hide what the next call needs. OSError
    where the kernel offers no such mark.
    """
    with contextlib.suppress(AttributeError):  # an allocator that has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident_mb("VmRSS")


def resident_mb(field_name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in 10^6 bytes. OSError where there is no /proc."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field_name))
    return int(line.split()[1]) * 1024 / 1e6
