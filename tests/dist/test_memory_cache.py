"""The memory cache of real processes: one copy per machine, the same batches, and no memory left after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import ROOT, environment, free_port
from tests.support.waiting import wait_until

RANKS = 3
PROGRAM = "tests.dist.cached_ranks"


def start(out: Path, digits: Path, *, ranks: int, mode: str) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of one training. Each is a new interpreter."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables = environment(out, **{name: str(value) for name, value in own.items()})
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", PROGRAM, str(digits), str(out / f"{mode}-{rank}.json"), mode]
        processes.append(subprocess.Popen(command, env=variables, cwd=ROOT, stderr=subprocess.PIPE))
    return processes


def records(out: Path, digits: Path, *, ranks: int, mode: str) -> list[dict[str, Any]]:
    processes = start(out, digits, ranks=ranks, mode=mode)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    return [json.loads((out / f"{mode}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[dict[str, Any]]:
    return records(tmp_path_factory.mktemp("cached"), digits, ranks=RANKS, mode="run")


def test_processes_share_one_copy(found: list[dict[str, Any]]) -> None:
    assert len({rank["inode"] for rank in found}) == 1
    assert len({rank["feed_inode"] for rank in found}) == 1, "also the feed processes"
    assert found[0]["inode"] == found[0]["feed_inode"]
    # The memory in use is that of one copy: the samples that were drawn, and pages of flags and of partial images.
    assert found[0]["stored_bytes"] <= found[0]["used"] < 1.3 * found[0]["stored_bytes"]


def test_a_sample_that_one_process_has_decoded_is_a_hit_in_the_others(found: list[dict[str, Any]]) -> None:
    """In the second epoch most samples are drawn by another rank than in the first.

    The first batches of an epoch are read while the last ones of the previous epoch are decoded.
    """
    for rank in found:
        assert rank["hits"][1] > 0.7 * rank["samples"][1]
        assert rank["hits"][0] < 0.5 * rank["samples"][0]


def test_batches_equal_those_of_one_process_without_a_cache(
    found: list[dict[str, Any]], tmp_path: Path, digits: Path
) -> None:
    (plain,) = records(tmp_path, digits, ranks=1, mode="plain")
    for step, expected in enumerate(plain["images"]):
        assert [image for rank in found for image in rank["images"][step]] == expected


def test_no_shared_memory_is_left_when_all_processes_are_killed(tmp_path: Path, digits: Path) -> None:
    processes = start(tmp_path, digits, ranks=2, mode="wait")
    files = [tmp_path / f"wait-{rank}.json" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text().endswith("}") for file in files))
    inode = json.loads(files[0].read_text())["inode"]
    feeds = [json.loads(file.read_text())["feed"] for file in files]
    assert inode in inodes_in_use()
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{feed}/exe").exists() for feed in feeds))
    assert inode not in inodes_in_use()


def test_an_error_of_one_process_ends_all(tmp_path: Path, digits: Path) -> None:
    """Only rank 0 allocates the cache and finds that it does not fit."""
    for process in start(tmp_path, digits, ranks=2, mode="too large"):
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        assert b"UserError: --memory-cache: needs" in errors


def inodes_in_use() -> set[int]:
    """Return the inodes of all memory caches that processes of this machine have mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # the process has ended
            continue
        found |= {int(line.split()[4]) for line in lines if "memfd:decoded-images" in line}
    return found
