"""Run everything that needs a GPU within a time budget; called again, continue.

    python3 benchmarks/gpu.py [PROFILE ...] [--seconds 600] [--out DIR] [--only REGEX] [--work DIR] [--cpu]

Profiles (`benchmarks/gpu_run/parts.py` is the table of their parts):

  contact  everything once, about 220 s: correctness tests side by side, then the first timings
  measure  timed parts one at a time, in order of value, about 335 s
  peers    other people's models under torch.compile, 70 s each

Neither an installed project nor a virtual environment is needed: this Python with its packages is used. Where there is
a folder .kit with unpack.sh and kit.tar.xz (packages) or triton-cache.tar.xz (compiled kernels, packed from the same
absolute path, $TRITON_CACHE_DIR or TMP/triton-cache), they are unpacked first.

Every part has a limit of twice its expected time, and is not begun with fewer seconds left than it needs. Results are
kept in the work folder and copied to DIR every 15 s and at the end: gpu.json (all results, by device), gpu.md (a
table), results.tar.gz (every part's whole output too). A killed call loses only the part that was running. Parts that
have passed on such a device with the same sources do not run again, on another machine either if DIR/gpu.json is there.
Exit status: 0 all parts passed, 1 some failed, 2 no GPU or bad options, 3 time ran out before every part had its turn.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_run.parts import PROFILES, ROOT, Command, Part, parts
from benchmarks.gpu_run.report import summary
from benchmarks.gpu_run.results import Result, Results

START = time.monotonic()
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "accelerate", "deepspeed", "timm", "numpy")
SOURCES = ("benchmarks", "fat", "launch", "pipeline", "shards", "tests")
KEPT_LINES, FAILED_LINES = 12, 200  # of a part's output, in gpu.json
SHOWN_FAILED, SHOWN_WIDTH = 15, 300  # lines and columns of a failed part's output that are printed
SLOWER = 20.0  # with --cpu: times the limits, which are for a machine with many idle cores
PHOTOS, FEW_PHOTOS = 2000, 64  # to make; the second with --cpu
GRACE = 10.0  # seconds for killed processes to be gone
BAD_INPUT, TIME_IS_UP = 2, 3


def main() -> int:
    options = arguments()
    if not options.cpu and not has_gpu():
        print(f"error: {sys.executable} finds no CUDA device (torch.cuda.is_available() is False)", file=sys.stderr)
        return BAD_INPUT
    options.work.mkdir(parents=True, exist_ok=True)
    lock = (options.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"error: another call is using {options.work}; wait for it, or give --work DIR", file=sys.stderr)
        return BAD_INPUT
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about = machine()
    results = Results(options.work, options.out, device_of(about), digest_of_sources())
    runner = Runner(results, about, end=START + options.seconds, on_cpu=options.cpu)
    chosen = selection(parts(), options.profiles, options.only, runner)
    with results.copied():
        states = runner.run(chosen)
    print(f"done after {time.monotonic() - START:.0f} s; results in {options.out}", flush=True)
    return 1 if "failed" in states else TIME_IS_UP if states & {"time ran out", "not run"} else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="default: contact and measure")
    parser.add_argument("--seconds", type=float, default=600.0, help="of this call; the next call continues")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where to copy the results")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="parts whose names this finds")
    work = Path(tempfile.gettempdir()) / "fat-gpu"
    parser.add_argument("--work", type=Path, default=work, help=f"for results, data and caches, default {work}")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU: begin every part, on small inputs")
    options = parser.parse_args()
    options.profiles = options.profiles or list(PROFILES[:2])
    if unknown := set(options.profiles) - set(PROFILES):
        parser.error(f"unknown profile {', '.join(sorted(unknown))}: expected {', '.join(PROFILES)}")
    options.work, options.out = options.work.absolute(), options.out.absolute()
    return options


def selection(table: list[Part], profiles: list[str], only: re.Pattern[str], runner: Runner) -> list[Part]:
    """Parts of these profiles, in order, before them what they need of others: the kit, and data that is not there."""
    chosen = [part for part in table if part.profile in profiles and only.search(part.name)]
    paths = {path for part in chosen for path in part.uses} | {"site", "{cache}"}
    makers = [
        p
        for p in table
        if paths.intersection(p.makes) and not runner.done(p) and all(file.exists() for file in p.files)
    ]
    return [part for part in table if part in chosen or part in makers]


class Runner:
    """Runs parts one at a time or side by side, within the time that is left.

    Args:
        about: what the results are of, from `machine`.
        end: when time is up, by `time.monotonic`.
        on_cpu: rehearse.
    """

    def __init__(self, results: Results, about: dict[str, Any], *, end: float, on_cpu: bool) -> None:
        self.results, self.about, self.end, self.on_cpu = results, about, end, on_cpu
        self.stopped = threading.Event()
        work = results.work
        self.site, self.data = work / "site", work / "data"
        self.data.mkdir(exist_ok=True)
        # Compiled kernels hold absolute paths, so the folder does not depend on the work folder.
        self.cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir()) / "triton-cache")
        kept = {"TRITON_CACHE_DIR": self.cache, "TORCHINDUCTOR_CACHE_DIR": work / "inductor", "HF_HOME": work / "hf"}
        self.environment = {name: str(path) for name, path in kept.items()} | os.environ
        self.environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(self.site), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",  # what a killed part had said is not lost
            "PYTHONDONTWRITEBYTECODE": "",  # later parts import the kit faster
            "FAT_TUNED": "off",
            "DS_IGNORE_CUDA_DETECTION": "1",  # DeepSpeed looks for nvcc otherwise
        } | ({"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE"} if on_cpu else {})

    def run(self, chosen: list[Part]) -> set[str]:
        """Run parts; returns the states in which they ended."""
        states: set[str] = set()
        try:
            for group in groups(chosen):
                if len(group) == 1:
                    states.add(self.turn(group[0]))
                    continue
                with ThreadPoolExecutor(len(group)) as pool:  # as many threads as parts: they wait for one another
                    futures: dict[str, Future[str]] = {}
                    try:
                        for part in group:
                            before = [futures[name] for name in part.after if name in futures]
                            futures[part.name] = pool.submit(self.turn, part, before)
                        states |= {future.result() for future in futures.values()}
                    except BaseException:
                        self.stopped.set()
                        raise
        finally:
            self.stopped.set()
        return states

    def turn(self, part: Part, before: list[Future[str]] | None = None) -> str:
        """Run a part when those before it have ended, unless it has passed already; returns its state."""
        wait(before or [])
        if self.stopped.is_set():
            return "not run"
        if self.done(part):
            print(f"-- {part.name}: passed before", flush=True)
            return "passed"
        state, reason = self.obstacle(part)
        if state:
            result: Result = {"state": state, "seconds": 0.0, "tail": reason, "machine": self.about}
            if state == "left out" or part.name not in self.results.here:  # an earlier result says more than "not run"
                self.results.record(part.name, result)
        else:
            begun = {"state": "begun", "seconds": 0.0, "tail": "not ended: the call was killed", "machine": self.about}
            self.results.record(part.name, begun)
            result = self.attempt(part)
            self.results.record(part.name, result)
        lines = [f"-- {part.name}: {summary(result)} (at {time.monotonic() - START:.0f} s)"]
        tail = SHOWN_FAILED if result["state"] in {"failed", "time ran out"} else part.shown
        lines += [line[:SHOWN_WIDTH] for line in result["tail"].splitlines()[-tail:] if tail]
        print("\n".join(lines), flush=True)
        return str(result["state"])

    def done(self, part: Part) -> bool:
        """Whether it has passed, and what it makes for others is there."""
        return self.results.passed(part.name) and all(self.made(path).exists() for path in part.makes)

    def made(self, path: str) -> Path:
        return self.results.work / path.format(cache=self.cache)

    def obstacle(self, part: Part) -> tuple[str, str]:
        """State and reason of a part that cannot be begun; two empty strings if it can."""
        for file in part.files:
            if not file.exists():
                return "left out", f"there is no {file.relative_to(ROOT)}"
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        for name in part.modules:
            if subprocess.call([sys.executable, "-c", probe, name], env=self.environment) != 0:
                return "left out", f"{name} cannot be imported here"
        left = self.end - time.monotonic()
        if left < part.least:
            return "not run", f"{left:.0f} s left, {part.least:.0f} needed; call again"
        for path in part.uses:
            if not self.made(path).exists():
                return "not run", f"{path} was not made; see the part that makes it"
        return "", ""

    def attempt(self, part: Part) -> Result:
        """Run a part's commands: output goes to NAME.txt, figures to NAME.json, other files to NAME.run/."""
        stem = self.results.parts / part.name
        out, output, run = (stem.with_name(f"{part.name}.{kind}") for kind in ("json", "txt", "run"))
        for file in (out, output):
            file.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for path in map(self.made, part.makes):
            if self.results.work in path.parents:  # the cache may be the caller's
                shutil.rmtree(path, ignore_errors=True)
        places = {"out": out, "run": run, "parts": stem.parent, "site": self.site, "caches": self.cache.parent}
        values = places | {"data": self.data, "photos": FEW_PHOTOS if self.on_cpu else PHOTOS}
        limit = part.limit * (SLOWER if self.on_cpu else 1)
        start = time.monotonic()
        until = min(start + limit, self.end)
        status: int | None = 0
        for command in commands(part, on_cpu=self.on_cpu):
            words = [sys.executable if word == "python" else word.format(**values) for word in command]
            status = self.finish(words, until, output, self.environment | part.environment)
            if status != 0:
                break
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        state = "passed" if status == 0 else "failed"
        if status is None:
            lines.append(f"ended after {time.monotonic() - start:.0f} s")
            state = "failed" if start + limit <= self.end and not self.stopped.is_set() else "time ran out"
        result = {
            "state": state,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "expected": part.expected,
            "commands": part.commands,
            "commit": commit(),
            "machine": self.about,
            "tail": "\n".join(lines[-max(KEPT_LINES, part.shown) if state == "passed" else -FAILED_LINES :]),
        }
        with contextlib.suppress(FileNotFoundError, ValueError):  # one that was ended may have written some
            result["figures"] = json.loads(out.read_text(encoding="utf-8"))
        return result

    def finish(self, words: list[str], until: float, output: Path, environment: dict[str, str]) -> int | None:
        """Exit status of a command, or None if it was ended here; its children end too, in any session."""
        with output.open("ab") as sink:
            process = psutil.Popen(words, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
            try:
                while time.monotonic() < until and not self.stopped.is_set():
                    with contextlib.suppress(psutil.TimeoutExpired):
                        return int(process.wait(timeout=min(0.5, max(0.0, until - time.monotonic()))))
                return None
            finally:
                family = [process]
                with contextlib.suppress(psutil.NoSuchProcess):
                    family += process.children(recursive=True)
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                psutil.wait_procs(family, timeout=GRACE)


def groups(chosen: list[Part]) -> Iterator[list[Part]]:
    """Parts in order; neighbours that may run side by side in one list."""
    group: list[Part] = []
    for part in chosen:
        if group and not (part.together and group[-1].together):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def commands(part: Part, *, on_cpu: bool) -> list[Command]:
    """A part's commands, with its options for a rehearsal."""
    *first, last = part.commands
    return [*first, (*last, *part.on_cpu) if on_cpu else last]


def digest_of_sources() -> str:
    """Of every file that could change a result, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".toml"} or (path.suffix == ".json" and "results" not in path.parts):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Commit, and whether files differ from it; empty outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """GPUs, cores and versions."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def device_of(about: dict[str, Any]) -> str:
    """What a machine's results count for."""
    return ", ".join(about["gpus"]) or "cpu"


if __name__ == "__main__":
    sys.exit(main())
