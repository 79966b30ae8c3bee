"""The FFCV loader follows the plan, with the same crop windows, flips and operations as the DALI loader."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline import background
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.decode.choose import make_decoder
from pipeline.decode.job import DecodeError, DecodeJob
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.loaders.factory import train_loader
from pipeline.options import LoaderName
from pipeline.plan import EvalPlan, TrainPlan
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from pipeline.storage.remote.shard_set import open_set
from shards.errors import ShardSetError, UserError
from shards.format.beton import FIELD, HEADER, METADATA
from shards.format.dataset import ShardSet
from tests.support.commands import run_pipeline
from tests.support.serving import serve
from tests.support.waiting import wait_until

if os.environ.get("CI") != "true":
    pytest.importorskip("ffcv")

CPU = torch.device("cpu")
GLOBAL = 24
MODES = {"jpg": ("ffcv", "jpg"), "raw": ("ffcv", "raw"), "both": ("both", "smart")}


@pytest.fixture(scope="module")
def sets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One source as tars, as .beton files of JPEGs and of pixels, and as tars with a .beton of both."""
    folder = tmp_path_factory.mktemp("betons")
    source = photos.parent / "images"
    for name, (form, mode) in MODES.items():
        options = ("--shard-size", "2", "--format", form, "--write-mode", mode, "--smart-ratio", "5")
        run_pipeline("shard", source, "--out", folder / name, *options)
    return {name: folder / name for name in MODES} | {"tars": photos}


def train(path: Path | str, loader: LoaderName, recipe: AugmentRecipe, **options: Any) -> TrainLoader:
    dataset = open_set(path, cache=options.pop("cache", None))
    plan = TrainPlan(
        dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16, pairs=recipe.mixes
    )
    shape = BatchShape(global_batch=GLOBAL, pairs=recipe.mixes)
    chosen = LoaderOptions(loader=loader, **options)
    return TrainLoader(dataset, plan, shape, recipe, epochs=2, device=CPU, options=chosen)


def batches_of(loader: TrainLoader | EvalLoader) -> list[Batch]:
    with loader:
        return list(loader.stream())


class Recording:
    """A decoder that records its jobs."""

    def __init__(self, inner: Any, jobs: list[tuple[DecodeJob, Any]]) -> None:
        self._inner, self._jobs = inner, jobs

    def decode(self, jobs: Iterable[tuple[DecodeJob, Any]]) -> Iterator[Any]:
        for images, job, extra in self._inner.decode(jobs):
            self._jobs.append((job, extra))
            yield images, job, extra


def record_jobs(patch: pytest.MonkeyPatch, jobs: list[tuple[DecodeJob, Any]]) -> None:
    patch.setattr(background, "make_decoder", lambda *args, **kwargs: Recording(make_decoder(*args, **kwargs), jobs))


