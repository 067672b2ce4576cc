"""The runner of gpu-check with parts that pass, fail, hang, break and leave children behind; and what is made of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu import build, check, parts, report
from gpu.parts import Clock, Done, Part


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def gone(pid: int) -> bool:
    """Whether the process ends within moments: it dies after the signal, and its parent may never ask for it."""
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def clock(tmp_path):
    return Clock(time.monotonic() + 60, tmp_path)


def test_a_command_keeps_its_output_and_its_status(clock):
    done = clock.command("three", python("import os; print(os.environ['WORD']); raise SystemExit(3)"), WORD="hello")
    assert (done.code, done.status) == (3, "failed") and done.tail(1) == "hello"
    assert clock.command("well", python("")).status == "passed"
    assert clock.command("nobody", ["/nowhere/to/be/found"]).code == 127


def test_a_command_out_of_time_ends_with_all_its_children(clock, monkeypatch, tmp_path):
    """Even those that will not hear of an interrupt, and the child's child."""
    monkeypatch.setattr(parts, "GRACE", 1.5)
    (tmp_path / "inner").write_text(f"trap '' INT; echo $$ > {tmp_path}/pid; sleep 600")
    began = time.monotonic()
    done = clock.command("hang", ["sh", "-c", f"trap '' INT; sh {tmp_path}/inner; true"], limit=9)
    assert done.status == "timed out" and time.monotonic() - began < 300
    assert gone(int((tmp_path / "pid").read_text())) and "its time was over" in done.log.read_text()


def test_a_child_left_behind_is_ended_too(clock, tmp_path):
    pid = str(tmp_path / "pid")
    code = f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({pid!r}, 'w').write(str(p.pid))"
    assert clock.command("parent", python(code)).code == 0
    assert gone(int((tmp_path / "pid").read_text()))


def test_whoever_stops_the_runner_stops_its_commands(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"echo $$ > {tmp_path}/pid-{name}; sleep 600")
    code = f"""
import functools, signal, time; from pathlib import Path; from gpu.parts import Clock
signal.signal(signal.SIGTERM, signal.default_int_handler)
clock, here = Clock(time.monotonic() + 500, Path({str(tmp_path)!r})), {str(tmp_path)!r}
clock.together({{n: functools.partial(clock.command, n, ["sh", f"{{here}}/{{n}}"]) for n in "ab"}})
"""
    tests = str(Path(parts.__file__).parent.parent)
    runner = subprocess.Popen(python(code), env=os.environ | {"PYTHONPATH": tests}, stderr=subprocess.DEVNULL)
    while not all((tmp_path / f"pid-{name}").exists() for name in "ab"):
        time.sleep(0.1)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(900) != 0
    assert all(gone(int((tmp_path / f"pid-{name}").read_text())) for name in "ab")


def test_an_interrupt_comes_first_so_that_results_are_written(clock, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 3.0)
    done = clock.command("writes", ["sh", "-c", "trap 'echo results; exit' INT; sleep 600 & wait"], limit=6)
    assert done.code is None and "results" in done.log.read_text()


def test_no_part_hides_another(tmp_path, capsys):
    def breaks(clock):
        raise ZeroDivisionError("oh")

    def hangs(clock):
        return {"status": clock.command("hangs", ["sleep", "600"]).status}

    def fine(clock):
        return {"status": clock.command("fine", python("")).status, "passed": 7, "failed": 0}

    chosen = [Part("breaks", 1, breaks), Part("hangs", 6, hangs), Part("fine", 593, fine)]
    began = time.monotonic()
    found = parts.run(chosen, {"machine": {}}, tmp_path, 600.0)
    assert time.monotonic() - began < 300
    assert [p["status"] for p in found["parts"].values()] == ["failed", "timed out", "passed"]
    assert "ZeroDivisionError: oh" in found["parts"]["breaks"]["reason"]
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == found and found["finished"]


def test_what_is_known_is_on_disk_after_every_part(tmp_path):
    def look(clock):
        seen.append(json.loads((tmp_path / "gpu-check.json").read_text()))
        return {"status": "passed"}

    seen: list = []
    parts.run([Part("a", 1, look), Part("b", 1, look)], {}, tmp_path, 60.0)
    assert [s["parts"]["a"]["status"] for s in seen] == ["not run", "passed"]
    assert not seen[1]["finished"] and seen[1]["parts"]["b"] == {"status": "not run"}


def test_time_that_is_left_over_goes_to_later_parts(tmp_path):
    left = []
    note = lambda clock: left.append(clock.left()) or {"status": "passed"}  # noqa: E731
    parts.run([Part("a", 30, note), Part("b", 10, note)], {}, tmp_path, 80.0)
    assert 59 < left[0] <= 60 and 79 < left[1] <= 80


