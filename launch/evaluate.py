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
from typing import Annotated, Any, Literal

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import tyro
from annotated_types import Interval
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fat
from fat.kernels.prefill.work import evaluation
from launch.checkpoint import CheckpointFolder
from launch.data_recipe import CropPct, DataRecipe, ModelSide
from launch.kernel_check import check_kernels
from launch.loss import count_correct
from launch.masters import AVERAGE
from launch.saved_run import RECIPE_NAME, read_saved_run
from launch.world import World, connect, run_command
from pipeline.augment.recipe import AugmentRecipe
from pipeline.loader import EvalLoader, LoaderOptions
from pipeline.plan import EvalPlan
from shards.errors import UserError
from shards.memory import check_memory
from shards.output import check_output, write_output
from shards.ranges import check_ranges
from shards.redact import printable

WORST_SHOWN = 5


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run, a checkpoint or a weights file."""

    model: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), weights file (.safetensors, or the released layout)."""
    data: str | None = None
    """Shard set, a folder or a URL. None = $FAT_DATA, else ./imagenet-shards."""
    set_digest: str | None = None
    """xxh3=HEX or sha256=HEX that the set's dataset.json must have (printed by 'pipeline info'); the same as #xxh3=HEX
    behind the set's location."""
    split: str = "val"
    """Split to evaluate."""
    size: ModelSide | None = None
    """Side of the images in pixels. None = the run's, else 224."""
    crop_pct: CropPct | None = None
    """Share of the short side that is looked at. None = the run's, else 0.875."""
    batch: Annotated[int, Interval(ge=1, le=65536)] = 128
    """Images per rank and step."""
    limit: Annotated[int, Interval(ge=1, le=10**12)] | None = None
    """Only the first N images."""
    average: bool = False
    """The run's moving average instead of its weights."""
    fuse: bool = False
    """Fold BatchNorm into the convolutions first (fat.fuse)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto = bf16 autocast on GPUs, fp32 on CPUs."""
    json: Path | None = None
    """Also write the figures, per class too, as JSON."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(command: Evaluate) -> dict[str, Any] | None:
    """Run the evaluation; collective. Rank 0 gets samples, top1, top5, loss (shares) and per-class top-1.

    Raises:
        UserError: no such model or data, or they do not fit.
    """
    if command.json is not None:
        check_output(command.json, "--json")
    world = connect()
    dataset = DataRecipe(data=command.data, set_digest=command.set_digest).open()
    samples = dataset.split(command.split).samples
    samples = samples if command.limit is None else min(samples, command.limit)
    model, data = load_model(command)
    size = command.size or data.size
    _check_memory(command, size, world)
    if model.config.num_classes < len(dataset.manifest.classes):
        raise UserError(
            f"{command.model}: a model of {model.config.num_classes} classes, {dataset.path} has "
            f"{len(dataset.manifest.classes)}; give the data set that it was trained on"
        )
    model = model.eval().to(world.device)
    if command.fuse:
        model = fat.fuse(model)
    bf16 = command.precision == "bf16" or (command.precision == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    passes = [evaluation(model, (command.batch, 3, size, size), dtype=dtype)]
    check_kernels(model, world, size=size, dtype=dtype, gradients=False, passes=passes)
    normal = AugmentRecipe()
    loader = EvalLoader(
        dataset,
        EvalPlan(samples, batch=command.batch, world=world.size, rank=world.rank),
        size=size,
        crop_pct=command.crop_pct or data.crop_pct,
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


def _check_memory(command: Evaluate, size: int, world: World) -> None:
    """Compare what the images of a batch take, as float32, with what there is."""
    needed = 4.0 * 3 * size**2 * command.batch
    what, remedy = f"--batch {command.batch}, --size {size}", "use a smaller --batch"
    if world.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(world.device)
        check_memory(what, needed, remedy, available=total, of="this GPU")
    else:
        check_memory(what, needed * world.local_size, remedy)


def load_model(command: Evaluate) -> tuple[fat.FAT, DataRecipe]:
    """Load the model, and the `data` section of the recipe that it was trained with (defaults if unknown).

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
            return fat.load_model(path), DataRecipe()
        found, complaints = CheckpointFolder(path / "checkpoints").newest()
        for complaint in complaints:
            print(f"warning: {printable(complaint)}", file=sys.stderr)
        if found is None:
            raise UserError(f"{path}: no whole checkpoint in it; give a run folder (--out of the training)")
        saved = read_saved_run(path)
        state = found.load()
        values = {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}
        if command.average:
            average = {k.removeprefix(f"{AVERAGE}/"): v for k, v in state.items() if k.startswith(f"{AVERAGE}/")}
            if not average:
                raise UserError(f"{found.path}: trained without a moving average (--ema); leave --average out")
            values |= average
        variant = saved.recipe.model.variant
        if "head.bias" not in values:
            raise UserError(f"{found.path}: holds no classifier (head.bias); give another run folder")
        model = fat.create_model(f"fat_{variant}", num_classes=len(values["head.bias"]))
        _fill(model, values, found.path, f"fat_{variant}, the model of {path / RECIPE_NAME}")
    except (ValueError, OSError) as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return model, saved.recipe.data


def _fill(model: fat.FAT, values: dict[str, torch.Tensor], checkpoint: Path, what: str) -> None:
    """Load a checkpoint's tensors.

    Raises:
        UserError: the tensors do not fit the model.
    """
    expected = model.state_dict()
    unlike = [
        n
        for n in {**expected, **values}
        if n not in values or n not in expected or values[n].shape != expected[n].shape
    ]
    if unlike:
        raise UserError(
            f"{checkpoint}: {len(unlike)} tensors do not fit {what}, such as {unlike[0]}; restore recipe.json, or "
            "evaluate the weights file"
        )
    model.load_state_dict(values)


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
        table.add_row(Text(printable(name)), f"{top1:.2%}", str(result["classes"][name]["samples"]))
    console.print(table)


def main() -> int:
    """The command line; returns the exit status."""

    def run() -> int:
        command = tyro.cli(Evaluate, description=__doc__)
        result = evaluate(command)
        if result is not None:
            show(result)
            if command.json is not None:
                write_output(command.json, (json.dumps(result, indent=1) + "\n").encode(), "--json")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
