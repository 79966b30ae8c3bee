"""Load the teacher of a distillation, and match its classes and its normalization with those of the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import nn

from fat.features import MEAN, STD
from launch.class_mapping import map_classes
from launch.deploy.weights_file import load_weights_file
from launch.engine.distillation import Channels, Teacher
from launch.feed import Feed
from launch.models.create import outputs_of
from launch.models.specification import ModelSpec
from launch.run.weights_files import best_weights_file
from shards.errors import UserError, about_file


def load_teacher(feed: Feed) -> tuple[Teacher | None, list[str]]:
    """Load the teacher of `--teacher`, if it is set; return it and messages.

    Raises:
        UserError: the teacher does not exist, cannot be read, has other classes, or does not support these images.
    """
    config, sizes = feed.recipe.distillation, sorted({phase.augment.size for phase in feed.phases})
    if config.teacher is None:
        return None, []
    path, given = _source(config.teacher, config.teacher_weights)
    try:
        model, info, notes = load_weights_file(path, given, request=f"use --teacher {{}} --teacher-weights {path}")
        of_teacher = {outputs_of(model, size) for size in sizes}.pop()
    except (UserError, ValueError, OSError) as error:
        raise UserError(f"--teacher: {about_file(path, error)}") from error
    classes, data = feed.class_list, Path(str(feed.dataset.path))
    outputs, class_notes = map_classes(info.classes, of_teacher, classes, model=path, data=data)
    if outputs is None and of_teacher > classes.count:  # outputs without a class teach nothing
        outputs = list(range(classes.count))
    mean, std = feed.augment.mean, feed.augment.std
    own_mean, own_std = info.mean or MEAN, info.std or STD  # as in evaluation
    if info.size is not None and sizes != [info.size]:
        received = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        notes += (f"it was evaluated with images of {info.size} pixels, and gets images of {received}",)
    name = given or info.model or type(model).__name__
    accuracy = "" if info.top1 is None else f", top-1 {info.top1:.2%}"
    teacher = Teacher(
        model=model,
        outputs=None if outputs is None else tuple(outputs),
        scale=_per_channel(lambda c: std[c] / own_std[c]),
        shift=_per_channel(lambda c: (mean[c] - own_mean[c]) / own_std[c]),
        digest=_digest(model),
        description=f"{name} of {path}{accuracy}",
    )
    messages = [f"{config.distillation} distillation from {teacher.description}"]
    return teacher, [*messages, *(f"teacher: {note}" for note in (*notes, *class_notes))]


def _source(teacher: str, weights: Path | None) -> tuple[Path, ModelSpec | None]:
    """Return the weights file of the teacher, and its model if the user named it."""
    path = Path(teacher)
    if path.is_file() or path.is_dir():
        if weights is not None:
            raise UserError(f"--teacher {teacher}: has weights itself; omit --teacher-weights, or name a model")
        if path.is_file():
            return path, None
        return best_weights_file(path), None
    try:
        spec = ModelSpec.parse(teacher)
    except UserError as error:
        raise UserError(f"--teacher {teacher}: no such file or folder, and {str(error).partition(': ')[2]}") from None
    if weights is None:
        raise UserError(f"--teacher {teacher}: an untrained model teaches nothing; set --teacher-weights FILE")
    return best_weights_file(weights) if weights.is_dir() else weights, spec


def _per_channel(value: Callable[[int], float]) -> Channels:
    return value(0), value(1), value(2)


def _digest(model: nn.Module) -> str:
    """Return the hash of a model's parameters and buffers, with their names."""
    found = xxhash.xxh3_64()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
