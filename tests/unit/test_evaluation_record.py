"""The record of an evaluation: collected from batches, written, read back, and rejected if it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from launch.engine.loss import SampleResults, evaluate_batches
from launch.machine.world import World
from launch.monitor.confusion import class_results, confusion_matrix, confusions
from launch.run import evaluation_record
from launch.run.evaluation_record import (
    HARDEST,
    RECORD_NAME,
    EvaluationInfo,
    EvaluationRecord,
    read_evaluation,
    write_evaluation,
)
from pipeline.batch import Batch
from pipeline.plan import NO_SAMPLE, Position
from shards.errors import UserError

CLASSES = 6
CPU = World(0, 1, 0, 1, torch.device("cpu"))
JPEG = b"\xff\xd8\xff\xe0 a thumbnail"


def batch_of(ids: list[int], labels: list[int], logits: NDArray[np.float32]) -> Batch:
    """Return an evaluation batch whose images are the logits; rows without a sample are masked out."""
    numbers = np.array(ids)
    return Batch(
        images=torch.from_numpy(logits),
        labels=torch.tensor(labels),
        ids=numbers,
        planned=numbers,
        mask=torch.from_numpy(numbers != NO_SAMPLE),
        position=Position(0, 0),
    )


def collect(*batches: Batch, outputs: list[int] | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rows of all samples, and the sums of `BatchResult.counts`."""
    samples = SampleResults()
    mapped = None if outputs is None else torch.tensor(outputs)
    results = evaluate_batches(
        lambda images: images, batches, device=CPU.device, precision="fp32", outputs=mapped, samples=samples
    )
    counts = sum(result.counts.sum(dim=0) for result in results)
    rows = samples.gather(CPU)
    assert rows is not None
    assert samples.outputs == (len(outputs) if outputs else CLASSES)
    return rows, torch.as_tensor(counts).numpy()


