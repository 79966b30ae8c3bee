"""Load a trained model with its preprocessing and class names."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fat.inference.transform import ImageTransform
from fat.model import FAT
from fat.weights.classes import ClassList
from fat.weights.load import load_model, read_info, warn
from fat.weights.safe_pickle import printable

TIMM = "timm/"  # begins the names of models that timm provides


class LoadedModel(NamedTuple):
    """A model that is ready for inference. Unpacks as `model, transform, classes = fat.load(PATH)`."""

    model: FAT
    """The model in eval mode: images float [B, 3, H, W] -> logits [B, classes]."""
    transform: ImageTransform
    """Prepares an image for the model."""
    classes: tuple[str, ...]
    """Name of each output (`class_names`)."""


def load(
    path: str | Path, *, size: int | None = None, crop_pct: float | None = None, entry: str | None = None
) -> LoadedModel:
    """Load the FAT of a weights file in eval mode, with the preprocessing and the class names that the file records.

    Args:
        path: weights file of a training, or any file that `load_model` accepts. What the file does not record gets
            timm's defaults (`ImageTransform`), with a warning.
        size, crop_pct: replace those of the file.
        entry: see `load_model`.

    Raises:
        ValueError: the file holds another model than a FAT, is invalid, or its preprocessing is not supported.
    """
    info = read_info(path)
    if info.config is None and info.model is not None:
        raise ValueError(f"{path}: {_how_to_load(Path(path), info.model, info.classes)}")
    try:
        transform = ImageTransform.of(info, size=size, crop_pct=crop_pct)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(path, entry=entry)
    notes = [str(warning.message).removeprefix(f"{path}: ") for warning in caught]
    if model.config.in_chans != 3:
        raise ValueError(
            f"{path}: the model has {model.config.in_chans} input channels, not those of RGB images; use fat.load_model"
        )
    if info.size is None and size is None:
        notes.append(f"does not record the image size of its training; images of {transform.size} pixels are used")
    warn(path, tuple(notes))
    return LoadedModel(model, transform, class_names(info.classes, model.num_classes))


def class_names(classes: ClassList | None, outputs: int) -> tuple[str, ...]:
    """Return a name for each output of a model.

    It is the human-readable name if the class has one that no other class has ("tench"), the name and the folder if
    several classes have this name ("crane (n02012849)"), the folder if it has none, and otherwise "output 7", counted
    from 0.
    """
    folders = classes.folders or () if classes is not None else ()
    names = classes.names if classes is not None and classes.names is not None else (None,) * len(folders)
    count = Counter(names)
    named = [
        folder if not name else name if count[name] == 1 else f"{name} ({folder})"
        for folder, name in zip(folders, names, strict=True)
    ]
    return (*named[:outputs], *(f"output {number}" for number in range(len(named), outputs)))


def _how_to_load(path: Path, model: str, classes: ClassList | None) -> str:
    name, outputs = printable(model), classes.count if classes is not None else "N"
    state = f"safetensors.torch.load_file({str(path)!r})"
    timm = f"timm.create_model({name.removeprefix(TIMM)!r}, num_classes={outputs})"
    create = timm if model.startswith(TIMM) else "create it"
    return (
        f"holds {name}, which is not a FAT; use {create} and load_state_dict({state}), with "
        "fat.ImageTransform.of(fat.read_info(FILE)) as the transform; or classify with: pipeline predict"
    )
