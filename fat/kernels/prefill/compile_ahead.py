"""Compile the Triton kernels of given functions into Triton's cache ahead of time, in parallel processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.build import platform_key
from triton.runtime.cache import get_cache_key, get_cache_manager

from fat.kernels.prefill.compiler import Extension, Job, one_line
from fat.kernels.prefill.launches import Launch, cuda_target, record

log = logging.getLogger(__name__)

LOCK = "compile-ahead.lock"
POLL = 0.1  # seconds between two attempts to get a lock that another process holds
NAMED = 3  # maximum number of failures that are named in a report


@dataclass(frozen=True)
class Report:
    """Result of `compile_ahead`."""

    total: int = 0
    """Distinct kernels that the work launches."""
    compiled: int = 0
    cached: int = 0
    """Kernels that were already in the cache. Kernels that are neither compiled nor cached have failed."""
    seconds: float = 0.0
    problem: str | None = None
    """One-line description of all failures. Kernels that failed will be compiled at their first launch."""

    def __str__(self) -> str:
        failed = self.total - self.compiled - self.cached
        return (
            f"{self.total} kernels: {self.compiled} compiled, {self.cached} in the cache"
            + (f", {failed} failed" if failed else "")
            + f", {self.seconds:.1f} s"
        )


def compile_ahead(
    work: Iterable[Callable[[], object]],
    *,
    capability: tuple[int, int] | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    wait: float = 600.0,
) -> Report:
    """Compile every kernel that `work` would launch and that is not in Triton's cache. Never raises an `Exception`.

    Call it on one rank per node, before any kernel is launched, while the other local ranks wait. Independent callers
    are serialized by a lock in the cache folder, and the second one finds what the first one has compiled.

    Args:
        work: functions that launch kernels: those of `fat.kernels.prefill.work`, or others that `record` accepts.
        capability: compute capability to compile for, such as (9, 0). None: that of the current device; without a
            device nothing is compiled.
        processes: number of parallel compiler processes. None: one per core that this process may use.
        progress: called with the number of finished kernels and the number to compile; the first call has 0 finished.
        wait: seconds to wait for another process that is compiling. After that, nothing is compiled ahead of time.
    """
    start = time.monotonic()
    if knobs.runtime.interpret or (capability is None and not torch.cuda.is_available()):
        return Report()
    problems: list[str] = []
    report = Report()
    try:
        if capability is None:
            pin_cache_location()
        target = cuda_target(capability or torch.cuda.get_device_capability())
        launches = _recorded(work, target, problems)
        report = Report(total=len(launches))
        jobs = _to_compile(launches, target)
        if jobs:
            with _locked(cache_folder(), wait) as waited:
                if waited:
                    jobs = _to_compile(launches, target)
                results = _compile(jobs, target, processes or len(os.sched_getaffinity(0)), progress)
            failures = [f"{job.launch.name} ({r.error})" for job, r in zip(jobs, results, strict=True) if r.error]
            problems += failures
            report = replace(report, compiled=sum(result.compiled for result in results))
            report = replace(report, cached=len(launches) - report.compiled - len(failures))
        else:
            report = replace(report, cached=len(launches))
    except TimeoutError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(
            f"Triton's cache folder {cache_folder()} cannot be used ({one_line(error)}); set TRITON_CACHE_DIR"
        )
    except Exception as error:
        problems.append(one_line(error))
    return replace(report, seconds=time.monotonic() - start, problem=_summary(problems))


def pin_cache_location() -> None:
    """Set environment variables so that later launches of this process find the kernels from `compile_ahead`.

    If they are not set, torch.compile sets TRITON_CACHE_DIR to another folder, and TRITON_PTXAS_PATH to PyTorch's
    assembler, whose version is part of the cache keys. Call this on every rank before torch.compile is used;
    `compile_ahead` calls it in its own process.
    """
    if not knobs.runtime.interpret and torch.cuda.is_available():
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder()))
        os.environ.setdefault("TRITON_PTXAS_PATH", knobs.nvidia.ptxas.path)


def cache_folder() -> Path:
    """Return Triton's cache folder: TRITON_CACHE_DIR, or ~/.triton/cache."""
    return Path(knobs.cache.dir)


