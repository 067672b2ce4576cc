"""The first part of gpu-check: the package, the bench, and the programs for the hardware, side by side."""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.parts import FAILED, NOT_RUN, PASSED, TIMED_OUT, Clock, Done

ROOT = Path(__file__).resolve().parent.parent.parent
SCRATCH = ROOT / "build" / "gpu-check"
TREE, OBJECTS = SCRATCH / "tree", SCRATCH / "objects"
HARDWARE, DRIVE, CALLS = OBJECTS / "libhardware.so", OBJECTS / "drive", SCRATCH / "calls"
RATES = OBJECTS / "rates"


@dataclass(frozen=True)
class Machine:
    """What there is to work with: the GPU's facts, the CUDA tools by name, where results go."""

    facts: dict[str, Any]
    tools: dict[str, str | None]
    out: Path

    @property
    def arch(self) -> str:
        """As nvcc names it; code for sm_90a uses what only Hopper has."""
        major, minor = self.facts["capability"]
        return f"{major}{minor}" + ("a" if self.hopper else "")

    @property
    def hopper(self) -> bool:
        return self.facts["capability"] == [9, 0]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


def environment() -> dict[str, str]:
    """For all commands: the tree comes first, threads wait asleep, nothing is asked of a network."""
    path = [str(TREE / "tests"), str(TREE), os.environ.get("PYTHONPATH", "")]
    bins = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "PATH": os.pathsep.join(bins),
        "OMP_WAIT_POLICY": "passive",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
    }


def bench_built() -> bool:
    return (SCRATCH / "simt" / "ready").exists()


def worst(statuses: Mapping[str, str]) -> dict[str, Any]:
    """A part's report from those of its pieces."""
    bad = {name: status for name, status in statuses.items() if status in (FAILED, TIMED_OUT)}
    status = next((s for s in (FAILED, TIMED_OUT) if s in bad.values()), PASSED)
    if statuses and set(statuses.values()) == {NOT_RUN}:
        status = NOT_RUN
    reason = {"reason": ", ".join(f"{name} {status}" for name, status in bad.items())} if bad else {}
    return {"status": status, "pieces": dict(statuses), **reason}


def build(machine: Machine, clock: Clock) -> dict[str, Any]:
    for path in (TREE, OBJECTS):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    for name in ("tests", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, TREE)
    archs = machine.arch + "-real"
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--upgrade"]
    commands: dict[str, Callable[[], Done]] = {
        "package": lambda: clock.command(
            "build-package", [*install, "--target", TREE, ROOT], SCRATCH,
            CUDACXX=machine.tools["nvcc"] or "", IGPT_CUDA_ARCHS=archs,
        ),
        "bench": lambda: clock.command("build-bench", [sys.executable, "-c", BENCH, SCRATCH / "simt"], ROOT),
    }  # fmt: skip
    if machine.tools["nvcc"]:
        commands |= {name: functools.partial(compile_, machine, clock, name) for name in objects(machine)}
    done = clock.together(commands)
    statuses = {name: d.status for name, d in done.items()}
    programs = [("hardware", HARDWARE, is_hardware), ("drive", DRIVE, is_drive)]
    programs += [("rates", RATES, is_rates)] * machine.hopper
    for name, linked, wanted in programs:
        files = [OBJECTS / f"{o}.o" for o in objects(machine) if wanted(o)]
        if all(f.exists() for f in files) and files:
            shared = ["-shared"] if linked is HARDWARE else []
            line = [machine.tools["nvcc"], *shared, "-o", linked, *files]
            statuses[name] = clock.command(f"build-{name}", line, SCRATCH).status
        else:
            statuses[name] = FAILED
    statuses |= operands(machine, clock)
    return worst(statuses) | ({} if machine.tools["nvcc"] else {"status": FAILED, "reason": "nvcc is not here"})


def operands(machine: Machine, clock: Clock) -> dict[str, str]:
    """Whether this assembler kept every wgmma's registers, see sass_flow: before CUDA 13.3 it may not."""
    extension = next((TREE / "igpt_fast").glob("_C*.so"), None)
    if not machine.hopper or extension is None or not machine.tools["cuobjdump"]:
        return {"operands": NOT_RUN}
    path = os.pathsep.join([str(Path(machine.tools["cuobjdump"]).parent), environment()["PATH"]])
    line = [sys.executable, "-m", "sass", "--built", extension]
    return {"operands": clock.command("build-operands", line, SCRATCH, PATH=path).status}


BENCH = """
import sys, subprocess, pathlib, pybind11, shutil
out = pathlib.Path(sys.argv[1])
cmake = ["cmake", "-S", "tests/simt", "-B", out, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
(out / "ready").unlink(missing_ok=True)
subprocess.run(cmake, check=True)
subprocess.run(["cmake", "--build", out, "--target", "_simt", "kernels"], check=True)
(out / "ready").touch()
"""


def objects(machine: Machine) -> dict[str, Path]:
    """The sources that nvcc compiles for the hardware: test kernels and their interface, the ops and their driver."""
    kernels = (TREE / "tests/simt/kernels").glob("*.cu")
    found = [*(TREE / "csrc/cuda").glob("*.cu")]  # of Hopper's, too, which launchers name on every GPU
    found += [p for p in kernels if machine.hopper or not p.stem.endswith("_sm90")]
    found += [TREE / "tests/gpu/hardware.cu", TREE / "tests/simt/drive.cpp", TREE / "csrc/common/check.cpp"]
    found += [TREE / "tests/gpu/rates_sm90.cu"] * machine.hopper
    return {f"{p.parent.name}-{p.stem}": p for p in found}


def is_hardware(name: str) -> bool:
    return name.startswith(("kernels-", "gpu-hardware"))


def is_drive(name: str) -> bool:
    return not name.startswith("gpu-")


def is_rates(name: str) -> bool:
    return name in ("gpu-rates_sm90", "common-check")


def compile_(machine: Machine, clock: Clock, name: str) -> Done:
    """One object; -lineinfo for compute-sanitizer's reports."""
    csrc, kernels = TREE / "csrc", TREE / "tests/simt/kernels"
    arch = "90a" if name.endswith("_sm90") else machine.arch
    code = f"arch=compute_{arch},code=sm_{arch}"
    line = [
        machine.tools["nvcc"], "-std=c++20", "-O2", "-lineinfo", "-Xcompiler", "-fPIC", "-gencode", code, "-x", "cu",
        '-DIGPT_CUDA_ARCHS=""', f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{kernels}",
        *([] if machine.hopper else ["-DDRIVE_NO_SM90"]), "-c", objects(machine)[name], "-o", OBJECTS / f"{name}.o",
    ]  # fmt: skip
    return clock.command(f"compile-{name}", line, SCRATCH)