def test_dali_and_ffcv_get_the_same_jobs_at_every_position(
    sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = augment_recipe("fat", size=64)
    asked: dict[str, list[tuple[DecodeJob, Any]]] = {"dali": [], "ffcv": []}
    delivered = {}
    for name, jobs in asked.items():
        record_jobs(monkeypatch, jobs)
        delivered[name] = batches_of(train(sets["both"], name, recipe))  # type: ignore[arg-type]
    assert len(asked["dali"]) == len(asked["ffcv"]) == len(delivered["dali"]) > 4
    for (one, batch), (other, other_batch) in zip(*asked.values(), strict=True):
        assert batch.request.position == other_batch.request.position
        assert one.encoded.ids.tolist() == other.encoded.ids.tolist()
        assert np.array_equal(one.window, other.window)
        assert np.array_equal(one.flip, other.flip)
        for name in ("ops", "applied", "arguments", "erase_boxes", "erase_keys"):
            assert np.array_equal(getattr(batch.params, name), getattr(other_batch.params, name))
    for one, other in zip(*delivered.values(), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.lam, other.lam)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tars", *MODES])
def test_pixels_are_close_to_pil_for_every_storage_format(sets: dict[str, Path], name: str) -> None:
    recipe = augment_recipe("light", size=96)
    jobs: list[tuple[DecodeJob, Any]] = []
    loader = train(sets[name], "ffcv", recipe)
    with loader, pytest.MonkeyPatch.context() as patch:
        record_jobs(patch, jobs)
        shown = [next(loader) for _ in range(3)]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    errors = []
    with SampleReader(open_storage(ShardSet(sets["tars"]), "train")) as tars:
        for (job, _), batch in zip(jobs, shown, strict=False):
            pixels = ((batch.images * std + mean) * 255).permute(0, 2, 3, 1).numpy()
            assert job.flip is not None
            for row, jpeg in enumerate(tars.read(batch.ids).checked().images):
                y, x, height, width = job.window[row].tolist()
                image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
                expected = image.resize((96, 96), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
                expected = ImageOps.mirror(expected) if job.flip[row] else expected
                errors.append(np.abs(pixels[row] - np.asarray(expected, np.float64)).mean())
    assert np.mean(errors) < 3


def test_one_decoder_serves_every_output_size(sets: dict[str, Path]) -> None:
    arguments: dict[str, Any] = {"global_batch": GLOBAL, "augment": "light", "options": LoaderOptions(loader="ffcv")}
    with train_loader(sets["tars"], size_schedule="0e:64,1e:64,1e:96", epochs=2, **arguments) as loader:
        batches = list(loader.stream())
    assert {batch.images.shape[-1] for batch in batches} == {64, 96}
    for size in (64, 96):
        with train_loader(sets["tars"], size=size, epochs=2, **arguments) as loader:
            fixed = list(loader.stream())
        for batch, expected in zip(batches, fixed, strict=True):
            if batch.images.shape[-1] == size:
                assert torch.equal(batch.images, expected.images)


def test_every_storage_format_gives_the_same_batches(sets: dict[str, Path]) -> None:
    recipe = augment_recipe("fat", size=64)
    reference = batches_of(train(sets["tars"], "ffcv", recipe))
    for name, exact in (("jpg", True), ("raw", False), ("both", False)):
        for one, other in zip(reference, batches_of(train(sets[name], "ffcv", recipe)), strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            # Stored pixels were decoded at conversion, with the exact inverse DCT.
            assert torch.equal(one.images, other.images) if exact else (one.images - other.images).abs().mean() < 0.1


def test_evaluation_pixels_are_close_to_dali(sets: dict[str, Path]) -> None:
    dataset = ShardSet(sets["both"])
    samples = dataset.split("val").samples
    images = []
    for loader in ("dali", "ffcv"):
        plan = EvalPlan(samples, batch=samples)
        options = LoaderOptions(loader=loader)  # type: ignore[arg-type]
        normalization = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
        (batch,) = batches_of(EvalLoader(dataset, plan, size=96, device=CPU, options=options, **normalization))  # type: ignore[arg-type]
        images.append(batch.images)
    assert (images[0] - images[1]).abs().mean() < 3


def test_auto_selects_ffcv_for_a_beton_of_jpegs_without_tars_and_dali_otherwise(sets: dict[str, Path]) -> None:
    recipe = augment_recipe("light", size=32)
    for name, expected in (("tars", "dali"), ("both", "dali"), ("jpg", "ffcv"), ("raw", "dali")):
        auto, named = (batches_of(train(sets[name], loader, recipe)) for loader in ("auto", expected))  # type: ignore[arg-type]
        assert all(torch.equal(a.images, b.images) for a, b in zip(auto, named, strict=True))


def test_dali_reads_the_jpegs_of_a_beton(sets: dict[str, Path]) -> None:
    recipe = augment_recipe("light", size=32)
    tars, beton = (batches_of(train(sets[name], "dali", recipe)) for name in ("tars", "jpg"))
    assert all(torch.equal(a.images, b.images) for a, b in zip(tars, beton, strict=True))


def stored_as_pixels(path: Path) -> np.ndarray:
    """Return the ids of the training samples that the .beton stores as pixels, int64 [n]."""
    rows = ShardSet(path).index("train", beton=True)
    return np.flatnonzero(rows["size"] == rows["height"].astype(np.int64) * rows["width"] * 3)


@pytest.mark.parametrize("name", ["jpg", "raw", "both"])
@pytest.mark.parametrize("check", [True, False])
def test_a_damaged_sample_raises_an_error(sets: dict[str, Path], tmp_path: Path, name: str, check: bool) -> None:
    """Also for pixels, with and without tars: the index of the .beton has the hashes of its contents."""
    path = Path(shutil.copytree(sets[name], tmp_path / "set"))
    sample = 11 if name == "jpg" else int(stored_as_pixels(path)[0])
    row = ShardSet(path).index("train", beton=True)[sample]
    with (path / "train.beton").open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["size"]) // 2)
        file.write(b"\xff\xd9" * 200)

    def batches() -> list[Batch]:
        return batches_of(train(path, "ffcv", augment_recipe("light", size=32), check_hashes=check))

    if check:
        with pytest.raises(ShardSetError, match=rf"train.beton: the .* offset {row['offset']} .*sample {sample}\)"):
            batches()
    elif name == "jpg":
        with pytest.raises(DecodeError, match=r"sample 11 could not be decoded"):
            batches()
    else:
        assert batches(), "damaged pixels cannot be detected without a hash"


def test_a_beton_of_other_samples_is_rejected(sets: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(sets["both"], tmp_path / "set"))
    assert 0 < len(stored_as_pixels(path)) < ShardSet(path).split("train").samples, "the .beton has JPEGs and pixels"
    (path / "train.beton").write_bytes(bytes((path / "train.beton").stat().st_size))
    with pytest.raises(ShardSetError, match=r"train\.beton: neither the first nor the last sample"):
        train(path, "ffcv", augment_recipe("light", size=32))


@pytest.mark.parametrize("name", ["raw", "both"])
def test_the_sample_table_in_the_beton_is_not_used(sets: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Offsets, sizes and modes come from the index, whose hash is in the manifest. Those in the file may be damaged."""
    path = Path(shutil.copytree(sets[name], tmp_path / "set"))
    metadata = HEADER.itemsize + 2 * FIELD.itemsize
    with (path / "train.beton").open("r+b") as file:
        file.seek(metadata)
        file.write(b"\xa5" * ShardSet(path).split("train").samples * METADATA.itemsize)
    recipe = augment_recipe("light", size=32)
    found, expected = (batches_of(train(each, "ffcv", recipe)) for each in (path, sets[name]))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(found, expected, strict=True)
    )


def test_without_ffcv_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, sets: dict[str, Path]) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.decode.ffcv", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv.libffcv", None)
    with pytest.raises(UserError, match=r"pip install 'fat-pipeline\[ffcv\]'"):
        batches_of(train(sets["both"], "ffcv", augment_recipe("light", size=32)))


@pytest.mark.parametrize("name", MODES)
def test_a_remote_beton_is_staged_shard_by_shard(sets: dict[str, Path], tmp_path: Path, name: str) -> None:
    recipe = augment_recipe("light", size=32)
    shards = len(ShardSet(sets[name]).split("train").shards)
    with serve(sets[name]) as site, train(site.url, "ffcv", recipe, cache=tmp_path) as loader:
        found = [next(loader)]
        wait_until(lambda: len(list(tmp_path.rglob("train.beton.??????"))) >= shards)
        found += list(loader.stream())
    for one, other in zip(found, batches_of(train(sets[name], "ffcv", recipe)), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.equal(one.images, other.images)
