"""Pictures of a run: its first batch as the model sees it, and the images with the worst mistakes.

The pictures are for people only: a failure to read or draw an image, or to write a file, is a warning.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from launch.engine.loss import SampleResults
from launch.feed import Feed
from launch.run.evaluation_record import (
    MAX_THUMBNAIL,
    RECORD_NAME,
    EvaluationInfo,
    EvaluationRecord,
    HardestImage,
    read_evaluation,
    write_evaluation,
)
from pipeline.look import Cell, contact_sheet, denormalized
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import Encoded, SampleReader
from shards.errors import first_line
from shards.files.durable import durable_write
from shards.redact import printable

if TYPE_CHECKING:
    from pipeline.batch import Batch
    from shards.format.dataset import ShardSet

FIRST_BATCH_NAME = "first-batch.jpg"
HARDEST_NAME = "hardest.jpg"
log = logging.getLogger(__name__)

_FIRST_BATCH_IMAGES = 32
_SHORT_SIDE, _LONG_SIDE = 96, 192  # of thumbnails, in pixels
_SHEET_SIDE = 160  # of an image in hardest.jpg
_QUALITY = 85
_MAX_SECONDS = 20.0  # for reading the hardest images from a slow server; all other ranks wait


def hardest_images(run: Path) -> list[HardestImage]:
    """Return the hardest images of a run's last evaluation; none if it has no record.

    Raises:
        UserError: the record is damaged.
    """
    record = read_evaluation(run)
    return [] if record is None else record.hardest


def save_evaluation(
    run: Path, feed: Feed, samples: SampleResults, info: EvaluationInfo, *, last: bool = True
) -> list[str]:
    """Write RUN/evaluation.safetensors with thumbnails of the hardest images; return warnings. Collective.

    Args:
        last: also write RUN/hardest.jpg, if there are thumbnails.
    """
    rows = samples.gather(feed.world)
    return [] if rows is None else _warnings(lambda: _save(run, feed, rows, info, last), run / RECORD_NAME)


def _save(run: Path, feed: Feed, rows: NDArray[np.float64], info: EvaluationInfo, last: bool) -> None:
    record = EvaluationRecord.of(rows, info)
    if not is_synthetic(feed):
        hardest = [image.id for image in record.hardest]
        record = replace(record, thumbnails=thumbnails(feed.dataset, info.split, hardest))
    write_evaluation(run, record)
    if last and record.thumbnails:
        durable_write(run / HARDEST_NAME, draw_hardest(record, class_titles(feed.dataset)))
    else:  # an existing file shows an earlier evaluation
        (run / HARDEST_NAME).unlink(missing_ok=True)


def save_first_batch(run: Path, feed: Feed, batch: Batch) -> list[str]:
    """Write RUN/first-batch.jpg, unless the images are synthetic; return warnings. Waits for the device."""
    if is_synthetic(feed):
        return []
    path = run / FIRST_BATCH_NAME
    return _warnings(lambda: durable_write(path, draw_batch(batch, feed)), path)


def is_synthetic(feed: Feed) -> bool:
    return feed.recipe.data.loader.loader == "synthetic"


def _warnings(save: Callable[[], None], path: Path) -> list[str]:
    try:
        save()
    except Exception as error:
        return [f"warning: {path}: not written ({first_line(error) or type(error).__name__}); training is not affected"]
    return []


def class_titles(dataset: ShardSet) -> list[str]:
    """Return the names of the classes, in the order of the labels."""
    return [entry.title for entry in dataset.manifest.classes]


def title_of(label: int, titles: Sequence[str]) -> str:
    """Return the name of a class, or the number of a model output that has no class."""
    return printable(titles[label]) if label < len(titles) else f"output {label}"


def thumbnails(dataset: ShardSet, split: str, ids: Sequence[int]) -> dict[int, bytes]:
    """Read and downscale images of a split; return JPEGs by id, without images that cannot be read.

    A set on a server that does not support range requests has no thumbnails, because whole shards would be downloaded.
    """
    if not ids:
        return {}
    with SampleReader(open_storage(dataset, split, beton=not dataset.split(split).tars)) as reader:
        if not reader.random_access():
            return {}
        limit = threading.Timer(_MAX_SECONDS, reader.interrupt)
        limit.start()
        try:
            encoded = reader.read(np.asarray(ids, np.int64))
        finally:
            limit.cancel()
    bad = {fault.row for fault in encoded.faults}
    drawn = {ids[row]: _thumbnail(encoded, row) for row in range(len(ids)) if row not in bad}
    return {sample: jpeg for sample, jpeg in drawn.items() if jpeg is not None}


def _thumbnail(encoded: Encoded, row: int) -> bytes | None:
    """Return the JPEG of an image whose short side has at most `_SHORT_SIDE` pixels; None if it cannot be decoded."""
    data = encoded.images[row]
    try:
        if encoded.raw[row]:
            height, width = int(encoded.rows["height"][row]), int(encoded.rows["width"][row])
            image = Image.fromarray(data.reshape(height, width, 3))
        else:
            image = Image.open(io.BytesIO(data.tobytes()), formats=("JPEG",))
            image.draft("RGB", (_LONG_SIDE, _LONG_SIDE))  # decode a large JPEG at a fraction of its size
        scale = min(1.0, _SHORT_SIDE / min(image.size), _LONG_SIDE / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        jpeg = _jpeg(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))
    except Exception as error:  # Pillow raises exceptions of many types
        log.debug("no thumbnail of sample %d: %s", row, error)
        return None
    return jpeg if len(jpeg) <= MAX_THUMBNAIL else None


def draw_hardest(record: EvaluationRecord, titles: Sequence[str]) -> bytes:
    """Return a contact sheet of the hardest images as a JPEG, with label, prediction and loss of each."""
    cells = []
    for image in record.hardest:
        if image.jpeg is not None:
            square = np.asarray(_square(Image.open(io.BytesIO(image.jpeg), formats=("JPEG",))))
            title = f"{title_of(image.label, titles)}, predicted {title_of(image.prediction, titles)}"
            cells.append(Cell([square], title, f"loss {image.loss:.2f}, #{image.id}"))
    return _jpeg(contact_sheet(cells))


def _square(image: Image.Image) -> Image.Image:
    """Fit an image into a white square of `_SHEET_SIDE` pixels."""
    scale = _SHEET_SIDE / max(image.size)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    square = Image.new("RGB", (_SHEET_SIDE, _SHEET_SIDE), "white")
    square.paste(fitted, ((_SHEET_SIDE - fitted.width) // 2, (_SHEET_SIDE - fitted.height) // 2))
    return square


def draw_batch(batch: Batch, feed: Feed) -> bytes:
    """Return a contact sheet of augmented and mixed training images as a JPEG, with the classes of each."""
    images = denormalized(batch.images[:_FIRST_BATCH_IMAGES].float().cpu().numpy(), feed.augment)
    captions = batch_captions(batch, class_titles(feed.dataset))
    return _jpeg(contact_sheet([Cell([image], caption, "") for image, caption in zip(images, captions, strict=False)]))


def batch_captions(batch: Batch, titles: Sequence[str]) -> list[str]:
    """Return the class of each row of a batch; for mixed rows, both classes and their weights."""
    names = [title_of(label, titles) for label in batch.labels.tolist()]
    if batch.lam is None:
        return names
    return [
        name if own == 1 else f"{own:.0%} {name}, {1 - own:.0%} {names[row ^ 1]}"
        for row, (name, own) in enumerate(zip(names, batch.lam.tolist(), strict=True))
    ]


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
