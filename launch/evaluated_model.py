"""Load the model of a weights file, a run or a checkpoint for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fat
from launch.config.data import DataConfig
from launch.deploy.weights_file import find_weights, load_weights_file
from launch.models.specification import ModelSpec, spec_in_file
from launch.models.weights import restore_model
from launch.optim.zero_state import weights_of
from launch.run.checkpoint import META, STATE, Checkpoint, open_checkpoint
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.saved_recipe import RECIPE_NAME, read_saved_run, restore_class_names
from launch.run.weights_files import weights_file
from shards.errors import UserError, about_file
from shards.redact import printable

MAX_ERROR = 200  # maximum characters of PyTorch's message, which lists all tensors that do not match


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to evaluate, and its description."""

    model: nn.Module
    source: Path
    """Path of the weights file or checkpoint."""
    info: fat.WeightsInfo
    """Classes, preprocessing and step, as far as the file has them."""
    average: bool
    """Whether the weights are an EMA."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""
    defaults: DataConfig = field(default_factory=DataConfig)
    """Preprocessing where `info` has none."""

    @property
    def size(self) -> int:
        """Height and width of the input images in pixels."""
        return self.info.size or self.defaults.size

    @property
    def crop_pct(self) -> float:
        """Fraction of the short side that the center crop keeps."""
        return self.info.crop_pct or self.defaults.crop_pct

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel, for pixel values in 0 to 1."""
        return self.info.mean or self.defaults.augmentation().mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel."""
        return self.info.std or self.defaults.augmentation().std


def load_model(
    path: Path, *, average: bool = False, best: bool = False, given: ModelSpec | None = None
) -> EvaluatedModel:
    """Load a model, with the classes and the preprocessing that it was trained with.

    Args:
        path: weights file, run folder (its newest checkpoint) or checkpoint folder.
        average: load the EMA of the run instead of its weights.
        best: load the best weights of the run (`find_weights`) instead of those of its newest checkpoint.
        given: model that the user named (`launch.models.weights.load_model_file`).

    Raises:
        UserError: `path` is not a weights file, a run folder or a checkpoint folder, or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run folder, checkpoint or weights file")
    try:
        if best:
            return _load_best(path, average=average, given=given)
        if path.name == STATE and (path.parent / META).exists():
            path = path.parent  # the state of a checkpoint: the metadata next to it has its hash
        if path.is_dir():
            return _load_checkpoint(path, average=average, given=given)
        if average:
            name = weights_file(path.parent, "last", "average").name
            raise UserError(f"{path}: --ema requires a run folder; evaluate the run folder, or its {name}")
        return _load_weights_file(path, given)
    except (UserError, ValueError, OSError) as error:
        raise UserError(about_file(path, error)) from error


def training_data(path: Path) -> DataConfig | None:
    """Return the data options of the run that a run folder, checkpoint or weights file belongs to; None: unknown.

    Raises:
        UserError: the run's recipe is invalid.
    """
    if path.is_file():
        path = path.parent
    run = path.absolute().parents[1] if (path / META).exists() else path
    return read_saved_run(run).recipe.data if (run / RECIPE_NAME).exists() else None


def _load_best(path: Path, *, average: bool, given: ModelSpec | None) -> EvaluatedModel:
    if not path.is_dir():
        raise UserError(f"{path}: --best requires a run folder; omit it")
    return _load_weights_file(find_weights(path, ema=average), given)


def _load_weights_file(path: Path, given: ModelSpec | None) -> EvaluatedModel:
    model, info, notes = load_weights_file(path, given)
    if info.interpolation not in (None, "bicubic"):
        notes += (f"{path} was trained with {info.interpolation} resizing; evaluation resizes bicubically",)
    return EvaluatedModel(model, path, info, bool(info.ema), notes)


def _load_checkpoint(path: Path, *, average: bool, given: ModelSpec | None) -> EvaluatedModel:
    run, found, notes = _find_checkpoint(path, average=average)
    info = found.info()
    if (info.config is None and info.model is None) or info.size is None or info.crop_pct is None:
        raise UserError(f"{found.path}: does not record the model's dimensions; evaluate a weights file of the run")
    # Copies, because the tensors of the state share its memory, which includes that of the optimizer.
    values = {name: value.clone() for name, value in weights_of(found.load(), average=average).items()}
    if average and not values:
        raise UserError(f"{found.path}: trained without a moving average; omit --ema")
    model = _restore(found.path, info, values, given)
    classes = None if info.classes is None else restore_class_names(run, info.classes)
    info = dataclasses.replace(info, classes=classes, step=found.progress.step)
    return EvaluatedModel(model, found.path, info, average, notes)


def _restore(path: Path, info: fat.WeightsInfo, values: dict[str, Tensor], given: ModelSpec | None) -> nn.Module:
    """Create the model of a checkpoint from its metadata, and load its tensors into it."""
    if info.config is None:
        spec = spec_in_file(info.model or "", given)
        return restore_model(spec, path, values, outputs=info.classes.count if info.classes is not None else 1)
    if "head.bias" not in values:
        raise UserError(f"{path}: contains no classifier (head.bias); use another run folder")
    config = dataclasses.replace(info.config, num_classes=len(values["head.bias"]))
    with torch.device("meta"):  # allocates nothing: a damaged config could request far more memory than the tensors
        model = fat.FAT(config)
    try:
        model.load_state_dict(values, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:MAX_ERROR]
        raise UserError(
            f"{path}: its tensors do not match the model dimensions in its header ({reason}); evaluate another "
            "checkpoint, or a weights file of the run"
        ) from error
    return model


def _find_checkpoint(path: Path, *, average: bool) -> tuple[Path, Checkpoint, tuple[str, ...]]:
    """Return the run folder, the checkpoint to evaluate and messages for the user."""
    if (path / META).exists():
        return path.absolute().parents[1], open_checkpoint(path), ()
    folder = CheckpointFolder(path / CHECKPOINTS)
    found, skipped = folder.newest()
    for message in skipped:
        print(f"warning: {printable(message)}", file=sys.stderr)
    if found is None:
        raise UserError(
            f"{path}: contains no complete checkpoint; use a run folder (--out of the training), one of its "
            "checkpoints or a weights file"
        )
    step = None
    with contextlib.suppress(OSError, ValueError, UserError):  # missing or damaged files do not concern this checkpoint
        step = fat.read_info(find_weights(path, ema=average)).step
    if step is None or step == found.progress.step:
        return path, found, ()
    return (
        path,
        found,
        (f"{found.path} is the newest checkpoint; the best weights are those of step {step:,} (--best)",),
    )
