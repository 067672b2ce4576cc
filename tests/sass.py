"""What nvcc made of each CUDA kernel's main loop, beside what the kernel promises: a look at speed without a GPU.

    make sass        # prints the table, keeps it in benchmarks/results/sass.txt, fails where a promise is broken

A promise is a line of a .cu file, of counts in the main loop of one instance of a kernel, by the classes of CLASSES:

    // sass bias_quick_gelu_fwd_kernel<bf16, 8>: LDG.128 = 4, STG.128 = 4, MUFU <= 64, LDS = 0

The main loop is the innermost loop with the most instructions (the whole kernel where none loops). Counts are of
instructions in the text, not of executions: both sides of a branch count.
"""

import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sass_flow import Line, mixed_operands, touched_in_flight

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
TABLE = ROOT / "benchmarks" / "results" / "sass.txt"
ARCH = "90a"

# Each class of the table: which opcodes (with their suffixes) it counts.
CLASSES = {
    "HGMMA": r"HGMMA",
    "HMMA": r"HMMA",
    "MUFU": r"MUFU",
    "FFMA": r"FFMA",
    "FADD+FMUL": r"(FADD|FMUL)",
    "LDG.128": r"LDG\..*\b128\b",
    "LDG.64": r"LDG\..*\b64\b",
    "LDG": r"LDG(?!.*\b(64|128)\b)",  # 4 bytes or fewer
    "STG.128": r"STG\..*\b128\b",
    "STG.64": r"STG\..*\b64\b",
    "STG": r"STG(?!.*\b(64|128)\b)",
    "LDS": r"LDSM?",
    "STS": r"STS",
    "SHFL": r"SHFL",
    "BAR": r"(BAR|SYNCS|WARPSYNC)",
    "ATOM": r"(ATOM|ATOMS|ATOMG|RED|REDG)",
    "LOCAL": r"(LDL|STL)",
}
COMPARE = {"=": operator.eq, "<=": operator.le, ">=": operator.ge}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")
PROMISE = re.compile(r"^// sass (\w+(?:<.*?>)?): (.+)$", re.MULTILINE)


def kernels(text: str) -> dict[str, list[Line]]:
    """cuobjdump's listing → by mangled name the instructions: address, opcode, operands, whether under a predicate."""
    found: dict[str, list[Line]] = {}
    for line in text.splitlines():
        if "Function : " in line:
            body = found.setdefault(line.split("Function : ")[1].strip(), [])
        elif match := INSTRUCTION.match(line):
            body.append((int(match[1], 16), match[3], match[4], match[2] is not None))
    return found


def main_loop(body: list[Line]) -> list[str]:
    """The opcodes of the innermost loop with the most instructions, or of the whole kernel."""
    loops = []
    for address, opcode, operands, _ in body:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:  # not the trap after the end
            loops.append((int(target[1], 16), address))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    bodies = [[opcode for address, opcode, *_ in body if a <= address <= b] for a, b in inner]
    return max(bodies, key=len, default=[opcode for _, opcode, *_ in body])


def counts(opcodes: list[str]) -> Counter:
    """How many of each class."""
    return Counter({name: sum(bool(re.fullmatch(f"{p}(\\..*)?", o)) for o in opcodes) for name, p in CLASSES.items()})


def readable(demangled: str) -> str:
    """A kernel's name and template arguments as a promise writes them."""
    name = re.sub(r"\(anonymous namespace\)::|igpt::|cuda::|^void ", "", demangled)
    name = re.sub(r"\(((?:unsigned )?int|bool)\)", "", name.replace("__nv_bfloat16", "bf16").replace("__half", "f16"))
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    types = {"unsigned char": "u8", "short": "i16", "long": "i64", "float": "f32"}
    return re.sub(r"unsigned char|\b(short|long|float)\b", lambda m: types[m[0]], name[:end])


