"""What a device is and has: names, memory, limits of containers."""

import os
import subprocess
import sys

import pytest
import torch

from igpt_fast import device as module
from igpt_fast.config import Config
from igpt_fast.device import (
    dtype_of,
    free_memory_of,
    images_at_once,
    memory_of,
    peak_of,
    pick_device,
    processor,
    restart_peak,
)
from igpt_fast.errors import InputError

CPU = torch.device("cpu")


FREES = """
import resource, sys
import torch
from igpt_fast.device import keep_memory
if "keep" in sys.argv:
    keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # until blocks have found their places
    before = faults()
    blocks = [torch.ones(size << 20, dtype=torch.uint8) for size in (8, 3, 48)]
    del blocks
print(faults() - before)
"""


@pytest.mark.parametrize(
    "says", [{}, {"MALLOC_TRIM_THRESHOLD_": "1000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9"}]
)
def test_memory_that_is_kept_is_not_cleared_anew(says):
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(*words):
        done = subprocess.run([sys.executable, "-c", FREES, *words], env=others | says, capture_output=True, check=True)
        return int(done.stdout)

    kept, given_back = faults("keep"), faults()
    assert 3 * kept > given_back if says else 3 * kept < given_back


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC 9654 96-Core Processor\ncpu family : 25\n", "AMD EPYC 9654 96-Core Processor"),
        ("cpu family : 26\nmodel\t\t: 2\nmodel name : AMD EPYC\n\nmodel : 9\n", "AMD EPYC (family 26, model 2)"),
        ("cpu family : 6\nmodel name : Some: Processor\n", "Some: Processor (family 6, model unknown)"),
        ("model name : Neoverse\nBogoMIPS\n", "Neoverse"),
        ("processor : 0\n", "what the system says"),
        (None, "what the system says"),
    ],
)
def test_a_processor_is_known_by_its_name_or_by_numbers_where_that_hides_it(tmp_path, monkeypatch, told, name):
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "what the system says")
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    assert processor(file) == name


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == pick_device(CPU) == CPU
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong, words in (("tpu", "use auto, cpu or cuda"), ("cuda:99", "use cpu"), ("cpu:x", "use cpu")):
        with pytest.raises(InputError, match=f"device '{wrong}'.*{words}"):
            pick_device(wrong)


def test_dtypes_of_weights():
    assert dtype_of(None, "cpu") is dtype_of("auto", CPU) is None
    assert dtype_of("bfloat16", "cpu") is dtype_of(torch.bfloat16, CPU) is torch.bfloat16
    for wrong in ("int8", torch.int8, "Tensor", "nothing", 3):
        with pytest.raises(InputError, match="give float32"):
            dtype_of(wrong, "cpu")
    with pytest.raises(InputError, match="meta device holds no weights"):
        dtype_of(None, "meta")


def test_as_many_images_at_once_as_the_estimate_has_room_for():
    config = Config(layers=1, width=64, heads=4, size=(32, 32))
    assert images_at_once(config) == 64, "256 MiB of float32, 16 numbers a pixel and channel"
    assert images_at_once(config, more=16 * 64) == 32
    assert images_at_once(Config(layers=1, width=8, heads=1, size=(2, 2))) == 256
    assert images_at_once(Config(layers=1, width=4096, heads=8, size=(128, 128))) == 1


def assert_pages_count_as_free(limit, name):
    """What a container has read of files goes when room is wanted."""
    stat, before = limit.with_name("memory.stat"), free_memory_of(CPU, limit)
    stat.write_text(f"anon 7\n{name} {5 * 10**8}\n")
    assert abs(free_memory_of(CPU, limit) - before - 5 * 10**8) < 10**8
    stat.unlink()


def test_memory_of_this_machine(tmp_path):
    limit = tmp_path / "memory.max"
    whole = memory_of(CPU, limit)
    limit.write_text("max\n")
    assert memory_of(CPU, limit) == whole
    limit.write_text("1000000\n")
    assert memory_of(CPU, limit) == 1000000 < free_memory_of(CPU) <= memory_of(CPU)
    limit.write_text(f"{10**13}\n")
    free = free_memory_of(CPU, limit)
    limit.write_text(f"{whole - 1}\n")
    (tmp_path / "memory.current").write_text(f"{whole - 10**9}\n")
    assert free_memory_of(CPU, limit) < 10**9 + 8 * 10**9 and free > 10**9
    assert_pages_count_as_free(limit, "inactive_file")
    older = tmp_path / "memory.limit_in_bytes"  # as the first version of control groups has them
    (tmp_path / "memory.usage_in_bytes").write_text(f"{whole - 10**9}\n")
    for bound, least in ((whole - 1, 0), (2**63 - 4096, free - 10**9)):  # the second is none: all that is used counts
        older.write_text(f"{bound}\n")
        assert memory_of(CPU, older) == min(bound, whole) and free_memory_of(CPU, older) > least
    older.write_text(f"{whole - 1}\n")
    assert free_memory_of(CPU, older) < 10**9 + 8 * 10**9
    assert_pages_count_as_free(older, "inactive_file 0\ntotal_inactive_file")
    restart_peak(CPU)
    before = peak_of(CPU)
    del_me = torch.ones(50 << 20, dtype=torch.uint8)
    assert peak_of(CPU) - before > 45 << 20
    del del_me
    restart_peak(CPU)
    assert peak_of(CPU) - before < 20 << 20
