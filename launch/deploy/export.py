"""Write a trained model for other programs, with class names and preprocessing inside, and check the file."""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import fat
from fat.features import INTERPOLATION
from fat.model import MIN_SIZE
from fat.weights.save import write_weights
from launch.deploy.weights_file import load_weights_file
from launch.models.specification import ModelSpec
from shards.command import PROJECT
from shards.errors import UserError, explain_os_errors, reason_of
from shards.files.durable import sync_folder
from shards.files.output import OutputError, check_output
from shards.format.manifest import tool_version
from shards.progress import Phases

Format = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
REQUIRED: Mapping[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
MARK = "fat_export"  # key in the metadata of every exported file
METADATA = "metadata.json"  # name of the metadata in a torch.export file
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4  # largest difference in a check, relative to the largest logit

Program = Callable[[Tensor], Tensor]


def check_export(source: Path, out: Path, target: Format) -> None:
    """Check before the work that the file can be written, and would only replace an earlier export.

    Raises:
        UserError: a package is missing, or `out` has another suffix than the format, cannot be written, or exists and
            is the source or was not exported.
    """
    missing = [name for name in REQUIRED.get(target, ()) if find_spec(name) is None]
    if missing:
        raise UserError(f"--to {target} needs {', '.join(missing)}; install it with: pip install '{PROJECT}[onnx]'")
    check_output(out, "--out", (SUFFIXES[target],))
    if not out.exists():
        return
    try:
        with out.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            is_export = not out.samefile(source) and content.find(MARK.encode()) >= 0
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        fact = f"exists and cannot be read ({reason_of(error)})"
        raise OutputError(f"--out {out}: {fact}; specify another file") from error
    if not is_export:
        raise OutputError(f"--out {out}: exists and was not written by 'pipeline export'; specify another file")


def export_file(
    model: nn.Module, info: fat.WeightsInfo, out: Path, target: Format, *, fuse: bool, progress: Phases
) -> None:
    """Export a model, compare the file with the model on random images, and then move it to `out`.

    Args:
        model: model in eval mode on the CPU, which maps images [B, 3, H, W] to logits.
        info: metadata of the weights.
        fuse: export a FAT with folded BatchNorm (`fat.fuse`); not for safetensors.

    Raises:
        UserError: the exported file computes other logits, or cannot be written; nothing is left at `out`.
    """
    if fuse and not isinstance(model, fat.FAT):
        raise UserError(f"--fuse: folds BatchNorm of a FAT, but the model is {info.model}; omit --fuse")
    transform = fat.ImageTransform.of(info)
    info = dataclasses.replace(
        info,
        config=model.config if isinstance(model, fat.FAT) else None,
        size=transform.size,
        crop_pct=transform.crop_pct,
        interpolation=INTERPOLATION,
        mean=transform.mean,
        std=transform.std,
    )
    # A FAT accepts any size, but at the smallest one its graph is another (`fat.export_program`).
    any_size = isinstance(model, fat.FAT) and transform.size > MIN_SIZE
    size = None if any_size else transform.size
    exported = fat.fuse(model) if isinstance(model, fat.FAT) and fuse else model
    metadata = export_metadata(info, transform, outputs=_run(model, 1, transform.size).shape[1])
    with (
        explain_os_errors(out, "then run the same command"),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
    ):
        file = Path(folder, out.name)
        if target == "safetensors":
            progress.begin("writing the weights")
            write_weights(file, model.state_dict(), info, metadata)
        elif target == "torch-export":
            progress.begin("tracing the model")
            program = fat.export_program(exported, size=size)
            torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
        else:
            progress.begin("tracing and translating the model, which takes up to a minute")
            with _quiet():
                fat.export_onnx(exported, file, size=size, metadata=metadata, verbose=False)
        progress.begin("comparing the file with the model")
        _check(model, _load(file, target, info), transform.size, out)
        with file.open("rb+") as content:
            os.fsync(content.fileno())
        file.replace(out)
        sync_folder(out.parent)


def export_metadata(info: fat.WeightsInfo, transform: fat.ImageTransform, outputs: int) -> dict[str, str]:
    """Return the metadata of an exported file, as texts.

    classes: JSON list of the outputs' names (`fat.class_names`). preprocessing: JSON object of what `transform` does.
    The others are those of a weights file, for `fat.WeightsInfo.from_header`.
    """
    return {
        **info.to_header(),
        "classes": json.dumps(fat.class_names(info.classes, outputs)),
        "preprocessing": json.dumps(
            dataclasses.asdict(transform) | {"interpolation": INTERPOLATION, "channels": "RGB"}
        ),
        MARK: tool_version(),
    }


def _load(file: Path, target: Format, info: fat.WeightsInfo) -> Program:
    """Return the function that an exported file computes."""
    if target == "safetensors":
        given = None if info.config is not None or info.model is None else ModelSpec.parse(info.model)
        return load_weights_file(file, given)[0]
    if target == "torch-export":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _check(model: nn.Module, program: Program, size: int, out: Path) -> None:
    """Raise UserError if the program and the model compute different logits for batches of random images."""
    for batch in CHECKED_BATCHES:
        expected, found = _run(model, batch, size), _run(program, batch, size)
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if found.shape != expected.shape or not error <= TOLERANCE:
            raise UserError(
                f"{out}: not written, because the exported model computes other logits (relative difference "
                f"{error:.2g}, at most {TOLERANCE:g} is allowed); export without --fuse, or to another format"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PyTorch's warnings about its own code, and about torchvision's operators, which are not used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.inference_mode()
def _run(program: Program, batch: int, size: int) -> Tensor:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    return program(images)
