"""The shared cluster, and checks of what the tests require of the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import xxhash

from launch import submit
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from tests.slurm.cluster import DAEMONS, Cluster, wait_until
from tests.support.launching import ROOT

# --no-check-nodes saves some seconds per start; test_doctor.py sets --check-nodes.
OPTIONS = (
    *("--recipe", "launch/recipes/digits.toml", "--size", "32", "--global-batch", "16", "--log-every", "1"),
    "--no-check-nodes",
)
RECORDED = ROOT / "tests" / "slurm" / "recorded_train.py"


def need(*programs: str) -> None:
    """Skip the test if a program is missing or the user is not root. With CI=true, fail instead."""
    missing = [name for name in programs if shutil.which(name) is None] + (["root"] if os.getuid() else [])
    if not missing and "ip" in programs:
        probe = ["unshare", "--net", "ip", "link", "add", "probe", "type", "veth"]
        missing = [] if subprocess.run(probe, check=False).returncode == 0 else ["rights to create network namespaces"]
    if missing:
        reason = f"needs {', '.join(missing)} (as root, `make test-slurm` installs what is missing)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Cluster of two nodes."""
    need(*DAEMONS)
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


@pytest.fixture
def no_orphans(cluster: Cluster) -> Iterator[None]:
    """Check after the test that no process of a job is left, and that all nodes are idle."""
    yield
    wait_until(lambda: not cluster.run("squeue", "-h").stdout, "empty queue", seconds=240)  # jobs of other tests
    cluster.wait_for_silence()
    wait_until(lambda: cluster.idle() == set(cluster.nodes), "idle nodes", seconds=45)


@dataclasses.dataclass
class Job:
    """A submitted training run."""

    cluster: Cluster
    number: int
    run: Path

    @property
    def log(self) -> str:
        return (self.run / "slurm" / f"job-{self.number}.out").read_text(encoding="utf-8", errors="replace")

    def fed(self) -> list[dict[str, Any]]:
        """Return the recorded batches of all ranks in all starts."""
        return [
            json.loads(line)
            for path in self.run.glob("fed-*.jsonl")
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def wait_for_step(self, step: int, *, start: int = 0, seconds: float = 150) -> None:
        """Wait until a start of the job has reached a step."""

        def reached() -> bool:
            return any(entry["step"] >= step and entry["start"] == start for entry in self.fed())

        try:
            wait_until(reached, f"step {step} of start {start}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log if list(self.run.glob('slurm/*.out')) else '(no log)'}") from None

    def end(self, seconds: float = 240) -> dict[str, str]:
        """Wait for the job to end, and return its properties."""
        try:
            return self.cluster.wait_for_end(self.number, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.job(self.number)}\n{self.log}") from None

    def batches(self) -> dict[int, tuple[list[int], list[str]]]:
        """Return (ids, image hashes) of the global batch by step, from the last start that ran the step."""
        last: dict[int, list[dict[str, Any]]] = {}
        for entry in sorted(self.fed(), key=lambda entry: (entry["start"], entry["rank"])):
            ranks = last.setdefault(entry["step"], [])
            if ranks and ranks[0]["start"] != entry["start"]:
                ranks.clear()
            ranks.append(entry)
        for step, ranks in last.items():
            assert [entry["rank"] for entry in ranks] == list(range(ranks[0]["world"])), f"step {step}: {ranks}"
        return {
            step: ([i for e in ranks for i in e["ids"]], [x for e in ranks for x in e["pixels"]])
            for step, ranks in sorted(last.items())
        }


def start_job(cluster: Cluster, run: Path, *job: str | Path, options: tuple[str | Path, ...], **env: str) -> Job:
    """Run `python -m launch.submit JOB -- OPTIONS` for a recorded training on CPUs."""
    args = [*("--gpus-per-node", "0", "--processes-per-node", "1", "--cpus-per-node", "1"), *job]
    args += ["--script", RECORDED, "--", *OPTIONS, "--out", run, *options]
    output = io.StringIO()
    with (
        patch.dict(os.environ, cluster.environment() | env, clear=True),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(output),
    ):
        assert submit.main([str(arg) for arg in args]) == 0
    number = re.search(r"submitted job (\d+)", output.getvalue())
    assert number is not None, output.getvalue()
    return Job(cluster, int(number[1]), run)


def uninterrupted(digits: Path, steps: int, *options: str) -> dict[int, tuple[list[int], list[str]]]:
    """Return (ids, image hashes) of the global batch by step, as an uninterrupted run in one process has them."""
    with contextlib.chdir(ROOT):
        recipe = parse([*OPTIONS, *options, "--data", str(digits)])
    feed = Feed.of(recipe, World(0, 1, 0, 1, torch.device("cpu")))
    found = {}
    with feed.train_loader(step=0, dtype=torch.float32) as loader:
        for step in range(steps):
            batches = [next(loader) for _ in range(feed.shape.accumulation)]
            ids = np.concatenate([batch.ids for batch in batches]).tolist()
            images = torch.cat([batch.images for batch in batches])
            found[step] = (ids, [xxhash.xxh3_64_hexdigest(x.contiguous().numpy().data) for x in images])
    return found
