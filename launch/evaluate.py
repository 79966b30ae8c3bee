"""Evaluate the accuracy of a run, a checkpoint or a weights file. Every image is counted once at any world size.

python launch/evaluate.py runs/fat --data imagenet-shards/

accelerate launch --multi_gpu --num_processes 8 launch/evaluate.py weights-last.safetensors --fuse
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

# Python puts a script's folder, launch/, first on the import path; imports need the project's root there instead.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.machine.simple_launcher import LAUNCHER
from launch.machine.standard_streams import open_missing_streams
from shards.interrupt import exit_on_interrupt

if __name__ == "__main__":
    open_missing_streams()  # before the pipe for signals, which would get the descriptor of a closed stream
    LAUNCHER.attach()
    exit_on_interrupt(LAUNCHER.exit)  # during imports, which take seconds, and during the evaluation

import torch
import torch.distributed as dist
import tyro
from annotated_types import Interval

import fat
from fat.kernels.prefill.work import evaluation
from launch.class_mapping import map_classes
from launch.config.data import DataConfig
from launch.config.engine import ParallelConfig
from launch.engine.execution import kernels_from_environment, zero_and_precision
from launch.engine.kernel_check import check_kernels
from launch.engine.loss import SampleResults, evaluate_batches
from launch.engine.memory import check_device_memory
from launch.evaluated_model import load_model, training_data
from launch.evaluation_results import show, summarize
from launch.machine.world import World, connect, run_command
from launch.models.create import outputs_of
from launch.models.specification import ModelSpec
from launch.run.evaluation_record import EvaluationInfo, EvaluationRecord
from pipeline.batch import Batch
from pipeline.loader import EvalLoader, LoaderOptions
from pipeline.plan import EvalPlan
from shards.command import check_options, main_program, option_names
from shards.errors import UserError
from shards.files.output import check_output, is_standard_output, write_output
from shards.option_help import default
from shards.progress import Progress
from shards.ranges import CropPct, ModelSide, check_ranges
from shards.redact import printable

PROG = "launch/evaluate.py"


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run, a checkpoint or a weights file."""

    weights: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="WEIGHTS")]]
    """Run folder (its newest checkpoint is evaluated, unless --best is set), checkpoint folder, or weights
    file: .safetensors, or a checkpoint written by torch.save, including those of other training programs."""
    model: Annotated[str | None, default("that of the weights")] = None
    """Name of the model, as in training. Required for package.module:function, whose code a weights file alone must not
    choose, and for files of other programs that do not contain a FAT."""
    data: Annotated[str | None, default("that of the run's training, else $FAT_DATA, else ./imagenet-shards")] = None
    """Shard set: a folder or a URL."""
    set_digest: Annotated[str | None, default("not checked")] = None
    """Expected digest of the set's dataset.json, as xxh3=HEX or sha256=HEX ('pipeline info' prints it). The evaluation
    does not start if the digest differs. Appending #xxh3=HEX to --data has the same effect."""
    classes_subset: Annotated[str | None, default("without --data as in the run's training, else all classes")] = None
    """Evaluate only images of these classes, as in training: names separated by commas, @FILE, or the first N."""
    split: str = "val"
    """Split to evaluate."""
    cache: Annotated[Path | None, default("$FAT_CACHE, else the temporary folder")] = None
    """Folder on a local disk in which the shards of a remote set are staged."""
    size: Annotated[ModelSide | None, default("that of the run's evaluations, else 224")] = None
    """Height and width of the model's input images in pixels."""
    crop_pct: Annotated[CropPct | None, default("that of the training, else 0.875")] = None
    """Fraction of the short side that the center crop keeps: the image is resized to size / crop_pct and cropped to
    size."""
    batch: Annotated[int, Interval(ge=1, le=65536)] = 128
    """Images per rank and step. Use a smaller number if the evaluation runs out of memory."""
    limit: Annotated[Annotated[int, Interval(ge=1, le=10**12)] | None, default("all images")] = None
    """Evaluate only the first N images of the split."""
    best: bool = False
    """Evaluate the run's best weights instead of its newest checkpoint: of the trained ones and their moving average,
    those with the higher accuracy; with --ema, the best moving average."""
    ema: bool = False
    """Evaluate the run's EMA, the moving average of its weights, instead of the weights."""
    fuse: bool = False
    """Fold BatchNorm into the convolutions before the evaluation (fat.fuse)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 = autocast to bfloat16; fp32 = float32; auto = bf16 on GPUs, fp32 on CPUs."""
    json: Annotated[Path | None, default("not written")] = None
    """JSON file to write, with the results in total and per class (by folder name), and the most frequent
    confusions; - writes it to standard output instead of the table."""
    predictions: Annotated[Path | None, default("not written")] = None
    """.safetensors file to write, with id, label, prediction, loss and probabilities of each sample."""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(command: Evaluate, data: DataConfig) -> dict[str, Any] | None:
    """Run the evaluation. Collective.

    Returns:
        On rank 0: samples, top1 and top5 (fractions), loss, the same per class folder, and confusions; None on other
        ranks.

    Raises:
        UserError: model or data do not exist, or the data set has other classes than the model.
    """
    _check_outputs(command)
    world = connect()
    dataset = data.open(local_ranks=world.local_size)
    if command.split not in dataset.manifest.splits and "train" in dataset.manifest.splits:
        known = ", ".join(sorted(dataset.manifest.splits))
        raise UserError(f"{dataset.path}: no split '{command.split}' (it has: {known}); use --split train")
    samples = dataset.split(command.split).samples
    samples = samples if command.limit is None else min(samples, command.limit)
    given = None if command.model is None else ModelSpec.parse(command.model)
    found = load_model(command.weights, average=command.ema, best=command.best, given=given)
    entries = dataset.manifest.classes
    classes = fat.ClassList.of([entry.folder for entry in entries], [entry.name for entry in entries])
    model = found.model
    size, crop_pct = command.size or found.size, command.crop_pct or found.crop_pct
    if command.fuse and not isinstance(model, fat.FAT):
        raise UserError(f"--fuse: folds BatchNorm of a FAT, but the model is {given or found.info.model}; omit --fuse")
    mapped, class_notes = map_classes(
        found.info.classes, outputs_of(model, size), classes, model=command.weights, data=dataset.path
    )
    notes = [*found.notes, *class_notes]
    if world.is_main:
        step = "" if found.info.step is None else f", step {found.info.step:,}"
        kind = ", moving average" if found.average else ""
        data_set = f"{samples:,} images of split '{command.split}' of {dataset.path}, size {size}, crop {crop_pct:g}"
        header = sys.stderr if is_standard_output(command.json) else sys.stdout
        print(printable(f"{found.source}{step}{kind}: {data_set}"), file=header, flush=True)
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr, flush=True)
    images = 4.0 * 3 * size**2 * command.batch  # bytes of the float32 images
    check_device_memory(f"--batch {command.batch}, --size {size}", images, "use a smaller --batch", world)
    model = model.eval().to(world.device)
    if command.fuse and isinstance(model, fat.FAT):
        model = fat.fuse(model)
    _, precision = zero_and_precision(ParallelConfig(precision=command.precision), world.device, ranks=world.size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    passes = [evaluation(model, (command.batch, 3, size, size), dtype=dtype)]
    check_kernels(model, world, sizes=[size], dtype=dtype, gradients=False, passes=passes)
    loader = EvalLoader(
        dataset,
        EvalPlan(samples, batch=command.batch, world=world.size, rank=world.rank),
        size=size,
        crop_pct=crop_pct,
        mean=found.mean,
        std=found.std,
        device=world.device,
        dtype=dtype,
        split=command.split,
        options=LoaderOptions(decode_threads=world.cores),
    )
    outputs = None if mapped is None else torch.tensor(mapped, device=world.device)
    collected = SampleResults()
    counts = torch.zeros(len(entries), 4, dtype=torch.float64, device=world.device)
    with loader:
        batches = _with_progress(loader, samples, world)
        for batch in evaluate_batches(
            model, batches, device=world.device, precision=precision, outputs=outputs, samples=collected
        ):
            counts.index_add_(0, batch.labels, batch.counts)
    if world.size > 1:
        dist.all_reduce(counts)
    rows = collected.gather(world)
    if rows is None:
        return None
    info = EvaluationInfo(
        step=found.info.step,
        weights="average" if found.average else "weights",
        outputs=collected.outputs,
        split=command.split,
    )
    record = EvaluationRecord.of(rows, info)
    if command.predictions is not None:
        write_output(command.predictions, record.to_bytes(), "--predictions")
    return {
        "model": str(found.source),
        "step": found.info.step,
        "ema": found.average,
        "split": command.split,
        "size": size,
        "crop_pct": crop_pct,
        "notes": notes,
        **summarize(counts, record, entries),
    }


def _data(command: Evaluate) -> DataConfig:
    """Return the data options of the command; the data set is by default that of the run's training."""
    trained = training_data(command.weights) if command.data is None else None
    trained = trained or DataConfig(data=command.data)
    return DataConfig(
        data=trained.data,
        set_digest=command.set_digest or trained.set_digest,
        classes_subset=command.classes_subset or trained.classes_subset,
        cache=command.cache,
    )


def _check_outputs(command: Evaluate) -> None:
    """Raise UserError if an output file cannot be written, before the work."""
    if command.json is not None:
        check_output(command.json, "--json")
    if command.predictions is not None:
        check_output(command.predictions, "--predictions", (".safetensors",))


def _with_progress(loader: EvalLoader, samples: int, world: World) -> Iterator[Batch]:
    """Yield the batches of `loader`, and show how many of `samples` images all ranks have evaluated."""
    with Progress("evaluating", samples, shown=world.is_main) as progress:
        done = 0
        for batch in loader:
            yield batch
            done += len(batch.ids) * world.size  # the other ranks are as far
            progress.update(min(done, samples))


def main() -> int:
    """Run the command line; return the exit status."""

    @kernels_from_environment()
    def run() -> int:
        check_options(args, option_names(Evaluate), command=PROG)
        command = tyro.cli(Evaluate, prog=PROG, description=__doc__)
        result = evaluate(command, _data(command).with_environment(os.environ))
        if result is not None:
            if command.json is not None:
                write_output(command.json, (json.dumps(result, indent=1) + "\n").encode(), "--json")
            if not is_standard_output(command.json):
                show(result)
            for path in (command.json, command.predictions):
                if path is not None and not is_standard_output(path):
                    print(f"wrote {printable(path)}", file=sys.stderr)
        return 0

    args = sys.argv[1:]
    return LAUNCHER.run(lambda: main_program(lambda: run_command(run), args))


if __name__ == "__main__":
    sys.exit(main())
