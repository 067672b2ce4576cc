"""Where to compute, and how much memory is there."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch

from igpt_fast.config import Config
from igpt_fast.errors import InputError

BATCH_BYTES = 256 << 20  # of activations at once, by the estimate in images_at_once
# A container's limit, in the second version of control groups and in the first; beside each, what has been used.
LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
LIMIT = next(filter(Path.is_file, LIMITS), LIMITS[0])

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # numbers of mallopt's options, in malloc.h
ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_", "glibc.malloc.trim", "glibc.malloc.mmap", "glibc.malloc.hugetlb")


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": the GPU when there is one, else the CPU; else what is named. InputError when this machine lacks it."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is not supported: use auto, cpu or cuda")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here ({reason}): use cpu") from error
    return torch.device(device)


def memory_of(device: torch.device, limit: Path = LIMIT) -> int:
    """Bytes of memory that the device has: a GPU's own, else the machine's, or the container's where that is less.

    limit: the file with the container's, named as one of USED: a whole number or "max".
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = _machine()
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def free_memory_of(device: torch.device, limit: Path = LIMIT) -> int:
    """Bytes of it that no other program holds: what is free, and what this process has. limit: as in `memory_of`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, own = 1024 * _kilobytes("/proc/meminfo", "MemAvailable"), resident()
    used, whole = limit.with_name(USED[limit.name]), memory_of(device, limit)
    # Of a container without a limit of its own, what is used is that of all others, too.
    counted = used.is_file() and whole < _machine()
    others = int(used.read_text()) - _of_files(used.with_name("memory.stat")) - own if counted else 0
    return min(whole - max(0, others), free + own)


def _of_files(stat: Path) -> int:
    """Bytes of a control group that hold what was read of files, and go when others want the room."""
    found = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(found.get("total_inactive_file") or found.get("inactive_file", 0))


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux tells it, else its architecture.

    Virtual machines may keep the model from the name ("AMD EPYC"): its family and model numbers stand for it then.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    facts: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in lines):
        if colon:
            facts.setdefault(key.strip(), value.strip())  # of the first core
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in facts or any(letter.isdigit() for letter in name):
        return name
    return f"{name} (family {facts['cpu family']}, model {facts.get('model', 'unknown')})"


def images_at_once(config: Config, more: int = 0) -> int:
    """How many images go through a model side by side when nobody says.

    more: extra numbers a pixel that are needed behind the last block, such as logits.
    """
    # About 16 numbers a pixel and channel live at once inside a block.
    return max(1, min(256, BATCH_BYTES // (4 * config.tokens * (16 * config.width + more))))


def keep_memory() -> None:
    """Has glibc's allocator keep what is freed for what comes next, until the process ends.

    As it is, it gives large blocks back at once, and the system clears each of their pages anew when they are wanted
    again, at every step. What the environment says of it (ALLOCATOR) stays as it is.
    """
    said = " ".join(os.environ) + os.environ.get("GLIBC_TUNABLES", "")
    if any(word in said for word in ALLOCATOR):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 1 << 30):  # older ones know no more than 32 MiB
            mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def restart_peak(device: torch.device) -> None:
    """Has `peak_of` count from here. What the allocator keeps is given back first: it would hide what is needed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(AttributeError):  # an allocator that has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise InputError(f"this system does not count how much memory a process takes at most ({error})") from error


def peak_of(device: torch.device) -> int:
    """Bytes: the most since `restart_peak`, on a GPU what torch held, else all of this process."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else resident(most=True)


def resident(most: bool = False) -> int:
    """Bytes of memory that this process has now, or the most since `restart_peak`. OSError where there is no /proc."""
    return 1024 * _kilobytes("/proc/self/status", "VmHWM" if most else "VmRSS")


def _machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kilobytes(file: str, name: str) -> int:
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(name)).split()[1])


def dtype_of(wanted: torch.dtype | str | None, device: str | torch.device) -> torch.dtype | None:
    """The dtype of weights to be loaded, also by its name; None, or "auto", leaves it to them. Raises InputError."""
    if torch.device(device).type == "meta":
        raise InputError("the meta device holds no weights; make an ImageGPT of the config there, or load on the CPU")
    if wanted is None or wanted == "auto":
        return None
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is {wanted!r}; give float32, bfloat16, float16, float64 or auto")
    return found
