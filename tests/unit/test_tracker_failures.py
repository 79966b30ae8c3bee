"""Trackers (launch/monitor/trackers.py) that are missing, cannot start, fail or do not answer."""

from __future__ import annotations

import sys
import threading
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launch.config.errors import RecipeError
from launch.monitor import trackers as trackers_module
from launch.monitor.tracker_backends import BACKENDS, TensorBoard, TrackedRun, id_name
from launch.monitor.tracker_thread import TrackerThread
from launch.monitor.trackers import TrackerFailed, Trackers
from launch.train import main as train
from tests.support.tracker_readers import keep_on_this_machine, library_of, recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(BACKENDS)


def trained(digits: Path, out: Path, *options: str) -> int:
    small = ("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--stop-after", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--data", str(digits), "--out", str(out), *small, *options])
        return train()


@pytest.mark.parametrize("name", NAMES)
def test_tracker_that_is_not_installed_is_rejected_before_the_run_folder_is_created(
    name: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda library, *a: None if library == name else find_spec(library, *a))
    assert trained(digits, tmp_path / "run", "--tracker", name) == 2
    shown = capsys.readouterr().err
    advice = f"error: --tracker {name}: {name} is not installed; run pip install 'fat-pipeline[{name}]'"
    assert shown.splitlines()[-1].startswith(advice)
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_the_extra_of_each_tracker_exists_and_installs_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in NAMES:
        assert extras[name][0].startswith(name), name


def test_new_run_without_wandb_login_is_rejected_before_the_run_folder_is_created(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library_of("wandb", monkeypatch)
    keep_on_this_machine(tmp_path, monkeypatch)
    monkeypatch.delenv("WANDB_MODE")
    assert trained(digits, tmp_path / "run", "--tracker", "wandb") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --tracker wandb: cannot start (")
    assert "WANDB_MODE=offline" in error
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_cannot_be_imported_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"--tracker tensorboard: cannot start \(.*; repair the installation"):
        Trackers(recipe("tensorboard", tmp_path))


def test_resumed_run_continues_without_a_tracker_that_fails_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = Trackers(recipe("tensorboard", tmp_path), resumes=True)
    trackers.open(tmp_path, step=3)
    (warning,) = trackers.messages()
    assert warning.startswith("warning: --tracker tensorboard failed (")
    assert warning.endswith("; training is not affected")
    trackers.log_line("train", {"step": 4, "loss": 1.0})
    trackers.finish()
    assert trackers.messages() == []


class Unreliable(TensorBoard):
    """Tracker whose server fails in the way that a test needs."""

    logged: ClassVar[list[int]] = []
    start_error: ClassVar[Exception | None] = None
    log_error: ClassVar[Exception | None] = None
    answers = threading.Event()

    def start(self) -> None:
        if self.start_error:
            raise self.start_error

    def open(self, folder: Path, step: int) -> None:
        pass

    def log(self, values: Any, step: int) -> None:
        self.answers.wait()
        self.logged.append(step)
        if self.log_error:
            raise self.log_error

    def finish(self) -> None:
        pass


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Backend(Unreliable):
        logged: ClassVar[list[int]] = []
        answers = threading.Event()

    monkeypatch.setitem(BACKENDS, "tensorboard", Backend)
    yield Backend
    Backend.answers.set()


@pytest.mark.parametrize(("error", "kind"), [(ConnectionError("x"), TrackerFailed), (ValueError("x"), RecipeError)])
def test_an_unreachable_server_may_be_reached_by_the_next_start(
    unreliable: Any, tmp_path: Path, error: Exception, kind: type
) -> None:
    unreliable.start_error = error
    with pytest.raises(RecipeError) as caught:
        Trackers(recipe("tensorboard", tmp_path))
    assert type(caught.value) is kind


def test_failing_tracker_warns_once_and_gets_the_later_lines(unreliable: Any, tmp_path: Path) -> None:
    unreliable.log_error = ConnectionError("no route to the tracker\nand more")
    unreliable.answers.set()
    trackers = Trackers(recipe("tensorboard", tmp_path))
    trackers.open(tmp_path, step=0)
    for step in (1, 2, 3):
        trackers.log_line("train", {"step": step, "loss": 1.0})
    trackers.finish()
    assert trackers.messages() == [
        "warning: --tracker tensorboard failed (no route to the tracker); training is not affected"
    ]
    assert unreliable.logged == [1, 2, 3]


def test_a_server_that_does_not_answer_delays_neither_training_nor_the_end(
    unreliable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "FINISH_SECONDS", 0.1)
    trackers = Trackers(recipe("tensorboard", tmp_path))
    trackers.open(tmp_path, step=0)
    for step in (1, 2, 3):
        trackers.log_line("train", {"step": step, "loss": 1.0})
    trackers.finish()
    assert unreliable.logged == []
    (warning,) = trackers.messages()
    assert "not all values were sent within 0.1 seconds" in warning


def test_calls_beyond_the_limit_are_dropped_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.monitor.tracker_thread.MAX_PENDING", 2)
    thread, blocks, done = TrackerThread("test"), threading.Event(), []
    thread.submit(blocks.wait)
    for number in range(5):
        thread.submit(lambda number=number: done.append(number))
    assert len(thread.failures()) == 1
    blocks.set()
    thread.call(lambda: None)
    assert done[0] == 0
    assert len(done) < 5


@pytest.mark.parametrize("content", [b"", b"../../x\n", b"a b\n", b"\xff", b"x" * 5000])
def test_a_damaged_id_is_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / id_name("wandb")).write_bytes(content)
    run = TrackedRun(out=tmp_path, project=None, tags={}, options={}, resumes=True)
    assert not BACKENDS["wandb"](run).continues
