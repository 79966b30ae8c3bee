"""Trackers (launch/monitor/trackers.py): what is logged and read back, also of a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.config.run import LogConfig
from launch.monitor.tracker_backends import id_name
from launch.monitor.trackers import LOGGED, Trackers
from launch.run.metrics_file import MetricsLog
from launch.run.metrics_schema import KINDS
from tests.support import tracker_readers
from tests.support.tracker_readers import EVERY_TRACKER, keep_on_this_machine, library_of, recipe

KEEPING = ("wandb", "mlflow", "trackio")
"""Trackers that cannot remove values: repeated steps are not logged to them again."""
PROJECT = "fat-pipeline"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which all trackers store their values."""
    keep_on_this_machine(tmp_path, monkeypatch)
    return tmp_path


def stored(name: str, local: Path, out: Path) -> tracker_readers.Steps:
    """Return the steps that a tracker has stored for a run."""
    readers: dict[str, Callable[[], tracker_readers.Steps]] = {
        "tensorboard": lambda: tracker_readers.tensorboard_steps(out),
        "wandb": lambda: tracker_readers.wandb_steps(local, out),
        "mlflow": lambda: tracker_readers.mlflow_steps(out),
        "trackio": lambda: tracker_readers.trackio_steps(out, PROJECT),
    }
    return readers[name]()


START = {
    "world": 1, "engine": "plain", "model": "fat_b0", "device": "some CPU", "host": "a", "total_steps": 8,
    "steps_per_epoch": 4, "epochs": 2, "global_batch": 8, "started": 1.8e9,
}  # fmt: skip


class Start:
    """One start of a run whose metrics and trackers get the same lines, as from `launch.monitor.metrics.Metrics`."""

    def __init__(self, name: str, out: Path, *, step: int = 0, resumes: bool | None = None) -> None:
        resumes = step > 0 if resumes is None else resumes
        self.trackers = Trackers(recipe(name, out), resumes=resumes, data_set="digits")
        out.mkdir(exist_ok=True)
        self.trackers.open(out, step=step)
        self._log = MetricsLog(out)

    def write(self, kind: str, **values: Any) -> None:
        self._log.write(kind, **values)
        self.trackers.log_line(kind, values)

    def train(self, *steps: int) -> None:
        for step in steps:
            values = {"epoch": 1, "lr": 0.1, "loss": 2.0 / step, "data_wait": 0.5, "slowest_host": "node-1"}
            self.write("train", step=step, steps=1, seconds=1.0, images_per_second=9.0, **values)

    def evaluate(self, step: int) -> None:
        for kind in ("eval", "eval-ema"):
            self.write(kind, step=step, epoch=1, top1=0.5, top5=0.75, loss=1.5, samples=360)

    def finish(self) -> None:
        self.trackers.finish()
        self._log.close()
        assert self.trackers.messages() == []


