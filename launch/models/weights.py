"""Load weights into any model, with a new classifier if the classes differ."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fat
from fat.weights.classifier import choose_rows, difference
from fat.weights.load import load_tensors, read_weights
from launch.models.classifier import classifier_name
from launch.models.create import create_model
from launch.models.specification import ModelSpec, spec_in_file


def load_weights(model: nn.Module, path: Path, *, classes: fat.ClassList) -> tuple[str, ...]:
    """Load a weights file into a model, strictly except for the classifier; return messages (see `fat.load_weights`).

    The classifier is kept, reordered or initialized anew by the same rules for all models, if its name is known
    (`classifier_name`). Otherwise the file's tensors must fit as they are.

    Args:
        classes: classes of the model's outputs.

    Raises:
        ValueError: the file is not readable, does not fit, or has other classes and the classifier is unknown.
    """
    if isinstance(model, fat.FAT):
        return fat.load_weights(model, path, classes=classes)
    weights, expected, name = read_weights(path), model.state_dict(), classifier_name(model)
    found, known = dict(weights.tensors), weights.info.classes
    if name is None or f"{name}.weight" not in expected:
        if known is not None and known.digest != classes.digest:
            raise ValueError(
                f"{path}: has other classes ({difference(known, classes)}), and the classifier of this model is "
                "unknown, so it cannot be replaced; give the model a method get_classifier() that returns the module"
            )
        load_tensors(path, found, model)
        return weights.notes
    head, weight = f"{name}.", found.get(f"{name}.weight")
    rows = len(weight) if weight is not None and weight.ndim else 0
    order, note = choose_rows(rows, len(expected[f"{head}weight"]), known, classes)
    for key in [key for key in {*found, *expected} if key.startswith(head)]:
        if order is None:
            found.pop(key, None)
            found |= {key: expected[key]} if key in expected else {}
        elif key in found and found[key].shape[:1] == (rows,):
            found[key] = found[key][order]
    load_tensors(path, found, model)
    return (*weights.notes, note)


def restore_model(spec: ModelSpec, path: Path, tensors: Mapping[str, Tensor], *, outputs: int) -> nn.Module:
    """Create a model and load the tensors of a file into it; return it in eval mode.

    Args:
        spec: model that is safe to create (`launch.models.specification.spec_in_file`).
        path: the file, for messages.
        outputs: number of classes that the file names; its classifier may have more outputs.

    Raises:
        ValueError: the tensors do not fit the model.
        UserError: the model cannot be created.
    """
    if not any(tensor.shape[:1] == (outputs,) for tensor in tensors.values()):
        # The number is not trusted: it could request far more memory than the file has.
        outputs = 1
    model = create_model(spec, num_classes=outputs)
    weight = tensors.get(f"{classifier_name(model)}.weight")
    if weight is not None and weight.shape[:1] not in ((), (outputs,)):
        model = create_model(spec, num_classes=len(weight))
    load_tensors(path, tensors, model)
    return model.eval()


def load_model_file(
    path: Path, given: ModelSpec | None = None, *, request: str = "add --model {}"
) -> tuple[nn.Module, fat.WeightsInfo, list[str]]:
    """Create the model of a weights file, which is not trusted, in eval mode; return it, its metadata and messages.

    For a file of another program, the metadata is completed with the name of the model and timm's preprocessing.

    Args:
        given: model that the user named; required for a model of a function (`spec_in_file`), and for files without
            metadata that are not those of a FAT.
        request: see `spec_in_file`.

    Raises:
        ValueError, OSError: the file is invalid or cannot be read.
        UserError: the model cannot be created, or must be named by the user.
    """
    info = fat.read_info(path)
    if info.model is not None and (info.config is None or given is not None):
        given = spec_in_file(info.model, given, request=request)
    if given is None or given.is_fat:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return fat.load_model(path), info, [str(warning.message) for warning in caught]
    weights = read_weights(path)
    outputs = info.classes.count if info.classes is not None else 1  # `restore_model` finds the number
    model, notes = restore_model(given, path, weights.tensors, outputs=outputs), list(weights.notes)
    info = dataclasses.replace(info, model=str(given))
    missing = {name: value for name, value in _preprocessing(model).items() if getattr(info, name) is None}
    if missing:
        shown = ", ".join(f"{name} {value}" for name, value in missing.items())
        notes.append(f"{path} does not record its preprocessing completely; timm's of {given} is used: {shown}")
    return model, dataclasses.replace(info, **missing), notes


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return size, crop_pct, mean and std of a model of timm; those of its default weights. Empty for other models."""
    config = getattr(model, "default_cfg", None)
    if not isinstance(config, dict):
        return {}
    values = {name: config.get(name) for name in ("crop_pct", "mean", "std")} | {"size": config["input_size"][-1]}
    return {name: tuple(value) if name in ("mean", "std") else value for name, value in values.items() if value}
