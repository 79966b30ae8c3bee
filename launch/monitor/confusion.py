"""Which classes a model confuses, computed from the labels and predictions of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.integer]
"""Class numbers, [samples]."""

MAX_MATRIX = 30
"""Largest number of classes whose confusion matrix is readable as a picture."""


@dataclass(frozen=True)
class Confusion:
    """A pair of classes, and how often the model predicted the second for samples of the first."""

    label: int
    prediction: int
    count: int


@dataclass(frozen=True)
class ClassResult:
    """Result of one class that has samples."""

    label: int
    samples: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


def confusions(labels: Classes, predictions: Classes, limit: int) -> list[Confusion]:
    """Return the `limit` most frequent pairs of a label and a wrong prediction, in descending order of count."""
    wrong = labels != predictions
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [Confusion(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order.tolist()]


def class_results(labels: Classes, predictions: Classes) -> list[ClassResult]:
    """Return the results of all classes that have samples, lowest accuracy first."""
    samples = np.bincount(labels)
    correct = np.bincount(labels[labels == predictions], minlength=len(samples))
    found = [ClassResult(label, int(samples[label]), int(correct[label])) for label in np.flatnonzero(samples).tolist()]
    return sorted(found, key=lambda result: (result.accuracy, -result.samples, result.label))


def confusion_matrix(labels: Classes, predictions: Classes, classes: int) -> NDArray[np.int64] | None:
    """Return how often each class (row) was predicted as each class (column), int64 [n, n].

    n is `classes`, or larger if the model predicted an output without a class. None if n is above `MAX_MATRIX`.
    """
    size = max(classes, int(labels.max(initial=-1)) + 1, int(predictions.max(initial=-1)) + 1)
    if size > MAX_MATRIX:
        return None
    pairs = labels.astype(np.int64) * size + predictions
    return np.bincount(pairs, minlength=size * size).reshape(size, size)
