"""`igpt-fast info`: what is installed, what this machine offers, and which backend serves each op."""

import os
import platform
import re
from importlib import metadata

import torch
import typer
from rich.console import Console
from rich.table import Table

from igpt_fast import __version__
from igpt_fast.cli.options import JsonOption, print_json
from igpt_fast.console import naming_stdout
from igpt_fast.device import processor
from igpt_fast.ops import _native

# What a backend lacks and nobody misses: ops that other ops, each with what serves it, make up; one of a GPU alone.
UNMISSED = {
    "linear_cross_entropy_fwd": "composed of other ops",
    "linear_cross_entropy_dlogits": "composed of other ops",
    "decode_step": "composed of other ops",
    "palette_table": "not used on a CPU",
}
DEVELOPERS = ("test", "lint")  # extras that no user looks for


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(info)


def info(as_json: JsonOption = False) -> None:
    """Show versions, the backends of this machine, and what serves each op, with the reason when it is not native.

    Example: igpt-fast info
    """
    facts = gather()
    if as_json:
        print_json(**facts)
        return
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in (
        "igpt_fast",
        "torch",
        "python",
        "processor",
        "threads",
        "cpu backend",
        "better cpu backends",
        "gpu",
        "cuda",
        "cuda backend",
        "extras",
    ):
        table.add_row(name, str(facts[name]))
    ops = Table("op", "on the CPU", "on the GPU", box=None, padding=(0, 2, 0, 0))
    for op, (cpu, gpu) in facts["ops"].items():
        ops.add_row(op, cpu, gpu.replace(facts["cuda backend"], "see cuda backend above"))
    with naming_stdout():
        console.print(table)
        console.print()
        console.print(ops)


def gather() -> dict:
    """What `info` shows, as plain values."""
    cpu = next((n for n in _native.BACKENDS if n != "cuda"), None)
    if _native.WHY_NO_EXTENSION:
        better = cuda = lacking = _native.WHY_NO_EXTENSION
        names: list[str] = []
    else:
        above = _native.CPU_TABLES[: _native.CPU_TABLES.index(cpu)]
        better = "; ".join(f"{isa}: {_native._C.cpu_why_not(isa)}" for isa in above) or "none, this is the best"
        archs = _native._C.cuda_archs()
        lacking = _native._C.cuda_why_not()
        unfit = [] if lacking else [_native.gpu_why_not(torch.device("cuda", i)) for i in range(len(gpus()))]
        lacking = lacking or (unfit[0] if unfit and all(unfit) else None)
        lacking = lacking or (None if gpus() else "this torch sees no GPU; install one that is built for CUDA")
        cuda = lacking or "; ".join(["ready", *(f"but not everywhere: {reason}" for reason in unfit if reason)])
        cuda += f" (built for {archs})" if archs else ""
        names = list(_native._C.Backend.ops)
    return {
        "igpt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu backend": cpu or "plain torch",
        "better cpu backends": better,
        "gpu": "; ".join(gpus()) or "none",
        "cuda": versions(),
        "cuda backend": cuda,
        "extras": extras(),
        "ops": {op: (_served(cpu, op, better), _served(None if lacking else "cuda", op, cuda)) for op in names},
    }


def extras() -> str:
    """The package's extras for users that are installed, and what the others lack."""
    try:
        wanted = metadata.requires("igpt-fast") or []
    except metadata.PackageNotFoundError:
        return "unknown: igpt_fast is not installed, only found"
    lacking: dict[str, list[str]] = {}
    for text in wanted:
        if found := re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", text):
            missing = lacking.setdefault(found[2], [])
            missing += [] if _installed(found[1]) else [found[1]]
    return "; ".join(
        name if not missing else f"{name} lacks {', '.join(missing)}"
        for name, missing in lacking.items()
        if name not in DEVELOPERS
    )


def _installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def gpus() -> list[str]:
    """Of each GPU that torch sees: name, compute capability, multiprocessors and memory."""
    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
        f"{p.total_memory / 2**30:.1f} GiB"
        for p in every
    ]


def versions() -> str:
    """The NVIDIA driver, the newest CUDA that it runs, and the runtimes of torch and of our kernels."""
    driver = "unknown" if torch.cuda.is_available() else "none"
    if os.path.exists("/proc/driver/nvidia/version"):
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read())
            driver = found[0] if found else driver
    ours = "" if _native.WHY_NO_EXTENSION else _native._C.cuda_versions()
    return f"driver {driver}; torch's runtime {torch.version.cuda or 'none'}; ours {ours or 'none'}"


def _served(backend: str | None, op: str, missing: str) -> str:
    """The backend's name, or what computes instead and why. missing: why there is no such backend at all."""
    if op in UNMISSED and backend in _native.BACKENDS and not _native.BACKENDS[backend].has(op):
        return UNMISSED[op]
    reason = _native.why_not(backend, op) if backend in _native.BACKENDS else missing
    return backend if reason is None else f"plain torch: {reason}"
