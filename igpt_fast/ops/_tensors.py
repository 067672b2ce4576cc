"""Tensors on their way to a kernel and back: what is one, where they are, which bytes, who wants their gradient."""

import functools
import typing
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.ops._native import debugs, poisons, why_plain

# Arguments of registered ops. torch 2.4 knows them by these names only, not as list[Tensor].
Tensors = typing.Sequence[Tensor]
OptionalTensors = typing.Sequence[typing.Optional[Tensor]]  # noqa: UP045


def tensor_of(given: typing.Any, what: str) -> Tensor:
    """A tensor as it is, and of an array or a list what NumPy makes of it, copied where torch cannot share its memory.

    what: begins the errors, as "tokens are". Raises InputError where torch has no such dtype: texts, objects.
    """
    if isinstance(given, Tensor):
        return given
    try:
        array = np.asarray(given)
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        is_array = isinstance(given, np.ndarray)
        form = f"{given.dtype} {list(given.shape)}" if is_array else f"a {type(given).__name__}"
        raise InputError(f"{what} {form}; give an array or a tensor of numbers") from error


def stream_of(t: Tensor) -> int:
    """The raw handle of torch's current stream on the tensor's device; 0 on the CPU."""
    return torch._C._cuda_getCurrentRawStream(t.get_device()) if t.is_cuda else 0


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for an output, on `like`'s device; poisoned on request, so that no kernel leaves a hole unseen."""
    out = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
    if poisons():
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(t: Tensor) -> int:
    """How many the tensor's device has; where it is no GPU, as many as keep any CPU's threads at work."""
    return _multiprocessors(t.device) if t.is_cuda else 128


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises InputError, naming the argument, unless all tensors are where the first one is."""
    first = home = None
    for name, t in tensors.items():
        if t is None:
            continue
        if home is None:
            first, home = name, t.device
        elif t.device != home:
            raise InputError(f"{op}: {name} is on {t.device}, {first} on {home}; move both to one device")


def floats(op: str, **tensors: Tensor | None) -> None:
    """same_device, and InputError, naming the argument, unless all tensors hold floating-point numbers."""
    same_device(op, **tensors)
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise InputError(f"{op}: {name} is {t.dtype}; give floats")


def check_range(op: str, name: str, indices: Tensor, limit: int, on_cpu: bool = False) -> None:
    """InputError for indices outside 0..limit-1. On a GPU only with IGPT_DEBUG=1, for the host waits for the answer.

    on_cpu: whether CPU tensors are checked here, for ops whose CPU kernels do not.
    """
    if indices.is_cuda:  # within a CUDA graph the host does not wait: the calls before it was recorded were checked
        asked = debugs() and not torch.cuda.is_current_stream_capturing()
    else:
        # Nobody can look at what is traced, batched or without numbers; torch's own ops refuse what they can.
        asked = on_cpu and indices.is_cpu and not torch.compiler.is_compiling() and why_plain() is None
    if asked and ((indices < 0) | (indices >= limit)).any():
        raise InputError(f"{op}: {name} has a value outside 0..{limit - 1}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd wants to hear about a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows(t: Tensor, sixteens: bool = False) -> Tensor:
    """`t` with a contiguous last dimension, copied only when it has none.

    sixteens: rows that begin at multiples of 16 bytes, too.
    """
    if t.stride(-1) != 1 and t.size(-1) != 1:
        return t.contiguous()
    if not sixteens or not any(at % 16 for at in (t.data_ptr(), *(n * t.element_size() for n in t.stride()[:-1]))):
        return t
    return t.clone(memory_format=torch.contiguous_format)
