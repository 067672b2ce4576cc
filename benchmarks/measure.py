"""How long a call takes, and how much memory it needs, on the CPU or a GPU."""

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
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide the call's need
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = resident_mb("VmRSS")
        run()
        return max(0.0, resident_mb("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def resident_mb(field_name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in 10^6 bytes. OSError where there is no /proc."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field_name))
    return int(line.split()[1]) * 1024 / 1e6
