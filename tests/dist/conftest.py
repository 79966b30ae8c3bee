"""Fixtures of the tests with several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.forked import Launcher
from tests.dist.trainings import Trainer
from tests.support.runs import STARTED, kill_everything

PROGRAMS = (
    *(f"tests.dist.{name}" for name in ("damage_run", "doctor_run", "engine_run", "host_waits_run")),
    *(f"tests.dist.{name}" for name in ("kernel_check_run", "norm_run")),
    *("tests.dist.inject_fault", "tests.dist.record_batches", "tests.dist.record_example", "tests.dist.slow_rank_run"),
    "launch.train",
)
# Libraries that these programs import when they need them.
LIBRARIES = (
    *("accelerate", "deepspeed", "torch._dynamo", "torch._functorch.aot_autograd", "pipeline.decode.dali"),
    *("aiohttp", "fsspec.implementations.http", "matplotlib.pyplot"),
)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Launcher of PROGRAMS on several ranks."""
    folder = tmp_path_factory.mktemp("launches")
    with Launcher(folder, *LIBRARIES, *PROGRAMS) as launcher:
        yield launcher


@pytest.fixture
def train(launch: Launcher) -> Iterator[Trainer]:
    """Trainer that starts one training at a time."""
    trainer = Trainer(launch)
    yield trainer
    trainer.kill()


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    """Kill the runs that a test has started, even if it fails."""
    yield
    while STARTED:
        kill_everything(STARTED.pop())
