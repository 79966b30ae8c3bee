"""What DALI is told to do on a GPU, done on a CPU: the same operators and arguments, but for the device."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from nvidia.dali import Pipeline, fn
from PIL import Image

from pipeline.decode import dali
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.job import DecodeJob
from pipeline.jobs import eval_geometry, eval_windows

SIZE = 64
PHOTOS = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea")]
ONLY_ON_GPUS = ("hw_decoder_load", "preallocate_width_hint", "preallocate_height_hint")


def encoded(photo: Image.Image) -> np.ndarray:
    sink = io.BytesIO()
    photo.save(sink, "JPEG", quality=95)
    return np.frombuffer(sink.getvalue(), np.uint8)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = fn.decoders.image_slice

    def image_slice(*inputs: Any, **options: Any) -> Any:
        assert options.pop("device") == "mixed"
        for name in ONLY_ON_GPUS:
            options.pop(name)
        return decode(*inputs, device="cpu", **options)

    monkeypatch.setattr(fn.decoders, "image_slice", image_slice)
    monkeypatch.setattr(dali, "Pipeline", lambda device_id, **options: Pipeline(device_id=None, **options))


def decoded(evaluation: bool, photos: list[Image.Image] = PHOTOS, **job: Any) -> np.ndarray:
    images = [encoded(photo) for photo in photos]
    sizes = np.array([photo.size[::-1] for photo in photos], np.int32)
    window = job.pop("window", np.concatenate([np.zeros_like(sizes), sizes], axis=1))
    decoder = DaliDecoder(size=SIZE, batch=4, device=torch.device("cuda", 0), threads=1, evaluation=evaluation)
    # A batch may be smaller than the largest.
    whole = DecodeJob(encoded=SimpleNamespace(ids=np.arange(3), images=images), window=window, **job)  # type: ignore[arg-type]
    (found,) = decoder._build(iter([decoder._inputs(whole)] * 4)).run()
    return np.asarray(found.as_tensor())


def test_training(on_a_cpu: None) -> None:
    found = decoded(False, flip=np.array([True, False, True]))
    expected = [photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for photo in PHOTOS]
    for flipped in (0, 2):
        expected[flipped] = expected[flipped].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (found.dtype, found.shape) == (np.uint8, (3, SIZE, SIZE, 3))
    assert np.abs(found.astype(int) - np.stack(expected)).mean() < 2


def test_arrays_that_dali_reads_without_a_copy_are_kept_until_it_has_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DALI prefetches: it reads what it was given before the batch is asked for, and nobody else holds it then."""
    given: list[list[weakref.ref[np.ndarray]]] = []
    real = DaliDecoder._inputs

    def watched(decoder: DaliDecoder, job: DecodeJob) -> tuple[Any, ...]:
        inputs = real(decoder, job)
        images, *others = inputs
        given.append([weakref.ref(array) for array in (*images, *others)])
        return inputs

    monkeypatch.setattr(DaliDecoder, "_inputs", watched)

    def jobs() -> Iterator[tuple[DecodeJob, int]]:
        for number in range(6):
            images = [encoded(photo) for photo in PHOTOS]
            window = np.array([[0, 0, *photo.size[::-1]] for photo in PHOTOS], np.int32)
            yield DecodeJob(encoded=SimpleNamespace(ids=np.arange(3), images=images), window=window), number  # type: ignore[arg-type]

    decoder = DaliDecoder(size=SIZE, batch=3, device=torch.device("cpu"), threads=1, ahead=2)
    for _, _, number in decoder.decode(jobs()):
        assert all(array() is not None for batch in given[number:] for array in batch), number
        assert not any(array() is not None for batch in given[: max(number - 2, 0)] for array in batch)
    assert len(given) == 6


def test_evaluation(on_a_cpu: None) -> None:
    widths, heights = np.array([photo.size for photo in PHOTOS], np.int32).T
    window, region = eval_windows(heights, widths, SIZE)
    found = decoded(True, window=window, region=region)
    expected = []
    resize, anchor = eval_geometry(heights, widths, SIZE)
    for photo, (high, wide), (y, x) in zip(PHOTOS, resize.tolist(), anchor.tolist(), strict=True):
        small = photo.resize((wide, high), Image.Resampling.BICUBIC)
        expected.append(np.asarray(small.crop((x, y, x + SIZE, y + SIZE))))
    assert (found.dtype, found.shape) == (np.uint8, (3, SIZE, SIZE, 3))
    assert np.abs(found.astype(int) - np.stack(expected)).mean() < 2
