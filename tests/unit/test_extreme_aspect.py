"""Evaluation of images of any aspect ratio: same pixels as resizing the whole image, then cropping its center."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode.job import DecodeJob
from pipeline.decode.resize import Resizer
from pipeline.jobs import MAX_ASPECT, eval_geometry, eval_windows
from tests.support.dali_on_cpu import decoded, encoded
from tests.support.measured import run_measured

SIZE = 64
SIZES = [(2, 900), (900, 2), (1, 400), (3, 777), (40, 500), (2000, 90), (33, 265), (80, 641), (300, 451)]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    """Return noise, in which every pixel differs from its neighbors, so that shifts by a fraction of a pixel show.

    Its values are far from black and white, because Pillow clips between its two passes, whose order depends on the
    size.
    """
    return np.random.default_rng(height * 9999 + width).integers(64, 192, (height, width, 3), np.uint8)


def job_of(pixels: list[NDArray[np.uint8]], size: int, crop_pct: float) -> DecodeJob:
    sides = np.array([image.shape[:2] for image in pixels], np.int32)
    window, region = eval_windows(*sides.T, size, crop_pct)
    encoded = SimpleNamespace(ids=np.arange(len(pixels)), images=[], rows={"height": sides[:, 0], "width": sides[:, 1]})
    return DecodeJob(encoded=cast(Any, encoded), window=window, size=size, region=region)


def reference(image: Image.Image, size: int, crop_pct: float) -> NDArray[np.int16]:
    """Resize the whole image, then crop."""
    resize, anchor = eval_geometry(np.array([image.height]), np.array([image.width]), size, crop_pct)
    (high, wide), (y, x) = resize[0].tolist(), anchor[0].tolist()
    whole = image.resize((wide, high), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((x, y, x + size, y + size)), np.int16)


@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (33, 1.0), (48, 0.9)])
def test_the_cpu_gives_the_pixels_of_resize_then_crop(size: int, crop_pct: float) -> None:
    pixels = [noise(*sides) for sides in SIZES]
    job = job_of(pixels, size, crop_pct)
    windows = [p[y : y + h, x : x + w] for p, (y, x, h, w) in zip(pixels, job.window.tolist(), strict=True)]
    with Resizer(threads=1, normalization=None) as resize:
        shown = resize([np.ascontiguousarray(window) for window in windows], job).numpy().astype(np.int16)
    for row, sides, image in zip(shown, SIZES, pixels, strict=True):
        difference = np.abs(row - reference(Image.fromarray(image), size, crop_pct))
        assert difference.max() <= 2, sides
        assert difference.mean() < 0.4, sides


def test_the_gpu_s_graph_gives_the_pixels_of_resize_then_crop() -> None:
    photos = [Image.fromarray(noise(*sides)).resize(sides[::-1]) for sides in SIZES]
    for some in (photos[:3], photos[3:6], photos[6:]):
        heights, widths = np.array([image.size[::-1] for image in some], np.int32).T
        window, region = eval_windows(heights, widths, SIZE)
        found = decoded(SIZE, some, evaluation=True, window=window, region=region)
        for row, photo in zip(found, some, strict=True):
            stored = Image.open(io.BytesIO(encoded(photo).tobytes())).convert("RGB")
            # DALI handles borders differently than Pillow: compare with DALI's resize of the whole image.
            whole = resized_by_dali(np.asarray(stored))
            assert np.abs(row.astype(np.int16) - whole).max() <= 2, photo.size


def resized_by_dali(image: NDArray[np.uint8]) -> NDArray[np.int16]:
    from nvidia.dali import Pipeline, fn, types

    resize, anchor = eval_geometry(np.array([image.shape[0]]), np.array([image.shape[1]]), SIZE)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = fn.external_source(source=[[image]], batch=True, layout="HWC")
        pipeline.set_outputs(fn.resize(source, size=resize[0].tolist(), interp_type=types.INTERP_CUBIC, antialias=True))
    y, x = anchor[0].tolist()
    return np.asarray(pipeline.run()[0].as_tensor())[0][y : y + SIZE, x : x + SIZE].astype(np.int16)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 65_500), width=st.integers(1, 65_500), size=st.integers(16, 600), crop=st.floats(0.5, 1.0))
def test_regions_are_inside_windows_inside_the_image(height: int, width: int, size: int, crop: float) -> None:
    (window,), (region,) = eval_windows(np.array([height]), np.array([width]), size, crop)
    y, x, high, wide = window.tolist()
    assert 0 <= y < y + high <= height
    assert 0 <= x < x + wide <= width
    top, left, region_high, region_wide = region.tolist()
    assert min(top, left) >= -1e-6
    assert top + region_high <= high + 1e-6 * height
    assert left + region_wide <= wide + 1e-6 * width
    if max(height, width) > MAX_ASPECT * min(height, width):
        assert max(high, wide) < 2 * min(height, width) + 12, "the window is little more than the center crop"


def test_an_extreme_image_takes_no_more_memory_than_its_center() -> None:
    """Resizing 65,500 x 2 pixels to 8,384,000 x 256 would take 6 GB."""
    code = """
        import io, json, torch, numpy as np
        from types import SimpleNamespace
        from PIL import Image
        from pipeline.decode.dali import DaliDecoder
        from pipeline.decode.job import DecodeJob
        from pipeline.jobs import eval_windows
        import torch.nn.functional
        jpegs = []
        for height, width in ((2, 65500), (65500, 2), (300, 400)):
            sink = io.BytesIO()
            Image.new("RGB", (width, height), (10, 200, 30)).save(sink, "JPEG", quality=95)
            jpegs.append(np.frombuffer(sink.getvalue(), np.uint8))
        sides = np.array([(2, 65500), (65500, 2), (300, 400)], np.int32)
        window, region = eval_windows(*sides.T, 224)
        rows = {"height": sides[:, 0], "width": sides[:, 1]}
        decoder = DaliDecoder(batch=3, device=torch.device("cpu"), threads=1, evaluation=True)
        def run(n):
            some = SimpleNamespace(ids=np.arange(n), images=jpegs[-n:], rows=rows)
            job = DecodeJob(encoded=some, window=window[-n:], size=224, region=region[-n:])
            return [pixels for pixels, _, _ in decoder.decode([(job, 0)])][0]
        run(1)
        measure()
        pixels = run(3)
        print(json.dumps([grown(), (pixels.int() - torch.tensor([10, 200, 30])).abs().max().item()]))
    """
    grown, difference = json.loads(run_measured(code))
    assert grown < 64 * 2**20
    assert difference <= 3
