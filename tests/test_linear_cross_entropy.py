"""The head fused with its loss, on every backend that has it and composed where none does, against its reference."""

import math
import sys

import pytest
import torch
from check import check, served
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_fast import InputError, ops
from igpt_fast.config import Config
from igpt_fast.model import ImageGPT
from igpt_fast.ops._native import BACKENDS, use_backend
from igpt_fast.reference.linear_cross_entropy import linear_cross_entropy

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FUSED = [(name, dtype) for name, dtype in served("linear_cross_entropy_fwd", F32, BF16) if name != "reference"]
EVERY = [*served("linear_cross_entropy_fwd", F32, BF16, F16), ("auto", F32), ("auto", BF16)]


def head(rows: int, columns: int, colors: int, spread: float = 1.0):
    """hidden, weight and target; the logits' standard deviation is `spread`."""
    generator = torch.Generator().manual_seed(rows * 10_000 + colors)
    hidden = torch.randn(rows, columns, generator=generator)
    weight = torch.randn(colors, columns, generator=generator) * spread / columns**0.5
    return [hidden, weight, torch.randint(colors, (rows,), generator=generator)]


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize(
    ("rows", "columns", "colors"),
    [
        (1, 8, 2),
        (127, 64, 17),
        (128, 8, 512),
        (129, 520, 2),
        (129, 64, 513),
        (300, 24, 1000),
        (40, 512, 512),
        (3, 72, 4096),
    ],
)
def test_shapes(backend, dtype, rows, columns, colors):
    check(ops.linear_cross_entropy, linear_cross_entropy, head(rows, columns, colors), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 12).map(lambda n: 8 * n),
    colors=st.integers(2, 300),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)
