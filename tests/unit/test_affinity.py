"""The cores on which a rank runs, out of those that its process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.machine.affinity import choose, cores_near, parse_list
from tests.support.launching import python_path

ALL = frozenset(range(16))
NODES = {0: frozenset(range(8)), 1: frozenset(range(8, 16)), None: frozenset[int](), "all": ALL}


@pytest.mark.parametrize(
    ("what", "allowed", "near", "rank", "expected"),
    [
        ("half of the ranks near each NUMA node", ALL, [0, 0, 1, 1], 2, (range(8, 16), 4)),
        ("all near one NUMA node: its cores are shared", ALL, [1, 1, 1, 1], 0, (range(8, 16), 2)),
        ("no GPUs: all cores are shared", ALL, [None] * 4, 3, (ALL, 4)),
        ("a single rank: remote cores too", ALL, [1], 0, (ALL, 16)),
        ("the mask has half of each node", frozenset({0, 1, 2, 3, 8, 9, 10, 11}), [0, 0, 1, 1], 3, (range(8, 12), 2)),
        ("the mask has no core near some GPUs", frozenset(range(8)), [0, 0, 1, 1], 0, (range(8), 2)),
        ("the mask has fewer cores near some GPUs than ranks", frozenset(range(9)), [0, 0, 1, 1], 0, (range(9), 2)),
        ("more ranks than cores", frozenset({5}), [None] * 4, 1, ({5}, 1)),
        ("the NUMA node of one GPU is unknown", ALL, [0, None], 0, (ALL, 8)),
        ("a machine without NUMA nodes", ALL, ["all"] * 4, 0, (ALL, 4)),
    ],
)
def test_a_rank_uses_the_cores_near_its_gpu(
    what: str, allowed: frozenset[int], near: list[int | str | None], rank: int, expected: tuple[set[int], int]
) -> None:
    assert choose(allowed, [NODES[node] for node in near], rank) == (frozenset(expected[0]), expected[1]), what


def test_cpu_lists_of_linux_are_parsed() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("\n") == set()


def test_cores_near_a_gpu_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAF, pci_device_id=1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("launch.machine.affinity.PCI_DEVICES", tmp_path)
    assert cores_near(0) == frozenset(), "virtual machines may lack the file"
    (tmp_path / "0000:af:01.0").mkdir()
    (tmp_path / "0000:af:01.0" / "local_cpulist").write_text("8-9,24-25\n")
    assert cores_near(0) == {8, 9, 24, 25}


MASKED = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import connect
world = connect()
recipe = parse(["--data", sys.argv[1], "--size", "32", "--global-batch", "16", "--loader", "dali"])
with Feed.of(recipe, world).train_loader(step=0, dtype=torch.float32) as loader:
    next(loader)
    names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
decoders = sum(name.startswith("[DALI][TP") for name in names)
print(world.cores, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], decoders)
"""


def test_torch_openmp_and_the_decoder_follow_the_mask_and_not_the_machine(digits: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "7", "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", MASKED, str(digits)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1", "1"]