def test_rows_have_prediction_loss_and_probabilities_of_each_sample() -> None:
    logits = np.random.default_rng(0).normal(size=(5, CLASSES)).astype(np.float32) * 3
    labels = [0, 5, 2, 3, 1]
    rows, counts = collect(
        batch_of([7, 0, 3], labels[:3], logits[:3]), batch_of([NO_SAMPLE, 4, NO_SAMPLE], [0, 3, 1], logits[[0, 3, 0]])
    )
    kept = logits[:4].astype(np.float64)
    probabilities = np.exp(kept) / np.exp(kept).sum(axis=1, keepdims=True)
    own = probabilities[range(4), labels[:4]]
    expected = np.stack(
        [[7, 0, 3, 4], labels[:4], kept.argmax(axis=1), -np.log(own), own, probabilities.max(axis=1)], axis=1
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    assert counts[0] == 4
    assert counts[1] == (expected[:, 1] == expected[:, 2]).sum()
    assert counts[3] == pytest.approx(expected[:, 3].sum(), rel=1e-6)


def test_predictions_are_classes_of_the_data_set_if_outputs_are_mapped() -> None:
    logits = np.zeros((1, CLASSES), np.float32)
    logits[0, 4] = 9.0
    rows, _ = collect(batch_of([0], [1], logits), outputs=[2, 4, 0])
    assert rows[0, 1:3].tolist() == [1, 1]


def record_of(samples: int = 60, **changes: Any) -> EvaluationRecord:
    rng = np.random.default_rng(0)
    numbers = [rng.integers(0, CLASSES, samples) for _ in range(2)]
    rows = np.column_stack([rng.permutation(samples) * 2, *numbers, rng.random((samples, 3))])
    record = EvaluationRecord.of(rows, EvaluationInfo(step=3, weights="average", outputs=CLASSES))
    return replace(record, **changes)


def test_record_is_read_back(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None
    record = record_of()
    record = replace(record, thumbnails={record.hardest[0].id: JPEG})
    write_evaluation(tmp_path, record)
    found = read_evaluation(tmp_path)
    assert found is not None
    assert (found.info, found.step, found.weights) == (record.info, 3, "average")
    for name in ("ids", "labels", "predictions", "losses", "probabilities", "confidences"):
        np.testing.assert_array_equal(getattr(found, name), getattr(record, name), strict=True)
    assert found.ids.tolist() == list(range(0, 120, 2))
    assert found.hardest == record.hardest
    assert [image.jpeg for image in found.hardest] == [JPEG] + [None] * (HARDEST - 1)


def test_hardest_images_are_wrong_predictions_with_the_highest_loss() -> None:
    record = record_of(3)
    record = replace(
        record,
        labels=np.array([0, 1, 2], np.int32),
        predictions=np.array([1, 1, 3], np.int32),
        losses=np.array([0.5, 9.0, 2.5], np.float32),
    )
    assert [(image.id, image.label, image.prediction, image.loss) for image in record.hardest] == [
        (4, 2, 3, 2.5),
        (0, 0, 1, 0.5),
    ]


def test_fifty_thousand_samples_of_a_thousand_classes_take_few_megabytes() -> None:
    rows = np.zeros((50_000, 6))
    rows[:, 0] = np.arange(50_000)
    content = EvaluationRecord.of(rows, EvaluationInfo(step=1, weights="weights", outputs=1000)).to_bytes()
    assert len(content) < 2_000_000


Change = Callable[[dict[str, NDArray[Any]]], object]
DAMAGE: dict[str, tuple[Change, str]] = {
    "a column is missing": (lambda t: t.pop("losses"), "expected the arrays ids, labels"),
    "an unknown array": (lambda t: t.update(x=t["ids"]), "expected the arrays ids, labels"),
    "columns of different lengths": (lambda t: t.update(losses=t["losses"][1:]), "losses: float32 (59,), expected"),
    "another dtype": (lambda t: t.update(labels=t["labels"].astype(np.int64)), "labels: int64 (60,), expected"),
    "another rank": (lambda t: t.update(ids=t["ids"][:, None]), "ids: int64 (60, 1), expected"),
    "a scalar": (lambda t: t.update(ids=np.array(3)), "ids: int64 (), expected"),
    "a sample twice": (lambda t: t["ids"].__setitem__(1, 0), "ids: expected ascending numbers"),
    "a negative id": (lambda t: t["ids"].__setitem__(0, -1), "ids: expected ascending numbers"),
    "an unknown class": (lambda t: t["predictions"].__setitem__(0, CLASSES), "predictions: expected numbers from 0"),
    "a negative label": (lambda t: t["labels"].__setitem__(0, -1), "labels: expected numbers from 0 to 5"),
    "a probability above 1": (lambda t: t["confidences"].__setitem__(0, 1.5), "confidences: expected numbers from 0"),
    "another sample's thumbnail": (lambda t: t.update({"thumbnail/1": t["thumbnail/2"]}), "unknown sample"),
    "no number": (lambda t: t.update({"thumbnail/²": t["thumbnail/2"]}), "unknown sample"),
    "no JPEG": (lambda t: t.update({"thumbnail/4": np.zeros(9, np.uint8)}), "sample 4 is not a JPEG"),
    "a large thumbnail": (
        lambda t: t.update({"thumbnail/4": np.full(1 << 17, 255, np.uint8)}),
        "sample 4 is not a JPEG",
    ),
    "too many thumbnails": (lambda t: t.update({f"thumbnail/{i}": t["thumbnail/2"] for i in range(25)}), "at most 24"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_rejected_in_one_line(tmp_path: Path, damage: str) -> None:
    write_evaluation(tmp_path, record_of(thumbnails={2: JPEG}))
    path = tmp_path / RECORD_NAME
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change, fact = DAMAGE[damage]
    change(tensors)
    save_file(tensors, path, {"evaluation": '{"step": 3, "weights": "average", "outputs": 6}'})
    with pytest.raises(UserError) as raised:
        read_evaluation(tmp_path)
    assert str(raised.value).startswith(f"{path}: invalid record of an evaluation (")
    assert fact in str(raised.value)


@pytest.mark.parametrize(
    "header",
    [None, "[]", '{"step": -1, "weights": "weights", "outputs": 6}', '{"step": 1, "weights": "x", "outputs": 6}',
     '{"step": 1, "weights": "weights", "outputs": 0}', '{"step": 1, "weights": "weights", "outputs": 6, "x": 1}'],
)  # fmt: skip
def test_invalid_header_is_rejected(tmp_path: Path, header: str | None) -> None:
    write_evaluation(tmp_path, record_of())
    path = tmp_path / RECORD_NAME
    save_file(load_file(path), path, None if header is None else {"evaluation": header})
    with pytest.raises(UserError, match="invalid record of an evaluation"):
        read_evaluation(tmp_path)


def test_truncated_unreadable_and_large_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(tmp_path, record_of())
    path = tmp_path / RECORD_NAME
    whole = path.read_bytes()
    for size in (0, 7, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="invalid record of an evaluation"):
            read_evaluation(tmp_path)
    path.write_bytes(whole)
    monkeypatch.setattr(evaluation_record, "MAX_BYTES", len(whole) - 1)
    with pytest.raises(UserError, match="more than the"):
        read_evaluation(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_evaluation(tmp_path)


LABELS = np.array([0, 0, 0, 1, 1, 2], np.int32)
PREDICTIONS = np.array([0, 1, 1, 0, 4, 2], np.int32)  # output 4 has no class


def test_confusions_are_sorted_by_count() -> None:
    found = [(pair.label, pair.prediction, pair.count) for pair in confusions(LABELS, PREDICTIONS, limit=2)]
    assert found == [(0, 1, 2), (1, 0, 1)]
    assert confusions(LABELS, LABELS, limit=9) == []


def test_results_of_classes_start_with_the_lowest_accuracy() -> None:
    found = [(result.label, result.samples, result.correct) for result in class_results(LABELS, PREDICTIONS)]
    assert found == [(1, 2, 0), (0, 3, 1), (2, 1, 1)]
    assert class_results(LABELS, PREDICTIONS)[1].accuracy == pytest.approx(1 / 3)


def test_confusion_matrix_counts_every_sample_and_has_outputs_without_a_class() -> None:
    matrix = confusion_matrix(LABELS, PREDICTIONS, classes=3)
    assert matrix is not None
    assert matrix.shape == (5, 5)
    assert (matrix.sum(), matrix[0, 1], matrix[1, 4], matrix[2, 2]) == (6, 2, 1, 1)
    assert confusion_matrix(LABELS, PREDICTIONS, classes=31) is None


def test_info_is_json_in_the_header(tmp_path: Path) -> None:
    content = record_of().to_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    expected = {"step": 3, "weights": "average", "outputs": CLASSES, "split": "val"}
    assert json.loads(header["__metadata__"]["evaluation"]) == expected
