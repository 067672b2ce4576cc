"""The compiled backends, the one rule for when a call may use them, and the one place that reads what rules them:

IGPT_BACKEND   auto (default), reference, or a backend's name: a named backend serves the call or raises
IGPT_STRICT    1: a call that would take a slower path raises with the reason instead of logging it
IGPT_POISON    1: outputs are filled with NaN (or the smallest integer) before a kernel writes them
IGPT_DEBUG     1: indices on a GPU are checked before a kernel reads them, for which the host waits
"""

import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch  # before _C: the extension then shares torch's OpenMP runtime
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

log = logging.getLogger("igpt_fast")

try:
    from igpt_fast import _C

    BACKENDS = {b.name: b for b in _C.backends()}  # best first
    WHY_NO_EXTENSION = None
except ImportError as error:  # a source tree that was never built runs on the reference, and says so
    BACKENDS = {}
    WHY_NO_EXTENSION = f"the extension is not built ({error}); run `pip install .`"

CPU_TABLES: tuple[str, ...] = () if WHY_NO_EXTENSION else _C.cpu_tables  # best first, also those that do not run here
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
# Of each backend: the device of the tensors that it serves, and their float dtypes.
_SERVES = {name: (d := "cuda" if name == "cuda" else "cpu", _DTYPES[d]) for name in BACKENDS}
# What 'auto' chooses, by device: the best. A call asks several times.
_AUTOMATIC = {_SERVES[name][0]: name for name in reversed(BACKENDS)}
_wanted = os.environ.get("IGPT_BACKEND", "auto")
_strict = os.environ.get("IGPT_STRICT") == "1"
_poison = os.environ.get("IGPT_POISON") == "1"
_debug = os.environ.get("IGPT_DEBUG") == "1"
_said: set[str] = set()

if _wanted not in ("auto", "reference", *BACKENDS):
    raise ValueError(
        f"IGPT_BACKEND={_wanted} is not here; choose auto, reference or one of {', '.join(BACKENDS) or 'none'}"
    )


def register_backend(name: str, backend, device: str, dtypes: Sequence[torch.dtype] = _DTYPES["cpu"]) -> None:
    """Adds a backend that serves whoever asks for it by name; 'auto' never chooses it.

    backend: an object with `has(op)` and a method for each op that it has, as the extension's own tables.
    device: "cpu" or "cuda", the tensors that it takes. dtypes: their float dtypes. Raises ValueError on a name in use.
    """
    if name in ("auto", "reference", *BACKENDS):
        raise ValueError(f"there is a backend named {name} already")
    BACKENDS[name] = backend
    _SERVES[name] = device, tuple(dtypes)


@contextlib.contextmanager
def use_backend(name: str, poison: bool = False) -> Iterator[None]:
    """Within the block `name` serves every op: 'auto', 'reference', or a backend's name (it then serves or raises)."""
    global _wanted, _poison
    if name not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"no backend named {name}; there are {', '.join(BACKENDS) or 'none'}")
    old = _wanted, _poison
    _wanted, _poison = name, poison or _poison
    try:
        yield
    finally:
        _wanted, _poison = old


class _Thread(threading.local):
    plain = False  # whether the reference serves every op of this thread


_thread = _Thread()


@contextlib.contextmanager
def in_plain_torch() -> Iterator[None]:
    """Within the block the reference serves every op of this thread, and of no other."""
    old, _thread.plain = _thread.plain, True
    try:
        yield
    finally:
        _thread.plain = old


# What an op itself has found to be outside the native kernels' reach, or None; or how to ask, by a backend's name.
Refusal = str | None | Callable[[str], str | None]


def why_not(name: str, op: str, tensors: Sequence[Tensor] = (), refusal: Refusal = None) -> str | None:
    """Why backend `name` cannot serve this call of `op`; None when it can."""
    if name not in BACKENDS:
        return WHY_NO_EXTENSION or f"there is no backend {name} here"
    if reason := why_plain():
        return reason
    if not BACKENDS[name].has(op):
        return f"{name} has no {op}"
    device, dtypes = _SERVES[name]
    for t in tensors:
        if not (t.is_cpu if device == "cpu" else t.device.type == device):  # is_cpu: a fifth of the time
            return f"{name} needs {device} tensors, got {t.device}"
        if t.is_floating_point() and t.dtype not in dtypes:
            return f"{name} has no {op} for {str(t.dtype).removeprefix('torch.')}"
        if makes_its_own(t):
            return f"a {type(t).__name__} has ops of its own"
    if name == "cuda" and tensors and (reason := gpu_why_not(tensors[0].device)):
        return reason
    return refusal(name) if callable(refusal) else refusal


_ORDINARY = Tensor.__torch_dispatch__


def makes_its_own(t: Tensor) -> bool:
    """Whether a tensor is of a type that computes in its own way, and may have no memory (quantised, distributed)."""
    return getattr(type(t), "__torch_dispatch__", _ORDINARY) is not _ORDINARY


