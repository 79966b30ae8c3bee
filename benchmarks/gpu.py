"""Run all GPU tests and benchmarks within a time limit. Another call continues where the previous one ended.

    python3 benchmarks/gpu.py [PROFILE ...] [--seconds 600] [--out DIR] [--only REGEX] [--work DIR] [--cpu]

Profiles (their parts are defined in `benchmarks/gpu_run/parts.py`):

  contact  every test and a first timing of each kind, about 230 s; tests run in parallel
  measure  further timings, one at a time, the most important first, about 360 s
  sweep    launch configurations of the depthwise kernels, 70 s
  short-recipes
           stored pixels, and a training at three image sizes, 110 s
  peers    other models under torch.compile, 70 s each

To use a machine that is available for 15 minutes and limits a command to 10 minutes, run two commands:

    python3 benchmarks/gpu.py contact --seconds 280 --out DIR     # allow 300 s for the command
    python3 benchmarks/gpu.py measure --seconds 350 --out DIR     # directly after it, on the same machine; allow 370 s

If parts of `contact` fail, release the machine and fix the cause before `measure`. On a new machine, `measure` first
unpacks the kit and generates its data, which takes about 30 s: pass the time that is left minus 50 s as --seconds.

The project need not be installed: the script uses the packages of the Python that runs it. If a folder .kit exists, its
packages are unpacked first (docs/performance.md explains how to prepare it).

A part is stopped after twice its expected time (at least 30 s). It is not started if less time is left than it needs.
Results are kept in the work folder and copied to DIR after every part and every 15 s: gpu.json (all results by device),
gpu.md (a table), results.tar.gz (also the complete output of every part). If the script is killed, its parts end too,
and only the results of running parts are lost. Parts that have passed on the same type of GPU with the same source
files are skipped; copy DIR/gpu.json to continue on another machine.

Exit status: 0 all parts passed, 1 some failed, 2 no GPU or invalid options, 3 some parts did not run for lack of time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_run.parts import PROFILES, ROOT, Part, parts
from benchmarks.gpu_run.results import Results
from benchmarks.gpu_run.runner import Runner
from shards.cores import cores

# Start of the process, so that the time for imports counts too.
START = time.monotonic() - (time.time() - psutil.Process().create_time())
SOURCES = ("benchmarks", "fat", "launch", "pipeline", "shards", "tests")
BAD_INPUT, TIME_IS_UP = 2, 3


def main() -> int:
    options = arguments()
    if not options.cpu and not has_gpu():
        print(
            f"error: {sys.executable} finds no CUDA device (torch.cuda.is_available() is False); use --cpu to test "
            "without a GPU",
            file=sys.stderr,
        )
        return BAD_INPUT
    options.work.mkdir(parents=True, exist_ok=True)
    lock = (options.work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(
            f"error: {options.work} is in use by another run; wait for it, or specify another --work DIR",
            file=sys.stderr,
        )
        return BAD_INPUT
    results = Results(options.work, options.out, device_of(machine()), digest_of_sources())
    runner = Runner(results, machine, start=START, seconds=options.seconds, on_cpu=options.cpu)
    sys.path.append(str(runner.site))  # `machine` reads the versions of the kit's packages
    chosen = selection(parts(), options.profiles, options.only, runner)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.stop)
    with results.copied():
        states = runner.run(chosen)
    print(f"finished after {time.monotonic() - START:.0f} s; results are in {options.out}", flush=True)
    if runner.stopped_by:
        return 128 + runner.stopped_by
    return 1 if "failed" in states else TIME_IS_UP if states & {"time ran out", "not run"} else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="default: contact and measure")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit; run again for the remaining parts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for copies of the results")
    parser.add_argument("--only", type=regex, default="", metavar="REGEX", help="run only parts with a matching name")
    work = Path(tempfile.gettempdir()) / "fat-gpu"
    parser.add_argument("--work", type=Path, default=work, help=f"folder for results, data, caches; default {work}")
    parser.add_argument("--cpu", action="store_true", help="test without a GPU: run every part with small inputs")
    options = parser.parse_args()
    options.profiles = options.profiles or list(PROFILES[:2])
    if unknown := set(options.profiles) - set(PROFILES):
        parser.error(f"unknown profile {', '.join(sorted(unknown))}: expected {', '.join(PROFILES)}")
    names = [part.name for part in parts() if part.profile in options.profiles]
    if not any(options.only.search(name) for name in names):
        parser.error(f"--only {options.only.pattern}: no part matches; the parts are {', '.join(names)}")
    options.work, options.out = options.work.absolute(), options.out.absolute()
    return options


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a valid regular expression: {error}") from None


def selection(table: list[Part], profiles: list[str], only: re.Pattern[str], runner: Runner) -> list[Part]:
    """Return the matching parts of these profiles, and the parts that create missing data for them, in order."""
    chosen = [part for part in table if part.profile in profiles and only.search(part.name)]
    paths = {path for part in chosen for path in part.uses} | {"site", "{cache}"}
    makers = [p for p in table if paths.intersection(p.makes) and p.available and not runner.done(p)]
    return [part for part in table if part in chosen or part in makers]


def digest_of_sources() -> str:
    """Hash every source file that could change a result, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".toml"} or (path.suffix == ".json" and "results" not in path.parts):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """Describe GPUs, cores and versions, including the kit's packages once they are unpacked."""
    import torch

    from launch.machine.provenance import installed_version, versions

    found = {name: version for name in ("triton", "timm") if (version := installed_version(name))}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cores": cores(), **versions(), **found}


def device_of(about: dict[str, Any]) -> str:
    """Return the name of the device under which results are stored."""
    return ", ".join(about["gpus"]) or "cpu"


if __name__ == "__main__":
    sys.exit(main())
