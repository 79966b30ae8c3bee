"""Run each parser on mutated files, in a process with limits on time and memory.

    python -m tests.fuzz.runner --seconds 20 --seed 1 --out FOLDER [--only TARGET]

A parser may succeed, or raise one of its target's errors with a one-line message. Anything else (another exception, a
signal, more than `CPU_SECONDS` for one input, more than `MEMORY` of additional memory) is a failure. The input is then
written to FOLDER/TARGET-HASH; move it to tests/fuzz/corpus/TARGET/ once the parser is fixed. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn

from shards.redact import one_line
from tests.fuzz.mutate import dumps, mutate_bytes, mutate_document

CORPUS = Path(__file__).parent / "corpus"
CPU_SECONDS = 10
STALLED_SECONDS = 120
"""Wall-clock time after which a process without progress is killed."""
MEMORY = 1 << 30
"""Additional address space for an input, in bytes."""
MAX_FAILURES = 5
MAX_MESSAGE = 2100


class TooSlow(BaseException):
    """Raised by the CPU timer. A BaseException, so that `except Exception` does not catch it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser of untrusted data.

    Attributes:
        seeds: returns the contents of valid files; receives a scratch folder.
        parse: passes a file's content to the parser; receives an empty scratch folder.
        errors: exceptions that the parser may raise.
        seal: encodes a mutated JSON document with updated hashes, so that the hash check does not reject it first.
            None: the files are not JSON.
        tolerant: the parser ignores damaged files instead of raising an error.
    """

    name: str
    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[bytes, Path], object]
    errors: tuple[type[BaseException], ...]
    seal: Callable[[Any], bytes] | None = None
    tolerant: bool = False


@dataclass
class Report:
    """Results of one target."""

    target: str
    inputs: int = 0
    rejected: int = 0
    failures: list[str] = field(default_factory=list)


def fuzz(target: Target, seconds: float, seed: int, out: Path) -> Report:
    """Fuzz one target in a child process; a new child replaces one that died."""
    report, number = Report(target.name), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(report.failures) < MAX_FAILURES:
        number += 1
        progress = out / f"{target.name}.progress"
        progress.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _child(target, end, Random(f"{target.name} {seed} {number}"), out)
        status = _wait(child, progress)
        part = json.loads(progress.read_text()) if progress.exists() else {}
        report.inputs += part.get("inputs", 0)
        report.rejected += part.get("rejected", 0)
        report.failures += part.get("failures", [])
        if status:
            current = out / f"{target.name}.current"
            report.failures.append(_keep(target, current.read_bytes(), f"died: {status}", out))
    return report


def replay(target: Target, content: bytes, folder: Path) -> BaseException | None:
    """Parse one input; return the error if the parser raised one that is allowed.

    Raises:
        BaseException: any other exception of the parser, or AssertionError if a message is not a single line.
    """
    rejection = None
    try:
        target.parse(content, folder)
    except target.errors as error:
        rejection = error
    if rejection is not None:
        message = str(rejection)
        assert message.strip(), f"{type(rejection).__name__} without a message"
        assert one_line(message) == message, f"not one printable line: {message!r}"
        assert len(message) <= MAX_MESSAGE, f"a message of {len(message)} characters: {message[:200]}..."
    return rejection


def _child(target: Target, end: float, draw: Random, out: Path) -> NoReturn:
    report = Report(target.name)
    signal.signal(signal.SIGPROF, _too_slow)
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        sys.setrecursionlimit(1000)
        (scratch / "seeds").mkdir()
        seeds = target.seeds(scratch / "seeds")
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        current = out / f"{target.name}.current"
        while time.monotonic() < end and len(report.failures) < MAX_FAILURES:
            content = _draw(target, seeds, draw)
            current.write_bytes(content)
            folder = scratch / "input"
            folder.mkdir()
            report.inputs += 1
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                report.rejected += replay(target, content, folder) is not None
            except BaseException:
                signal.setitimer(signal.ITIMER_PROF, 0)
                report.failures.append(_keep(target, content, traceback.format_exc(limit=-4), out))
            signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder)
            (out / f"{target.name}.progress").write_text(json.dumps(vars(report)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _draw(target: Target, seeds: list[bytes], draw: Random) -> bytes:
    content = draw.choice(seeds)
    if target.seal is not None and draw.random() < 0.8:
        document = mutate_document(json.loads(content), draw)
        try:
            return target.seal(document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # too damaged to recompute a hash
            return dumps(document)
    return mutate_bytes(content, draw.choice(seeds), draw)


def _wait(child: int, progress: Path) -> str:
    """Wait for a child, and kill it if it stalls; return why it died, or an empty string."""
    last, since = -1.0, time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"exit status {code}" if code > 0 else signal.Signals(-code).name
        stamp = progress.stat().st_mtime_ns if progress.exists() else 0
        if stamp != last:
            last, since = stamp, time.monotonic()
        if time.monotonic() - since > STALLED_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no progress in {STALLED_SECONDS} s"
        time.sleep(0.05)


def _keep(target: Target, content: bytes, what: str, out: Path) -> str:
    path = out / f"{target.name}-{sha256(content).hexdigest()[:12]}"
    path.write_bytes(content)
    return f"{path}: {what}"


def _too_slow(number: int, frame: FrameType | None) -> NoReturn:
    raise TooSlow(f"more than {CPU_SECONDS} s of CPU time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="total time for all targets (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for inputs that caused failures")
    parser.add_argument("--only", action="append", help="name of a target (default: all); may be repeated")
    options = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    chosen = [target for target in TARGETS if not options.only or target.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    for target in chosen:
        report = fuzz(target, options.seconds / len(chosen), options.seed, options.out)
        print(json.dumps(vars(report)), flush=True)


if __name__ == "__main__":
    main()
