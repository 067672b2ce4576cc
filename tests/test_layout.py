"""The rules of the layout: arrows point down, files stay short, PTX and symbols stay in their rooms."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from igpt_fast.ops._native import CPU_TABLES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "igpt_fast"

# Lower layers first. A module imports from its own layer's neighbours below, never from above.
LAYERS = [
    {"errors", "_C", "__version__"},
    {
        "config",
        "console",
        "atomic",
        "pictures",
        "patterns",
        "reference",
        "interrupt",
        "optimizer",
        "device",
        "positions",
        "intervals",
        "tables",
    },
    {"ops", "replay"},
    {"modules", "palette", "kmeans", "decode", "arrays", "reader", "classes", "found", "made", "sources", "pixels"}
    | {"images", "image_files", "scientific", "values", "tokens"},
    {"model", "pretrained", "image_tensors", "accelerate"},
    {"data", "joined", "weights", "checkpoint"},
    {"cached", "drawing", "sample", "regression", "sgd", "options", "metrics", "run", "batches", "labels", "task"},
    {"over_images", "train", "finetune", "plan", "loop", "processes", "probe", "predict", "evaluate", "sklearn"},
    {"demo", "demo_page", "demo_style"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """The rooms of igpt_fast that a file imports: the first name below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "igpt_fast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("igpt_fast."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("igpt_fast.")}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = room(path)
    assert own in LEVEL, f"{own} has no layer: give it one in tests/test_layout.py"
    for name in imported(path) - {own}:
        assert name in LEVEL, f"{path.name} imports {name}, which has no layer"
        assert LEVEL[name] <= LEVEL[own], f"{path.name} imports {name}, which stands above it"


def test_no_cycles():
    graph = {}
    for path in modules():
        graph.setdefault(room(path), set()).update(imported(path) - {room(path)})
    seen: dict[str, int] = {}

    def visit(name, trail):
        assert seen.get(name) != 1, f"import cycle: {' → '.join([*trail, name])}"
        if name not in seen:
            seen[name] = 1
            for below in graph.get(name, ()):
                visit(below, [*trail, name])
            seen[name] = 2

    for name in graph:
        visit(name, [])


def test_our_modules_are_imported_at_the_top():
    for path in modules():
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    assert not any(name.split(".")[0] == "igpt_fast" for name in names), (
                        f"{path.name}:{node.lineno} imports one of our modules inside a function"
                    )


def sources(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else []
    return [ROOT / n for n in names] or [
        p for pattern in patterns for p in ROOT.rglob(pattern) if ".venv" not in p.parts
    ]


def test_files_are_short():
    limits = {300: sources("*.py"), 400: sources("*.cpp", "*.h", "*.cu", "*.cuh")}
    long = {
        str(p.relative_to(ROOT)): n
        for limit, ps in limits.items()
        for p in ps
        if (n := len(p.read_text().split("\n")) - 1) > limit
    }
    assert not long, f"too long, split by stem: {long}"


def braces(name: str) -> list[str]:
    """a{b,c}d → abd, acd"""
    before, brace, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    return [end for part in inside.split(",") for end in braces(before + part + after)] if brace else [name]


def test_the_map_is_of_this_tree():
    """CONTRIBUTING.md: every file in the grid exists, every kernel and every module of the package is named."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(i for i, cells in enumerate(lines) if cells[0] == "stem")
    rooms = [re.search("`(.*)`", cell)[1] for cell in lines[head][1:]]
    named = set()
    for cells in lines[head + 1 :]:
        if len(cells) == len(rooms) + 1:
            for room, cell in zip(rooms, cells[1:], strict=True):
                named |= {room + name for names in re.findall(r"[\w{,}]+\.\w+", cell) for name in braces(names)}
    assert not [name for name in named if not (ROOT / name).exists()]
    kernels = {f"csrc/cuda/{p.name}" for p in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"csrc/cuda/table.cu"}
    assert not kernels - named
    assert not [p.name for p in PACKAGE.glob("*.py") if p.stem != "__init__" and f"`{p.name}`" not in text]


def test_devices_do_not_see_each_other():
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / device).iterdir():
            assert f"{other}/" not in path.read_text().split("namespace igpt")[0], f"{path} includes from {other}"


def test_inline_ptx_stays_in_its_files():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        assert path.name.startswith("ptx") or not re.search(r"\basm\b", path.read_text()), f"inline PTX in {path.name}"


def test_no_paths_of_a_machine_and_no_unfinished_marks():
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|Not" r"ImplementedError")
    places = re.compile(r"(?<![\w.])/(work|root|home|mnt)/\w")
    for path in sources("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.md", "Makefile"):
        assert not marks.search(path.read_text()), f"unfinished mark in {path}"
        assert not (found := places.search(path.read_text())), f"a place of somebody's machine in {path}: {found[0]}"


@pytest.mark.skipif(
    not list((ROOT / "build").glob("*/CMakeFiles/cpu_avx*")), reason="needs the objects of a build in the tree"
)
def test_symbols_stay_in_their_instruction_set():
    """A function that the linker could merge across instruction sets would hand AVX-512 code to an older processor."""
    assert shutil.which("nm"), "nm (binutils) is needed to read the objects"
    loose = set()
    for isa in set(CPU_TABLES) - {"baseline"}:
        for obj in (ROOT / "build").glob(f"*/CMakeFiles/cpu_{isa}.dir/**/*.o"):
            listed = subprocess.run(
                ["nm", "-C", "--defined-only", str(obj)], capture_output=True, text=True, check=True
            )
            for line in listed.stdout.splitlines():
                kind, name = line.split(maxsplit=2)[1:]
                if kind in "WVuTDB" and f"igpt::{isa}::" not in name and "DW.ref" not in name:
                    loose.add(f"{obj.name}: {name}")
    assert not loose, "shared symbols in code for one instruction set:\n" + "\n".join(sorted(loose))
