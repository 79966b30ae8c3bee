"""Compile kernels in parallel processes. `compile_ahead` runs this module in a new interpreter, without a CUDA context.

It reads the pickled compute capability, number of processes and list of `Job` from standard input. As soon as a job has
ended, it writes a line of JSON to standard output: `index` of the job, `compiled` (false: it was in the cache) and
`error` (null: none). Each job runs in a forked process of its own, so that no job waits for a process that was killed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime import build
from triton.runtime.cache import triton_key

from fat.kernels.prefill.launches import Launch, cuda_target

MAX_ERROR = 300  # maximum characters of an error message; short lines of JSON are written to the pipe atomically


@dataclass(frozen=True)
class Extension:
    """A C extension that Triton builds to launch kernels."""

    name: str
    source: str


@dataclass(frozen=True)
class Job:
    """A kernel to compile, and the extensions it needs for launching that no other job builds."""

    launch: Launch
    extensions: tuple[Extension, ...]


def main() -> None:
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # compiler output must not mix with the results
    capability, processes, jobs = pickle.load(sys.stdin.buffer)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(jobs, cuda_target(capability), Path(folder))
        _compile_all(jobs, cuda_target(capability), processes, results)


def _prepare(jobs: list[Job], target: GPUTarget, folder: Path) -> None:
    """Import and compute, once before forking, what every job needs."""
    for module in sorted({job.launch.module for job in jobs}):
        with suppress(Exception):  # if this fails, the jobs report the error
            import_module(module)
    import_module("triton.compiler.code_generator")
    triton_key()
    make_backend(target).hash()
    sources = [extension.source for job in jobs for extension in job.extensions]
    if sources:
        _link_without_driver(folder, sources)
        # Do not load extensions after building them: loading requires the CUDA driver.
        build._load_module_from_path = lambda name, path: types.ModuleType(name)


def _link_without_driver(folder: Path, sources: list[str]) -> None:
    """If there is no libcuda, link extensions to a stub library. They resolve symbols only when they are loaded.

    The stub defines the functions that the extensions call. Otherwise linkers with --as-needed would not record libcuda
    as a dependency, and the extensions could not be loaded on any machine.
    """
    try:
        nvidia.library_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
        library = folder / "libcuda.so.1"
        names = sorted(set(re.findall(r"\bcu[A-Z]\w*", "".join(sources))))
        stub = folder / "libcuda.c"
        stub.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
        flags = ["-shared", "-w", "-o", str(library), f"-Wl,-soname,{library.name}", str(stub)]
        subprocess.run([compiler, *flags], check=True)
        knobs.nvidia.libcuda_path = str(folder)


def _compile_all(jobs: list[Job], target: GPUTarget, processes: int, results: BinaryIO) -> None:
    waiting, running = list(enumerate(jobs)), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < processes:
            index, job = waiting.pop(0)
            process = os.fork()
            if process == 0:
                _compile_and_exit(index, job, target, results)
            running[process] = index
        process, status = os.wait()
        index = running.pop(process)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            _write(results, index, error=f"the compiler process {how}")


def _compile_and_exit(index: int, job: Job, target: GPUTarget, results: BinaryIO) -> None:
    code = 1
    try:
        try:
            _write(results, index, compiled=_compile(job, target))
        except Exception as error:
            _write(results, index, error=one_line(error))
        code = 0
    finally:
        os._exit(code)


def _compile(job: Job, target: GPUTarget) -> bool:
    """Run a job, and return whether there was anything to compile."""
    for extension in job.extensions:  # build extensions first: other jobs need them even if this kernel fails
        build.compile_module_from_src(
            extension.source,
            extension.name,
            library_dirs=nvidia.library_dirs(),
            include_dirs=nvidia.include_dirs,
            libraries=nvidia.libraries,
        )
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    triton.compile(job.launch.source, target=target, options=job.launch.options)
    return not all(hits) or bool(job.extensions)


def _write(results: BinaryIO, index: int, *, compiled: bool = False, error: str | None = None) -> None:
    results.write(json.dumps({"index": index, "compiled": compiled, "error": error}).encode() + b"\n")


def one_line(error: BaseException) -> str:
    """Return an error's type and the last line of its message, which in compiler errors contains the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[-1:]])[:MAX_ERROR]


if __name__ == "__main__":
    main()
