"""Log metrics to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.machine.world import World, broadcast_from_rank0
from launch.run.files import read_regular
from shards.errors import first_line
from shards.files.durable import durable_write
from shards.redact import redacted

WANDB_ID = "wandb-id"
"""File of the run folder with the run's id at Weights & Biases, so that a resumed run continues to log to it."""
PROJECT = "fat-pipeline"

_TRANSIENT = ("Comm", "Connection", "Timeout")
"""Substrings of the class names of transient errors, which may not occur in the next start."""
_EXTRAS = {"tensorboard": "track", "wandb": "wandb"}
# Advice in the error message, by tracker, if the tracker cannot start.
_REMEDIES = {
    "tensorboard": "repair the installation ('pip install --force-reinstall tensorboard')",
    "wandb": "log in ('wandb login', or WANDB_API_KEY), or log to files only (WANDB_MODE=offline)",
}


class TrackerFailed(RecipeError):
    """The server of a tracker cannot be reached; another start may succeed."""

    exit_code = 1


class Trackers:
    """The trackers of `--tracker`, on rank 0.

    They start before the run folder is created. If one cannot start, a new run ends with an error, but a resumed run
    continues without it. Later failures never end the run: `messages` returns only the first of consecutive
    failures of a tracker, and later lines are still sent to it.

    Args:
        resumes: whether the run is resumed from its run folder.

    Raises:
        RecipeError: a library is not installed; or, for a new run, it cannot be imported or the login fails.
    """

    def __init__(self, recipe: Recipe, *, resumes: bool = False) -> None:
        self._recipe, self._resumes = recipe, resumes
        self._trackers: dict[str, Any] = {}
        self._failing: set[str] = set()
        self._messages: list[str] = []
        self._wandb_id = ""
        for name in recipe.log.tracker:
            if importlib.util.find_spec(name) is None:
                raise RecipeError(
                    f"--tracker {name}: {name} is not installed; run pip install 'fat-pipeline[{_EXTRAS[name]}]', or "
                    "omit the tracker"
                )
        for name in recipe.log.tracker:
            try:
                self._start(name)
            except Exception as error:  # a tracker may raise any exception
                if not resumes:
                    fact = first_line(error) or type(error).__name__
                    transient = isinstance(error, OSError) or any(word in type(error).__name__ for word in _TRANSIENT)
                    kind = TrackerFailed if transient else RecipeError
                    raise kind(
                        f"--tracker {name}: cannot start ({fact}); {_REMEDIES[name]}, or omit the tracker"
                    ) from error
                self._report_failure(name, error)

    def _start(self, name: str) -> None:
        """Import the tracker's library and log in; the run folder need not exist yet."""
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401

            return
        import wandb

        run = self._recipe.run
        self._wandb_id = (_saved_id(run.out) if self._resumes else "") or secrets.token_hex(4)
        self._trackers[name] = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.out.resolve().name,
            id=self._wandb_id,
            resume="allow",
            config=_flat(redacted(self._recipe.to_dict())),
        )

    def open(self, folder: Path) -> None:
        """Open the files of the trackers in the run folder, which must exist."""
        for name in self._recipe.log.tracker:
            if name == "tensorboard":
                self._try(name, lambda: self._open_tensorboard(folder))
            elif name in self._trackers:
                self._try(name, lambda: durable_write(folder / WANDB_ID, f"{self._wandb_id}\n".encode()))

    def _open_tensorboard(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        recipe = "\n".join(f"    {name} = {value}" for name, value in _flat(redacted(self._recipe.to_dict())).items())
        writer.add_text("recipe", recipe)
        self._trackers["tensorboard"] = writer

    def log(self, values: dict[str, int | float], *, step: int) -> None:
        """Log values by name."""
        for name, tracker in self._trackers.items():
            log = _log_scalars if name == "tensorboard" else _log_to_wandb
            self._try(name, lambda log=log, tracker=tracker: log(tracker, values, step))  # type: ignore[misc]

    def finish(self) -> None:
        """Flush and close the trackers."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.close if name == "tensorboard" else tracker.finish)

    def messages(self) -> list[str]:
        """Return warnings since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            self._failing.discard(name)
        except Exception as error:  # a tracker may raise any exception, which must not end the run
            self._report_failure(name, error)

    def _report_failure(self, name: str, error: Exception) -> None:
        if name not in self._failing:
            self._failing.add(name)
            fact = first_line(error) or type(error).__name__
            self._messages.append(f"warning: --tracker {name} failed ({fact}); the run continues without it")


def start_trackers(recipe: Recipe, world: World, *, resumes: bool) -> Trackers | None:
    """Create the trackers on rank 0; None on other ranks. Collective: errors are raised on every rank.

    Raises:
        RecipeError: see `Trackers`.
    """
    created: list[Trackers] = []
    broadcast_from_rank0(lambda: created.append(Trackers(recipe, resumes=resumes)), world)
    return created[0] if created else None


def _log_scalars(writer: Any, values: dict[str, int | float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, global_step=step)
    writer.flush()


def _log_to_wandb(run: Any, values: dict[str, int | float], step: int) -> None:
    run.log(values, step=step)


def _saved_id(run: Path) -> str:
    """Return the id that an earlier start has saved in the run folder, or an empty string."""
    try:
        text = read_regular(run / WANDB_ID, limit=1024).decode().strip()
    except (OSError, ValueError):
        return ""
    return text if text.isalnum() else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Flatten nested values to keys `section.name`, and convert them to types that every tracker accepts."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
