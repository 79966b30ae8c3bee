"""Run everything that needs a GPU within a time budget. A second call continues where the first one ended.

    python3 benchmarks/gpu.py [PROFILE ...] [--seconds 600] [--out DIR] [--only REGEX] [--work DIR] [--cpu]

Profiles (`benchmarks/gpu_run/parts.py` lists their parts):

  contact  everything once, about 230 s: correctness tests side by side, then the first timings
  measure  timed parts one at a time, in order of value, about 360 s
  sweep    other launch shapes of the depthwise kernels, 70 s
  peers    other people's models under torch.compile, 70 s each

A first run on a machine that is available for 15 minutes, by commands of at most 10 minutes, takes two commands:

    python3 benchmarks/gpu.py contact --seconds 280 --out DIR     # let the command run for 300 s
    python3 benchmarks/gpu.py measure --seconds 350 --out DIR     # at once, on the same machine; 370 s

If parts of `contact` fail, release the machine first and repair them. On the next machine `measure` also unpacks the
kit and makes its data, some 30 s: give it the time that is left, less 50 s.

Neither an installed project nor a virtual environment is needed: this Python with its packages is used. If a folder
.kit exists, what it holds is unpacked first (docs/performance.md tells how to prepare it).

A part is ended after twice its expected time (at least 30 s), and does not begin when fewer seconds are left than it
needs. Results are kept in the work folder and copied to DIR after every part and every 15 s: gpu.json (all results, by
device), gpu.md (a table), results.tar.gz (also the whole output of every part). When the script is killed, its parts
end too, and only the results of those that were running are lost. Parts that have passed on the same kind of GPU with
the same sources do not run again; on another machine this needs DIR/gpu.json.

Exit status: 0 all parts passed, 1 some failed, 2 no GPU or bad options, 3 time ran out before every part had its turn.
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

# The interpreter's imports are a part of the call.
START = time.monotonic() - (time.time() - psutil.Process().create_time())
SOURCES = ("benchmarks", "fat", "launch", "pipeline", "shards", "tests")
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
    results = Results(options.work, options.out, device_of(machine()), digest_of_sources())
    runner = Runner(results, machine, start=START, seconds=options.seconds, on_cpu=options.cpu)
    sys.path.append(str(runner.site))  # for the versions of packages that the kit brings
    chosen = selection(parts(), options.profiles, options.only, runner)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.stop)
    with results.copied():
        states = runner.run(chosen)
    print(f"done after {time.monotonic() - START:.0f} s; results in {options.out}", flush=True)
    if runner.stopped_by:
        return 128 + runner.stopped_by
    return 1 if "failed" in states else TIME_IS_UP if states & {"time ran out", "not run"} else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="default: contact and measure")
    parser.add_argument("--seconds", type=float, default=600.0, help="of this call; the next call continues")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where to copy the results")
    parser.add_argument("--only", type=regex, default="", metavar="REGEX", help="parts whose names this finds")
    work = Path(tempfile.gettempdir()) / "fat-gpu"
    parser.add_argument("--work", type=Path, default=work, help=f"for results, data and caches, default {work}")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU: begin every part, on small inputs")
    options = parser.parse_args()
    options.profiles = options.profiles or list(PROFILES[:2])
    if unknown := set(options.profiles) - set(PROFILES):
        parser.error(f"unknown profile {', '.join(sorted(unknown))}: expected {', '.join(PROFILES)}")
    names = [part.name for part in parts() if part.profile in options.profiles]
    if not any(options.only.search(name) for name in names):
        parser.error(f"--only {options.only.pattern}: none of {', '.join(names)}")
    options.work, options.out = options.work.absolute(), options.out.absolute()
    return options


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def selection(table: list[Part], profiles: list[str], only: re.Pattern[str], runner: Runner) -> list[Part]:
    """Parts of these profiles, in order, before them what they need of others: the kit, and data that is not there."""
    chosen = [part for part in table if part.profile in profiles and only.search(part.name)]
    paths = {path for part in chosen for path in part.uses} | {"site", "{cache}"}
    makers = [p for p in table if paths.intersection(p.makes) and p.available and not runner.done(p)]
    return [part for part in table if part in chosen or part in makers]


def digest_of_sources() -> str:
    """Of every file that could change a result, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".toml"} or (path.suffix == ".json" and "results" not in path.parts):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """GPUs, cores and versions; of the kit's packages too, once they are unpacked."""
    import torch

    from launch.machine.provenance import installed_version, versions

    found = {name: version for name in ("triton", "timm") if (version := installed_version(name))}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cores": cores(), **versions(), **found}


def device_of(about: dict[str, Any]) -> str:
    """What a machine's results count for."""
    return ", ".join(about["gpus"]) or "cpu"


if __name__ == "__main__":
    sys.exit(main())
