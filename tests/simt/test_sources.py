"""The rules that let the bench read the CUDA sources, and nvcc's opinion of the sources that only the bench runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simt import bench

CUDA = bench.ROOT / "csrc" / "cuda"
KERNELS = bench.HERE / "kernels"
SOURCES = sorted([*CUDA.iterdir(), *KERNELS.iterdir()])

HEADERS = "cuda|std|string|initializer_list|type_traits|algorithm|utility|array|cmath|limits|cstd"
# What is forbidden: a pattern, and the files in which it may stand all the same.
FORBIDDEN = [
    (r"\basm\b", "inline PTX", "ptx"),
    (r"<<<|>>>", "a raw launch", "launch.h"),
    (r"\b__shared__\b", "shared memory outside DYN_SMEM and STATIC_SMEM", "device.cuh"),
    (r"\b__activemask\b", "a mask that the schedule decides", None),
    (r"\bcudaMalloc|\bcuda(Device|Stream)Synchronize", "native code owns no memory and never waits", None),
    (r"\bclock(64)?\(\)|\b__nanosleep\b", "a clock", None),
    (rf"#include <(?!{HEADERS})", "a header that the bench does not have", None),
]


def code(path: Path) -> str:
    """The text without comments."""
    return re.sub(r"//.*", "", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_forbidden_constructs(path):
    for pattern, what, allowed in FORBIDDEN:
        if not (allowed and path.name.startswith(allowed)):
            found = re.search(pattern, code(path))
            assert not found, f"{path.name}: {what} ({found.group()})"


def test_forbidden_constructs_are_recognised():
    offences = [
        "asm(",
        "k<<<1, 1>>>",
        "__shared__ int",
        "__activemask()",
        "cudaMallocAsync",
        "clock64()",
        "#include <mma.h>",
    ]
    assert all(re.search(pattern, text) for (pattern, *_), text in zip(FORBIDDEN, offences, strict=True))


def test_every_wrapper_has_its_twin():
    """Functions of ptx*.cuh and of the bench's header are the same set."""
    name = r"^\s*(?:PTX_FN|inline|constexpr) (?:void|bool|float|uint32_t) (\w+)\("
    declared = set()
    for path in CUDA.glob("ptx*.cuh"):
        text = code(path).replace(" \\\n", "\n")
        declared |= set(re.findall(name, text.split("#endif  // IGPT_SIMT")[0], re.MULTILINE)) - {"name"}
        declared |= set(re.findall(r"^IGPT_LDMATRIX\((\w+),", text, re.MULTILINE))
    shared = {"cluster_sync", "matrix_descriptor"}  # plain arithmetic and compositions, one text for both
    twin = (bench.HERE / "include" / "simt_ptx.h").read_text().split("namespace ptx {")[1]
    twins = set(re.findall(name, twin, re.MULTILINE)) - {"is_bf16"}
    assert twins == declared - shared
    kernels = "".join(code(path) for path in KERNELS.glob("*.cu"))
    unused = {n for n in declared if not re.search(rf"ptx::{n}\b", kernels)}
    assert not unused, f"no test kernel calls {unused}"


def test_the_bench_knows_what_hopper_has():
    found = {op for path in CUDA.glob("*_sm90.cu") for op in re.findall(r"^void (\w+)_sm90\(View", code(path), re.M)}
    assert found == set(bench.HOPPER)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the test kernels are not compiled for a GPU")
@pytest.mark.parametrize(
    ("source", "arch"),
    [("layouts", "80"), ("layouts_sm90", "90a"), ("faults_sm90", "90a"), ("../../gpu/rates_sm90", "90a")],
)
def test_nvcc_takes_the_test_kernels(source, arch, tmp_path):
    """Every wrapper, without a warning: the bench's model must be of what nvcc compiles too."""
    command = [
        "nvcc", "-std=c++20", "-O1", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Werror", "all-warnings",
        f"-I{CUDA}", f"-I{CUDA.parent}", "-c", str(KERNELS / f"{source}.cu"), "-o", str(tmp_path / "object.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not re.search("warning|serialized", done.stderr), done.stderr[-4000:]