def promises(source: str) -> dict[str, list[tuple[str, str, int]]]:
    """Of each instance with a promise: class, comparison, number. ValueError on one that cannot be read."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    for name, terms in PROMISE.findall(source):
        for term in terms.split(","):
            match = re.fullmatch(r"\s*([A-Z][\w.+]*) (=|<=|>=) (\d+)\s*", term)
            if not match or match[1] not in CLASSES:
                raise ValueError(f"sass promise of {name}: cannot read {term.strip()!r}; classes: {', '.join(CLASSES)}")
            found.setdefault(name, []).append((match[1], match[2], int(match[3])))
    return found


def broken(promised: list[tuple[str, str, int]], found: Counter) -> list[str]:
    """The promises that do not hold."""
    return [f"{c} is {found[c]}, promised {o} {n}" for c, o, n in promised if not COMPARE[o](found[c], n)]


def lost(body: list[Line]) -> list[str]:
    """What the assembler has lost track of in one kernel's wgmma: see sass_flow."""
    return [*mixed_operands(body), *touched_in_flight(body)]


def built(file: Path) -> int:
    """`python -m sass --built FILE`: the same of a built extension or object, by the cuobjdump on PATH; 1 for any."""
    text = subprocess.run(["cuobjdump", "-sass", file], check=True, capture_output=True, text=True).stdout
    every = kernels(text).items()
    found = {name: body for name, body in every if any(opcode.startswith("HGMMA") for _, opcode, *_ in body)}
    bad = [f"{name}: {what}" for name, body in found.items() for what in lost(body)]
    print(f"{len(found)} kernels with wgmma", *bad, sep="\n")
    return 1 if bad or not found else 0


def listing(source: Path, tools: Path) -> str:
    """The disassembly of one file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arch = f"arch=compute_{ARCH},code=sm_{ARCH}"
        line = ["nvcc", "-std=c++20", "-O3", "-gencode", arch, '-DIGPT_CUDA_ARCHS=""', "-cubin", "-o", cubin, source]
        subprocess.run(line, check=True)
        env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(["cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True, env=env).stdout


def row(name: str, cells: list[str]) -> str:
    return f"{name:56}" + "".join(f"{c:>{max(6, len(h) + 1)}}" for c, h in zip(cells, ["instr", *CLASSES], strict=True))


def main(argv: list[str]) -> int:
    if argv[:1] == ["--built"] and len(argv) == 2:
        return built(Path(argv[1]))
    if not shutil.which("nvcc") or len(argv) != 1:
        print("usage: tests/sass.py DIRECTORY-OF-cuobjdump, with nvcc on PATH", file=sys.stderr)
        return 2
    sources = sorted(p for p in CUDA.glob("*.cu") if p.stem != "table")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        texts = list(pool.map(lambda p: listing(p, Path(argv[0])), sources))
    version = re.search(r"release ([\d.]+)", subprocess.check_output(["nvcc", "--version"], text=True))
    lines = [f"Main loops for sm_{ARCH} by nvcc {version[1] if version else '?'}; made by `make sass`."]
    lines.append(row("", ["instr", *CLASSES]))
    bad = []
    for source, text in zip(sources, texts, strict=True):
        promised = promises(source.read_text())
        names = kernels(text)
        plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
        found = dict(sorted((readable(n), body) for n, body in zip(plain.splitlines(), names.values(), strict=True)))
        bad += [f"{source.name}: there is no {name}" for name in promised.keys() - found.keys()]
        for name, body in found.items():
            loop = main_loop(body)
            number = counts(loop)
            bad += [f"{name}: {w}" for w in lost(body)]
            lines.append(row(name, [str(len(loop)), *(str(number[c] or "") for c in CLASSES)]))
            if name in promised:
                wrong = broken(promised[name], number)
                lines.append("    promised: " + ", ".join(f"{c} {o} {n}" for c, o, n in promised[name]))
                bad += [f"{name}: {w}" for w in wrong]
    TABLE.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    print(TABLE.read_text(), end="")
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
