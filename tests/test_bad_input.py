"""What an op must not take: it raises and names what is wrong, and never returns garbage. And what is empty, it takes.

The kernels' own checks are tried for every op with a case in simt/test_schedules.py, argument by argument.
"""

import pytest
import torch
from check import backends
from simt import bench
from simt.test_schedules import CASES
from torch import Tensor

from igpt_fast import BlockMask, InputError, ops
from igpt_fast.ops import _native, _tensors
from igpt_fast.ops._native import BACKENDS, use_backend
from igpt_fast.patterns import compiled

needs_bench = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")
F64, F32, I64 = torch.float64, torch.float32, torch.int64


def arguments(op: str) -> list:
    outputs, others = CASES[op](3, 8, F32)
    return [*outputs, *others]


def calls():
    """Every tensor argument of every op with a case: the op and the argument's number."""
    return [
        pytest.param(op, i, id=f"{op}-{i}")
        for op in CASES
        for i, a in enumerate(arguments(op))
        if isinstance(a, Tensor)
    ]


class Elsewhere:
    """A CPU tensor that says it is on a GPU; the bindings ask for attributes."""

    is_cuda = True

    def __init__(self, t: Tensor):
        self.t = t

    def __getattr__(self, name):
        return getattr(self.t, name)

    def get_device(self):
        return 3


def refused(op: str, i: int, change, match: str) -> None:
    [native] = bench.module().backends()
    args = arguments(op)
    args[i] = change(args[i])
    with pytest.raises(ValueError, match=match):
        getattr(native, op)(*args)


@needs_bench
@pytest.mark.parametrize(("op", "i"), calls())
class TestKernelsRefuse:
    def test_another_dtype(self, op, i):
        given = arguments(op)[i]
        for dtype in (F64, I64) if given.is_floating_point() else (F32, torch.int32):
            integers = (op, i, dtype) == ("palette_decode", 2, torch.int32)  # its tokens may be any
            if (
                dtype is not given.dtype
                and not (op == "palette_assign" and dtype in (F32, torch.int32))
                and not integers
            ):
                refused(op, i, lambda t, to=dtype: t.to(to), r"\w+: ")
        if op == "palette_assign":  # whose pixels may be floats, and whose tokens any integers
            refused(op, i, lambda t: t.to(F64 if i else torch.uint8), "palette")

    def test_a_last_dimension_with_gaps(self, op, i):
        if arguments(op)[i].ndim and arguments(op)[i].size(-1) > 1:
            refused(op, i, lambda t: t.repeat_interleave(2, -1)[..., ::2], "last dimension is contiguous")

    def test_a_column_too_few(self, op, i):
        if (op, i) in (
            ("cross_entropy_fwd", 2),
            ("sample_tokens", 1),
        ):  # logits, which say themselves how wide they are
            refused(op, i, lambda t: t[:-1], r"\w+: ")
        elif arguments(op)[i].ndim:
            refused(op, i, lambda t: t[..., :-1].contiguous(), r"\w+: ")

    def test_another_device(self, op, i):
        refused(op, i, Elsewhere, f"{op}: tensors on .*cuda:3.*; move them to one device")


@needs_bench
def test_a_tensor_without_memory_is_no_absent_one():
    [native] = bench.module().backends()
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="has memory"):
        native.bias_quick_gelu_fwd(torch.empty(2, 4), x, torch.empty(4, device="meta"), 0)


