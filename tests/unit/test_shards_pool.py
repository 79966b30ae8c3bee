"""If a worker process dies or memory runs out, the error names the file that was processed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shards.workers.worker
from shards.errors import ConversionFailed
from shards.progress import Progress
from shards.workers.pool import run_jobs
from shards.workers.worker import Report
from tests.support.decompression_bombs import png
from tests.support.measured import ROOT

Job = tuple[str, Path]


def run(how: str, tmp_path: Path, workers: int) -> list[str]:
    jobs = [("works", tmp_path / "good.png"), (how, tmp_path / "bad.png"), ("works", tmp_path / "other.png")]
    with Progress("testing", 1) as progress:
        return run_jobs(task, jobs, workers, progress)


def task(job: Job, report: Report) -> str:
    how, path = job
    report.start(os.fsencode(path))
    if how == "out of memory":
        raise MemoryError
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    if how == "endless":
        shards.workers.worker.MAX_IMAGE_SECONDS = 1  # only in this process
        report.start(os.fsencode(path))
        while True:
            pass
    report(1, 1)
    return path.name


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_for_memory_names_the_file(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ConversionFailed, match=r"/bad\.png: out of memory; .*--workers") as error:
        run("out of memory", tmp_path, workers)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"was killed by SIGKILL at .*/bad\.png \(out of memory\?\); .*--workers"),
        ("exits", r"exited with status 3 at .*/bad\.png"),
        ("endless", r"an image took more than \d+ s of CPU time at .*/bad\.png; remove that file from the source"),
    ],
)
def test_the_error_for_a_dead_worker_names_the_file(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(ConversionFailed, match=message):
        run(how, tmp_path, 2)


def test_results_are_in_the_order_of_the_jobs(tmp_path: Path) -> None:
    assert run("works", tmp_path, 2) == ["good.png", "bad.png", "other.png"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_conversion_without_enough_memory_names_the_file(tmp_path: Path, workers: int) -> None:
    """The address space is limited, as some batch systems do; the image itself is valid."""
    for number in range(4):
        path = tmp_path / "source" / "train" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(6000, 6000) if number == 2 else png(64, 64) + bytes(2**20))  # several shards
    code = """
import resource, sys
import shards.convert.convert, shards.convert.writer, launch.cli
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)
sys.exit(launch.cli.main(sys.argv[1:]))
"""
    command = ["shard", str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--shard-size", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        # One arena: otherwise each thread reserves 64 MiB of address space for its own.
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"source/train/0/2\.png: out of memory; run .* with fewer --workers or more", last), done.stderr
    assert not (tmp_path / "set" / "dataset.json").exists()