def why_plain() -> str | None:
    """Why calls must consist of torch's own ops just now; None when they need not. Compilers know ours."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode watches it, as those of FakeTensorMode and make_fx"
    if torch._C._len_torch_function_stack() and not all(
        type(mode) is DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a function mode watches it"
    if is_transformed():
        return "torch.func transforms it"
    if forward_ad._current_level >= 0:
        return "it is differentiated forward"
    return "torch.jit traces it" if torch.jit.is_tracing() else None


def constant_for_compilers(function: Callable[..., bool]) -> Callable[..., bool]:
    """What torch.compiler.assume_constant_result does, which would import the whole compiler: two seconds at every
    start. The function is asked while a call is traced.
    """
    function._dynamo_marked_constant = True
    return function


@constant_for_compilers
def is_transformed() -> bool:
    """Whether torch.func transforms what is computed just now."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@functools.cache
def gpu_why_not(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels that were built; None when it can."""
    major, minor = torch.cuda.get_device_capability(device)
    archs, name = _C.cuda_archs(), torch.cuda.get_device_name(device)
    if not runs_on(archs, 10 * major + minor):
        return f"the kernels were built for {archs}, {name} has compute capability {major}.{minor}"
    if runs_on(archs, 10 * major + minor, ptx=False) or _C.cuda_takes_ptx():
        return None
    return f"{name} has to compile the kernels' PTX, for which its driver is too old ({_C.cuda_versions()}); update it"


def runs_on(archs: str, capability: int, ptx: bool = True) -> bool:
    """Whether a GPU of a compute capability, 86 for 8.6, runs code built for `archs`, as CMake names them.

    PTX serves newer GPUs, machine code ("-real") its own generation, and what has a letter no other GPU at all. ptx:
    False leaves PTX out.
    """
    for arch in re.split("[,;]", archs):
        found = re.fullmatch(r"(\d+)([a-z]?)(-real|-virtual)?", arch)
        if found is None:  # "native", "all": nobody but CMake knows
            return True
        built, letter, kind = int(found[1]), found[2], found[3]
        if not ptx and kind == "-virtual":
            continue
        alike = capability == built if letter else (ptx and kind != "-real") or capability // 10 == built // 10
        if alike and capability >= built:
            return True
    return False


def is_reference() -> bool:
    """Whether the reference was asked for, where plain torch may have something faster."""
    return _wanted == "reference"


def has_cuda_kernels(name: str) -> bool:
    """Whether a backend runs csrc/cuda: on a GPU, or on the bench."""
    return torch.float16 in _SERVES[name][1]


def backend_for(op: str, tensors: Sequence[Tensor], refusal: Refusal = None):
    """The backend that serves this call, or None for the reference. A slower path is logged once, with its reason."""
    if _wanted == "reference" or _thread.plain:
        return None
    torch.get_num_threads()  # a Python thread that has not asked yet has no OpenMP threads as torch's are set
    if name := _preferred(tensors[0]):
        reason = why_not(name, op, tensors, refusal)
        if reason is None:
            return BACKENDS[name]
        if _wanted != "auto":
            raise RuntimeError(f"{op}: {reason}")
    else:
        device = tensors[0].device.type
        reason = WHY_NO_EXTENSION or f"no backend for {device} tensors here"
        if not WHY_NO_EXTENSION and device == "cuda":
            reason = _C.cuda_why_not()
    say_slower(f"{op} runs on plain torch: {reason}")
    return None


def serves(op: str, tensors: Sequence[Tensor], refusal: Refusal = None) -> bool:
    """Whether a kernel would serve this call; no word where none does."""
    return why_not(_preferred(tensors[0]), op, tensors, refusal) is None


def _preferred(t: Tensor) -> str:
    """The backend that is asked first for a tensor's device; "" where there is none."""
    if _wanted != "auto":
        return _wanted
    return _AUTOMATIC.get("cpu" if t.is_cpu else t.device.type, "")


def say_slower(message: str) -> None:
    """Logs, once, that a slower path is taken and why; IGPT_STRICT=1 raises it."""
    if _strict:
        raise RuntimeError(f"{message} (IGPT_STRICT=1)")
    if message not in _said:
        _said.add(message)
        log.warning(message)


def fused_backend_for(op: str, tensors: Sequence[Tensor], refusal: str | None = None):
    """backend_for, for an op that elsewhere is a sequence of other ops: None, and no word, where the table lacks it.

    Each op of the sequence says itself what serves it; a fused one is not missed on a device for which there is none.
    """
    name = _preferred(tensors[0])
    return backend_for(op, tensors, refusal) if name in BACKENDS and BACKENDS[name].has(op) else None


def native_layers(layers: Iterable[Sequence[Tensor | None]]):
    """The weights of a model's blocks as the kernels read them; it keeps the tensors that it points into."""
    # Detached: the memory that they have now, whatever becomes of a Parameter's.
    return _C.Layers([tuple(t if t is None else t.detach() for t in layer) for layer in layers])


def native_masks(masks: Iterable[Sequence[Tensor]], of: Sequence[int], groups: int):
    """The masks of a model's layers and heads as the kernels read them; it keeps the tensors that it points into."""
    return _C.Masks([tuple(mask) for mask in masks], list(of), groups)


def poisons() -> bool:
    """Whether outputs are to be filled with NaN before a kernel writes them."""
    return _poison


def debugs() -> bool:
    """Whether indices on a GPU are to be checked before a kernel reads them."""
    return _debug