CPU = [b for b in BACKENDS if b in _native.CPU_TABLES]
BROKEN_TABLES = [
    (0, lambda t: t.long()),
    (0, lambda t: t[:-1]),
    (0, lambda t: t + 9),
    (1, lambda t: t.flip(0)),
    (1, lambda t: t - 2),
    (2, lambda t: t + 99),
    (2, lambda t: t[:-1]),
    (6, lambda t: t.int()),
]
BROKEN_ORDERS = [lambda t: t[:-1], lambda t: t.long(), lambda t: t + 1, lambda t: t * 0]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("change", BROKEN_ORDERS)
def test_attention_refuses_a_broken_order_and_decoding_any(backend, change):
    tables = list(BlockMask.compile("local", (8, 16), order="transposed").tensors)
    q = torch.randn(1, 2, 128, 32)
    decode = q[:, :, :1], None, q[:, :, :1], q, q, None, None, None, None, tuple(tables), 128, 0, 0.3, 0
    with pytest.raises(ValueError, match="raster order"):
        BACKENDS[backend].attention_decode(*decode)
    tables[8] = change(tables[8])
    with pytest.raises(ValueError, match="a mask's order"):
        BACKENDS[backend].attention_fwd(q, torch.empty(1, 2, 128), q, q, q, tuple(tables), True, 0.3, 0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("i", [1, 4])
def test_attention_refuses_rows_and_columns_that_differ(backend, i):
    tables, q = list(compiled("local", (8, 24)).tensors), torch.randn(1, 2, 192, 32)
    tables[i] = tables[i].flip(0)
    lse = torch.zeros(1, 2, 192)
    with pytest.raises(ValueError, match="rows and columns name different tiles"):
        BACKENDS[backend].attention_bwd(*[q.clone() for _ in range(8)], lse, None, tuple(tables), True, 0.3, 0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("i", "change"), BROKEN_TABLES)
def test_a_decoding_step_refuses_a_broken_mask(backend, i, change):
    tables = list(compiled("local", (8, 16)).tensors)
    q, k, v = torch.randn(2, 2, 1, 32), torch.randn(2, 2, 128, 32), torch.randn(2, 2, 128, 32)
    tables[i] = change(tables[i])
    with pytest.raises(ValueError, match="mask"):
        BACKENDS[backend].attention_decode(q, None, q, k, v, None, None, None, None, tuple(tables), 128, 0, 0.3, 0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("of", "message"), [([0], "masks for 1 layers"), ([0, 1], "there is no mask 1")])
def test_a_decoding_step_refuses_masks_of_other_layers(backend, of, message):
    d, native = 16, BACKENDS[backend]
    layers = [
        (floats(d), floats(3 * d, d), None, floats(d, d), None, floats(d), floats(d, d), None, floats(d, d), None)
    ]
    masks = _native.native_masks([compiled("row", (3, 3)).tensors], of, 1)
    cache, pixels = floats(2, 4, 9, 8), torch.zeros(1, dtype=I64)
    args = cache, None, pixels, floats(5, d), floats(9, d), _native.native_layers(2 * layers), floats(d), floats(5, d)
    with pytest.raises(ValueError, match=message):
        native.decode_step(floats(1, 5), *args, None, masks, 3, 1e-5, 0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("page", [-1, 2])
def test_a_kernel_reads_no_page_outside_the_cache(backend, page):
    pages = torch.tensor([0, page], dtype=torch.int32)
    q, k, mask = floats(2, 2, 1, 32), floats(2, 2, 128, 32), compiled("local", (8, 16)).tensors
    with pytest.raises(ValueError, match=f"page {page} is outside the cache's 2"):
        BACKENDS[backend].attention_decode(q, None, q, k, k, None, None, None, pages, mask, 128, 0, 0.3, 0)


# ---- the public ops ----


def floats(*shape):
    return torch.randn(*shape)


def public(rows: int) -> dict[str, tuple]:
    """Each public op with a kernel: the function of its tensors, these by name, and those that get a gradient."""
    weights = ops.decode_step.__globals__["StepWeights"](floats(5, 16), floats(9, 16), [], floats(16), floats(5, 16))
    x, y = floats(rows, 8), floats(rows, 8)
    uniforms, bytes_ = torch.rand(rows, dtype=F64), torch.randint(256, (rows, 3), dtype=torch.uint8)
    q, k, v = floats(rows, 2, 9, 32), floats(rows, 2, 9, 32), floats(rows, 2, 9, 32)
    targets, times, cache = torch.zeros(rows, dtype=I64), torch.ones(rows, dtype=I64), floats(0, rows, 2, 2, 9, 8)
    return {
        "rms_norm": (lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
                     {"x": x, "weight": floats(8), "residual": y}, "rms_norm_bwd"),
        "bias_quick_gelu": (ops.bias_quick_gelu, {"x": x, "bias": floats(8)}, "bias_quick_gelu_bwd"),
        "cross_entropy": (lambda logits, target: ops.cross_entropy(logits, target, "none"),
                          {"logits": x, "target": targets}, "cross_entropy_bwd"),
        "attention": (ops.attention, {"q": q, "k": k, "v": v}, "attention_bwd"),
        "attention_dropout": (lambda qkv: ops.attention_dropout(qkv, 0.1, 0),
                              {"qkv": floats(rows, 9, 3, 2, 32)}, "attention_dropout_bwd"),
        "dropout": (lambda x: ops.dropout(x, 0.1, 0), {"x": x}, "dropout"),
        "attention_decode": (lambda q, k, v: ops.attention_decode(q, k, v, 4), {"q": q[:, :, :1], "k": k, "v": v}, ""),
        "cache_append": (lambda k_cache, v_cache, k, v: ops.cache_append(k_cache, v_cache, k, v, 2),
                         {"k_cache": k, "v_cache": v, "k": q[:, :, :3], "v": q[:, :, 3:6]}, ""),
        "linear_cross_entropy": (ops.linear_cross_entropy,
                                 {"hidden": x, "weight": floats(5, 8), "target": targets},
                                 "linear_cross_entropy_dlogits"),
        "linear": (ops.linear, {"x": x, "weight": floats(4, 8), "bias": floats(4), "norm": floats(8),
                                "residual": floats(rows, 4)}, ""),
        "sample_tokens": (ops.sample_tokens, {"logits": x, "uniforms": uniforms}, ""),
        "palette_decode": (ops.palette_decode, {"tokens": targets, "colors": bytes_.new_zeros(5, 3)}, ""),
        "color_histogram": (ops.color_histogram, {"pixels": bytes_}, ""),
        "palette_assign": (ops.palette_assign, {"pixels": bytes_, "palette": floats(5, 3)}, ""),
        "kmeans_step": (ops.kmeans_step, {"colors": bytes_, "weights": times, "palette": floats(5, 3)}, ""),
        "decode_step": (lambda cache, pixels: ops.decode_step(cache, pixels, weights, 3),
                        {"cache": cache, "pixels": targets}, ""),
    }  # fmt: skip


def test_every_public_op_is_here():
    same = {"attention_packed", "projection"}  # attention on one buffer, and torch's own product
    assert set(public(1)) | same == set(ops.__all__)


@pytest.mark.parametrize("name", public(1))
def test_a_tensor_elsewhere_is_named(name):
    fn, tensors, _ = public(2)[name]
    for moved in list(tensors)[1:]:
        with pytest.raises(InputError, match=rf"{moved}.* (is|are) .*on meta"):
            fn(**(tensors | {moved: tensors[moved].to("meta")}))


@pytest.mark.parametrize("name", ["rms_norm", "bias_quick_gelu", "cross_entropy", "sample_tokens"])
def test_integers_for_floats_are_refused(name):
    fn, tensors, _ = public(2)[name]
    first = next(iter(tensors))
    for backend in backends(f"{name}_fwd" if name != "sample_tokens" else name)[1:]:
        with use_backend(backend), pytest.raises(ValueError, match=r"float|floating"):
            fn(**(tensors | {first: tensors[first].long()}))


HALVES = ("attention", "attention_dropout", "attention_decode", "cache_append", "linear")  # no float32 on the GPU


def empty_calls():
    return [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for name, (*_, backward) in public(1).items()
        for backend in ["reference", *(b for b in BACKENDS if b != "cuda")]
        if name != "decode_step" and (backend == "reference" or any(
            _native.why_not(backend, op, [torch.empty(0)]) is None for op in (backward or f"{name}_fwd", name)))
    ]  # fmt: skip


backends("rms_norm_fwd")  # registers the bench


@pytest.mark.parametrize(("name", "backend"), empty_calls())
def test_nothing_in_nothing_out(name, backend):
    """No rows: outputs without elements, and gradients of zeros, also where autograd hands on an expanded gradient."""
    fn, tensors, backward = public(0)[name]
    if name in HALVES and backend != "reference" and _native.has_cuda_kernels(backend):  # which has no float32
        tensors = {k: t.bfloat16() for k, t in tensors.items()}
    leaves = {k: t.requires_grad_() if backward and t.is_floating_point() else t for k, t in tensors.items()}
    with use_backend(backend, poison=True):
        out = fn(**leaves)
        if out is None:  # it changes what it is given, which is nothing
            return
        outs = [out] if isinstance(out, Tensor) else list(out)
        if name == "color_histogram":
            assert outs[0].shape == (1 << 24,) and not outs[0].any()
        elif name != "kmeans_step":
            assert all(o.numel() == 0 for o in outs)
        else:
            assert [o.tolist() for o in outs] == [[[0] * 3] * 5, [0] * 5, 0.0]
        if backward:
            wanted = [t for t in leaves.values() if t.requires_grad]
            grads = torch.autograd.grad(sum(o.sum() for o in outs), wanted)
            assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("backend", backends("bias_quick_gelu_bwd"))
def test_no_columns(backend):
    x = torch.ones(3, 0, requires_grad=True)
    with use_backend(backend, poison=True):
        [dx] = torch.autograd.grad(ops.bias_quick_gelu(x, torch.ones(0)).sum(), [x])
    assert dx.shape == (3, 0)


class OnGpu(Tensor):
    is_cuda = True


def test_with_igpt_debug_indices_on_a_gpu_are_checked(monkeypatch):
    logits, bad = torch.zeros(2, 5), torch.tensor([0, 5]).as_subclass(OnGpu)
    _tensors.check_range("cross_entropy", "target", bad, 5)  # where the host must not wait, the loss is NaN instead
    monkeypatch.setattr(_native, "_debug", True)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    _tensors.check_range("cross_entropy", "target", bad, 5)  # within a CUDA graph nobody may wait
    capturing = False
    with pytest.raises(InputError, match=r"cross_entropy: target has a value outside 0\.\.4"):
        ops.cross_entropy(logits, bad)
