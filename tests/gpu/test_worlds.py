"""What carries the ordinary tests to the hardware, tried here with the bench in the hardware's place."""

import json
import struct
import types

import copies
import numpy as np
import pytest
import torch
from simt import bench, calls
from simt.test_schedules import CASES

from gpu import hardware, report

pytestmark = pytest.mark.skipif(bench.missing() is not None, reason=bench.missing() or "")


class Seen:
    """The bench's ops, remembering their arguments."""

    def __init__(self):
        [self.native] = bench.module().backends()
        self.last = ()

    def __getattr__(self, op):
        def call(*args):
            self.last = args
            getattr(self.native, op)(*args)

        return call


@pytest.mark.parametrize("op", CASES)
def test_copies_give_what_the_backend_gives(op):
    [native] = bench.module().backends()
    carried = copies.Copies(native, "cpu")
    results = []
    for backend in (native, carried):
        torch.manual_seed(0)
        outs, args = CASES[op](3, 129, torch.bfloat16)
        getattr(backend, op)(*outs, *args)
        results.append(outs)
    assert carried.has(op) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_copies_keep_strides_alignment_and_identity():
    seen = Seen()
    carried = copies.Copies(seen, "cpu")
    logits, targets = torch.randn(3 * 16 + 1)[1:].view(3, 16), torch.tensor([5]).expand(3)
    lse, before = torch.randn(3), logits.clone()
    carried.cross_entropy_bwd(logits, torch.ones(3), logits, torch.arange(3), lse, 0)
    first, *_, stream = seen.last
    assert stream == 0 and first.data_ptr() != logits.data_ptr() and first.data_ptr() % 16 == logits.data_ptr() % 16
    assert seen.last[0] is seen.last[2] and not torch.equal(logits, before)
    with pytest.raises(ValueError, match="contiguous"):
        carried.cross_entropy_bwd(logits, torch.ones(3), logits, targets, lse, 0)
    assert seen.last[3].stride() == (0,)


def test_hardware_that_differs_in_one_bit_is_seen():
    x, out = np.arange(64, dtype=np.int32), np.empty((7, 64), np.int32)

    def on_gpu(kernel, buffers, numbers):
        bench_run(kernel, buffers, numbers)
        buffers[1][0, 3] ^= flipped

    bench_run, flipped = bench.run, 0
    run = hardware.both(on_gpu, bench_run)
    run("shuffles", [x, out], [3, 32])
    flipped = 1
    with pytest.raises(AssertionError, match="shuffles, buffer 1: 1 elements differ, first 3"):
        run("shuffles", [x, out], [3, 32])


def test_errors_of_one_world_alone_are_seen():
    def fails(*_):
        raise RuntimeError("tensor map refused")

    with pytest.raises(RuntimeError, match="refused"):
        hardware.both(fails, fails)("k", [])
    with pytest.raises(AssertionError, match="the GPU says tensor map refused, the bench None"):
        hardware.both(fails, lambda *_: None)("k", [])
    with pytest.raises(RuntimeError, match="refused"):
        hardware.both(fails, None)("k", [])


def test_any_nan_is_as_good_as_another():
    a, b = np.array([0x7FC00000, 0x7FC00000, 1], np.uint32), np.array([0xFFC00001, 0x3F800000, 1], np.uint32)
    assert hardware._same(a.view(np.float32), b.view(np.float32)).tolist() == [True, False, True]


def test_calls_are_counted_by_op():
    [native] = bench.module().backends()
    counted = hardware.Counted(native)
    outs, args = CASES["sample_tokens"](2, 9, torch.float32)
    counted.sample_tokens(*outs, *args)
    assert counted.called == {"sample_tokens"} and counted.name == "simt" and counted.has("kmeans_step")


def test_a_test_that_fails_beside_others_accuses_nobody(tmp_path):
    counted = types.SimpleNamespace(called=set())
    agreement = hardware.Agreement(counted, tmp_path / "ops.json")
    for called, passed in (({"a"}, True), ({"a"}, False), ({"a", "b"}, False)):
        agreement.pytest_runtest_setup()
        counted.called |= called
        agreement.pytest_runtest_logreport(types.SimpleNamespace(when="call", skipped=False, passed=passed))
    expected = {"a": {"passed": 1, "failed": 1, "unclear": 1}, "b": {"passed": 0, "failed": 0, "unclear": 1}}
    assert json.loads((tmp_path / "ops.json").read_text()) == expected


def test_every_kernel_waits_for_its_verdict():
    assert set(json.loads((report.ROOT / report.VERIFIED).read_text())["kernels"]) >= set(CASES)


def test_every_case_becomes_calls(tmp_path):
    assert calls.main(str(tmp_path / "calls")) == 0
    data = (tmp_path / "calls").read_bytes()
    assert all(data.count(struct.pack("=I", len(op)) + op.encode()) == len(calls.shapes(op)) for op in CASES)
