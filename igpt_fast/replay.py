"""A step that is the same at every call. On a GPU it is recorded once, as a CUDA graph, and replayed thereafter.

A step is a few hundred small kernels, which the host could launch no faster than every few microseconds.
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch

log = logging.getLogger("igpt_fast")

FIRST_CALLS = 2  # of a step that is replayed: before it is recorded libraries have made what they make only once


class Replayed:
    """Calls a step that reads and writes the same tensors on `device` every time, and nothing that the host knows."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._run, self._device, self._calls = step, device, 0

    def __call__(self) -> None:
        if self._calls == FIRST_CALLS:
            self._run = recorded(self._run, self._device)
        self._calls += 1
        self._run()


@functools.cache
def _stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """What a thread records steps on: one a GPU, for of each that it has met cuBLAS keeps memory of its own."""
    return torch.cuda.Stream(device)


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of the step; the step itself, with a word why, where it cannot be recorded."""
    try:
        graph = torch.cuda.CUDAGraph()
        # Back to the caller's stream at the end: a capture that fails leaves its own current. That is one of this GPU:
        # torch's own for captures is of the GPU that recorded first.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            if torch.cuda.is_current_stream_capturing():
                return step  # into a graph of the caller's
            with torch.cuda.graph(
                graph, stream=_stream(device, threading.get_ident()), capture_error_mode="thread_local"
            ):
                step()
    except RuntimeError as error:
        log.warning("sampling launches the kernels of every step one by one: no CUDA graph of it: %s", error)
        return step
    return graph.replay
