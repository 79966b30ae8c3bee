"""What a run's last evaluation got wrong: confusions of classes, accuracy per class, the hardest images."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.monitor.confusion import class_results, confusion_matrix, confusions
from launch.run.evaluation_record import EvaluationRecord

WORST = 10  # confusions that are listed
THUMBNAIL_BYTES = 1_000_000  # of all thumbnails of a report, as base64
_BINS = 20  # of the distribution of accuracies


@dataclass(frozen=True)
class Confusion:
    label: str
    prediction: str
    count: int
    fraction: float
    """Of the images of the class."""


@dataclass(frozen=True)
class ClassAccuracy:
    name: str
    correct: int
    samples: int

    @property
    def top1(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True)
class Image:
    id: int
    label: str
    prediction: str
    loss: str
    source: str
    """data: URI, or "" if there is no thumbnail."""


@dataclass(frozen=True)
class Mistakes:
    step: int | None
    weights: str
    samples: int
    wrong: int
    names: list[str]
    matrix: list[list[int]]
    """Images of each class (row) by prediction (column); empty if there are too many classes."""
    confusions: list[Confusion]
    classes: list[ClassAccuracy]
    """Classes with images, from the lowest accuracy to the highest."""
    distribution: list[int]
    """Number of classes in equal ranges of accuracy, from 0 to 100 %; empty if there are few classes."""
    images: list[Image]


def mistakes(record: EvaluationRecord, classes: Sequence[str] | None) -> Mistakes:
    """Count the mistakes of an evaluation.

    Args:
        classes: names in the order of the model's outputs; outputs without a name are shown as numbers.
    """
    outputs = record.info.outputs
    names = [*(classes or ())[:outputs]]
    names += [f"class {number}" for number in range(len(names), outputs)]
    results = class_results(record.labels, record.predictions)
    samples = {result.label: result.samples for result in results}
    matrix = confusion_matrix(record.labels, record.predictions, len(classes or ()))
    pairs = confusions(record.labels, record.predictions, WORST)
    bins, _ = np.histogram([result.accuracy for result in results], _BINS, (0, 1))
    return Mistakes(
        step=record.step,
        weights=record.weights,
        samples=len(record.labels),
        wrong=int((record.labels != record.predictions).sum()),
        names=names[: len(matrix)] if matrix is not None else [],
        matrix=matrix.tolist() if matrix is not None else [],
        confusions=[
            Confusion(names[pair.label], names[pair.prediction], pair.count, pair.count / samples[pair.label])
            for pair in pairs
        ],
        classes=[ClassAccuracy(names[result.label], result.correct, result.samples) for result in results],
        distribution=bins.tolist() if matrix is None else [],
        images=_images(record, names),
    )


def _images(record: EvaluationRecord, names: Sequence[str]) -> list[Image]:
    found, left = [], THUMBNAIL_BYTES
    for image in record.hardest:
        source = "data:image/jpeg;base64," + base64.b64encode(image.jpeg).decode() if image.jpeg else ""
        source = source if len(source) <= left else ""
        left -= len(source)
        loss = f"{image.loss:.2f}" if math.isfinite(image.loss) else "not finite"
        found.append(Image(image.id, names[image.label], names[image.prediction], loss, source))
    return found