def test_worst_of_the_pieces():
    assert check.worst({"a": "passed", "b": "not run"})["status"] == "passed"
    assert check.worst({"a": "timed out", "b": "failed"})["status"] == "failed"
    assert check.worst({"a": "passed", "b": "timed out"})["reason"] == "b timed out"
    assert check.worst({"a": "not run"})["status"] == "not run"


@pytest.mark.parametrize(
    ("code", "text", "wanted"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed"),
        (1, "========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", "not run"),
        (127, "no such file", "not run"),
        (None, "========= ERROR SUMMARY: 0 errors", "timed out"),
    ],
)
def test_verdicts_of_compute_sanitizer(tmp_path, code, text, wanted):
    (tmp_path / "log").write_text(text)
    assert check.verdict(Done(code, 1.0, tmp_path / "log")) == wanted


def test_counts_of_a_junit_file(tmp_path):
    (tmp_path / "t.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=x.xml", "t.py"]
    subprocess.run(line, cwd=tmp_path, capture_output=True)
    assert check.counts(tmp_path / "x.xml") == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_b"]}
    assert check.counts(tmp_path / "none.xml")["passed"] == 0


@pytest.mark.parametrize(("capability", "arch"), [([9, 0], "90a"), ([8, 0], "80"), ([12, 0], "120")])
def test_launchers_find_hoppers_kernels_on_every_gpu(capability, arch, tmp_path, monkeypatch):
    for place in ("csrc/cuda/a.cu", "csrc/cuda/a_sm90.cu", "tests/simt/kernels/b.cu", "tests/simt/kernels/b_sm90.cu"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(build, "TREE", tmp_path)
    machine, hopper = check.Machine({"capability": capability}, {"nvcc": "nvcc"}, tmp_path), capability == [9, 0]
    found = build.objects(machine)
    assert {"cuda-a", "cuda-a_sm90", "kernels-b"} <= set(found) and ("kernels-b_sm90" in found) is hopper
    lines = []
    told = SimpleNamespace(command=lambda name, line, where: lines.append(line))
    for name in ("cuda-a", "cuda-a_sm90"):
        build.compile_(machine, told, name)
    codes = [line[line.index("-gencode") + 1] for line in lines]
    assert codes == [f"arch=compute_{arch},code=sm_{arch}", "arch=compute_90a,code=sm_90a"]
    assert ("-DDRIVE_NO_SM90" in lines[0]) is not hopper


def test_rates_are_read_where_the_program_could_measure(clock, finished, tmp_path, monkeypatch):
    program = tmp_path / "rates"
    monkeypatch.setattr(check, "RATES", program)
    monkeypatch.setattr(check, "SCRATCH", tmp_path)
    machine = check.Machine({"capability": [9, 0]}, {}, tmp_path)
    assert check.rates(machine, clock) == {"status": "not run", "reason": "not built"}
    program.write_text('#!/bin/sh\necho \'{"m64n64k16": {"cycles": 32.25,\'; echo \'"mhz": 1755}}\'')
    program.chmod(0o755)
    found = check.rates(machine, clock)
    assert found == {"status": "passed", "cycles": {"m64n64k16": {"cycles": 32.25, "mhz": 1755}}}
    assert "32.2 cycles  1755 MHz" in report.table(finished | {"parts": {"rates": found}}, tmp_path)
    program.write_text("#!/bin/sh\necho '{'; echo 'rates: no device' >&2; exit 1")
    assert check.rates(machine, clock) == {"status": "failed", "reason": "rates: no device"}


@pytest.fixture
def finished():
    """A report as of a run on which one kernel agreed, one failed a test and one a sanitizer."""
    ops = {"rms_norm_fwd": {"passed": 9, "failed": 0}, "rms_norm_bwd": {"passed": 8, "failed": 1},
           "sample_tokens": {"passed": 3, "failed": 0},
           "palette_assign": {"passed": 3, "failed": 0, "unclear": 1},
           "attention_bwd": {"passed": 0, "failed": 0, "unclear": 9}}  # fmt: skip
    pieces = {"memcheck rms_norm_fwd": "passed", "racecheck sample_tokens": "failed"}
    made = {
        "machine": {"gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0"},
        "date": "2026-11-25 08:00 UTC",
        **report.heading(report.ROOT),
        "parts": {
            "build": {"status": "passed", "seconds": 80.2},
            "tests": {"status": "failed", "seconds": 9.0, "files": {"a": {"passed": 20, "failed": 1}}, "ops": ops},
            "sanitizer": {"status": "failed", "pieces": pieces, "reason": "racecheck sample_tokens failed"},
        },
    }
    return made | {"kernels": report.kernels(made, report.ROOT)}


def test_a_kernel_agrees_when_tests_and_sanitizer_do(finished, tmp_path):
    agreed = {op: k["agreed"] for op, k in finished["kernels"].items()}
    assert agreed["rms_norm_fwd"] is True and agreed["cross_entropy_fwd"] is None
    assert agreed["rms_norm_bwd"] is False and agreed["sample_tokens"] is False
    assert agreed["palette_assign"] is None  # what failed beside others erases nothing
    assert agreed["attention_bwd"] is False  # unless nothing ever passed
    entry = {"op": "rms_norm", "shape": "32768 × 512", "dtype": "bfloat16", "seconds": 2e-5, "rates": {"GB/s": 3355.4},
             "best_peer": "torch.compile", "ratio": 1.5, "goals": []}  # fmt: skip
    (tmp_path / "benchmarks.json").write_text(json.dumps({"entries": {"x": entry}}))
    text = report.table(finished, tmp_path)
    for words in (
        "NVIDIA H200, driver 580.1",
        "20 passed, 1 failed",
        "rms_norm_bwd          NO",
        "20.0 us",
        "3355 GB/s",
    ):
        assert words in text, words


def test_a_record_names_commit_and_device(finished, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "csrc").mkdir(parents=True), (root / report.VERIFIED).parent.mkdir(parents=True), out.mkdir()
    (root / "csrc" / "a.cu").write_text("kernel")
    old = {"commit": "abc", "device": "H100", "date": "2026-01-01"}
    nothing = {"commit": None, "device": None, "date": None}
    ops = {"rms_norm_fwd": nothing, "rms_norm_bwd": old, "cross_entropy_fwd": old}
    (root / report.VERIFIED).write_text(json.dumps({"kernels": ops}))
    for line in ("init", "add .", "-c user.name=a -c user.email=a@b.c commit -m x"):
        subprocess.run(["git", *line.split()], cwd=root, check=True, capture_output=True)
    (out / "gpu-check.json").write_text(json.dumps(finished))
    with pytest.raises(ValueError, match="not what was checked"):
        report.record(out, root)
    (out / "gpu-check.json").write_text(json.dumps(finished | {"sources": report.sources(root)}))
    (out / "benchmarks.json").write_text("{}")
    assert "rms_norm_fwd" in report.record(out, root)
    assert (root / report.VERIFIED).with_name("nvidia-h200.json").read_text() == "{}"
    written = json.loads((root / report.VERIFIED).read_text())["kernels"]
    head = report.git(root, "rev-parse", "HEAD")
    assert written["rms_norm_fwd"] == {"commit": head, "device": "NVIDIA H200", "date": "2026-11-25"}
    assert written["rms_norm_bwd"] == nothing and written["cross_entropy_fwd"] == old
    (root / "csrc" / "a.cu").write_text("another")
    (out / "gpu-check.json").write_text(json.dumps(finished | {"sources": report.sources(root)}))
    with pytest.raises(ValueError, match="not committed"):
        report.record(out, root)


def test_without_a_gpu_there_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("gpu-check: no GPU to check here (")


def test_every_part_has_a_share_of_nine_minutes():
    assert sum(seconds for _, seconds, _ in check.PARTS) == check.TOTAL and check.TOTAL + 30 < 540


def test_benchmarks_are_those_of_the_kernels():
    files = sorted((check.ROOT / "benchmarks").glob("test_*.py"))
    chosen = {p.stem.removeprefix("test_") for p in check.of_kernels(files)}
    assert chosen >= {
        "activation",
        "attention",
        "attention_decode",
        "linear_cross_entropy",
        "norm",
        "palette",
        "sampling",
    }
    assert not chosen & {"train", "accelerate"}


def test_benchmarks_begin_with_what_no_hardware_has_seen(monkeypatch, tmp_path):
    kernels = {"norm_fwd": {"commit": "a"}, "linear_fwd": {"commit": None}, "attention_fwd": {"commit": "a"}}
    (tmp_path / report.VERIFIED).parent.mkdir(parents=True)
    (tmp_path / report.VERIFIED).write_text(json.dumps({"kernels": kernels}))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    files = [tmp_path / f"test_{name}.py" for name in ("attention", "norm", "sampling", "linear")]
    for path in files:
        path.write_text("#" * len(path.stem))
    names = [path.stem.removeprefix("test_") for path in check.by_need(files)]
    assert names == ["linear", "sampling", "norm", "attention"]
