"""check(): one op against its reference, outputs and gradients, with an error budget that nobody types in."""

from collections.abc import Callable

import copies
import torch
from simt import bench
from torch import Tensor

from igpt_fast.ops._native import BACKENDS, use_backend, why_not

# The backends that run the CUDA kernels on CPU tensors: on the bench, and on a GPU. Where no host reads the data, they
# do otherwise than the CPU's.
BENCH = ("simt", "simt_sm90")
CUDA_KERNELS = (*BENCH, copies.NAME)


def backends(op: str, device: str = "cpu") -> list[str]:
    """The reference and every backend that has a kernel for `op` on `device`: the reference must pass its own tests.

    Among those of the CPU are "simt", the CUDA kernels on the bench that needs no GPU (built here, on first use), and,
    on a machine with a GPU, the same kernels there on copies of the CPU's tensors.
    """
    if bench.missing() is None:
        bench.register()
    copies.register()
    found = [n for n, b in BACKENDS.items() if b.has(op) and (n == "cuda") == (device == "cuda")]
    assert found, f"no backend has {op}: is the extension built?"
    return ["reference", *found]


def served(op: str, *dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Every pair of a backend from backends(op) and one of `dtypes` that it serves."""
    return [
        (name, dtype)
        for name in backends(op)
        for dtype in dtypes
        if name == "reference" or why_not(name, op, [torch.empty(0, dtype=dtype)]) is None
    ]


def _is_float(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def _run(fn: Callable, args: list, backend: str, dtype: torch.dtype | None, grads: bool) -> list[Tensor]:
    """Outputs, then gradients of the float arguments. Arguments keep their strides; None keeps each its own dtype."""
    given = [a.detach().to(dtype or a.dtype).requires_grad_(grads) if _is_float(a) else a for a in args]
    with use_backend(backend, poison=True):
        out = fn(*given)
        outs = [out] if isinstance(out, Tensor) else list(out)
        found: list[Tensor] = []
        if grads:
            leaves = [a for a in given if _is_float(a)]
            generator = torch.Generator().manual_seed(1)
            probes = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
            found = list(torch.autograd.grad(outs, leaves, probes))
    return [*(o.detach() for o in outs), *found]


def check(
    op: Callable,
    reference: Callable,
    args: list,
    backend: str,
    dtype: torch.dtype | None = None,
    grads: bool = True,
    terms: int = 0,
) -> None:
    """|ours - float64| <= 2 |torch at the same dtype - float64| + 4 ulp of the largest value; NaN anywhere fails.

    dtype: the floats' dtype, or None to keep the arguments' own. terms: of float32 sums of values around 1, which may
    cancel: then an ulp of 1 for each is allowed, too. Two runs must agree to the bit.
    """
    truth = _run(reference, args, "reference", torch.float64, grads)
    plain = _run(reference, args, "reference", dtype, grads)
    got = _run(op, args, backend, dtype, grads)
    again = _run(op, args, backend, dtype, grads)
    for i, (t, p, g, h) in enumerate(zip(truth, plain, got, again, strict=True)):
        assert g.dtype is p.dtype and g.shape == t.shape, f"result {i}: {g.dtype} {g.shape}, wanted {p.dtype} {t.shape}"
        if not g.numel():
            continue
        assert torch.equal(g, h), f"result {i} on {backend} differs between two runs"
        err, budget = (g.double() - t).abs().max(), (p.double() - t).abs().max()
        limit = 2 * budget + 4 * torch.finfo(g.dtype).eps * t.abs().max()
        limit += terms * torch.finfo(torch.float32).eps
        assert err <= limit, f"result {i} on {backend}: off by {err:.3e}, allowed {limit:.3e}"
