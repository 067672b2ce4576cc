"""Parts of a check that takes its time from a scarce machine: each ends in time, and none hides what comes after it.

A part is a function of a Clock, which runs its commands. A command is a process group of its own with a log; when its
part's time is over, the whole group is interrupted, then killed. What is known is on disk after every part.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A process group of its own, in the session of whoever called us, so that he can end us all.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
GRACE = 4.0  # seconds between the interrupt, on which pytest still writes its results, and the kill
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """name; the seconds planned for it (what earlier parts leave over is added); what it does → fields of its report.

    run returns a dict with at least "status". Raising is a failure of this part alone.
    """

    name: str
    seconds: float
    run: Callable[["Clock"], dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status, or None when it ran out of time; the seconds; the log's last lines."""

    code: int | None
    seconds: float
    log: Path

    @property
    def status(self) -> str:
        return TIMED_OUT if self.code is None else PASSED if self.code == 0 else FAILED

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Clock:
    """Runs the commands of one part until its deadline (by time.monotonic)."""

    def __init__(self, deadline: float, logs: Path, env: Mapping[str, str] | None = None):
        self.deadline, self.logs, self.env = deadline, logs, dict(os.environ if env is None else env)
        self.running: set[subprocess.Popen] = set()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def command(
        self, name: str, argv: Sequence[str | Path], cwd: Path | None = None, limit: float | None = None, **env: str
    ) -> Done:
        """Runs argv with its output in <logs>/<name>.txt. limit: seconds, if less than the part has left."""
        began, log = time.monotonic(), self.logs / f"{name}.txt"
        end = self.deadline if limit is None else min(self.deadline, began + limit)
        with open(log, "w") as file:
            print("$", *argv, file=file, flush=True)
            if end - GRACE <= began:
                print("no time left", file=file)
                return Done(None, 0.0, log)
            try:
                process = subprocess.Popen(
                    [str(a) for a in argv], cwd=cwd, env=self.env | env, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, **GROUP,
                )  # fmt: skip
            except OSError as error:
                print(error, file=file)
                return Done(127, 0.0, log)
            self.running.add(process)
            try:
                code: int | None = process.wait(max(0.0, end - GRACE - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
                self.running.discard(process)
            if code is None:
                print(f"stopped after {time.monotonic() - began:.0f} s: its time was over", file=file)
        return Done(code, time.monotonic() - began, log)

    def together(self, commands: Mapping[str, Callable[[], Done]], at_once: int | None = None) -> dict[str, Done]:
        """Calls several functions that run commands, so many at once."""
        with ThreadPoolExecutor(at_once or max(2, len(os.sched_getaffinity(0)))) as pool:
            running = {name: pool.submit(run) for name, run in commands.items()}
            try:
                return {name: future.result() for name, future in running.items()}
            except BaseException:  # somebody wants us to stop: then nothing more is begun, and what runs ends
                self.deadline = 0.0
                for process in list(self.running):
                    _end(process)
                raise


def _end(process: subprocess.Popen) -> None:
    """Ends the whole group of a process, whether it lives or has left children behind."""
    for kind, patience in ((signal.SIGINT, GRACE - 1), (signal.SIGKILL, 10.0)):
        if process.poll() is None or kind == signal.SIGKILL:
            try:
                os.killpg(process.pid, kind)
            except ProcessLookupError:  # all gone
                break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def run(
    parts: Sequence[Part], report: dict[str, Any], out: Path, total: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs the parts within `total` seconds, fills report["parts"] and writes it to out/gpu-check.json after each.

    Each part's deadline is fixed from the start, in proportion to its planned seconds, so that a part that hangs takes
    time from nobody, and one that is quick leaves its rest to the others.
    """
    began, planned = time.monotonic(), sum(part.seconds for part in parts)
    (logs := out / "logs").mkdir(parents=True, exist_ok=True)
    report |= {"parts": {part.name: {"status": NOT_RUN} for part in parts}, "finished": False}
    write(report, out)
    sofar = 0.0
    for part in parts:
        sofar += part.seconds
        start = time.monotonic()
        print(f"{part.name} …", flush=True)
        try:
            result = part.run(Clock(began + total * sofar / planned, logs, env))
        except Exception:  # whatever it is, the other parts still have something to say
            result = {"status": FAILED, "reason": "the part itself broke:\n" + traceback.format_exc()}
        result["seconds"] = round(time.monotonic() - start, 1)
        report["parts"][part.name] = result
        print(f"{part.name}: {result['status']} in {result['seconds']:.0f} s", result.get("reason", ""), flush=True)
        write(report, out)
    report["finished"] = True
    write(report, out)
    return report


def write(report: Mapping[str, Any], out: Path) -> None:
    """Puts the report at out/gpu-check.json, whole or not at all."""
    partial = out / "gpu-check.json.partial"
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, out / "gpu-check.json")
