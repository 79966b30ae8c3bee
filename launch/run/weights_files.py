"""The weights files of a run, which are written with every checkpoint.

| file | content |
|-|-|
| `weights-last.safetensors` | weights of the newest checkpoint |
| `weights-best.safetensors` | weights with the best top-1 accuracy so far |
| `weights-ema-last.safetensors`, `weights-ema-best.safetensors` | the same of their moving average (EMA) |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from torch import Tensor

import fat
from fat.weights.save import write_weights
from launch.config.recipe import Recipe
from launch.engine.build import config_of
from launch.feed import Feed
from launch.optim.zero_state import weights_of
from launch.run.checkpoint import CheckpointError
from launch.run.progress import WEIGHTS_KINDS, Progress, WeightsKind
from shards.errors import UserError, first_line
from shards.format.manifest import tool_version

_PREFIX: dict[WeightsKind, str] = {"weights": "weights", "average": "weights-ema"}


def weights_file(run: Path, which: Literal["best", "last"], kind: WeightsKind = "weights") -> Path:
    """Return the path of a weights file of a run."""
    return run / f"{_PREFIX[kind]}-{which}.safetensors"


class WeightsFiles:
    """Writes the weights files of a run.

    Args:
        run: the run folder.
        info: model, classes, preprocessing and recipe, for the headers.
    """

    def __init__(self, run: Path, info: fat.WeightsInfo) -> None:
        self._run, self._info = run, info

    def write(self, state: dict[str, Tensor], progress: Progress) -> None:
        """Write the weights of a canonical state as the last ones, and as the best ones if they are.

        Args:
            state: see `launch.optim.zero_state`.
            progress: the run's progress at this state.

        Raises:
            CheckpointError: a file cannot be written.
        """
        for kind in WEIGHTS_KINDS:
            tensors = weights_of(state, average=kind == "average")
            if not tensors:
                continue
            info = self._describe(progress, kind)
            # The best ones first: the last ones tell which step has been written completely.
            for path in self._paths(kind, info):
                _write(path, tensors, info)

    def write_best(self, state: dict[str, Tensor], progress: Progress, kind: WeightsKind) -> None:
        """Write the weights of a canonical state as the best ones of a kind, if the state has that kind.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if tensors := weights_of(state, average=kind == "average"):
            _write(weights_file(self._run, "best", kind), tensors, self._describe(progress, kind))

    def _describe(self, progress: Progress, kind: WeightsKind) -> fat.WeightsInfo:
        return replace(self._info, step=progress.step, top1=progress.top1.get(kind), ema=kind == "average")

    def _paths(self, kind: WeightsKind, info: fat.WeightsInfo) -> Iterator[Path]:
        best = weights_file(self._run, "best", kind)
        # Compared with the file, and not with `Progress.best`: the step that reached it may not have been saved.
        if info.top1 is not None and info.top1 > _top1_in(best):
            yield best
        yield weights_file(self._run, "last", kind)


def _write(path: Path, tensors: dict[str, Tensor], info: fat.WeightsInfo) -> None:
    try:
        write_weights(path, tensors, info)
    except (OSError, SafetensorError) as error:
        fact = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CheckpointError(f"{path}: the weights could not be written ({fact})") from error


def _top1_in(path: Path) -> float:
    """Return the top-1 accuracy in a weights file's header; -1.0: the file is missing or damaged, or has none."""
    try:
        top1 = fat.read_info(path).top1
    except (OSError, ValueError):
        return -1.0
    return -1.0 if top1 is None else top1


def describe_weights(recipe: Recipe, feed: Feed) -> fat.WeightsInfo:
    """Return the description of a run's model for the headers of its weights files and checkpoints."""
    return fat.WeightsInfo(
        config=config_of(recipe, feed.classes),
        classes=feed.class_list,
        model=str(recipe.model.spec),
        size=recipe.data.evaluation_size,
        crop_pct=recipe.data.crop_pct,
        interpolation="bicubic",
        mean=feed.augment.mean,
        std=feed.augment.std,
        recipe=recipe.digest(),
        version=tool_version(),
    )


def all_weights_files(run: Path) -> list[Path]:
    """Return the weights files of a run that exist: best and last, of the weights and of their EMA."""
    names = [weights_file(run, which, kind) for kind in WEIGHTS_KINDS for which in ("best", "last")]
    return [path for path in names if path.is_file()]


def best_weights_file(run: Path) -> Path:
    """Return the run's weights file with the highest top-1 accuracy, else that of the last weights.

    Raises:
        UserError: the folder has no weights file.
    """
    best: tuple[float, Path] | None = None
    for kind in WEIGHTS_KINDS:  # with equal accuracies, the weights precede their EMA
        path = weights_file(run, "best", kind)
        with contextlib.suppress(OSError):
            top1 = read_top1(path)
            if best is None or top1 > best[0]:
                best = (top1, path)
    if best is not None:
        return best[1]
    last = weights_file(run, "last")
    if not last.is_file():
        raise UserError(
            f"{run}: contains no weights file ({last.name}); use the run folder of a training (--out) that has written "
            "a checkpoint, or a weights file"
        )
    return last


def read_top1(path: Path) -> float:
    """Return the top-1 accuracy in a weights file's header; 0.0: it has none.

    Raises:
        UserError: the header is invalid.
        OSError: the file cannot be read.
    """
    try:
        return fat.read_info(path).top1 or 0.0
    except ValueError as error:
        raise UserError(f"{error}; use another weights file") from error
