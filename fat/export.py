"""Export a model with `torch.export` or to ONNX, for any batch size and image size."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from fat.model import MIN_SIZE, FATFeatures, Trunk

EXAMPLE_SIZE = 64  # side of the traced images in pixels; the graph accepts other sizes too


def export_program(model: nn.Module, *, size: int | None = None) -> ExportedProgram:
    """Export the model in eval mode with `torch.export`: images float [B, in_chans, H, W] -> the model's output.

    The program accepts any batch size and H, W of 33 or more; at 32, where the last feature map is one pixel, PyTorch
    would need another graph. Attention is exported in the variant that is fast on the model's device.

    Args:
        model: a FAT, or another model for RGB images.
        size: H and W that the program accepts. None: any, which other models may not support.
    """
    parameter = next(model.parameters())
    channels = model.config.in_chans if isinstance(model, Trunk) else 3
    images = parameter.new_zeros(2, channels, size or EXAMPLE_SIZE, size or EXAMPLE_SIZE)
    return export(copy.deepcopy(model).eval(), (images,), dynamic_shapes=(_dynamic_shapes(size),))


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    verbose: bool = True,
) -> None:
    """Write the model in eval mode to an ONNX file.

    The input is `images`; the output is `logits`, or `map4`, `map8`, `map16` and `map32` of a feature extractor. Batch
    size, height and width are dynamic as in `export_program`. Requires the packages onnx and onnxscript. For inference
    in fp32, export `fuse(model)`, which has fewer operations.

    Args:
        size: see `export_program`.
        metadata: entries of the file's `metadata_props`, which onnxruntime returns as `custom_metadata_map`.
        verbose: print what is being done to standard error, because it takes up to a minute.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """

    def say(text: str) -> None:
        if verbose:
            print(f"ONNX export: {text}", file=sys.stderr, flush=True)

    if not Path(path).parent.is_dir():  # before the work
        raise FileNotFoundError(f"{Path(path).parent}: no such folder; create it first")
    names = [f"map{r}" for r in model.feature_info.reduction()] if isinstance(model, FATFeatures) else ["logits"]
    say("1 of 3, tracing the model")
    program = export_program(copy.deepcopy(model).cpu(), size=size)
    say("2 of 3, translating the operations (the longest part)")
    translated = torch.onnx.export(
        program,
        (),
        input_names=["images"],
        output_names=names,
        dynamic_shapes=(_dynamic_shapes(size),),  # only names the dimensions: the program is already dynamic
        dynamo=True,
        verbose=False,
    )
    say("3 of 3, writing the file")
    assert translated is not None
    translated.model.metadata_props.update(metadata or {})
    translated.save(path, external_data=False)
    say(f"wrote {path} ({Path(path).stat().st_size / 1e6:,.1f} MB)")


def _dynamic_shapes(size: int | None) -> dict[int, Any]:
    sides = {2: Dim("height", min=MIN_SIZE + 1), 3: Dim("width", min=MIN_SIZE + 1)}
    return {0: Dim("batch"), **(sides if size is None else {})}
