"""What ranks are fed, in real processes: the same global batches at every world size and after every interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import ROOT, environment, free_port

STEPS = 6
OPTIONS = ("--size", "32", "--augment", "fat", "--global-batch", "48", "--epochs", "2", "--warmup-epochs", "0")


def record(tmp_path: Path, data: Path, *, world: int, start: int = 0, micro_batch: int | None = None) -> None:
    """Run `record_batches.py` on `world` ranks."""
    micro = [] if micro_batch is None else ["--micro-batch", str(micro_batch)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port())]
    command = [*launcher, "tests/dist/record_batches.py", str(tmp_path), str(STEPS), str(start), *OPTIONS, *micro]
    subprocess.run(
        [sys.executable, *command, "--data", str(data)], cwd=ROOT, env=environment(tmp_path), check=True, timeout=120
    )


def global_batches(tmp_path: Path, *, world: int, start: int = 0) -> dict[int, tuple[list[int], list[str]]]:
    """Step -> ids and pixel hashes of the whole global batch."""
    batches: dict[int, tuple[list[int], list[str]]] = {}
    for rank in range(world):
        path = tmp_path / f"world{world}-from{start}-rank{rank}.jsonl"
        for line in map(json.loads, path.read_text().splitlines()):
            ids, pixels = batches.setdefault(line["step"], ([], []))
            ids += line["ids"]
            pixels += line["pixels"]
    return batches


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[int], list[str]]]:
    folder = tmp_path_factory.mktemp("reference")
    record(folder, digits, world=1)
    return global_batches(folder, world=1)


@pytest.mark.parametrize(("world", "micro_batch"), [(2, None), (2, 8), (4, None)])
def test_same_global_batches_at_every_world_size(
    tmp_path: Path, digits: Path, reference: dict[int, tuple[list[int], list[str]]], world: int, micro_batch: int | None
) -> None:
    record(tmp_path, digits, world=world, micro_batch=micro_batch)
    assert sorted(reference) == list(range(STEPS))
    assert global_batches(tmp_path, world=world) == reference


def test_same_global_batches_after_a_restart_at_another_world_size(
    tmp_path: Path, digits: Path, reference: dict[int, tuple[list[int], list[str]]]
) -> None:
    record(tmp_path, digits, world=3, start=2)
    resumed = global_batches(tmp_path, world=3, start=2)
    assert resumed == {step: batch for step, batch in reference.items() if step >= 2}
