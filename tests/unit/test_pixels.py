"""Samples that are stored as pixels: the same batches as from JPEGs, on every loader, without decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.dali_pixels import DaliPixelsDecoder
from pipeline.decode.finish import finish, finish_with_numpy
from pipeline.decode.job import DecodeJob
from pipeline.decode.pixels import SplitBatchDecoder
from pipeline.jobs import eval_windows
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import EvalPlan, TrainPlan
from pipeline.storage.reader import Encoded
from shards.format.dataset import ShardSet
from shards.format.index import INDEX_DTYPE
from tests.support.commands import run_pipeline
from tests.support.dali_on_cpu import encoded, run_graph

CPU = torch.device("cpu")
GLOBAL = 24


@pytest.fixture(scope="module")
def sets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One source as tars of JPEGs, as a .beton of pixels, and as a .beton of which some samples are pixels."""
    folder = tmp_path_factory.mktemp("pixels")
    for name, mode in (("raw", "raw"), ("some", "smart")):
        options = ("--shard-size", "2", "--format", "ffcv", "--write-mode", mode, "--smart-ratio", "5")
        run_pipeline("shard", photos.parent / "images", "--out", folder / name, *options)
    return {"tars": photos, "raw": folder / "raw", "some": folder / "some"}


def train(path: Path, recipe: AugmentRecipe, **options: Any) -> list[Batch]:
    dataset = ShardSet(path)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, pairs=recipe.mixes)
    shape = BatchShape(global_batch=GLOBAL, pairs=recipe.mixes)
    chosen = LoaderOptions(**{"loader": "dali"} | options)
    with TrainLoader(dataset, plan, shape, recipe, epochs=2, device=CPU, options=chosen) as loader:
        return list(loader.stream())


def evaluate(path: Path) -> list[Batch]:
    dataset = ShardSet(path)
    plan = EvalPlan(dataset.split("val").samples, batch=8)
    recipe = augment_recipe("light")
    normalization: Any = {"mean": recipe.mean, "std": recipe.std}
    options = LoaderOptions(loader="dali")
    with EvalLoader(dataset, plan, size=96, device=CPU, options=options, **normalization) as loader:
        return list(loader)


def assert_equal_batches(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("name", ["raw", "some"])
@pytest.mark.parametrize("recipe", ["light", "fat"])
def test_training_batches_equal_those_from_jpegs(sets: dict[str, Path], name: str, recipe: str) -> None:
    chosen = augment_recipe(recipe, size=64)
    assert_equal_batches(train(sets[name], chosen), train(sets["tars"], chosen))


@pytest.mark.parametrize("name", ["raw", "some"])
def test_evaluation_batches_equal_those_from_jpegs(sets: dict[str, Path], name: str) -> None:
    assert_equal_batches(evaluate(sets[name]), evaluate(sets["tars"]))


def test_pixels_need_neither_dali_nor_ffcv(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = augment_recipe("light", size=32)
    expected = train(sets["raw"], recipe)
    for library in ("nvidia.dali", "pipeline.decode.dali", "ffcv", "pipeline.decode.ffcv"):
        monkeypatch.setitem(sys.modules, library, None)  # imports of it fail
    assert_equal_batches(train(sets["raw"], recipe, loader="auto"), expected)


def test_threads_and_batches_ahead_do_not_change_pixels(sets: dict[str, Path]) -> None:
    recipe = augment_recipe("light", size=64)
    expected = train(sets["some"], recipe)
    for threads, ahead in ((1, 1), (3, 4)):
        assert_equal_batches(train(sets["some"], recipe, decode_threads=threads, decode_ahead=ahead), expected)


@settings(max_examples=30)
@given(st.integers(1, 120), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_all_implementations_of_flip_and_normalize_give_the_same_values(
    size: int, flip: bool, normalized: bool, seed: int
) -> None:
    numbers = np.random.default_rng(seed)
    pixels = numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)
    scale, offset = numbers.normal(size=(2, size * 3)).astype(np.float32)
    expected = (pixels[:, ::-1] if flip else pixels).reshape(size, -1)
    if normalized:
        expected = expected.astype(np.float32) * scale + offset
    for implementation in (finish, finish_with_numpy):
        out = np.empty((size, size * 3), expected.dtype)
        implementation(pixels, flip, scale, offset, out)
        assert np.array_equal(out, expected)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 4))
def test_rows_of_both_kinds_stay_in_order(raw: list[bool], batches: int) -> None:
    """Also in batches that have no row of one kind."""
    jobs = [job_of(np.roll(raw, number), first=10 * number) for number in range(batches)]
    decoder = SplitBatchDecoder(IdsDecoder(1), IdsDecoder(2), CPU)
    found = list(decoder.decode((job, number) for number, job in enumerate(jobs)))
    assert [extra for *_, extra in found] == list(range(batches))
    for (images, job, _), given_job in zip(found, jobs, strict=True):
        assert job is given_job
        kinds = np.where(job.encoded.raw, 1, 2)
        assert images[:, 0, 0, 0].tolist() == job.encoded.ids.tolist()
        assert images[:, 0, 0, 1].tolist() == kinds.tolist()


def job_of(raw: Any, first: int) -> DecodeJob:
    n = len(raw)
    ids, rows = np.arange(first, first + n), np.ones(n, INDEX_DTYPE)
    batch = Encoded(ids=ids, images=[np.zeros(3, np.uint8)] * n, rows=rows, raw=np.asarray(raw))
    return DecodeJob(encoded=batch, window=np.tile(np.array([0, 0, 1, 1], np.int32), (n, 1)), size=1)


class IdsDecoder:
    """Yields images whose red value is the sample's id, and whose green value is the kind of this decoder."""

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def decode(self, jobs: Any) -> Iterator[Any]:
        ahead = [*zip(range(2), jobs, strict=False)]
        jobs = iter([each for _, each in ahead] + list(jobs))
        for job, extra in jobs:
            assert len(job.encoded.ids) > 0
            assert set(job.encoded.raw.tolist()) == {self._kind == 1}
            images = torch.zeros((len(job.encoded.ids), 1, 1, 3), dtype=torch.uint8)
            images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.from_numpy(job.encoded.ids), self._kind
            yield images, job, extra


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_gpu_graph_of_pixels_equals_that_of_jpegs(evaluation: bool) -> None:
    """Both graphs run on a CPU here, with the same operators and arguments except the device."""
    jpegs = [encoded(Image.fromarray(getattr(skimage.data, name)())) for name in ("astronaut", "coffee", "chelsea")]
    photos = [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs]
    rows = np.zeros(3, INDEX_DTYPE)
    rows["height"], rows["width"] = np.array([photo.shape[:2] for photo in photos]).T
    heights, widths = rows["height"].astype(np.int32), rows["width"].astype(np.int32)
    job: dict[str, Any] = {"window": np.array([[8, 16, 200, 177], [0, 0, 300, 451], [3, 2, 50, 100]], np.int32)}
    job["flip"] = np.array([True, False, True])
    if evaluation:
        job["window"], job["region"] = eval_windows(heights, widths, 64)
    found = []
    for kind, images in ((DaliDecoder, jpegs), (DaliPixelsDecoder, [photo.reshape(-1) for photo in photos])):
        batch = Encoded(ids=np.arange(3), images=images, rows=rows, raw=np.full(3, kind is DaliPixelsDecoder))
        jobs = [DecodeJob(encoded=batch, size=size, **job) for size in (64, 32)]
        found.append(run_graph(kind, jobs, evaluation=evaluation))
    for jpeg, pixels in zip(*found, strict=True):
        assert np.array_equal(pixels, jpeg)
