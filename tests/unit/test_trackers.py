"""Trackers (launch/monitor/trackers.py): a tracker that cannot start ends a new run, but not a resumed one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.config.run import LogConfig, RunConfig
from launch.monitor.trackers import WANDB_ID, Trackers
from launch.run.metrics_file import METRICS_NAME, MetricsLog
from launch.train import main as train

TRAIN = {"epoch": 0, "loss": 2.5, "lr": 1e-3, "images_per_second": 100.0}
# A replacement of wandb, which is not installed for tests, with the functions that are called and their errors.
WANDB = """
class UsageError(Exception):
    pass

class Run:
    def log(self, values, step=None):
        logged.append((step, values))
        if "log" in failing:
            raise ConnectionError("no route to the tracker\\nand more")

    def finish(self):
        if "log" in failing:
            raise ConnectionError("still none")

inits, logged, failing = [], [], set()

def init(**options):
    inits.append(options)
    if "init" in failing:
        raise UsageError("No API key configured. Use `wandb login` to log in.\\nMore.")
    return Run()
"""


def recipe(name: str, out: Path) -> Recipe:
    return Recipe(log=LogConfig(tracker=(name,)), run=RunConfig(out=out))  # type: ignore[arg-type]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the replacement of wandb."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def trained(digits: Path, out: Path, *options: str) -> int:
    small = ("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--stop-after", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--data", str(digits), "--out", str(out), *small, *options])
        return train()


@pytest.mark.parametrize(
    ("name", "hide", "advice"),
    [("wandb", None, "'fat-pipeline[wandb]'"), ("tensorboard", "tensorboard", "'fat-pipeline[track]'")],
)
def test_tracker_that_is_not_installed_is_rejected_before_the_run_folder_is_created(
    *,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    hide: str | None,
    advice: str,
) -> None:
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda library, *a: None if library == hide else find_spec(library, *a))
    assert trained(digits, tmp_path / "run", "--tracker", name) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: --tracker {name}: {name} is not installed; run pip install {advice}")
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_new_run_without_wandb_login_is_rejected_before_the_run_folder_is_created(
    digits: Path, tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.failing.add("init")
    assert trained(digits, tmp_path / "run", "--tracker", "wandb") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --tracker wandb: cannot start (No API key configured. Use `wandb login` to log in.")
    assert "WANDB_MODE=offline" in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_cannot_be_imported_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"--tracker tensorboard: cannot start \(.*; repair the installation"):
        Trackers(recipe("tensorboard", tmp_path))


def test_resumed_run_continues_without_a_tracker_that_fails_to_start(tmp_path: Path, wandb: Any) -> None:
    wandb.failing.add("init")
    trackers = Trackers(recipe("wandb", tmp_path), resumes=True)
    trackers.open(tmp_path)
    (warning,) = trackers.messages()
    assert warning.startswith("warning: --tracker wandb failed (No API key configured.")
    assert warning.endswith("; the run continues without it")
    trackers.log({"a": 1}, step=1)
    trackers.finish()
    assert trackers.messages() == []
    assert wandb.logged == []


def test_failing_tracker_warns_once_and_metrics_are_still_written(tmp_path: Path, wandb: Any) -> None:
    log = MetricsLog(tmp_path, Trackers(recipe("wandb", tmp_path)))
    wandb.failing.add("log")
    for step in (1, 2):
        log.write("train", step=step, **TRAIN)
    assert log.messages() == ["warning: --tracker wandb failed (no route to the tracker); the run continues without it"]
    assert log.close() == []
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert [step for step, _ in wandb.logged] == [1, 2]


def test_resumed_run_uses_the_same_wandb_id(tmp_path: Path, wandb: Any) -> None:
    out = tmp_path / "runs" / "b3"
    out.mkdir(parents=True)

    def start(make: Callable[[], Trackers]) -> dict[str, Any]:
        make().open(out)
        return wandb.inits[-1]

    first = start(lambda: Trackers(recipe("wandb", out)))
    assert (first["project"], first["name"]) == ("fat-pipeline", "b3")
    assert (out / WANDB_ID).read_text().strip() == first["id"]
    assert start(lambda: Trackers(recipe("wandb", out), resumes=True)) == first
    assert start(lambda: Trackers(recipe("wandb", out)))["id"] != first["id"]  # another run in the same folder
