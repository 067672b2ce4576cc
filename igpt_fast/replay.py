"""A step that is the same at every call. On a GPU it is recorded once, as a CUDA graph, and replayed thereafter.

A step is a few hundred small kernels, which the host could launch no faster than every few microseconds.
"""

import logging
from collections.abc import Callable

import torch

log = logging.getLogger("igpt_fast")

FIRST_CALLS = 2  # of a step that is replayed: before it is recorded libraries have made what they make only once


class Replayed:
    """Calls a step that reads and writes the same tensors on a GPU every time, and nothing that the host knows."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._run, self._calls = step, 0

    def __call__(self) -> None:
        if self._calls == FIRST_CALLS:
            self._run = recorded(self._run)
        self._calls += 1
        self._run()


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of the step; the step itself, with a word why, where it cannot be recorded."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        log.warning("sampling launches the kernels of every step one by one: no CUDA graph of it: %s", error)
        return step
    return graph.replay
