"""Every op of the bench gives the same bits whatever the order of its threads and whenever its copies land."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igpt_fast.patterns import BlockMask, compiled
from simt import bench

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def outputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]


def rms_norm_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    y, s = outputs((rows, cols), (rows, cols), dtype=dtype)
    [rstd] = outputs((rows,))
    x, residual, weight = floats(rows, cols, dtype=dtype), floats(rows, cols, dtype=dtype), floats(cols)
    return [y, s, rstd], [x, residual, weight, 1e-5, 0]


def rms_norm_bwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    dx, dresidual = outputs((rows, cols), (rows, cols), dtype=dtype)
    [dweight] = outputs((3, cols))
    dy, dsum, s = (floats(rows, cols, dtype=dtype) for _ in range(3))
    return [dx, dresidual, dweight], [dy, dsum, s, floats(cols), torch.rand(rows), 0]


def bias_quick_gelu_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    return outputs((rows, cols), dtype=dtype), [floats(rows, cols, dtype=dtype), floats(cols), 0]


def bias_quick_gelu_bwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    outs = outputs((rows, cols), dtype=dtype) + outputs((3, cols))
    return outs, [floats(rows, cols, dtype=dtype), floats(rows, cols, dtype=dtype), floats(cols, dtype=dtype), 0]


def cross_entropy_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    return outputs((rows,), (rows,)), [floats(rows, cols, dtype=dtype), torch.randint(cols, (rows,)), 0]


def cross_entropy_bwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    inputs = [floats(rows), floats(rows, cols, dtype=dtype), torch.randint(cols, (rows,)), floats(rows), 0]
    return outputs((rows, cols), dtype=dtype), inputs


def linear_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """Rows of one block of each kind, and of two; float32 stands for the product alone."""
    rows, outs, columns = {1: 1, 7: 70}.get(rows, 9 * rows), cols % 100 + 1, 8 * (rows + cols // 16)
    more, dtype = dtype is not torch.float32, torch.float16 if dtype is torch.float32 else dtype
    x, weight = floats(rows, columns, dtype=dtype), floats(outs, columns, dtype=dtype) / columns  # never -9
    shapes = (outs,), (columns,), (rows, outs)
    rest = [floats(*shape, dtype=dtype) if more else None for shape in shapes]
    return outputs((rows, outs), dtype=dtype), [x, weight, *rest, 1e-5, more, 0]


def linear_cross_entropy_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    inputs = [floats(20 * rows, 72, dtype=dtype), floats(cols, 72, dtype=dtype), torch.randint(cols, (20 * rows,)), 0]
    return outputs((20 * rows,), (20 * rows,)), inputs


def linear_cross_entropy_dlogits(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    _, [hidden, weight, targets, stream] = linear_cross_entropy_fwd(rows, cols, dtype)
    inputs = [floats(20 * rows), hidden, weight, targets, torch.rand(20 * rows) * 100 + 50, stream]
    return outputs((20 * rows, -(-cols // 8) * 8), dtype=dtype), inputs


def attention_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """Causal: [1, 2, cols, 64], or 193 of the many that the bench would take minutes for; of 100 rows on so many heads.
    Dtypes have 16 bits: float32 stands for a mask in two parts."""
    heads = 2 if rows < 100 else rows
    cols = min(cols, 70) if dtype is torch.float32 else cols if cols <= 400 else 193
    mask = in_two_parts(cols) if dtype is torch.float32 else None
    dtype = torch.float16 if dtype is torch.float32 else dtype
    o, lse = outputs((1, cols, heads, 64), dtype=dtype)[0].transpose(1, 2), outputs((1, heads, cols))[0]
    return [o, lse], [*floats(1, cols, 3, heads, 64, dtype=dtype).transpose(1, 3).unbind(2), mask, True, 0.15, 0]


def in_two_parts(tokens: int) -> tuple[Tensor, ...]:
    """The causal mask's even keys and its odd ones, each part with its tokens in an order of its own."""
    seen, odd = torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.arange(tokens) % 2 == 1
    orders = torch.arange(tokens).flip(0), torch.arange(tokens).roll(tokens // 3)
    even, other = (
        BlockMask.from_dense(seen & keys).in_order("some", order)
        for keys, order in zip((~odd, odd), orders, strict=True)
    )
    return even.tensors + other.tensors


def attention_bwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    [o, lse], [q, k, v, *rest] = attention_fwd(rows, cols, dtype)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    dout, o = (floats(*o.shape, dtype=o.dtype) for _ in range(2))
    room = None if rest[0] is None else floats(*lse.shape, 4, dtype=o.dtype)
    return grads, [dout, q, k, v, o, torch.rand(*lse.shape) + 12, room, *rest]


def cache(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, list]:
    """Keys and values of rows images and cols slots at D = 32, of bytes with scales for float16; mostly lengths."""
    shape, pages = (2, rows, 2, cols, 32), (2, rows, 2, -(-cols // 64))
    lengths = None if cols == 128 else torch.arange(cols, cols - rows, -1, dtype=torch.int32)
    if dtype is torch.float16:
        return floats(*shape).to(torch.float8_e4m3fn), [*(torch.rand(pages) + 0.5), lengths]
    return floats(*shape, dtype=torch.bfloat16), [None, None, lengths]


def attention_dropout_fwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """At D = 32 where float32 stands for it, else 64."""
    cols, dim = min(cols, 193), 32 if dtype is torch.float32 else 64
    dtype = torch.float16 if dtype is torch.float32 else dtype
    o, lse = outputs((1, cols, 2, dim), dtype=dtype)[0].transpose(1, 2), outputs((1, 2, cols))[0]
    return [o, lse], [*floats(1, cols, 3, 2, dim, dtype=dtype).transpose(1, 3).unbind(2), 0.15, 0.25, 7, 0]


def attention_dropout_bwd(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    [o, lse], [q, k, v, *rest] = attention_dropout_fwd(rows, cols, dtype)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    dout, o = (floats(*o.shape, dtype=o.dtype) for _ in range(2))
    return grads, [dout, q, k, v, o, torch.rand(*lse.shape) + 12, *rest]


def attention_decode(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """Split over the sequence where its dtype is bfloat16, in pages that stand backwards where it is float32."""
    cols = min(cols, 400)
    kv, [k_scale, v_scale, lengths] = cache(rows, cols, dtype)
    split = outputs((rows, 2, -(-cols // 128), 34)) if dtype is torch.bfloat16 else [None]
    q = floats(rows, 2, 1, 32, dtype=torch.bfloat16)
    pages = mask = None
    if dtype is torch.float32 and cols > 128:
        kv, mask = (
            floats(2, rows, 2, 64 * -(-cols // 64), 32, dtype=torch.bfloat16),
            compiled("local", (1, cols)).tensors,
        )
        pages = torch.arange(kv.size(3) // 64 - 1, -1, -1, dtype=torch.int32)
    inputs = [*split, q, *kv, k_scale, v_scale, lengths, pages, mask, cols, 0, 0.3, 0]
    return outputs((rows, 2, 1, 32), dtype=torch.bfloat16), inputs


def attention_prefix(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    cols = min(cols, 400)
    kv, [k_scale, v_scale, lengths] = cache(1, cols, dtype)
    q = floats(3 * rows, 2, 1, 32, dtype=torch.bfloat16)
    lengths = None if lengths is None else torch.full((3 * rows,), 4, dtype=torch.int32)
    return outputs((3 * rows, 2, -(-cols // 128), 34)), [q, *kv, k_scale, v_scale, lengths, None, 5, 0.3, 0]


def cache_append(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    cols = min(cols, 400)
    kv, [k_scale, v_scale, lengths] = cache(rows, cols + 70, dtype)
    new = floats(2, rows, 2, cols, 32, dtype=torch.bfloat16)
    starts = None if lengths is None else lengths - cols
    return [*kv], [k_scale, v_scale, *new, starts, 3, 0]


def sample_tokens(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    tokens = torch.full((rows,), -9)
    return [tokens], [floats(rows, cols, dtype=dtype), torch.rand(rows, dtype=torch.float64), 0.8, 100, 0.9, 0]


def palette_assign(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    pixels = torch.rand(3 * rows, 3) if dtype is torch.float32 else torch.randint(256, (3 * rows, 3)).to(torch.uint8)
    return [torch.full((3 * rows,), -9, dtype=torch.int16)], [pixels, torch.rand(cols, 3), None, 0]


def kmeans_step(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    integers = [torch.full((cols, 3), -9), torch.full((cols,), -9), torch.full((cols,), -9)]
    colors = torch.randint(256, (200 * rows, 3)).to(torch.uint8)
    inertia = outputs((), dtype=torch.float64)
    table = torch.randint(cols, (4096, 4096)).to(torch.int16) if dtype is torch.bfloat16 else None
    return integers + inertia, [colors, torch.randint(99, (200 * rows,)), torch.rand(cols, 3), table, 0]


def palette_table(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    return [torch.full((1, 4096), -9, dtype=torch.int16)], [torch.rand(cols, 3) * 2 - 1, 500 * rows, 0]


def palette_decode(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    kind = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int16}[dtype]
    tokens = torch.randint(-1, cols, (99 * rows,)).to(kind)
    outs = [torch.full((99 * rows, 3), 9, dtype=torch.uint8), torch.full((1,), -9)]
    return outs, [tokens, torch.randint(200, (cols, 3)).to(torch.uint8), 0]


def color_histogram(rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    pixels = torch.randint(0, 2, (7 * rows * cols, 3)).to(torch.uint8)
    workspace = None if dtype is torch.float32 else torch.full((1, 16896), -9, dtype=torch.int16)  # for one tile of two
    return [torch.zeros(1 << 24, dtype=torch.int64)], [pixels, workspace, 0]


def bytes_of(t: Tensor) -> Tensor:
    """8-bit floats, which torch does not compare, as the codes that they are."""
    return t.view(torch.uint8).int() if t.dtype is torch.float8_e4m3fn else t


# Of each op: outputs and the arguments after them. Shapes: one, less than a tile, a tile, one more, three and a rest.
CASES: dict[str, Callable] = {
    "rms_norm_fwd": rms_norm_fwd,
    "rms_norm_bwd": rms_norm_bwd,
    "bias_quick_gelu_fwd": bias_quick_gelu_fwd,
    "bias_quick_gelu_bwd": bias_quick_gelu_bwd,
    "cross_entropy_fwd": cross_entropy_fwd,
    "cross_entropy_bwd": cross_entropy_bwd,
    "linear_fwd": linear_fwd,
    "linear_cross_entropy_fwd": linear_cross_entropy_fwd,
    "linear_cross_entropy_dlogits": linear_cross_entropy_dlogits,
    "attention_fwd": attention_fwd,
    "attention_bwd": attention_bwd,
    "attention_dropout_fwd": attention_dropout_fwd,
    "attention_dropout_bwd": attention_dropout_bwd,
    "attention_decode": attention_decode,
    "attention_prefix": attention_prefix,
    "cache_append": cache_append,
    "sample_tokens": sample_tokens,
    "palette_assign": palette_assign,
    "kmeans_step": kmeans_step,
    "palette_table": palette_table,
    "palette_decode": palette_decode,
    "color_histogram": color_histogram,
}
SHAPES = [(1, 1), (2, 127), (3, 128), (2, 129), (7, 400), (2, 512), (2, 1540)]


def test_every_op_has_a_case():
    [backend] = bench.module().backends()
    assert {op for op in backend.ops if backend.has(op)} == set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "capability"), [*((op, 8) for op in CASES), *((op, 9) for op in bench.HOPPER)])
def test_schedules_agree_to_the_bit(op, capability, shape, dtype):
    if op == "color_histogram" and (dtype is torch.float16 or shape[0] != 7):
        return  # whose 128 MB make each run slow
    [backend] = bench.module().backends()
    results = {}
    for schedule in [*bench.SCHEDULES, (2, 13, 0, 2)]:
        torch.manual_seed(0)
        outs, args = CASES[op](*shape, dtype)
        with bench.scheduled(*schedule), bench.capability(capability):
            getattr(backend, op)(*outs, *args)
        assert not any((o.isnan() | o.eq(-9)).any() for o in map(bytes_of, outs)), schedule
        results[schedule] = outs
    first = results[bench.IN_ORDER]
    for schedule, outs in results.items():
        assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(first, outs, strict=True)), schedule


def test_what_a_kernel_does_beside_a_tensor_is_reported():
    """The bench copies tensors to memory that ends at a guard page: here one value of rstd stands for all rows'."""
    [backend] = bench.module().backends()
    short = torch.ones(1).expand(9, 1)
    with pytest.raises(RuntimeError, match="wild access: byte 32 of a buffer of 4 bytes"):
        args = [floats(9, 64), floats(9, 64), floats(9, 64), floats(64), short, 0]
        backend.rms_norm_bwd(*outputs((9, 64), (9, 64), (1, 64)), *args)
    with pytest.raises(RuntimeError, match="wrote past the end of a buffer of 4 bytes"):
        backend.rms_norm_fwd(*outputs((2, 64), (2, 64)), short[:2], floats(2, 64), floats(2, 64), floats(64), 1e-5, 0)
