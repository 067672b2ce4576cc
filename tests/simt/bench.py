"""Builds the bench on first use (cmake and ninja, into build/simt), loads it and runs kernels on it.

IGPT_SIMT_DIR names a directory with a build of the bench to use instead, for example one with sanitizers; "none" leaves
the bench out.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from igpt_fast.ops import _native

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = Path(os.environ.get("IGPT_SIMT_DIR") or ROOT / "build" / "simt")
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")

# (schedule, seed, landing): in order with asynchronous work as late as possible, then two random ones, then at once.
IN_ORDER, AT_ONCE = (0, 1, 0), (0, 1, 1)
RANDOM = [(2, 11, 0), (2, 12, 0)]
SCHEDULES = [IN_ORDER, *RANDOM, AT_ONCE, (1, 1, 0)]


# Ops whose launchers choose kernels of their own on a GPU of compute capability 9.
HOPPER = ("linear_cross_entropy_fwd", "linear_cross_entropy_dlogits", "attention_fwd", "attention_bwd")


def missing() -> str | None:
    """Why the bench cannot run on this machine, or None."""
    if os.environ.get("IGPT_SIMT_DIR") == "none":
        return "IGPT_SIMT_DIR=none leaves the bench out"
    if platform.machine() not in MACHINES:
        return f"the bench switches stacks by hand and knows x86-64 and aarch64, not {platform.machine()}"
    return None


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        raise RuntimeError(f"the bench needs {name} to build; `make test` installs it into .venv")
    return found


@functools.cache
def build() -> Path:
    """The directory of an up-to-date build; only what has changed is compiled. Raises RuntimeError with the log."""
    if os.environ.get("IGPT_SIMT_DIR"):
        return BUILD
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        _tool("cmake"), "-S", str(HERE), "-B", str(BUILD), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [_tool("cmake"), "--build", str(BUILD), "--target", "_simt", "kernels"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise RuntimeError(f"the bench does not build: {' '.join(command)}\n{done.stdout[-6000:]}")
    return BUILD


@functools.cache
def module() -> ModuleType:
    """The extension with the CUDA ops on the bench: the package's bindings under the name _simt."""
    path = next(build().glob("_simt*.so"))
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def register() -> None:
    """Makes "simt" and "simt_sm90" backends of the package that serve CPU tensors when they are asked for by name."""
    [backend] = module().backends()
    _native.register_backend("simt", backend, device="cpu", dtypes=(torch.float32, torch.bfloat16, torch.float16))
    _native.register_backend("simt_sm90", Hopper(backend), device="cpu", dtypes=(torch.bfloat16, torch.float16))


class Hopper:
    """The bench's table as a GPU of compute capability 9 would run it: the ops that have other kernels there."""

    name = "simt_sm90"

    def __init__(self, backend) -> None:
        self._backend = backend

    def has(self, op: str) -> bool:
        return op in HOPPER

    def __getattr__(self, op: str):
        def call(*args) -> None:
            with capability(9):
                getattr(self._backend, op)(*args)

        return call


@contextlib.contextmanager
def capability(major: int) -> Iterator[None]:
    """Within the block, launchers choose what they would choose on a GPU of this compute capability."""
    _library("_simt").simt_capability(major)
    try:
        yield
    finally:
        _library("_simt").simt_capability(8)


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(module().__file__ if name == "_simt" else build() / "libkernels.so"))


@contextlib.contextmanager
def scheduled(schedule: int, seed: int, landing: int, workers: int = 1) -> Iterator[None]:
    """Within the block, launches of ops and of test kernels run by this schedule."""
    libraries = [_library("_simt"), _library("kernels")]
    for lib in libraries:
        lib.simt_configure(schedule, ctypes.c_uint64(seed), landing, workers)
    try:
        yield
    finally:
        for lib in libraries:
            lib.simt_configure(0, ctypes.c_uint64(1), 0, 1)


def run(kernel: str, buffers: Sequence[np.ndarray], numbers: Sequence[int] = (), schedule=IN_ORDER) -> None:
    """Calls a test kernel of kernels/*.cu; the arrays are copied to guarded memory and back. Raises RuntimeError."""
    lib = _library("kernels")
    count = len(buffers)
    assert all(b.flags.c_contiguous for b in buffers)
    pointers = (ctypes.c_void_p * count)(*(b.ctypes.data for b in buffers))
    sizes = (ctypes.c_size_t * count)(*(b.nbytes for b in buffers))
    integers = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
    text = ctypes.create_string_buffer(8192)
    with scheduled(*schedule):
        if lib.simt_call(getattr(lib, f"test_{kernel}"), count, pointers, sizes, integers, text, len(text)):
            raise RuntimeError(text.value.decode())
