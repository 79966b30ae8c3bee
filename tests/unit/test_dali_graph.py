"""DALI's GPU graph, run on a CPU with the same operators and arguments except the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from pipeline.decode.dali import DaliDecoder
from pipeline.decode.job import DecodeJob
from pipeline.jobs import eval_geometry, eval_windows
from tests.support.dali_on_cpu import decoded, decoded_at_sizes, encoded

SIZE = 64
PHOTOS = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea")]


def test_training_crops_resizes_and_flips_like_pil() -> None:
    found = decoded(SIZE, PHOTOS, evaluation=False, flip=np.array([True, False, True]))
    expected = [photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for photo in PHOTOS]
    for flipped in (0, 2):
        expected[flipped] = expected[flipped].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (found.dtype, found.shape) == (np.uint8, (3, SIZE, SIZE, 3))
    assert np.abs(found.astype(int) - np.stack(expected)).mean() < 2


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_output_size_may_change_from_batch_to_batch(evaluation: bool) -> None:
    sizes = [32, 64, 96, 32]
    job: dict[str, Any] = {}
    if evaluation:
        widths, heights = np.array([photo.size for photo in PHOTOS], np.int32).T
        job["window"], job["region"] = eval_windows(heights, widths, SIZE)
    found = decoded_at_sizes(sizes, PHOTOS, evaluation=evaluation, **job)
    for size, pixels in zip(sizes, found, strict=True):
        assert np.array_equal(pixels, decoded(size, PHOTOS, evaluation=evaluation, **job))


def test_arrays_that_dali_reads_without_a_copy_stay_alive_until_it_has_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DALI prefetches: it reads arrays before their batch is requested, when no one else references them."""
    given: list[list[weakref.ref[np.ndarray]]] = []
    real = DaliDecoder._inputs

    def watched(decoder: DaliDecoder, *arguments: Any) -> tuple[Any, ...]:
        inputs = real(decoder, *arguments)
        images, *others = inputs
        given.append([weakref.ref(array) for array in (*images, *others)])
        return inputs

    monkeypatch.setattr(DaliDecoder, "_inputs", watched)

    def jobs() -> Iterator[tuple[DecodeJob, int]]:
        for number in range(6):
            images = [encoded(photo) for photo in PHOTOS]
            window = np.array([[0, 0, *photo.size[::-1]] for photo in PHOTOS], np.int32)
            of_dali: Any = SimpleNamespace(ids=np.arange(3), images=images)
            yield DecodeJob(encoded=of_dali, window=window, size=SIZE), number

    decoder = DaliDecoder(batch=3, device=torch.device("cpu"), threads=1, ahead=2)
    for _, _, number in decoder.decode(jobs()):
        assert all(array() is not None for batch in given[number:] for array in batch), number
        assert not any(array() is not None for batch in given[: max(number - 2, 0)] for array in batch)
    assert len(given) == 6


def test_evaluation_resizes_and_crops_like_pil() -> None:
    widths, heights = np.array([photo.size for photo in PHOTOS], np.int32).T
    window, region = eval_windows(heights, widths, SIZE)
    found = decoded(SIZE, PHOTOS, evaluation=True, window=window, region=region)
    expected = []
    resize, anchor = eval_geometry(heights, widths, SIZE)
    for photo, (high, wide), (y, x) in zip(PHOTOS, resize.tolist(), anchor.tolist(), strict=True):
        small = photo.resize((wide, high), Image.Resampling.BICUBIC)
        expected.append(np.asarray(small.crop((x, y, x + SIZE, y + SIZE))))
    assert (found.dtype, found.shape) == (np.uint8, (3, SIZE, SIZE, 3))
    assert np.abs(found.astype(int) - np.stack(expected)).mean() < 2
