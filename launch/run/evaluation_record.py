"""RUN/evaluation.safetensors: what the model predicted for each validation sample in the run's last evaluation.

It also contains thumbnails of the hardest images, so that a report needs only the run folder, not the data set. This
module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from launch.run.files import open_regular
from launch.run.progress import WeightsKind
from shards.errors import UserError, first_line
from shards.files.durable import durable_write
from shards.schema import Count, parse_json

RECORD_NAME = "evaluation.safetensors"
HARDEST = 24
"""Number of hardest images, of which thumbnails are kept."""
MAX_BYTES = 1 << 30  # of a record: more than 30 million samples
MAX_THUMBNAIL = 1 << 16  # bytes of a JPEG
MAX_OUTPUTS = 1_000_000
_HEADER, _THUMBNAIL = "evaluation", "thumbnail/"
_MAX_HEADER = 1 << 16
# Columns of `EvaluationRecord.of`, and the dtypes in which they are stored.
_COLUMNS: dict[str, Any] = {
    "ids": np.int64,
    "labels": np.int32,
    "predictions": np.int32,
    "losses": np.float32,
    "probabilities": np.float32,
    "confidences": np.float32,
}


@dataclass(frozen=True)
class HardestImage:
    """A wrong prediction with a high loss."""

    id: int
    label: int
    prediction: int
    loss: float
    jpeg: bytes | None
    """Thumbnail; None: it could not be drawn."""


@dataclass(frozen=True, kw_only=True)
class EvaluationInfo:
    """What was evaluated."""

    step: Count | None
    """Optimizer steps after which the model was evaluated; None: unknown."""
    weights: WeightsKind
    """The evaluated weights: those that were trained, or their moving average (EMA)."""
    outputs: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)]
    """Number of outputs of the model. It can be larger than the number of classes in the data set."""
    split: str = "val"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Predictions of one evaluation, one row per sample, sorted by id. Losses may be NaN or infinite."""

    info: EvaluationInfo
    ids: NDArray[np.int64]
    """Sample ids of the split, [samples], ascending."""
    labels: NDArray[np.int32]
    predictions: NDArray[np.int32]
    """Class with the highest probability, [samples], 0 to `info.outputs` - 1."""
    losses: NDArray[np.float32]
    """Cross-entropy, [samples]."""
    probabilities: NDArray[np.float32]
    """Probability of the label, [samples]."""
    confidences: NDArray[np.float32]
    """Probability of the prediction, [samples]."""
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    """JPEGs of the hardest images, by id."""

    @classmethod
    def of(cls, rows: NDArray[np.float64], info: EvaluationInfo) -> EvaluationRecord:
        """Convert rows of id, label, prediction, loss, probability and confidence, float64 [samples, 6]."""
        rows = rows[np.argsort(rows[:, 0])]
        columns: dict[str, Any] = {name: rows[:, i].astype(dtype) for i, (name, dtype) in enumerate(_COLUMNS.items())}
        return cls(info=info, **columns)

    @property
    def step(self) -> int | None:
        return self.info.step

    @property
    def weights(self) -> WeightsKind:
        return self.info.weights

    @property
    def hardest(self) -> list[HardestImage]:
        """The `HARDEST` wrong predictions with the highest loss, in descending order."""
        (wrong,) = np.nonzero(self.labels != self.predictions)
        rows = wrong[np.argsort(-self.losses[wrong], kind="stable")][:HARDEST]
        found = []
        for row in rows.tolist():
            sample, loss = int(self.ids[row]), float(self.losses[row])
            label, prediction = int(self.labels[row]), int(self.predictions[row])
            found.append(HardestImage(sample, label, prediction, loss, self.thumbnails.get(sample)))
        return found

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        tensors = {name: getattr(self, name) for name in _COLUMNS}
        images = {f"{_THUMBNAIL}{sample}": np.frombuffer(jpeg, np.uint8) for sample, jpeg in self.thumbnails.items()}
        header = TypeAdapter(EvaluationInfo).dump_json(self.info).decode()
        return save(tensors | images, {_HEADER: header})


def write_evaluation(run: Path, record: EvaluationRecord) -> None:
    """Replace RUN/evaluation.safetensors.

    Raises:
        OSError: the file cannot be written.
    """
    durable_write(run / RECORD_NAME, record.to_bytes())


def read_evaluation(run: Path) -> EvaluationRecord | None:
    """Read the record of a run's last evaluation; None if it has none.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    path = run / RECORD_NAME
    try:
        return read_record(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); correct this, or remove it") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: invalid record of an evaluation ({first_line(error)}); remove it") from error


def read_record(path: Path) -> EvaluationRecord:
    """Read a record from an untrusted file.

    Raises:
        OSError: the file is missing, not a regular file, or cannot be read.
        ValueError, SafetensorError: the content is invalid.
    """
    handle = open_regular(path)
    try:
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, more than the {MAX_BYTES:,} bytes that are allowed")
    with safe_open(path, framework="np") as file:
        header = (file.metadata() or {}).get(_HEADER, "")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file has no __iter__
    info = parse_json(header.encode("utf-8", "surrogatepass"), TypeAdapter(EvaluationInfo), limit=_MAX_HEADER)
    images = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_THUMBNAIL)}
    _check_columns(tensors, info)
    thumbnails = _thumbnails(images, set(tensors["ids"].tolist()))
    return EvaluationRecord(info=info, **tensors, thumbnails=thumbnails)


def _check_columns(tensors: dict[str, NDArray[Any]], info: EvaluationInfo) -> None:
    if tensors.keys() != _COLUMNS.keys():
        raise ValueError(f"expected the arrays {', '.join(_COLUMNS)}")
    samples = len(tensors["ids"]) if tensors["ids"].ndim else 0
    for name, dtype in _COLUMNS.items():
        if tensors[name].dtype != dtype or tensors[name].shape != (samples,):
            raise ValueError(f"{name}: {tensors[name].dtype} {tensors[name].shape}, expected {dtype} ({samples},)")
    ids = tensors["ids"]
    if samples and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise ValueError("ids: expected ascending numbers from 0")
    for name in ("labels", "predictions"):
        if ((tensors[name] < 0) | (tensors[name] >= info.outputs)).any():
            raise ValueError(f"{name}: expected numbers from 0 to {info.outputs - 1}")
    for name in ("probabilities", "confidences"):
        if ((tensors[name] < 0) | (tensors[name] > 1)).any():
            raise ValueError(f"{name}: expected numbers from 0 to 1")


def _thumbnails(images: dict[str, NDArray[Any]], ids: set[int]) -> dict[int, bytes]:
    if len(images) > HARDEST:
        raise ValueError(f"{len(images)} thumbnails, expected at most {HARDEST}")
    found = {}
    for name, image in images.items():
        text = name.removeprefix(_THUMBNAIL)
        if not text.isascii() or not text.isdigit() or len(text) > 16 or int(text) not in ids:
            raise ValueError("a thumbnail of an unknown sample")
        jpeg = image.tobytes() if image.dtype == np.uint8 and image.nbytes <= MAX_THUMBNAIL else b""
        if not jpeg.startswith(b"\xff\xd8"):
            raise ValueError(f"the thumbnail of sample {text} is not a JPEG")
        found[int(text)] = jpeg
    return found