@pytest.mark.parametrize("name", EVERY_TRACKER)
def test_a_resumed_run_has_each_step_once_in_its_tracker(
    name: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_of(name, monkeypatch)
    out = local / "run"
    first = Start(name, out)
    first.train(1, 2, 3, 4)
    first.evaluate(4)
    first.train(5, 6)  # the steps after the checkpoint of step 4 are repeated
    first.finish()
    second = Start(name, out, step=4)
    second.train(5, 6)
    second.evaluate(6)  # its step has been trained, but not evaluated before
    second.train(7, 8)
    second.evaluate(8)
    second.finish()

    steps = stored(name, local, out)
    assert steps["train/loss"] == steps["train/lr"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps["eval/top1"] == steps["eval-ema/loss"] == [4, 6, 8]
    assert {tag.split("/")[0] for tag in steps} == {"train", "eval", "eval-ema"}
    assert "train/slowest_host" not in steps


@pytest.mark.parametrize("name", EVERY_TRACKER)
def test_a_run_that_returns_to_a_checkpoint_is_another_run_of_the_tracker(
    name: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard forgets the later steps; the others cannot, and keep them in the run that they had."""
    library_of(name, monkeypatch)
    out = local / "run"
    first = Start(name, out)
    first.train(*range(1, 9))
    first.finish()
    returned = Start(name, out, step=4, resumes=False)
    returned.write("start", **START, step=4, origin="checkpoints/step-00000004")
    returned.train(5, 6)
    returned.finish()
    resumed = Start(name, out, step=6)
    resumed.train(7)
    resumed.finish()
    assert stored(name, local, out)["train/loss"] == [*([] if name in KEEPING else [1, 2, 3, 4]), 5, 6, 7]


@pytest.mark.parametrize("name", EVERY_TRACKER)
def test_another_run_in_the_same_folder_is_another_run_of_the_tracker(
    name: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_of(name, monkeypatch)
    out = local / "run"
    ids = []
    for _ in range(2):
        start = Start(name, out)
        start.train(1, 2)
        start.finish()
        ids += [(out / id_name(name)).read_text()] if name in KEEPING else []
    assert stored(name, local, out)["train/loss"] == [1, 2]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", EVERY_TRACKER)
def test_pictures_are_logged(name: str, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_of(name, monkeypatch)
    start = Start(name, local / "run")
    picture = local / "run" / "first-batch.jpg"
    Image.new("RGB", (40, 30), "red").save(picture)
    start.trackers.log_picture("train/images", picture, step=1)
    start.trackers.log_picture("eval/hardest", local / "run" / "missing.jpg", step=1)
    start.finish()
    if name == "mlflow":
        from mlflow import MlflowClient

        (found,) = MlflowClient().list_artifacts(
            (local / "run" / "mlflow-id").read_text().strip(), "train/images/step-00000001"
        )
        assert found.path.endswith("first-batch.jpg")
        return
    steps = stored(name, local, local / "run")
    assert "eval/hardest" not in steps
    assert [steps[tag] for tag in steps if tag.startswith("train/images")] != []
    assert all(steps[tag] == [1] for tag in steps if tag.startswith("train/images"))


def test_only_known_numbers_of_the_metrics_are_logged() -> None:
    for kind, names in LOGGED.items():
        assert set(names) <= KINDS[kind].model_fields.keys()
        assert not {"kind", "time", "step", "seconds", "samples"} & set(names)


def test_weights_and_biases_gets_project_name_tags_and_options(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library_of("wandb", monkeypatch)
    trackers = Trackers(recipe("wandb", local / "b0-digits", "my project"), data_set="digits-shards")
    run = trackers._trackers["wandb"][0]._tracker.tracker
    assert (run.project, run.name, run.tags) == ("my project", "b0-digits", ("fat_b0", "digits-shards"))
    (local / "b0-digits").mkdir()
    trackers.open(local / "b0-digits", step=0)
    trackers.finish()
    assert trackers.messages() == []
    assert run.config["optim.epochs"] == Recipe().optim.epochs


@pytest.mark.slow
def test_the_project_is_that_of_the_option_then_of_the_environment(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_of("mlflow", monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{local}/mlflow.db")  # the default, but slow to create
    from mlflow import MlflowClient

    for option, expected in ((None, "from the environment"), ("from the option", "from the option")):
        trackers = Trackers(recipe("mlflow", local / "run", option))
        (local / "run").mkdir(exist_ok=True)
        trackers.open(local / "run", step=0)
        trackers.finish()
        found = MlflowClient().get_run((local / "run" / "mlflow-id").read_text().strip())
        assert MlflowClient().get_experiment(found.info.experiment_id).name == expected
        assert found.data.tags["model"] == "fat_b0"
        assert found.info.status == "FINISHED"


@pytest.mark.parametrize("project", ["", "a/b", "it's", " x", "x" * 101, "a\nb"])
def test_project_names_that_a_tracker_would_reject_are_rejected(project: str) -> None:
    with pytest.raises(RecipeError, match="--tracker-project"):
        LogConfig(tracker_project=project)


def test_options_are_flat(local: Path) -> None:
    start = Start("tensorboard", local / "run")
    start.finish()
    options = start.trackers._trackers["tensorboard"][0]._run.options
    assert options["data.size"] == 224
    assert all(isinstance(value, int | float | str) for value in options.values())
