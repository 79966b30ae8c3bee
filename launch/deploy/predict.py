"""`pipeline predict`: classify images with a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from tyro.conf import Positional, arg

from shards.errors import UserError
from shards.files.output import check_output, is_standard_output, write_output
from shards.option_help import default
from shards.progress import Progress
from shards.ranges import CropPct, ModelSide, check_ranges
from shards.redact import printable

if TYPE_CHECKING:
    import torch

    import fat
    from launch.deploy.classify import Result

MAX_TABLE = 40  # images in the table on a terminal; more are printed as lines


@dataclass(frozen=True)
class Predict:
    """Classify images with a trained model, as the evaluation of the training does.

    Example: pipeline predict runs/fat photos/ --top 3
    """

    weights: Positional[Annotated[Path, arg(metavar="WEIGHTS")]]
    """Weights file, or run folder. The best weights of a run are used: of the trained ones and their moving average
    (EMA), those with the higher accuracy; without an evaluation, the last ones."""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)")]]
    """Image files, folders (with all folders in them), and quoted patterns such as 'photos/*.jpg'. - reads an image,
    or the names of files (one per line, or separated by NUL), from standard input."""
    model: Annotated[str | None, default("that of the weights")] = None
    """Name of the model, as in training. Required for package.module:function, whose code a weights file alone must not
    choose, and for files of other programs that do not contain a FAT."""
    top: Annotated[int, Interval(ge=1, le=1000)] = 5
    """Number of classes to show per image, most probable first."""
    json: Annotated[Path | None, default("not written")] = None
    """JSON Lines file to write: path, and folder, name and probability of each class; - writes it to standard output
    instead of the text."""
    ema: bool = False
    """Use the EMA of a run, even if its weights are better."""
    device: str = "auto"
    """Device of the model, such as cpu or cuda:1. auto: a GPU if there is one."""
    batch: Annotated[int, Interval(ge=1, le=65536)] = 64
    """Images per forward pass. Use a smaller number if memory runs out."""
    threads: Annotated[Annotated[int, Interval(ge=1, le=512)] | None, default("one per available CPU core")] = None
    """Threads that decode images."""
    size: Annotated[ModelSide | None, default("that of the run's evaluations, else 224")] = None
    """Height and width of the model's input images in pixels."""
    crop_pct: Annotated[CropPct | None, default("that of the training, else 0.875")] = None
    """Fraction of the short side that the center crop keeps."""
    apply_orientation: bool = False
    """Rotate images as their EXIF orientation states. Training and evaluation do not."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self) -> int:
        import fat
        from launch.deploy.classify import Classifier
        from launch.deploy.images import find_images
        from launch.deploy.weights_file import find_weights, load_weights_file
        from launch.models.specification import ModelSpec
        from shards.cores import cores

        if self.json is not None:
            check_output(self.json, "--json")
        if not self.images:
            raise UserError("no images specified: pipeline predict WEIGHTS IMAGE [IMAGE ...]")
        device = choose_device(self.device)
        path = find_weights(self.weights, ema=self.ema)
        images, others = find_images(self.images, sys.stdin.buffer)
        model, info, notes = load_weights_file(path, None if self.model is None else ModelSpec.parse(self.model))
        try:
            transform = fat.ImageTransform.of(info, size=self.size, crop_pct=self.crop_pct)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        step = "" if info.step is None else f", step {info.step:,}"
        _note(f"{path}{step}: size {transform.size}, crop {transform.crop_pct:g}, on {device}")
        for note in notes:
            _note(f"note: {note}")
        if others:
            _note(f"note: the folders also contain files that are not images: {others:,}")
        classifier = Classifier(
            model=model.to(device),
            transform=transform,
            device=device,
            top=self.top,
            batch=self.batch,
            threads=self.threads or cores(),
            apply_orientation=self.apply_orientation,
        )
        with fat.kernels.use("off"):  # they gain nothing here, because decoding takes longer, and need a self-check
            return self._report(classifier(images), len(images), ClassTable(info.classes))

    def _report(self, results: Iterator[Result], images: int, classes: ClassTable) -> int:
        """Write the results; return the exit status."""
        as_json = is_standard_output(self.json)
        table = None if as_json or images > MAX_TABLE or not sys.stdout.isatty() else classes.empty_table()
        lines: list[str] = []
        skipped = rotated = 0
        with Progress("classifying", images) as progress:
            for number, result in enumerate(results, 1):
                if result.fault is not None:
                    skipped += 1
                    _note(f"{result.name}: skipped: {result.fault}")
                else:
                    rotated += result.orientation != 1
                    if self.json is not None:
                        lines.append(json.dumps(classes.to_dict(result)))
                    if as_json:
                        print(lines.pop())
                    elif table is not None:
                        classes.add_rows(table, result)
                    else:
                        print(classes.line(result))
                progress.update(number)
        if table is not None and table.rows:
            from rich.console import Console

            Console().print(table)
        if self.json is not None and not as_json:
            write_output(self.json, "".join(f"{line}\n" for line in lines).encode(), "--json")
            _note(f"wrote {self.json}")
        if rotated and not self.apply_orientation:
            _note(
                f"note: {rotated:,} of {images:,} images have an EXIF orientation; as in training, it is not applied "
                "(--apply-orientation applies it)"
            )
        if skipped:
            _note(f"{skipped:,} of {images:,} images skipped")
        return 1 if skipped else 0


class ClassTable:
    """Formats results with the names of the classes.

    Args:
        classes: classes of the model's outputs; None: unknown.
    """

    def __init__(self, classes: fat.ClassList | None) -> None:
        import fat

        known = classes is not None and classes.folders is not None
        self._folders: Sequence[str] = classes.folders or () if classes is not None else ()
        self._names: Sequence[str | None] = (classes.names or ()) if classes is not None and known else ()
        self._labels = fat.class_names(classes, len(self._folders))

    def to_dict(self, result: Result) -> dict[str, Any]:
        """Return the JSON object of a result. Outputs without a class have no folder."""
        top = [
            {
                "output": output,
                "folder": self._folders[output] if output < len(self._folders) else None,
                "name": self._names[output] if output < len(self._names) else None,
                "probability": probability,
            }
            for output, probability in zip(result.outputs, result.probabilities, strict=True)
        ]
        return {"path": result.name, "classes": top}

    def line(self, result: Result) -> str:
        """Return a result as one line of text."""
        scores = (f"{self._label(o)} {p:.2%}" for o, p in zip(result.outputs, result.probabilities, strict=True))
        return printable(f"{result.name}: {', '.join(scores)}")

    def empty_table(self) -> Any:
        """Return a rich table without rows."""
        from rich.table import Table

        return Table("image", "class", "probability")

    def add_rows(self, table: Any, result: Result) -> None:
        """Append a row per class; only the first has the name of the image."""
        from rich.text import Text

        for number, (output, probability) in enumerate(zip(result.outputs, result.probabilities, strict=True)):
            name = "" if number else printable(result.name)
            table.add_row(Text(name), Text(printable(self._label(output))), f"{probability:.2%}")

    def _label(self, output: int) -> str:
        return self._labels[output] if output < len(self._labels) else f"output {output}"


def choose_device(name: str) -> torch.device:
    """Return the device of this name; for auto, a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= available:
        raise UserError(f"--device {name}: there is no such device; expected auto, cpu, cuda or cuda:N")
    return device


def _note(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
