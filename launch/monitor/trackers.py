"""Log metrics and pictures of a run to experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.machine.world import World, broadcast_from_rank0
from launch.monitor.tracker_backends import BACKENDS, FINISH_SECONDS, Backend, TrackedRun
from launch.monitor.tracker_thread import TrackerThread
from launch.run.metrics_file import read_metrics
from shards.errors import first_line
from shards.redact import redacted

LOGGED: dict[str, tuple[str, ...]] = {
    "train": (
        "loss", "lr", "grad_norm", "epoch", "images_per_second", "size", "data_wait", "compute", "communication",
        "behind", "mfu", "bandwidth", "memory_bytes", "skipped", "replaced", "cache_hits",
    ),
    "eval": ("top1", "top5", "loss", "clock"),
    "eval-ema": ("top1", "top5", "loss", "clock"),
    "run_stop": ("clock",),
}  # fmt: skip
"""For each kind of metrics line (launch/run/metrics_schema.py), the values that are logged as KIND/NAME."""

_TRANSIENT = ("Comm", "Connection", "Timeout")
"""Substrings of the class names of transient errors, which may not occur in the next start."""


class TrackerFailed(RecipeError):
    """The server of a tracker cannot be reached; another start may succeed."""

    exit_code = 1


class Trackers:
    """The trackers of `--tracker`, on rank 0.

    They start before the run folder is created. If one cannot start, a new run ends with an error, but a resumed run
    continues without it. Each tracker has a thread, so that a slow server does not delay training. Later failures never
    end the run: `messages` returns only the first of consecutive failures of a tracker, and later lines are still sent
    to it.

    Args:
        resumes: whether the run is resumed from its run folder.
        data_set: name of the data set, for the tags.

    Raises:
        RecipeError: a library is not installed; or, for a new run, it cannot be imported or the login fails.
    """

    def __init__(self, recipe: Recipe, *, resumes: bool = False, data_set: str = "") -> None:
        names = tuple(dict.fromkeys(recipe.log.tracker))
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise RecipeError(
                    f"--tracker {name}: {name} is not installed; run pip install 'fat-pipeline[{name}]', or omit the "
                    "tracker"
                )
        run = TrackedRun(
            out=recipe.run.out,
            project=recipe.log.tracker_project,
            tags={"model": str(recipe.model.spec)} | ({"data_set": redacted(data_set)} if data_set else {}),
            options=_flat(redacted(recipe.to_dict())),
            resumes=resumes,
        )
        self._messages: list[str] = []
        self._trackers: dict[str, tuple[Backend, TrackerThread]] = {}
        for name in names:
            backend, thread = BACKENDS[name](run), TrackerThread(name)
            try:
                thread.call(backend.start)
            except Exception as error:  # a tracker may raise any exception
                fact = first_line(error) or type(error).__name__
                if not resumes:
                    transient = isinstance(error, OSError) or any(word in type(error).__name__ for word in _TRANSIENT)
                    kind = TrackerFailed if transient else RecipeError
                    raise kind(
                        f"--tracker {name}: cannot start ({fact}); {backend.remedy}, or omit the tracker"
                    ) from error
                self._messages.append(_failed(name, fact))
            else:
                self._trackers[name] = backend, thread

    def open(self, folder: Path, *, step: int) -> None:
        """Open the files of the trackers in the run folder, which must exist, before its metrics get a line.

        Args:
            step: optimizer steps done before this start.
        """
        self._logged = _last_steps(folder) if any(backend.continues for backend, _ in self._trackers.values()) else {}
        for backend, thread in self._trackers.values():
            thread.submit(lambda backend=backend: backend.open(folder, step))  # type: ignore[misc]

    def log_line(self, kind: str, values: Mapping[str, Any]) -> None:
        """Log the values of a line of the metrics, unless an earlier start of the run has logged this step."""
        step = int(values.get("step", 0))
        found = {f"{kind}/{name}": values.get(name) for name in LOGGED.get(kind, ())}
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        if not numbers:
            return
        for backend, thread in self._trackers.values():
            if self._is_new(backend, kind, step):
                thread.submit(lambda backend=backend: backend.log(numbers, step))  # type: ignore[misc]

    def log_picture(self, name: str, path: Path, *, step: int) -> None:
        """Log an image file, if it exists, unless an earlier start of the run has logged this step.

        Args:
            name: kind of metrics line and name, as in "train/images".
        """
        if not path.exists():
            return
        for backend, thread in self._trackers.values():
            if self._is_new(backend, name.partition("/")[0], step):
                thread.submit(lambda backend=backend: backend.log_picture(name, path, step))  # type: ignore[misc]

    def finish(self) -> None:
        """Send the last values and close the trackers. Waits at most `FINISH_SECONDS` for each."""
        for backend, thread in self._trackers.values():
            thread.finish(backend.finish, timeout=FINISH_SECONDS)

    def _is_new(self, backend: Backend, kind: str, step: int) -> bool:
        return not backend.continues or step > self._logged.get(kind, -1)

    def messages(self) -> list[str]:
        """Return warnings since the last call."""
        messages, self._messages = self._messages, []
        return messages + [
            _failed(name, fact) for name, (_, thread) in self._trackers.items() for fact in thread.failures()
        ]


def _failed(name: str, fact: str) -> str:
    return f"warning: --tracker {name} failed ({fact}); training is not affected"


def start_trackers(recipe: Recipe, world: World, *, resumes: bool, data_set: str) -> Trackers | None:
    """Create the trackers on rank 0; None on other ranks. Collective: errors are raised on every rank.

    Raises:
        RecipeError: see `Trackers`.
    """
    created: list[Trackers] = []
    broadcast_from_rank0(lambda: created.append(Trackers(recipe, resumes=resumes, data_set=data_set)), world)
    return created[0] if created else None


def _last_steps(folder: Path) -> dict[str, int]:
    """Return the highest step of each kind of line in the run's metrics, since the run last returned to a checkpoint.

    A start that returns to an earlier checkpoint begins a new run of the tracker.
    """
    try:
        lines = read_metrics(folder, warn=lambda _: None)
    except OSError:
        return {}
    found: dict[str, int] = {}
    for line in lines:
        if line["kind"] == "start" and line.get("origin"):
            found.clear()
        found[line["kind"]] = max(found.get(line["kind"], -1), line.get("step", 0))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Flatten nested values to keys `section.name`, and convert them to types that every tracker accepts."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
