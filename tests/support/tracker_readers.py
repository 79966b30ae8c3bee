"""Let trackers store their values on this machine, and read them, if possible with their own libraries."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.config.recipe import Recipe
from launch.config.run import LogConfig, RunConfig
from launch.monitor.tracker_backends import BACKENDS

# Only TensorBoard's tests are part of `make test`: importing the other libraries takes seconds per test.
EVERY_TRACKER = [pytest.param(name, marks=() if name == "tensorboard" else pytest.mark.slow) for name in BACKENDS]

Steps = dict[str, list[int]]
"""For each logged name, the steps of its values in the order in which they are stored."""
TRACKIO_FOLDER = Path(sys.prefix) / "trackio"
"""Where `make test` installs trackio, because no version of it allows the pinned version of Pillow."""


def recipe(tracker: str, out: Path, project: str | None = None) -> Recipe:
    """Return a recipe with a tracker."""
    return Recipe(log=LogConfig(tracker=(tracker,), tracker_project=project), run=RunConfig(out=out))  # type: ignore[arg-type]


def library_of(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test whose tracker is not installed; fail it if CI=true."""
    if tracker == "trackio" and TRACKIO_FOLDER.exists():
        monkeypatch.syspath_prepend(TRACKIO_FOLDER)
    if os.environ.get("CI") != "true":
        pytest.importorskip(tracker)


def keep_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all trackers write to a folder, without a server, whatever the user of the tests has configured."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    variables = {
        "HOME": folder,
        "WANDB_DIR": folder,
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": folder / "trackio",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it has read the environment of an earlier test
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it has read TRACKIO_DIR


def tensorboard_steps(run: Path) -> Steps:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    tags = reader.Tags()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in tags["scalars"]} | {
        tag: [event.step for event in reader.Images(tag)] for tag in tags["images"]
    }


def mlflow_steps(run: Path) -> Steps:
    from mlflow import MlflowClient

    client, found = MlflowClient(), (run / "mlflow-id").read_text().strip()
    names = client.get_run(found).data.metrics
    return {name: [metric.step for metric in client.get_metric_history(found, name)] for name in names}


def trackio_steps(run: Path, project: str) -> Steps:
    from trackio.sqlite_storage import SQLiteStorage

    steps: Steps = defaultdict(list)
    for line in SQLiteStorage.get_logs(project, (run / "trackio-id").read_text().strip()):
        for name in line:
            if "/" in name:
                steps[name].append(line["step"])
    return steps


def wandb_steps(folder: Path, run: Path) -> Steps:
    """Read the records of all offline starts of a run."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process has written the files
    steps: Steps = defaultdict(list)
    run_id = (run / "wandb-id").read_text().strip()
    # The folder of a start in the same second as the one before it ends with a number.
    for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}*/*.wandb")):
        for content in _records(path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                for name in items:
                    if "/" in name:
                        steps[name].append(json.loads(items["step"]))
    return steps


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, in which records may be split."""
    data, offset, record = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # complete, last part
            yield record
            record = b""
