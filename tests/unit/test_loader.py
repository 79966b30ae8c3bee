"""Loaders on real shards: the batches follow the plan, the index and the recipe."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment.params import crop_windows, flips
from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader, eval_geometry
from pipeline.options import DaliOptions, LoaderSettings
from pipeline.plan import NO_SAMPLE, EvalPlan, Position, TrainPlan
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import Encoded, SampleReader
from shards.errors import UserError
from shards.format.dataset import ShardSet
from tests.support.leftovers import nothing_is_left_behind

CPU = torch.device("cpu")
GLOBAL = 24


def train_loader(path: Path, recipe: AugmentRecipe, *, epochs: int = 1, start: Position | None = None, **shape: int):
    dataset = ShardSet(path)
    plan = TrainPlan(
        dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16, pairs=recipe.mixes
    )
    batch_shape = BatchShape(global_batch=GLOBAL, pairs=recipe.mixes, **shape)
    return plan, TrainLoader(dataset, plan, batch_shape, recipe, epochs=epochs, start=start, device=CPU)


def pixels_of(batch: Batch, recipe: AugmentRecipe) -> np.ndarray:
    """Convert the images back to levels 0 to 255, float64 [B, H, W, 3]."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    return ((batch.images.double() * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def test_training_batches_contain_the_samples_of_the_plan_with_the_drawn_crops_and_flips(photos: Path) -> None:
    recipe = augment_recipe("light", size=96)
    plan, loader = train_loader(photos, recipe)
    dataset = ShardSet(photos)
    index = dataset.index("train")
    errors = []
    with loader, SampleReader(open_storage(dataset, "train")) as reader:
        batches = list(loader)
        assert [b.position.step for b in batches] == list(range(plan.steps_per_epoch))
        for batch in batches:
            ids = plan.ids(batch.position)
            assert batch.ids.tolist() == ids.tolist()
            assert batch.labels.tolist() == index["label"][ids].tolist()
            assert batch.images.shape == (GLOBAL, 3, 96, 96)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            sizes = {"heights": index["height"][ids], "widths": index["width"][ids]}
            windows = crop_windows(recipe, seed=5, epoch=0, ids=ids, **sizes)
            flipped = flips(recipe, seed=5, epoch=0, ids=ids)
            shown = pixels_of(batch, recipe)
            for row, jpeg in enumerate(reader.read(ids).checked().images):
                y, x, height, width = windows[row].tolist()
                image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
                expected = image.resize((96, 96), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
                if flipped[row]:
                    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                errors.append(np.abs(shown[row] - np.asarray(expected, np.float64)).mean())
    assert any(flips(recipe, seed=5, epoch=0, ids=np.arange(40)))
    # Decoders differ in chroma upsampling, and the resize sometimes differs by one level.
    assert np.mean(errors) < 0.1
    assert np.max(errors) < 0.3


@pytest.mark.parametrize("recipe_name", ["light", "fat"])
def test_global_batches_are_the_same_at_every_world_size(digits: Path, recipe_name: str) -> None:
    recipe = augment_recipe(recipe_name, size=32)

    def global_batches(world: int, micro: int) -> list[tuple[list[int], torch.Tensor]]:
        ranks = []
        for rank in range(world):
            _, loader = train_loader(digits, recipe, world=world, rank=rank, micro_batch=micro)
            with loader:
                ranks.append([next(loader) for _ in range(3 * GLOBAL // world // micro)])
        per_step = GLOBAL // world // micro
        steps = []
        for step in range(3):
            parts = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
            steps.append(([i for b in parts for i in b.ids.tolist()], torch.cat([b.images for b in parts])))
        return steps

    reference = global_batches(1, GLOBAL)
    for world, micro in [(1, 6), (2, 12), (4, 6), (6, 2)]:
        for (ids, images), (expected_ids, expected) in zip(global_batches(world, micro), reference, strict=True):
            assert ids == expected_ids
            assert torch.equal(images, expected)


def test_a_loader_resumes_from_its_state_with_the_next_batch(digits: Path) -> None:
    recipe = augment_recipe("fat", size=32)
    plan, whole = train_loader(digits, recipe, epochs=2)
    with whole:
        first = [next(whole) for _ in range(5)]
        state = whole.state_dict()
        expected = [next(whole) for _ in range(3)]
    assert (state["epoch"], state["step"]) == (0, 5)
    assert [b.position for b in first] == [plan.at(step) for step in range(5)]
    _, resumed = train_loader(digits, recipe, epochs=2)
    next(resumed)  # starts prefetching
    resumed.load_state_dict(state)
    with resumed:
        for batch in expected:
            again = next(resumed)
            assert again.ids.tolist() == batch.ids.tolist()
            assert torch.equal(again.images, batch.images)


def test_the_state_counts_complete_delivered_steps_only(digits: Path) -> None:
    _, loader = train_loader(digits, augment_recipe("light", size=32), micro_batch=8)
    with loader:
        for expected in (0, 0, 1, 1, 1, 2):
            next(loader)
            assert loader.state_dict()["step"] == expected


def test_training_continues_across_epochs_and_ends_after_the_last(digits: Path) -> None:
    plan, loader = train_loader(digits, augment_recipe("light", size=16), epochs=2, start=Position(0, 57))
    with loader:
        positions = [batch.position for batch in loader.stream()]
    assert positions[0] == (0, 57)
    assert positions[-1] == (1, plan.steps_per_epoch - 1)
    assert (1, 0) in positions


def test_evaluation_delivers_each_image_once_at_any_world_size(digits: Path) -> None:
    dataset = ShardSet(digits)
    labels = dataset.index("val")["label"]
    for world in (1, 3):
        ranks = []
        for rank in range(world):
            plan = EvalPlan(360, batch=50, world=world, rank=rank)
            loader = EvalLoader(dataset, plan, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU)
            with loader:
                batches = list(loader)
                again = list(loader)
            ranks.append(batches)
            assert [b.ids.tolist() for b in batches] == [b.ids.tolist() for b in again]
            for batch in batches:
                assert ((batch.ids != NO_SAMPLE) == batch.mask.numpy()).all()
                ids = batch.ids[batch.mask.numpy()]
                assert batch.labels[batch.mask].tolist() == labels[ids].tolist()
        seen = np.concatenate([batch.ids for step in zip(*ranks, strict=True) for batch in step])
        assert seen[seen != NO_SAMPLE].tolist() == list(range(360))


def test_an_interrupted_evaluation_resumes_at_another_world_size(digits: Path) -> None:
    def loader(world: int, rank: int) -> EvalLoader:
        plan = EvalPlan(360, batch=25, world=world, rank=rank)
        return EvalLoader(ShardSet(digits), plan, size=16, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU)

    with loader(1, 0) as whole:
        images = torch.cat([batch.images[batch.mask] for batch in whole])
    seen: dict[int, torch.Tensor] = {}

    def deliver(batches: list[Batch]) -> None:
        for batch in batches:
            for row in np.flatnonzero(batch.mask.numpy()):
                assert batch.ids[row] not in seen
                seen[int(batch.ids[row])] = batch.images[row]

    states = []
    for rank in range(3):
        with loader(3, rank) as first:
            deliver([next(first) for _ in range(2)])
            states.append(first.state_dict())
    assert states == [{"samples": 150, "of": 360}] * 3
    for rank in range(2):
        with loader(2, rank) as second:
            second.load_state_dict(states[0])
            assert len(second) == 5
            deliver(list(second))
            assert second.state_dict() == {"samples": 360, "of": 360}
            assert [b.position.step for b in second] == list(range(8)), "the next pass is complete"
    assert sorted(seen) == list(range(360))
    assert all(torch.equal(seen[i], images[i]) for i in seen)


def test_evaluation_pixels_equal_resize_and_center_crop_by_pil(photos: Path) -> None:
    dataset = ShardSet(photos)
    samples = dataset.split("val").samples
    recipe = AugmentRecipe()
    loader = EvalLoader(
        dataset, EvalPlan(samples, batch=samples), size=112, mean=recipe.mean, std=recipe.std, device=CPU
    )
    with loader, SampleReader(open_storage(dataset, "val")) as reader:
        batch = next(loader)
        encoded = reader.read(np.arange(samples)).checked()
    shown = pixels_of(batch, recipe)
    for row, jpeg in enumerate(encoded.images):
        image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
        short, (width, height) = 128, image.size
        scaled = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
        resized = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = round((scaled[0] - 112) / 2), round((scaled[1] - 112) / 2)
        expected = np.asarray(resized.crop((left, top, left + 112, top + 112)), np.float64)
        assert np.abs(shown[row] - expected).mean() < 1.0


def test_evaluation_geometry_has_the_ratio_256_to_224() -> None:
    resize, anchor = eval_geometry(np.array([375, 500, 64]), np.array([500, 333, 64]), 224)
    assert resize.tolist() == [[256, 341], [384, 256], [256, 256]]
    assert anchor.tolist() == [[16, 58], [80, 16], [16, 16]]
    assert eval_geometry(np.array([64]), np.array([64]), 64)[0].tolist() == [[73, 73]]
    assert eval_geometry(np.array([80]), np.array([64]), 64, crop_pct=1)[0].tolist() == [[80, 64]]


def test_no_resources_are_leaked(digits: Path) -> None:
    def round_trip() -> None:
        _, loader = train_loader(digits, augment_recipe("light", size=32))
        with loader:
            next(loader)

    round_trip()
    with nothing_is_left_behind():
        for _ in range(5):
            round_trip()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_an_error_after_the_decoder_also_ends_the_decoder(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the error, and with it the frames of its traceback, stays referenced."""

    def fails(*_: object) -> None:
        raise ArithmeticError

    before = set(threading.enumerate())
    monkeypatch.setattr("pipeline.loader.BatchAugment", lambda *_, **__: fails)
    _, loader = train_loader(digits, augment_recipe("fat", size=32))
    with pytest.raises(ArithmeticError):
        next(loader)
    assert loader._prefetcher is not None
    loader._prefetcher._thread.join()
    with pytest.raises(ArithmeticError):
        next(loader)
    assert not set(threading.enumerate()) - before
    loader.close()


@pytest.mark.usefixtures("three_threads")
def test_the_loader_uses_one_torch_thread_and_does_not_change_the_number_of_others(digits: Path) -> None:
    def seen_by_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    used = []

    class Watching(TrainLoader):
        def _labels(self, encoded: Encoded) -> torch.Tensor:
            used.append(torch.get_num_threads())
            return super()._labels(encoded)

    dataset = ShardSet(digits)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5)
    recipe = augment_recipe("light", size=32)
    with Watching(dataset, plan, BatchShape(global_batch=GLOBAL), recipe, epochs=1, device=CPU) as loader:
        next(loader)
        assert torch.get_num_threads() == seen_by_a_new_thread() == 3
    assert set(used) == {1}


def test_performance_options_do_not_change_the_batches(digits: Path) -> None:
    recipe = augment_recipe("light", size=32)
    dataset = ShardSet(digits)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5)
    shape = BatchShape(global_batch=GLOBAL)
    images = []
    for options in (LoaderOptions(), LoaderOptions(read_threads=1, read_ahead=0, ready=1, check_hashes=False)):
        with TrainLoader(dataset, plan, shape, recipe, epochs=1, device=CPU, options=options) as loader:
            images.append(torch.cat([next(loader).images for _ in range(3)]))
    assert torch.equal(*images)


@pytest.mark.parametrize("recipe_name", ["light", "fat"])
def test_synthetic_batches_have_the_shape_of_the_plan_and_read_no_shards(
    tmp_path: Path, digits: Path, recipe_name: str
) -> None:
    for file in ("dataset.json", "train.index.npy", "val.index.npy"):
        shutil.copy(digits / file, tmp_path)  # without the shards
    dataset, recipe = ShardSet(tmp_path), augment_recipe(recipe_name, size=32)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, pairs=recipe.mixes)
    options = LoaderOptions(loader="synthetic")
    shape = BatchShape(global_batch=GLOBAL, micro_batch=GLOBAL // 2)
    with TrainLoader(
        dataset, plan, shape, recipe, epochs=1, device=CPU, dtype=torch.bfloat16, options=options
    ) as loader:
        batches = [next(loader) for _ in range(4)]
    assert [(b.position.step, b.micro) for b in batches] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for batch in batches:
        assert batch.ids.tolist() == plan.ids(batch.position, shape.rows(batch.micro)).tolist()
        assert batch.images.shape == (GLOBAL // 2, 3, 32, 32)
        assert batch.images.dtype == torch.bfloat16
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.data_ptr() == batches[0].images.data_ptr()
        assert (batch.lam is not None) == recipe.mixes
    with EvalLoader(
        dataset, EvalPlan(360, batch=100), size=32, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU, options=options
    ) as loader:
        ids = np.concatenate([batch.ids[batch.mask.numpy()] for batch in loader])
    assert ids.tolist() == list(range(360))


def test_unset_options_get_the_defaults_and_zero_is_not_unset() -> None:
    assert LoaderOptions().settings == LoaderSettings()
    given = LoaderOptions(read_ahead=0, decode_threads=7, dali=DaliOptions(hw_decoder_load=0.0))
    assert given.settings == LoaderSettings(read_ahead=0, decode_threads=7, hw_decoder_load=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoaderOptions(decode_threads=0), "--decode-threads 0: expected a whole number from 1 to"),
        (lambda: LoaderOptions(read_ahead=-1), "--read-ahead -1: expected a whole number from 0 to"),
        (lambda: DaliOptions(hw_decoder_load=1.5), "--hw-decoder-load 1.5: expected a number from 0 to 1"),
    ],
)
def test_options_out_of_range_are_rejected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