@settings(max_examples=8)
def test_any_shape(backend, dtype, rows, columns, colors, spread):
    check(ops.linear_cross_entropy, linear_cross_entropy, head(rows, columns, colors, spread), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("apart", [24, 40])
def test_rows_that_lie_apart(backend, dtype, apart):
    """Every second row, or columns cut out of wider rows; a start at no multiple of 16 bytes costs a copy."""
    hidden, weight, target = head(150, 16, 30)
    for begin in (0, 8, 3):
        wide, tall = torch.zeros(150, apart), torch.zeros(30, apart)
        if begin + 16 > apart:
            continue
        views = wide[:, begin : begin + 16].copy_(hidden), tall[:, begin : begin + 16].copy_(weight)
        check(ops.linear_cross_entropy, linear_cross_entropy, [*views, target], backend, dtype)
    check(ops.linear_cross_entropy, linear_cross_entropy, [hidden[::2], weight[::3], target[::2] % 10], backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
def test_leading_dimensions(backend, dtype):
    hidden, weight, target = head(12, 16, 20)
    args = [hidden.view(2, 6, 16), weight, target.view(2, 6)]
    check(ops.linear_cross_entropy, linear_cross_entropy, args, backend, dtype)
    check(ops.linear_cross_entropy, linear_cross_entropy, [hidden[0], weight, target[0]], backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("colors", [2, 130, 512])
def test_equal_logits(backend, dtype, colors):
    """Ties everywhere, at zero and far from it: the loss is ln V."""
    for size in (0.0, 1.0, -8.0):
        hidden, weight = torch.full((5, 8), size, dtype=dtype), torch.ones(colors, 8, dtype=dtype)
        with use_backend(backend, poison=True):
            loss = ops.linear_cross_entropy(hidden, weight, torch.arange(5) % colors)
        assert (loss - math.log(colors)).abs().max() < 1e-5


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("columns", [17, 512])
def test_extreme_logits(backend, dtype, columns):
    """±10,000: a colour that is certain costs nothing, any other its distance, and gradients are zeros and ones."""
    hidden, weight = torch.full((4, 8), 100.0, dtype=dtype), torch.full((columns, 8), -12.5, dtype=dtype)
    weight[3] = 12.5
    hidden.requires_grad_(), weight.requires_grad_()
    with use_backend(backend, poison=True):
        loss = ops.linear_cross_entropy(hidden, weight, torch.tensor([3, 3, 0, columns - 1]))
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.tolist() == pytest.approx([0, 0, 20_000, 20_000], rel=2 * torch.finfo(dtype).eps)
    assert grads[0].tolist() == [[0.0] * 8, [0.0] * 8, [25.0] * 8, [25.0] * 8]
    assert grads[1][3].tolist() == [200.0] * 8 and grads[1][0].tolist() == [-100.0] * 8


@pytest.mark.parametrize(("backend", "dtype"), FUSED)
def test_the_backward_pass_in_chunks_of_rows(backend, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules[ops.linear_cross_entropy.__module__], "WORKSPACE", 1)  # a tile's rows at a time
    calls = []
    native = BACKENDS[backend].linear_cross_entropy_dlogits

    class Spy:
        def __getattr__(self, name):
            return getattr(real, name)

        def linear_cross_entropy_dlogits(self, dlogits, *args):
            calls.append(len(dlogits))
            native(dlogits, *args)

    real = BACKENDS[backend]
    monkeypatch.setitem(BACKENDS, backend, Spy())
    check(ops.linear_cross_entropy, linear_cross_entropy, head(300, 16, 70), backend, dtype)
    assert calls == [128, 128, 44] * 2  # check runs it twice


@pytest.mark.parametrize("backend", [name for name, dtype in FUSED if dtype is BF16])
def test_the_chunks_shares_of_the_weights_gradient_are_summed_in_float32(backend, monkeypatch):
    monkeypatch.setattr(sys.modules[ops.linear_cross_entropy.__module__], "WORKSPACE", 1)
    hidden, weight, target = head(128, 16, 70)
    grads = []
    for times in (1, 8):  # so many tiles that are the same: their sum is exact there, and is not in 16 bits
        rows, table = hidden.to(BF16).repeat(times, 1), weight.to(BF16).requires_grad_()
        with use_backend(backend, poison=True):
            ops.linear_cross_entropy(rows, table, target.repeat(times)).sum().backward()
        grads.append(table.grad)
    assert torch.equal(grads[1], 8 * grads[0])


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
def test_nothing_costs_nothing(backend, dtype):
    hidden = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
    weight = torch.ones(20, 16, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        loss = ops.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.shape == (0,) and grads[0].shape == (0, 16) and not grads[1].any()


@pytest.mark.parametrize(("backend", "dtype"), FUSED)
def test_where_no_host_reads_the_targets_a_bad_one_gives_nan(backend, dtype):
    hidden, weight = (t.to(dtype) for t in head(6, 16, 70)[:2])
    hidden.requires_grad_()
    target = torch.tensor([0, -1, 69, 70, 1 << 40, -(1 << 33)])
    with use_backend(backend, poison=True):
        loss = ops.linear_cross_entropy(hidden, weight, target)
        [grad] = torch.autograd.grad(loss.sum(), hidden)
    bad = torch.tensor([False, True, False, True, True, True])
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan(), bad[:, None].expand(6, 16))


def test_a_bad_target_is_refused_where_the_host_reads_it():
    hidden, weight, _ = head(2, 16, 5)
    with pytest.raises(InputError, match=r"outside 0\.\.4"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 5]))


@pytest.mark.parametrize(("backend", "dtype"), FUSED)
def test_what_the_kernels_do_not_take(backend, dtype):
    hidden, weight, target = head(4, 12, 20)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with use_backend(backend), pytest.raises(RuntimeError, match="12 columns are no multiple of 8"):
        ops.linear_cross_entropy(hidden, weight, target)
    native, [hidden, weight, target] = BACKENDS[backend], head(4, 16, 20)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    loss, lse, dlogits = torch.empty(4), torch.empty(4), torch.empty(4, 24, dtype=dtype)
    for args, message in (
        ([loss, lse, hidden, weight.double(), target], "must both be"),
        ([loss, lse, hidden[:, :12], weight[:, :12], target], "multiple of 8"),
        ([loss, lse, hidden[:, 1:9], weight[:, :8], target], "multiples of 16 bytes"),
        ([loss, lse, hidden, weight[:, :8], target], r"weight \[V, C\]"),
        ([loss, lse, hidden, weight, target.int()], "targets must be int64"),
        ([loss[:3], lse, hidden, weight, target], "one value a row"),
    ):
        with pytest.raises(ValueError, match=message):
            native.linear_cross_entropy_fwd(*args, 0)
    for bad in (dlogits[:, :20], dlogits[:3], dlogits.double()):
        with pytest.raises(ValueError, match="rounded up to 8"):
            native.linear_cross_entropy_dlogits(bad, loss, hidden, weight, target, lse, 0)


def test_bad_arguments():
    hidden, weight, target = head(4, 16, 20)
    for args, message in (
        ([hidden, weight[:, :8], target], r"weight \[20, 8\] does not fit hidden \[4, 16\]"),
        ([hidden, weight[:0], target], r"weight \[0, 16\]"),
        ([hidden, weight, target[:3]], r"target is torch.int64 \[3\]; give int64 \[4\]"),
        ([hidden, weight, target.int()], r"target is torch.int32"),
        ([hidden, weight.bfloat16(), target], "weight is torch.bfloat16, hidden torch.float32"),
        ([hidden, weight.to("meta"), target], "weight is on meta, hidden on cpu"),
        ([hidden, weight, target.to("meta")], "target is on meta, hidden on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            ops.linear_cross_entropy(*args)


@pytest.mark.parametrize(("backend", "dtype"), FUSED)
def test_the_model_loses_the_same_with_and_without_it(backend, dtype, monkeypatch):
    torch.manual_seed(1)
    model = ImageGPT(Config(layers=1, width=32, heads=4, colors=70, size=(6, 7)))
    torch.nn.init.normal_(model.wtet)
    tokens = torch.randint(70, (4, 42))
    fused = ops.linear_cross_entropy
    used = []

    def on_backend(hidden, weight, target):
        used.append(hidden.dtype)
        with use_backend(backend, poison=True):
            return fused(hidden, weight, target)

    def run():
        with torch.autocast("cpu", BF16, enabled=dtype is BF16):
            loss = model.loss(tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    plain = run()
    monkeypatch.setattr(ops, "linear_cross_entropy", on_backend)
    ours = run()
    assert used == [dtype]
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype is b.dtype and (a - b).abs().max() <= (0.02 if dtype is BF16 else 1e-5) * b.abs().max()
