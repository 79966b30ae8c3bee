"""The CPU quota of a container limits all default numbers of threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launch.machine.affinity import COMPILERS, choose
from shards import cores
from tests.support.cpu_quota import cpu_quota, cpu_set, joined
from tests.support.launching import python_path

V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that replaces /sys/fs/cgroup; the file `own` next to it replaces /proc/self/cgroup."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    cores.quota.cache_clear()
    yield tmp_path / "cgroup"
    cores.quota.cache_clear()


@pytest.mark.parametrize(
    ("what", "own", "files", "expected"),
    [
        ("no groups", None, {}, None),
        ("no quota", "0::/a", {"a/cpu.max": "max 100000", "cpu.max": "max 100000"}, None),
        ("a container's root", "0::/", {"cpu.max": "200000 100000"}, 2),
        ("a fraction is rounded up", "0::/", {"cpu.max": "150000 100000"}, 2),
        ("less than a core", "0::/", {"cpu.max": "20000 100000"}, 1),
        ("another period", "0::/", {"cpu.max": "30000 10000"}, 3),
        ("the process's own group", "0::/user/job", {"user/job/cpu.max": "100000 100000"}, 1),
        ("a parent group", "0::/pod/box/app", {"pod/cpu.max": "300000 100000", "pod/box/app/cpu.max": "max 1"}, 3),
        ("the smallest of them", "0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "800000 100000"}, 2),
        ("a sibling group", "0::/a/b", {"a/c/cpu.max": "100000 100000"}, None),
        ("the host's path in a container", "0::/docker/1f", {"cpu.max": "100000 100000"}, 1),
        ("v1", "4:cpu:/", {f"cpu/{V1[0]}": "400000", f"cpu/{V1[1]}": "100000"}, 4),
        ("v1 without quota", "4:cpu:/", {f"cpu/{V1[0]}": "-1", f"cpu/{V1[1]}": "100000"}, None),
        (
            "v1, two controllers in one",
            "3:cpu,cpuacct:/slurm/step_0",
            {f"cpu,cpuacct/slurm/{V1[0]}": "500000", f"cpu,cpuacct/slurm/{V1[1]}": "100000"},
            5,
        ),
        ("v1 and v2", "1:name=systemd:/x\n0::/y", {"unified/y/cpu.max": "100000 100000"}, 1),
        ("an invalid quota", "0::/", {"cpu.max": "many"}, None),
    ],
)
def test_the_smallest_quota_of_the_process_groups_is_used(
    groups: Path, what: str, own: str | None, files: dict[str, str], expected: int | None
) -> None:
    if own is not None:
        cores.OWN_GROUPS.write_text(own + "\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text + "\n")
    assert cores.quota() == expected, what
    visible = len(os.sched_getaffinity(0))
    assert cores.cores() == min(visible, expected or visible)


@pytest.mark.parametrize(
    ("what", "near", "quota", "threads"),
    [
        ("ranks share the quota", [None] * 4, 8, 2),
        ("ranks bound to NUMA nodes, too", [0, 0, 1, 1], 4, 1),
        ("less than a core per rank", [0, 0, 1, 1], 1, 1),
        ("a quota above the number of cores", [0, 0, 1, 1], 64, 4),
    ],
)
def test_ranks_share_the_quota(what: str, near: list[int | None], quota: int, threads: int) -> None:
    nodes = {0: frozenset(range(8)), 1: frozenset(range(8, 16)), None: frozenset[int]()}
    assert choose(frozenset(range(16)), [nodes[node] for node in near], 1, quota)[1] == threads, what


COUNTED = """
import os, sys
from pathlib import Path
import torch
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import connect
from shards.workers.pool import cores
world = connect()
import torch._inductor.config
from torch.utils.cpp_extension import _get_num_workers
recipe = parse(["--data", sys.argv[1], "--size", "32", "--global-batch", "16", "--loader", "dali"])
with Feed.of(recipe, world).train_loader(step=0, dtype=torch.float32) as loader:
    next(loader)
    names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
print(*{
    "rank": world.cores,
    "torch": torch.get_num_threads(),
    "OpenMP": int(os.environ["OMP_NUM_THREADS"]),
    "DALI": sum(name.startswith("[DALI][TP") for name in names),
    "workers of commands": cores(),
    "torch.compile": torch._inductor.config.compile_threads,
    "ninja": _get_num_workers(False),
}.items())
"""
COMMAND = """
import os
from launch.cli import main
main(["info", "nowhere"])
print(os.environ["OMP_NUM_THREADS"])
"""


def output_in(processes: Path, code: str, *args: str | Path) -> str:
    """Run Python code in a control group; return its output."""
    env = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("OMP_NUM_THREADS", *COMPILERS):
        env.pop(name, None)
    command = [*joined(processes), sys.executable, "-c", code, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("group", [cpu_quota(1), cpu_set("0")], ids=["quota", "set of CPUs"])
def test_all_components_of_a_rank_respect_a_control_group(group: AbstractContextManager[Path], digits: Path) -> None:
    names = ("rank", "torch", "OpenMP", "DALI", "workers of commands", "torch.compile", "ninja")
    with group as processes:
        assert output_in(processes, COUNTED, digits).strip() == " ".join(str((name, 1)) for name in names)


def test_commands_limit_openmp_to_the_quota() -> None:
    with cpu_quota(1) as processes:
        assert output_in(processes, COMMAND).split() == ["1"]
