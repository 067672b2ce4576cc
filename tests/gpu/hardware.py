"""A plugin of pytest (-p gpu.hardware) for the machine that has a GPU.

IGPT_HARDWARE=libhardware.so: the bench's layout tests run each kernel on the GPU too, and both must give the same bits.
IGPT_AGREEMENT=file.json: which op of the CUDA backend was called in how many tests that passed, in how many that failed
with no other op called ("failed"), and in how many that failed beside others, any of which may be why ("unclear").
"""

import ctypes
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simt import bench

from igpt_fast.ops import _native

# Where the PTX ISA leaves room, by kernel and buffer: the elements that are the test's own business.
LOOSE = {
    ("scalars", 1): slice(None),  # ex2 is an approximation
    ("atomics", 0): slice(5, 6),  # whoever comes first
}


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["IGPT_HARDWARE"])


def on_gpu(kernel: str, buffers: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
    """As bench.run, on the GPU. Raises RuntimeError."""
    lib, count = library(), len(buffers)
    pointers = (ctypes.c_void_p * count)(*(b.ctypes.data for b in buffers))
    sizes = (ctypes.c_size_t * count)(*(b.nbytes for b in buffers))
    integers = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
    text = ctypes.create_string_buffer(8192)
    if lib.gpu_call(getattr(lib, f"test_{kernel}"), count, pointers, sizes, integers, text, len(text)):
        raise RuntimeError(text.value.decode())


def both(on_gpu: Callable, on_bench: Callable | None) -> Callable:
    """bench.run's stand-in: the GPU's result, after the bench (where there is one) was seen to give the same."""

    def run(kernel, buffers, numbers=(), schedule=bench.IN_ORDER):
        copies = [b.copy() for b in buffers]
        ours = _error(lambda: on_gpu(kernel, buffers, numbers))
        if on_bench is not None:
            theirs = _error(lambda: on_bench(kernel, copies, numbers, schedule))
            assert (ours is None) == (theirs is None), f"{kernel}: the GPU says {ours}, the bench {theirs}"
            for i, (a, b) in enumerate(zip(buffers, copies, strict=True)):
                same = np.ones(a.size, bool) if ours else _same(a.ravel(), b.ravel())
                same[LOOSE.get((kernel, i), slice(0))] = True
                where = np.flatnonzero(~same)
                assert not where.size, f"{kernel}, buffer {i}: {where.size} elements differ, first {where[0]}"
        if ours is not None:
            raise ours

    return run


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bit for bit; of NaN the ISA promises no particular one."""
    bits = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    return bits | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else bits


def _error(call: Callable) -> RuntimeError | None:
    try:
        call()
    except RuntimeError as error:
        return error
    return None


class Counted:
    """A backend that remembers which of its ops were called."""

    def __init__(self, backend: Any):
        self.backend, self.called = backend, set()

    def has(self, op: str) -> bool:
        return self.backend.has(op)

    def __getattr__(self, op: str) -> Any:
        found = getattr(self.backend, op)
        if not callable(found):
            return found

        def call(*args):
            self.called.add(op)
            return found(*args)

        return call


class Agreement:
    """Counts, for each op, the tests that called it: those that passed, that failed, and that tell nothing of it."""

    def __init__(self, counted: Counted, path: Path):
        self.counted, self.path, self.ops = counted, path, {}

    @pytest.hookimpl
    def pytest_runtest_setup(self):
        self.counted.called.clear()

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report):
        if report.when != "call" or report.skipped:
            return
        what = "passed" if report.passed else "failed" if len(self.counted.called) == 1 else "unclear"
        for op in self.counted.called:
            self.ops.setdefault(op, {"passed": 0, "failed": 0, "unclear": 0})[what] += 1
        self.path.write_text(json.dumps(self.ops))


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("IGPT_HARDWARE"):
        bench.run = both(on_gpu, bench.run if bench.missing() is None else None)
        bench.missing = lambda: None
    if os.environ.get("IGPT_AGREEMENT"):
        counted = _native.BACKENDS["cuda"] = Counted(_native.BACKENDS["cuda"])
        config.pluginmanager.register(Agreement(counted, Path(os.environ["IGPT_AGREEMENT"])))