def _summary(problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return f"kernels that were not compiled ahead of time: {', '.join(problems[:NAMED])}{more}"


def _recorded(work: Iterable[Callable[[], object]], target: GPUTarget, problems: list[str]) -> list[Launch]:
    """Return the distinct launches of all functions that can be recorded; append an error to `problems` for others."""
    found: dict[str, Launch] = {}
    for run in work:
        try:
            found |= {repr(launch): launch for launch in record(run, target)}
        except Exception as error:
            problems.append(f"all kernels of {getattr(run, '__qualname__', run)} ({one_line(error)})")
    return list(found.values())


def _to_compile(launches: Sequence[Launch], target: GPUTarget) -> list[Job]:
    """Return a job for each kernel whose machine code or launcher is not in the cache.

    The last launches come first, because the kernels of the backward pass take longest to compile.
    """
    jobs: list[Job] = []
    covered: set[Extension] = set()
    for launch in reversed(launches):
        missing: tuple[Extension, ...] = ()
        try:
            needed = dict.fromkeys(_extensions(launch))
            missing = tuple(e for e in needed if e not in covered and not _has_extension(e))
            covered |= needed.keys()
            cached = not missing and _has_kernel(launch, target)
        except OSError:
            raise
        except Exception:  # the kernel's job will report the error or find the kernel in the cache
            log.debug("%s: cannot be looked up in Triton's cache", launch, exc_info=True)
            cached = False
        if not cached:
            jobs.append(Job(launch, missing))
    return jobs


def _has_kernel(launch: Launch, target: GPUTarget) -> bool:
    """Return whether the cache contains the machine code, by the same look-up as at the start of `triton.compile`."""
    source, backend = launch.source, make_backend(target)
    options = backend.parse_options({**launch.options, **source.parse_options()})
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    digest = hashlib.sha256(key.encode()).hexdigest()
    manager, metadata = get_cache_manager(digest), f"{source.name[:150]}.json"
    try:
        group = manager.get_group(metadata) or {}
        if metadata not in group:
            return False
        if not CompiledKernel(source, group, digest).kernel:
            raise ValueError("no machine code")
        return True
    except (KeyError, TypeError, ValueError):  # Triton would fail at every launch with an incomplete cache entry
        if folder := getattr(manager, "cache_dir", None):
            shutil.rmtree(folder, ignore_errors=True)
        return False


def _extensions(launch: Launch) -> Iterator[Extension]:
    """Yield the extensions that launch the kernel: Triton's driver binding and, up to Triton 3.6, one per signature."""
    folder = Path(nvidia.dirname)
    yield Extension("cuda_utils", (folder / "driver.c").read_text())
    if hasattr(nvidia, "make_launcher") and not any("tensordesc" in str(t) for t in launch.signature.values()):
        yield Extension("__triton_launcher", nvidia.make_launcher(launch.constants, launch.signature, None))


def _has_extension(extension: Extension) -> bool:
    """Return whether the cache contains an extension, by the look-up of Triton's `compile_module_from_src`."""
    key = hashlib.sha256((extension.source + platform_key()).encode()).hexdigest()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = get_cache_manager(key).get_file(f"{extension.name}{suffix}")
    return path is not None and os.path.getsize(path) > 0


@contextmanager
def _locked(folder: Path, seconds: float) -> Iterator[bool]:
    """Hold the folder's lock, which is released if the process dies. Yields whether another process held it before.

    Raises TimeoutError if the lock is not acquired within `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline, waited = time.monotonic() + seconds, False
    # Do not follow symbolic links, and do not truncate: other users may write to a shared folder.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {folder / LOCK} for {seconds:.0f} s") from None
                time.sleep(POLL)
            except OSError:  # a file system without locks: at worst, two processes compile the same kernels
                break
        yield waited


@dataclass(frozen=True)
class _Result:
    """Result of a job."""

    compiled: bool
    """Whether the job compiled anything. False if it failed or found everything in the cache."""
    error: str | None


def _compile(
    jobs: Sequence[Job], target: GPUTarget, processes: int, progress: Callable[[int, int], object] | None
) -> list[_Result]:
    """Run the jobs, and return their results in the same order."""
    if not jobs:
        return []
    results = [_Result(False, "the compiler process ended early")] * len(jobs)
    done = 0
    report: Callable[[int, int], Any] = progress or (lambda done, total: None)
    report(done, len(jobs))
    payload = pickle.dumps((divmod(target.arch, 10), min(processes, len(jobs)), list(jobs)))
    # Start a new interpreter: this one may have a CUDA context, which cannot be used after a fork.
    command = [sys.executable, "-P", "-m", "fat.kernels.prefill.compiler"]
    environment = {
        **os.environ,
        # Prevent libraries from starting threads: the process forks, which is not safe with running threads.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, env=environment
        ) as compiler,
    ):
        assert compiler.stdin is not None
        assert compiler.stdout is not None
        try:
            with suppress(BrokenPipeError), compiler.stdin as stream:
                stream.write(payload)
            for line in compiler.stdout:
                result = json.loads(line)
                results[result["index"]] = _Result(result["compiled"], result["error"])
                done += 1
                report(done, len(jobs))
        except BaseException:
            compiler.kill()
            raise
        if compiler.wait() != 0 and not done:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "the compiler process did not start")
    return results
