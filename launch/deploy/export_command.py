"""`pipeline export`: write a trained model as ONNX, torch.export or safetensors file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from shards.option_help import default
from shards.progress import Phases
from shards.redact import printable


@dataclass(frozen=True)
class Export:
    """Export a trained model for other programs, with class names and preprocessing in the file's metadata.

    The file is compared with the model before it is written. Example: pipeline export runs/fat --to onnx
    """

    weights: Positional[Annotated[Path, arg(metavar="WEIGHTS")]]
    """Weights file, or run folder. The best weights of a run are used: of the trained ones and their moving average
    (EMA), those with the higher accuracy; without an evaluation, the last ones."""
    model: Annotated[str | None, default("that of the weights")] = None
    """Name of the model, as in training. Required for package.module:function, whose code a weights file alone must not
    choose, and for files of other programs that do not contain a FAT."""
    to: Literal["onnx", "torch-export", "safetensors"] = "onnx"
    """Format of the file."""
    out: Annotated[Path | None, default("the model's name in the current folder, such as fat_b0.onnx")] = None
    """File to write: .onnx, .pt2 (torch-export) or .safetensors. Only an earlier export is replaced."""
    ema: bool = False
    """Export the EMA of a run, even if its weights are better."""
    fuse: bool = False
    """Fold BatchNorm into the convolutions of a FAT first (fat.fuse): fewer operations, the same logits up to rounding.
    onnxruntime does this itself, so it is not faster there. Not for safetensors, which holds the trained weights."""

    def run(self) -> int:
        from launch.deploy.export import SUFFIXES, check_export, export_file
        from launch.deploy.weights_file import find_weights, load_weights_file
        from launch.models.specification import ModelSpec

        with Phases("export") as progress:
            path = find_weights(self.weights, ema=self.ema)
            if self.out is not None:
                check_export(path, self.out, self.to)
            progress.begin(f"loading {path}")
            model, info, notes = load_weights_file(path, None if self.model is None else ModelSpec.parse(self.model))
            name = "model" if info.model is None else info.model.rpartition("/")[2]
            out = self.out or Path(f"{name}{SUFFIXES[self.to]}")
            check_export(path, out, self.to)
            for note in notes:
                progress.note(f"note: {note}")
            export_file(model, info, out, self.to, fuse=self.fuse, progress=progress)
        print(printable(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)"), file=sys.stderr)
        return 0
