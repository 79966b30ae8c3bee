"""Create a model by name, and check that it can be trained."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fat
from fat.config import VARIANTS, FATConfig
from fat.weights.entries import listed
from launch.models.specification import ModelSpec
from shards.command import suggestion
from shards.errors import UserError, first_line
from shards.redact import printable

ROWS = 2  # BatchNorm cannot train on a single value per channel


def create_model(spec: ModelSpec, *, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """Create a model in training mode, initialized from PyTorch's default generator. No weights are downloaded.

    A function of the user is called as `function(num_classes=N)`, with `drop_path_rate=RATE` if `drop_path` is set. Its
    module is imported, after the current working directory has been appended to `sys.path`.

    Args:
        drop_path: drop-path rate (stochastic depth); None: the model's default.

    Raises:
        UserError: the model does not exist, its library is not installed, or it cannot be created with these arguments.
    """
    if spec.is_fat:
        return fat.FAT(fat_config(spec, num_classes=num_classes, drop_path=drop_path))
    make = _timm_model(spec) if spec.kind == "timm" else _function(spec)
    options = {"num_classes": num_classes} | ({} if drop_path is None else {"drop_path_rate": drop_path})
    try:
        model = make(**options)
    except Exception as error:
        unsupported = isinstance(error, TypeError) and "drop_path_rate" in str(error)
        if unsupported and drop_path == 0:  # a model without the option has no drop path
            return create_model(spec, num_classes=num_classes)
        shown, hint = ", ".join(f"{name}={value}" for name, value in options.items()), "; omit --drop-path"
        raise UserError(
            f"--model {spec}: cannot be created with {shown} ({_shown(error)}){hint if unsupported else ''}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {spec}: returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.train()


def fat_config(spec: ModelSpec, *, num_classes: int, drop_path: float | None = None) -> FATConfig:
    """Return the dimensions of a FAT model (`spec.is_fat`)."""
    config = dataclasses.replace(VARIANTS[spec.name], num_classes=num_classes)
    return config if drop_path is None else dataclasses.replace(config, drop_path=drop_path)


def check_model(model: nn.Module, spec: ModelSpec, *, size: int, num_classes: int) -> None:
    """Run forward and backward of a copy of the model, and check that it can be trained.

    On the meta device, which computes nothing; on the CPU if an operation of the model needs values.

    Args:
        size: height and width of the images in pixels.

    Raises:
        UserError: the model fails for these images, its output is not a float tensor [B, num_classes], or a parameter
            gets no gradient, is not float32 or has several names.
    """
    expected = f"expected a float tensor of shape [{ROWS}, {num_classes}], the logits of {ROWS} images"
    trained, _, output = trial(model, size)
    if not isinstance(output, Tensor):
        raise UserError(f"--model {spec}: its output is a {type(output).__name__}; {expected}")
    if output.shape != (ROWS, num_classes) or not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise UserError(f"--model {spec}: its output is a {kind} tensor of shape {list(output.shape)}; {expected}")
    if not output.requires_grad:
        raise UserError(f"--model {spec}: has no parameters to train")
    names: dict[int, str] = {}
    for name, value in trained.named_parameters(remove_duplicate=False):
        if value.dtype != torch.float32:
            raise UserError(
                f"--model {spec}: the parameter {name} is {str(value.dtype).removeprefix('torch.')}; expected float32, "
                "which --precision bf16 casts in each operation"
            )
        first = names.setdefault(id(value), name)
        if first != name:  # its weights file would have the tensor only once, and not be loadable
            raise UserError(f"--model {spec}: {first} and {name} are the same parameter; expected different ones")
    output.sum().backward()
    idle = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise UserError(
            f"--model {spec}: the loss does not depend on {len(idle):,} parameters ({listed(idle)}); remove them, or "
            "set their requires_grad to False"
        )


def trial(model: nn.Module, size: int) -> tuple[nn.Module, Tensor, Any]:
    """Run a copy of the model in training mode on `ROWS` images; return the copy, the images and the output.

    All are on the meta device, or on the CPU if an operation of the model does not support the meta device.

    Raises:
        UserError: the model fails.
    """
    failure: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            twin = copy.deepcopy(model).to(device).train()
            images = torch.zeros(ROWS, 3, size, size, device=device)
            with torch.random.fork_rng(devices=[]):
                return twin, images, twin(images)
        except Exception as error:
            failure = error  # of the CPU in the end: it describes the model, and not a limitation of the meta device
    assert failure is not None
    kind = type(model).__name__
    raise UserError(
        f"the model {kind} fails for images [{ROWS}, 3, {size}, {size}] ({_shown(failure)}); use a --size that it "
        "supports, or another --model"
    ) from failure


def outputs_of(model: nn.Module, size: int) -> int:
    """Return the number of outputs of a classifier for images of `size` x `size` pixels.

    Raises:
        UserError: the model does not support images of this size, or its output is not [B, N].
    """
    if isinstance(model, fat.FAT):
        return model.num_classes
    _, _, output = trial(model, size)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise UserError(f"the model {type(model).__name__} does not return logits, a tensor of shape [{ROWS}, outputs]")
    return output.shape[1]


def _timm_model(spec: ModelSpec) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--model {spec}: timm cannot be imported ({first_line(error)}); run pip install 'fat-pipeline[timm]'"
        ) from error
    if not timm.is_model(spec.name):
        near = suggestion(spec.name, timm.list_models())
        raise UserError(f"--model {spec}: timm {timm.__version__} has no model of this name{near}")

    def make(**options: Any) -> Any:
        return timm.create_model(spec.name, pretrained=False, **options)

    return make


def _function(spec: ModelSpec) -> Callable[..., Any]:
    name, _, attribute = spec.name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that no file in it replaces a library
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"--model {spec}: {name} cannot be imported ({_shown(error)}); it is searched in PYTHONPATH, in the "
            f"installed packages and in the working directory {printable(folder)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = suggestion(attribute, [n for n, value in vars(module).items() if callable(value)])
        raise UserError(f"--model {spec}: {printable(module.__file__ or name)} has no function {attribute}{near}")
    return function


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
