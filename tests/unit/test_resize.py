"""Resizing on the CPU, compared with PIL pixel by pixel."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photos

from pipeline.decode.job import DecodeJob, Normalization
from pipeline.decode.resize import Resizer, resized

SIZE = 64
WINDOWS = [(0, 0, 300, 451), (10, 20, 100, 60), (50, 51, 64, 64), (100, 100, 31, 97), (5, 300, 7, 9), (299, 0, 1, 451)]


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    return photos.chelsea()  # type: ignore[no-any-return]


def job(size: int = SIZE, **given: Any) -> DecodeJob:
    window = np.array(WINDOWS, np.int32)
    encoded = SimpleNamespace(ids=np.arange(len(window)), images=[], rows=None, raw=None)
    return DecodeJob(encoded=cast(Any, encoded), window=window, size=size, **given)


def cut(photo: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [np.ascontiguousarray(photo[y : y + h, x : x + w]) for y, x, h, w in WINDOWS]


def by_pil(window: NDArray[np.uint8], height: int, width: int) -> NDArray[np.int16]:
    return np.asarray(Image.fromarray(window).resize((width, height), Image.Resampling.BICUBIC), np.int16)


def test_training_windows_equal_pil_up_to_rounding(photo: NDArray[np.uint8]) -> None:
    flip = np.arange(len(WINDOWS)) % 2 == 1
    with Resizer(threads=2, normalization=None) as resize:
        batch = resize(cut(photo), job(flip=flip)).numpy().astype(np.int16)
    for shown, window, flipped in zip(batch, cut(photo), flip, strict=True):
        expected = by_pil(window, SIZE, SIZE)
        difference = np.abs(shown - (expected[:, ::-1] if flipped else expected))
        assert difference.max() <= 2
        assert difference.mean() < 0.2


def test_evaluation_resizes_the_whole_image_and_crops_at_the_corner(photo: NDArray[np.uint8]) -> None:
    n = len(WINDOWS)
    scale = np.array(WINDOWS)[:, 2:] / (80, 96)
    region = np.hstack([(3, 17) * scale, SIZE * scale])
    assert len(region) == n
    with Resizer(threads=1, normalization=None) as resize:
        batch = resize(cut(photo), job(region=region)).numpy().astype(np.int16)
    for shown, window in zip(batch, cut(photo), strict=True):
        assert np.abs(shown - by_pil(window, 80, 96)[3 : 3 + SIZE, 17 : 17 + SIZE]).max() <= 2


@pytest.mark.parametrize("normalization", [None, Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))])
def test_one_resizer_serves_every_output_size(photo: NDArray[np.uint8], normalization: Normalization | None) -> None:
    with Resizer(threads=2, normalization=normalization) as shared:
        for size in (32, 96, 64, 32):
            with Resizer(threads=1, normalization=normalization) as own:
                expected = own(cut(photo), job(size))
            assert torch.equal(shared(cut(photo), job(size)), expected)


def test_normalized_output_equals_the_normalized_uint8_output(photo: NDArray[np.uint8]) -> None:
    flip = np.arange(len(WINDOWS)) % 2 == 0
    normalization = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    with Resizer(threads=2, normalization=None) as resize:
        plain = resize(cut(photo), job(flip=flip))
    with Resizer(threads=2, normalization=normalization) as resize:
        normalized = resize(cut(photo), job(flip=flip))
    mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
    torch.testing.assert_close(normalized, (plain / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_an_error_in_a_thread_is_raised_at_the_caller(photo: NDArray[np.uint8]) -> None:
    with Resizer(threads=2, normalization=None) as resize, pytest.raises(RuntimeError):
        resize([np.zeros((0, 0, 3), np.uint8)] * len(WINDOWS), job())


def test_a_thread_that_resizes_a_window_starts_no_other_threads(photo: NDArray[np.uint8]) -> None:
    """A team of OpenMP threads for every thread of a pool would mostly wait."""

    def threads_started() -> int:
        torch.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        resized(photo[10:290, 20:430], SIZE, SIZE)
        return len(os.listdir("/proc/self/task")) - before

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(threads_started).result() == 0
    finally:
        torch.set_num_threads(threads)
