"""Run the parts of `benchmarks/gpu.py`, sequentially or in parallel, within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.gpu_run.parts import ROOT, Command, Part
from benchmarks.gpu_run.report import summary
from benchmarks.gpu_run.results import Result, Results
from benchmarks.gpu_run.watchdog import MARK, end_all, kill_on_exit
from launch.machine.provenance import git_state

KEPT_LINES, FAILED_LINES = 12, 200  # output lines stored in gpu.json for a passed and a failed part
READ_BACK = 1 << 20  # bytes at the end of the output that are read to find these lines
SHOWN_FAILED, SHOWN_WIDTH = 15, 300  # lines and columns to print of a failed part's output
SLOWER = 20.0  # factor by which --cpu extends the time limits
PHOTOS, FEW_PHOTOS = 2000, 64  # number of photos, without and with --cpu
POLL = 0.5  # seconds between checks whether a part has ended or must be stopped


class Runner:
    """Runs parts sequentially or in parallel until the time limit.

    Args:
        results: storage for the results.
        machine: returns a description of the machine.
        start: start of this run (`time.monotonic`).
        seconds: time limit from `start`.
        on_cpu: rehearse without a GPU.
    """

    def __init__(
        self, results: Results, machine: Callable[[], Result], *, start: float, seconds: float, on_cpu: bool
    ) -> None:
        self.results, self.machine, self.on_cpu = results, machine, on_cpu
        self.start, self.end = start, start + seconds
        self.mark = f"{uuid.uuid4()}/"  # value of FAT_GPU_MARK in the environment of all processes of this run
        self.stopped_by = 0
        """Number of the signal that requested to stop the run; 0: none."""
        work = results.work
        self.site, self.data = work / "site", work / "data"
        self.data.mkdir(exist_ok=True)
        # Compiled kernels contain absolute paths, so this folder must not depend on the work folder.
        self.cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir()) / "triton-cache")
        kept = {
            "TRITON_CACHE_DIR": self.cache,
            "TORCHINDUCTOR_CACHE_DIR": work / "inductor",
            "HF_HOME": work / "hf",
        }
        self.environment = {name: str(path) for name, path in kept.items()} | os.environ
        self.environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(self.site), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",  # keeps the output of a part that is killed
            "PYTHONDONTWRITEBYTECODE": "",  # write bytecode, so that later parts import the kit faster
            "DS_IGNORE_CUDA_DETECTION": "1",  # DeepSpeed must not search for nvcc
        } | ({"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE"} if on_cpu else {})

    def run(self, chosen: list[Part]) -> set[str]:
        """Run parts and return the set of their final states."""
        states: set[str] = set()
        with kill_on_exit(self.mark):
            for group in groups(chosen):
                with ThreadPoolExecutor(len(group)) as pool:  # threads, because parts may wait for other parts
                    futures: dict[str, Future[str]] = {}
                    for part in group:
                        before = [futures[name] for name in part.after if name in futures]
                        futures[part.name] = pool.submit(self.turn, part, before)
                    # Poll: Python runs signal handlers in the main thread, which must not block indefinitely.
                    while wait(futures.values(), timeout=POLL).not_done:
                        pass
                states |= {future.result() for future in futures.values()}
        return states

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: end the running parts and start no others. It only sets a flag, because an exception could
        leave a part running."""
        self.stopped_by = number

    def turn(self, part: Part, before: list[Future[str]]) -> str:
        """Wait for the parts `before`, run a part unless it has already passed, and return its state."""
        wait(before)
        if self.stopped_by:
            return "not run"
        if self.done(part):
            print(f"-- {part.name}: passed in an earlier run", flush=True)
            return "passed"
        state, reason = self.obstacle(part)
        if state:
            result: Result = {"state": state, "seconds": 0.0, "tail": reason, "machine": self.machine()}
            if state == "left out" or part.name not in self.results.here:  # keep the result of an earlier run
                self.results.record(part.name, result)
        else:
            begun = {"state": "begun", "seconds": 0.0, "tail": "the run was killed", "machine": self.machine()}
            self.results.record(part.name, begun)
            result = self.attempt(part)
            self.results.record(part.name, result)
        lines = [f"-- {part.name}: {summary(result)} (at {time.monotonic() - self.start:.0f} s)"]
        tail = SHOWN_FAILED if result["state"] in {"failed", "time ran out"} else part.shown
        lines += [line[:SHOWN_WIDTH] for line in result["tail"].splitlines()[-tail:] if tail]
        print("\n".join(lines), flush=True)
        return str(result["state"])

    def done(self, part: Part) -> bool:
        """Return whether a part has passed and the paths that it creates exist."""
        return self.results.passed(part.name) and all(self.made(path).exists() for path in part.makes)

    def made(self, path: str) -> Path:
        return self.results.work / path.format(cache=self.cache)

    def obstacle(self, part: Part) -> tuple[str, str]:
        """Return state and reason if a part cannot be started; two empty strings if it can."""
        if not part.available:
            missing = [str(file.relative_to(ROOT)) for file in part.files if not file.exists()]
            return "left out", f"{', '.join(missing)} does not exist"
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        for name in part.modules:
            if subprocess.call([sys.executable, "-c", probe, name], env=self.environment) != 0:
                return "left out", f"module {name} cannot be imported"
        left = self.end - time.monotonic()
        if left < part.least:
            return "not run", f"{left:.0f} s are left, {part.least:.0f} s are needed; run the script again"
        for path in part.uses:
            if not self.made(path).exists():
                return "not run", f"{path} does not exist; see the result of the part that creates it"
        return "", ""

    def attempt(self, part: Part) -> Result:
        """Run a part's commands. Output goes to NAME.txt, results to NAME.json, other files to NAME.run/."""
        stem = self.results.parts / part.name
        out, output, run = (stem.with_name(f"{part.name}.{kind}") for kind in ("json", "txt", "run"))
        for file in (out, output):
            file.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for path in map(self.made, part.makes):
            if self.results.work in path.parents:  # a Triton cache of the user must not be deleted
                shutil.rmtree(path, ignore_errors=True)
        places = {"out": out, "run": run, "parts": stem.parent, "site": self.site, "caches": self.cache.parent}
        values = places | {"data": self.data, "photos": FEW_PHOTOS if self.on_cpu else PHOTOS}
        limit = part.limit * (SLOWER if self.on_cpu else 1)
        start = time.monotonic()
        until = min(start + limit, self.end)
        status: int | None = 0
        for command in commands(part, on_cpu=self.on_cpu):
            words = [sys.executable if word == "python" else word.format(**values) for word in command]
            status = self.finish(words, until, output, part)
            if status != 0:
                break
        lines = end_of(output)
        state = "passed" if status == 0 else "failed"
        if status is None:
            lines.append(f"ended after {time.monotonic() - start:.0f} s")
            state = "failed" if start + limit <= self.end and not self.stopped_by else "time ran out"
        result = {
            "state": state,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "expected": part.expected,
            "commands": part.commands,
            "commit": git_state(),
            "machine": self.machine(),
            "tail": "\n".join(lines[-max(KEPT_LINES, part.shown) if state == "passed" else -FAILED_LINES :]),
        }
        with contextlib.suppress(FileNotFoundError, ValueError):  # a stopped part may have written some results
            result["figures"] = json.loads(out.read_text(encoding="utf-8"))
        with contextlib.suppress(FileNotFoundError, ValueError):  # only a training run writes metrics
            metrics = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            result["figures"] = {"training": {line["kind"]: line for line in metrics}}
        return result

    def finish(self, words: list[str], until: float, output: Path, part: Part) -> int | None:
        """Run a command; return its exit status, or None if it was ended at the time limit. All processes that it has
        started are killed at its end, including those in other sessions."""
        mark = f"{self.mark}{part.name}/"
        environment = self.environment | part.environment | {MARK: mark}
        with output.open("ab") as sink:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            while time.monotonic() < until and not self.stopped_by:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(POLL, max(0.0, until - time.monotonic())))
            return None
        finally:
            end_all(mark)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0)


def end_of(file: Path) -> list[str]:
    """Return the last lines of a file, without reading all of it: its size is not limited."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - READ_BACK))
        return stream.read(READ_BACK).decode(errors="replace").strip().splitlines()


def groups(chosen: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts in order, in lists of adjacent parts that may run in parallel."""
    group: list[Part] = []
    for part in chosen:
        if group and not (part.together and group[-1].together):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def commands(part: Part, *, on_cpu: bool) -> list[Command]:
    """Return a part's commands, with its additional options for --cpu."""
    *first, last = part.commands
    return [*first, (*last, *part.on_cpu) if on_cpu else last]
