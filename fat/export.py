"""Deployment: a model as a graph of its own, for any batch and any image size."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram, export

from fat.model import MIN_SIZE, FATFeatures, Trunk

EXAMPLE_SIZE = 64  # of the images that are traced; the graph holds for any
FREE = {0: Dim("batch"), 2: Dim("height", min=MIN_SIZE + 1), 3: Dim("width", min=MIN_SIZE + 1)}


def export_program(model: Trunk) -> ExportedProgram:
    """The model as a `torch.export` program in eval mode: images float [B, in_chans, H, W] -> what the model returns.

    Any batch and any H, W of 33 or more (a map of one pixel would be a graph of its own). The graph holds the attention
    that is fast on the device where the model lies.
    """
    parameter = next(model.parameters())
    images = parameter.new_zeros(2, model.config.in_chans, EXAMPLE_SIZE, EXAMPLE_SIZE)
    return export(copy.deepcopy(model).eval(), (images,), dynamic_shapes=(FREE,))


def export_onnx(model: Trunk, path: str | Path) -> None:
    """Writes the model in eval mode as one ONNX file: input `images`, output `logits` or `map4` ... `map32`.

    Batch, height and width are as free as in `export_program`. Needs the packages onnx and onnxscript. For inference in
    fp32 export `fuse(model)`, which has fewer operations.
    """
    names = [f"map{r}" for r in model.feature_info.reduction()] if isinstance(model, FATFeatures) else ["logits"]
    torch.onnx.export(
        export_program(copy.deepcopy(model).cpu()),
        (),
        path,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=(FREE,),  # for their names; the program has them
        dynamo=True,
        external_data=False,
        verbose=False,
    )
