"""Accuracy of any checkpoint or weights file, each image exactly once at any world size.

python launch/evaluate.py runs/fat --data imagenet-shards/
accelerate launch --multi_gpu --num_processes 8 launch/evaluate.py weights.safetensors --fuse
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

import fat
from fat.kernels.prefill.work import evaluation
from launch.checkpoint import CheckpointFolder
from launch.kernel_check import check_kernels
from launch.loss import count_correct
from launch.masters import AVERAGE
from launch.recipe import DataRecipe
from launch.run_folder import saved_recipe
from launch.world import World, connect, run_command
from pipeline.augment.recipe import AugmentRecipe
from pipeline.loader import CROP_PCT, EvalLoader, LoaderOptions
from pipeline.plan import EvalPlan
from shards.errors import UserError

WORST_SHOWN = 5


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run, a checkpoint or a weights file."""

    model: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), weights file (.safetensors, or the released layout)."""
    data: str | None = None
    """Shard set, a folder or a URL. None = $FAT_DATA, else ./imagenet-shards."""
    split: str = "val"
    """Split to evaluate."""
    size: int | None = None
    """Side of the images in pixels. None = the run's, else 224."""
    crop_pct: float | None = None
    """Share of the short side that is looked at. None = the run's, else 0.875."""
    batch: int = 128
    """Images per rank and step."""
    limit: int | None = None
    """Only the first N images."""
    average: bool = False
    """The run's moving average instead of its weights."""
    fuse: bool = False
    """Fold BatchNorm into the convolutions first (fat.fuse)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto = bf16 autocast on GPUs, fp32 on CPUs."""
    json: Path | None = None
    """Also write the figures, per class too, as JSON."""


def evaluate(command: Evaluate) -> dict[str, Any] | None:
    """Run the evaluation; collective. Rank 0 gets samples, top1, top5, loss (shares) and per-class top-1.

    Raises:
        UserError: no such model or data, or they do not fit.
    """
    world = connect()
    dataset = DataRecipe(data=command.data).open()
    if command.crop_pct is not None and not 0 < command.crop_pct <= 1:
        raise UserError(f"--crop-pct {command.crop_pct}: between 0 and 1")
    model, data = load_model(command)
    if model.config.num_classes < len(dataset.manifest.classes):
        raise UserError(
            f"{command.model}: a model of {model.config.num_classes} classes, {dataset.path} has "
            f"{len(dataset.manifest.classes)}; give the data set that it was trained on"
        )
    model = model.eval().to(world.device)
    if command.fuse:
        model = fat.fuse(model)
    size = command.size or data.get("size", 224)
    bf16 = command.precision == "bf16" or (command.precision == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    passes = [evaluation(model, (command.batch, 3, size, size), dtype=dtype)]
    check_kernels(model, world, size=size, dtype=dtype, gradients=False, passes=passes)
    samples = dataset.split(command.split).samples
    samples = samples if command.limit is None else max(1, min(samples, command.limit))
    normal = AugmentRecipe()
    loader = EvalLoader(
        dataset,
        EvalPlan(samples, batch=command.batch, world=world.size, rank=world.rank),
        size=size,
        crop_pct=command.crop_pct or data.get("crop_pct", CROP_PCT),
        mean=normal.mean,
        std=normal.std,
        device=world.device,
        dtype=dtype,
        split=command.split,
        options=LoaderOptions(),
    )
    with loader:
        counts = count(model, loader, len(dataset.manifest.classes), world, bf16)
    if not world.is_main:
        return None
    seen, top1, top5, loss = counts.sum(dim=0).tolist()
    classes = {
        entry.title: {"samples": int(row[0]), "top1": row[1] / row[0] if row[0] else None}
        for entry, row in zip(dataset.manifest.classes, counts.tolist(), strict=True)
    }
    return {"samples": int(seen), "top1": top1 / seen, "top5": top5 / seen, "loss": loss / seen, "classes": classes}


def load_model(command: Evaluate) -> tuple[fat.FAT, dict[str, Any]]:
    """The model, and the `data` section of the recipe that it was trained by (empty where nobody says).

    Raises:
        UserError: neither a run folder with a whole checkpoint nor a readable weights file.
    """
    path = command.model
    if not path.exists():
        raise UserError(f"{path}: no such run folder or weights file")
    try:
        if path.is_file():
            if command.average:
                raise UserError(f"{path}: --average needs a run folder; or give its weights-ema.safetensors")
            return fat.load_model(path), {}
        found, complaints = CheckpointFolder(path / "checkpoints").newest()
        for complaint in complaints:
            print(f"warning: {complaint}", file=sys.stderr)
        if found is None:
            raise UserError(f"{path}: no whole checkpoint in it; give a run folder (--out of the training)")
        recipe = saved_recipe(path)
        state = found.load()
        values = {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}
        if command.average:
            average = {k.removeprefix(f"{AVERAGE}/"): v for k, v in state.items() if k.startswith(f"{AVERAGE}/")}
            if not average:
                raise UserError(f"{found.path}: trained without a moving average (--ema); leave --average out")
            values |= average
        model = fat.create_model(f"fat_{recipe['model']['variant']}", num_classes=len(values["head.bias"]))
        model.load_state_dict(values)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    return model, recipe["data"]


@torch.no_grad()
def count(model: torch.nn.Module, loader: EvalLoader, classes: int, world: World, bf16: bool) -> torch.Tensor:
    """Per class: samples, top-1 hits, top-5 hits, summed cross-entropy; float64 [classes, 4] over all ranks."""
    totals = torch.zeros(classes, 4, dtype=torch.float64, device=world.device)
    autocast = torch.autocast(world.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    for batch in loader:
        with autocast:
            logits = model(batch.images)
        totals.index_add_(0, batch.labels, count_correct(logits, batch))
    if world.size > 1:
        dist.all_reduce(totals)
    return totals


def show(result: dict[str, Any]) -> None:
    """The figures as text, with the classes that fare worst."""
    console = Console(highlight=False)
    console.print(
        f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f} "
        f"over {result['samples']} images"
    )
    worst = sorted((c["top1"], name) for name, c in result["classes"].items() if c["samples"])[:WORST_SHOWN]
    table = Table("class", "top-1", "images", title="hardest classes", title_justify="left")
    for top1, name in worst:
        table.add_row(name, f"{top1:.2%}", str(result["classes"][name]["samples"]))
    console.print(table)


def main() -> int:
    """The command line; returns the exit status."""
    command = tyro.cli(Evaluate, description=__doc__)

    def run() -> int:
        result = evaluate(command)
        if result is not None:
            show(result)
            if command.json is not None:
                command.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
