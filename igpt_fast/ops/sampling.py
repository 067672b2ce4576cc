"""Drawing tokens: the checks, and which backend draws."""

import math

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.errors import InputError, real, whole
from igpt_fast.ops._native import backend_for, has_cuda_kernels
from igpt_fast.ops._tensors import empty, same_device, stream_of

COLUMNS = 8192  # that the kernel of csrc/cuda/sampling.cu takes


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raise InputError for the first of the three that is out of range."""
    real("temperature", temperature)
    if not 0 <= temperature < math.inf:  # also catches NaN
        raise InputError(
            f"temperature is {temperature}; use a positive number (1 samples plainly), or 0 for the likeliest colour"
        )
    if top_k is not None:
        whole("top_k", top_k, 1, otherwise=", or leave it out to keep every colour")
    if top_p is not None:
        real("top_p", top_p)
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; use a share above 0 and up to 1 (1 keeps every colour)")


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw one token per row.   logits [N, V] floating   uniforms float64 [N] in [0, 1) → int64 [N]

    Inverts the distribution function of softmax(logits / temperature) cut to top_k, then top_p (see
    reference/sampling.py), so one uniform fixes one token, whatever the other rows hold. Temperature 0: the largest
    logit, lowest index on ties. A row whose largest logit is not finite (NaN, +inf, or -inf throughout) gives -1:
    asking the values would make a GPU wait, so the caller looks when it suits. Raises InputError for options out of
    range or shapes that do not fit.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise InputError(
            f"logits are {logits.dtype} {list(logits.shape)}; sample_tokens reads floating [N, V] with V of at least 1"
        )
    if uniforms.dtype != torch.float64 or uniforms.shape != logits.shape[:1]:
        raise InputError(
            f"uniforms are {uniforms.dtype} {list(uniforms.shape)}; sample_tokens reads float64 [{len(logits)}]"
        )
    same_device("sample_tokens", logits=logits, uniforms=uniforms)
    top_k = top_k if top_k is None else min(top_k, logits.shape[1])  # a kernel's has 64 bits
    if torch.compiler.is_compiling():
        return torch.ops.igpt.sample_tokens(logits, uniforms, temperature, top_k, top_p)
    return _sample_tokens(logits, uniforms, temperature, top_k, top_p)


def _sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    def refused(name: str) -> str | None:
        wide = has_cuda_kernels(name) and logits.shape[1] > COLUMNS
        return f"{logits.shape[1]} columns are more than {COLUMNS}" if wide else None

    native = backend_for("sample_tokens", (logits,), refused)
    if native is None:
        return reference.sampling.sample_tokens(logits, uniforms, temperature, top_k, top_p)
    tokens = empty((len(logits),), logits, torch.int64)
    options = temperature, top_k or 0, 1.0 if top_p is None else top_p
    native.sample_tokens(tokens, logits.contiguous(), uniforms.contiguous(), *options, stream_of(logits))
    return tokens


_sample_tokens_op = torch.library.custom_op("igpt::sample_tokens", mutates_args=())(_sample_tokens)


@_sample_tokens_op.register_fake
def _(logits, uniforms, temperature, top_k, top_p):
    return logits.new_empty(len(logits), dtype=torch.int64)
