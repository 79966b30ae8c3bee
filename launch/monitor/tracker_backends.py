"""How each experiment tracker is started, resumed and written, through the trackers of accelerate.

A backend is used by one thread (`launch.monitor.trackers`). Any of its methods may raise any exception, or wait for a
server.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launch.run.files import read_regular
from shards.files.durable import durable_write
from shards.redact import redacted

DEFAULT_PROJECT = "fat-pipeline"
FINISH_SECONDS = 30.0
"""Time to send the last values at the end of a start, which must fit into `--preempt-margin`."""
_MAX_ID = 1024  # bytes
_ID = re.compile(r"[\w.-]{1,300}")

Values = Mapping[str, int | float]


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told about a run. It contains no credentials."""

    out: Path
    """Run folder. It does not exist before the first start."""
    project: str | None
    """None: the project of the tracker's environment variable, or `DEFAULT_PROJECT`."""
    tags: Mapping[str, str]
    options: Mapping[str, int | float | str | bool]
    resumes: bool

    @property
    def name(self) -> str:
        return str(redacted(self.out.resolve().name))


class Backend(ABC):
    """One tracker of a run."""

    library: ClassVar[str]
    """Name of the library, of the tracker in `--tracker`, and of the extra that installs it."""
    remedy: ClassVar[str]
    """What to do if the tracker cannot start."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._saved = _read_id(run.out, self.library) if run.resumes else ""
        self._tracker: Any = None

    @property
    def continues(self) -> bool:
        """Whether the tracker already has values of earlier starts of the run, which must not be logged again."""
        return bool(self._saved)

    @abstractmethod
    def start(self) -> None:
        """Import the library and log in. The run folder need not exist."""

    def open(self, folder: Path, step: int) -> None:
        """Write the tracker's id of the run to the run folder, for the next start, and send the options of the run.

        Args:
            step: optimizer steps done before this start.
        """
        durable_write(folder / id_name(self.library), f"{self._id()}\n".encode())
        self._tracker.store_init_configuration(dict(self._run.options))

    def _id(self) -> str:
        """Return the tracker's id of the run."""
        return self._saved

    def log(self, values: Values, step: int) -> None:
        self._tracker.log(dict(values), step=step)

    @abstractmethod
    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Log an image file of the run folder."""

    def finish(self) -> None:
        self._tracker.finish()


class TensorBoard(Backend):
    """Event files in RUN/tensorboard."""

    library = "tensorboard"
    remedy = "repair the installation ('pip install --force-reinstall tensorboard')"

    @property
    def continues(self) -> bool:
        return False  # `purge_step` removes the values that a later start logs again

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401

        _accelerate()

    def open(self, folder: Path, step: int) -> None:
        # The reader drops all earlier values from `purge_step` on. After a start without a checkpoint, these are all.
        self._tracker = _on_this_process(
            _accelerate().TensorBoardTracker(self.library, folder, purge_step=step + 1 if step else 0)
        )
        self._tracker.start()
        if not step:
            # Not `store_init_configuration`, which adds a folder to the list of runs at each start.
            text = "\n".join(f"    {name} = {value}" for name, value in self._run.options.items())
            self._tracker.log({"recipe": text}, step=0)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")


class WandB(Backend):
    """Weights & Biases."""

    library = "wandb"
    remedy = "log in ('wandb login', or WANDB_API_KEY), or log to files only (WANDB_MODE=offline)"
    _MAX_TAG = 64

    def start(self) -> None:
        import wandb

        self._saved_or_new = self._saved or secrets.token_hex(4)
        self._tracker = _accelerate().WandBTracker(
            self._run.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            name=self._run.name,
            id=self._saved_or_new,
            resume="allow",
            tags=[tag[: self._MAX_TAG] for tag in self._run.tags.values()],
            # The terminal output is not sent, because the live view redraws it many times.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )
        with _redacted_arguments():
            self._tracker.start()
        # W&B ignores values at steps below its own counter, such as an evaluation that is repeated after a resume.
        self._tracker.tracker.define_metric("*", step_metric="step")

    def _id(self) -> str:
        return self._saved_or_new

    def log(self, values: Values, step: int) -> None:
        self._tracker.log({**values, "step": step})

    def log_picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._tracker.log({name: wandb.Image(str(path)), "step": step})


class MLflow(Backend):
    """MLflow: the server or the database of MLFLOW_TRACKING_URI, by default ./mlflow.db."""

    library = "mlflow"
    remedy = "set MLFLOW_TRACKING_URI to a server that can be reached, or to sqlite:////FOLDER/mlflow.db"

    def start(self) -> None:
        import mlflow

        project = self._run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
        self._tracker = _on_this_process(
            _accelerate().MLflowTracker(run_id=self._saved or None, run_name=self._run.name)
        )
        self._tracker.experiment_name = project  # MLFLOW_EXPERIMENT_NAME would have priority over an argument
        self._tracker.start()
        mlflow.set_tags(dict(self._run.tags))  # accelerate would give its tags to the experiment too

    def open(self, folder: Path, step: int) -> None:
        if self.continues:  # parameters cannot be changed
            return
        super().open(folder, step)

    def _id(self) -> str:
        return str(self._tracker.tracker.info.run_id)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        self._tracker.log_artifact(str(path), f"{name}/step-{step:08d}")


class Trackio(Backend):
    """trackio: a database in ~/.cache/huggingface/trackio, or the Space or server of its environment variables."""

    library = "trackio"
    remedy = "unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL to log to this machine, or check them"

    def start(self) -> None:
        # trackio finds a run by its name, which must therefore be unique in the project.
        self._name = self._saved or re.sub(r"[^\w.-]", "-", f"{self._run.name}-{secrets.token_hex(2)}")
        self._tracker = _accelerate().TrackioTracker(
            self._run.project or DEFAULT_PROJECT, name=self._name, resume="allow" if self._saved else "never"
        )
        with contextlib.redirect_stdout(io.StringIO()):  # control codes, which a log file should not contain
            self._tracker.start()

    def _id(self) -> str:
        return self._name

    def log_picture(self, name: str, path: Path, step: int) -> None:
        import trackio

        self._tracker.log({name: trackio.Image(str(path))}, step=step)


BACKENDS: dict[str, type[Backend]] = {backend.library: backend for backend in (TensorBoard, WandB, MLflow, Trackio)}


def id_name(library: str) -> str:
    """Return the name of the file in the run folder that contains a tracker's id of the run."""
    return f"{library}-id"


def _read_id(run: Path, library: str) -> str:
    """Return the id that an earlier start has saved in the run folder, or an empty string."""
    try:
        text = read_regular(run / id_name(library), limit=_MAX_ID).decode().strip()
    except (OSError, ValueError):
        return ""
    return text if _ID.fullmatch(text) else ""


def _accelerate() -> Any:
    from accelerate import tracking

    # Its loggers raise an error before an Accelerator has been created, but trackers are started before.
    tracking.logger = getattr(tracking.logger, "logger", tracking.logger)
    return tracking


def _on_this_process(tracker: Any) -> Any:
    """Make a tracker not ask accelerate for the rank: only rank 0 has trackers, and the engine resets the state."""
    tracker.main_process_only = False
    return tracker


@contextlib.contextmanager
def _redacted_arguments() -> Iterator[None]:
    """Remove credentials from sys.argv, which W&B sends when a run is started."""
    arguments = sys.argv
    sys.argv = redacted(arguments)
    try:
        yield
    finally:
        sys.argv = arguments
