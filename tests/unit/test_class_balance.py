"""Class-balanced sampling: shares of classes, turns of samples, and the same batches at every world size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape, PlanError
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import Position, TrainPlan
from pipeline.sampling.class_balance import ClassBalance
from shards.format.dataset import ShardSet
from tests.support.plans import balanced_plans

CPU = torch.device("cpu")
GLOBAL = 24
seeds = st.integers(0, 2**63 - 1)
exponents = st.sampled_from([0.1, 0.5, 0.75, 1.0])


@st.composite
def label_arrays(draw: st.DrawFn) -> NDArray[np.int64]:
    """Draw labels of classes with 0 to 60 samples, in any order."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any))
    return np.random.default_rng(draw(st.integers(0, 100))).permutation(np.repeat(np.arange(len(sizes)), sizes))


@given(label_arrays(), exponents, seeds, st.integers(0, 5))
def test_every_epoch_has_as_many_draws_as_samples_and_each_class_has_its_share_within_one_draw(
    labels: NDArray[np.int64], exponent: float, seed: int, epoch: int
) -> None:
    balance = ClassBalance(labels, exponent, seed=seed)
    drawn = balance.draws(epoch)
    assert len(drawn) == len(labels)
    assert (np.diff(drawn.astype(np.int64)) >= 0).all()
    sizes = np.bincount(labels)
    weights = np.where(sizes > 0, np.maximum(sizes, 1.0) ** (1 - exponent), 0.0)
    shares = len(labels) * weights / weights.sum()
    np.testing.assert_allclose(balance.expected, shares, rtol=1e-9)
    found = np.bincount(labels[drawn], minlength=len(sizes))
    assert found.tolist() == balance.quotas(epoch).tolist()
    assert (np.abs(found - shares) < 1 + 1e-6).all()


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_expected_number_of_draws_of_each_sample_is_the_share_of_its_class_per_sample(exponent: float) -> None:
    labels = np.repeat(np.arange(4), [40, 9, 3, 1])
    total = np.zeros(len(labels))
    for seed in range(500):
        total += np.bincount(ClassBalance(labels, exponent, seed=seed).draws(0), minlength=len(labels))
    weights = np.bincount(labels) ** (1 - exponent)
    expected = (len(labels) * weights / weights.sum() / np.bincount(labels))[labels]
    # Five standard deviations: the number of draws of a sample is its mean, rounded up or down.
    assert (np.abs(total / 500 - expected) < 5 * 0.5 / np.sqrt(500)).all()


@settings(max_examples=40)
@given(label_arrays(), exponents, seeds, st.integers(1, 12))
def test_samples_of_a_class_are_drawn_in_turn_over_all_epochs(
    labels: NDArray[np.int64], exponent: float, seed: int, epochs: int
) -> None:
    balance = ClassBalance(labels, exponent, seed=seed)
    times = sum(np.bincount(balance.draws(epoch), minlength=len(labels)) for epoch in range(epochs))
    for label in np.unique(labels):
        assert np.ptp(times[labels == label]) <= 1


def test_equal_classes_are_drawn_as_without_balance() -> None:
    labels = np.tile(np.arange(5), 30)
    assert ClassBalance(labels, 1.0, seed=3).draws(7).tolist() == list(range(150))


def test_golden_draws() -> None:
    """Values of the first release. Different values would change the data of every run that resumes."""
    labels = np.array([0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0, 1])
    drawn = [ClassBalance(labels, exponent, seed=2026).draws(epoch).tolist() for exponent, epoch in GOLDEN]
    assert drawn == list(GOLDEN.values())


GOLDEN: dict[tuple[float, int], list[int]] = {
    (1.0, 0): [0, 1, 2, 4, 4, 4, 4, 6, 7, 10, 11, 11],
    (1.0, 3): [1, 3, 4, 4, 4, 4, 5, 6, 8, 9, 11, 11],
    (0.5, 1): [0, 1, 2, 3, 4, 4, 5, 6, 7, 9, 10, 11],
}


@settings(max_examples=40)
@given(balanced_plans(), st.integers(0, 3), st.data())
def test_same_global_batches_at_every_world_size_and_after_a_resume(
    plan: TrainPlan, epoch: int, data: st.DataObject
) -> None:
    size = plan.global_batch
    world = data.draw(st.sampled_from([r for r in range(1, size + 1) if size % r == 0]))
    position = Position(epoch, data.draw(st.integers(0, plan.steps_per_epoch - 1)))
    assert plan.balance is not None
    labels = plan.balance._labels
    rows = []
    for rank in range(world):
        fresh = TrainPlan(  # as in a process that starts at this position
            plan._counts,
            global_batch=size,
            seed=plan.seed,
            lanes=plan.lanes,
            shuffle_block_size=plan.shuffle_block_size,
            class_balance=plan.balance.exponent,
            labels=labels,
        )
        rows.append(
            np.stack(fresh.ids_and_repeats(position, BatchShape(global_batch=size, world=world, rank=rank).rows(0)))
        )
    assert np.concatenate(rows, axis=1).tolist() == np.stack(plan.ids_and_repeats(position)).tolist()


@settings(max_examples=40)
@given(balanced_plans(), st.integers(0, 3))
def test_an_epoch_contains_its_draws_without_a_rest_smaller_than_a_batch(plan: TrainPlan, epoch: int) -> None:
    assert plan.balance is not None
    pairs = [
        pair
        for step in range(plan.steps_per_epoch)
        for pair in zip(*(each.tolist() for each in plan.ids_and_repeats(Position(epoch, step))), strict=True)
    ]
    assert len(set(pairs)) == len(pairs) == plan.samples // plan.global_batch * plan.global_batch
    drawn = Counter(plan.balance.draws(epoch).tolist())
    assert all(repeat < drawn[sample] for sample, repeat in pairs)
    assert sum(drawn.values()) - len(pairs) < plan.global_batch


def test_labels_are_required() -> None:
    for wrong in ({"class_balance": 1.0}, {"class_balance": 1.0, "labels": np.zeros(9, np.int64)}):
        with pytest.raises(PlanError, match=r"class balance 1: expected .* the label of each of the 10 samples"):
            TrainPlan([10], global_batch=2, seed=0, **wrong)
    with pytest.raises(PlanError, match=r"class balance 1\.5: expected a number from 0 to 1"):
        TrainPlan([10], global_batch=2, seed=0, class_balance=1.5, labels=np.zeros(10, np.int64))


@pytest.fixture(scope="module")
def long_tailed(digits: Path) -> ShardSet:
    """Digits, of which class c has about 0.6^c of its training samples."""
    dataset = ShardSet(digits)
    labels = dataset.index("train")["label"]
    place = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    rows = np.flatnonzero(place < 140 * 0.6**labels).astype(np.uint32)
    dataset.restrict(range(10), {"train": rows})
    return dataset


def loader(dataset: ShardSet, shape: BatchShape, *, start: Position, recipe: str = "light", **options: str):
    augment = augment_recipe(recipe, size=32)
    labels = dataset.index("train")["label"]
    plan = TrainPlan(
        dataset.shard_samples("train"),
        global_batch=GLOBAL,
        seed=5,
        pairs=augment.mixes,
        shuffle_block_size=8,
        class_balance=1.0,
        labels=labels,
    )
    return plan, TrainLoader(
        dataset,
        plan,
        shape,
        augment,
        epochs=2,
        start=start,
        device=CPU,
        options=LoaderOptions(**options),  # type: ignore[arg-type]
    )


def test_loaders_give_the_same_pixels_at_every_world_size_and_in_the_feed_process(long_tailed: ShardSet) -> None:
    start = Position(0, 11)
    plan, one = loader(long_tailed, BatchShape(global_batch=GLOBAL), start=start)
    index = long_tailed.index("train")
    with one:
        whole = [next(one) for _ in range(4)]  # into the second epoch
    for batch in whole:
        ids = plan.ids(batch.position)
        assert batch.ids.tolist() == ids.tolist()
        assert batch.labels.tolist() == index["label"][ids].tolist()
    parts = []
    for rank in range(2):
        shape = BatchShape(global_batch=GLOBAL, world=2, rank=rank, micro_batch=6)
        _, half = loader(long_tailed, shape, start=start, feed_process="on" if rank else "off")
        with half:
            parts.append([next(half) for _ in range(8)])
    for step, batch in enumerate(whole):
        micro = [part[2 * step + number] for part in parts for number in range(2)]
        assert torch.equal(torch.cat([each.images for each in micro]), batch.images)
        assert np.concatenate([each.ids for each in micro]).tolist() == batch.ids.tolist()


def test_repeated_samples_of_an_epoch_have_different_augmentations(long_tailed: ShardSet) -> None:
    _, train = loader(long_tailed, BatchShape(global_batch=GLOBAL), start=Position(0, 0))
    seen: dict[int, list[torch.Tensor]] = {}
    with train:
        for batch in train:
            if batch.position.epoch:
                break
            for sample, image in zip(batch.ids.tolist(), batch.images, strict=True):
                seen.setdefault(sample, []).append(image)
    repeated = [images for images in seen.values() if len(images) > 5]
    assert repeated
    for images in repeated:
        assert len({image.numpy().tobytes() for image in images}) == len(images)


@settings(max_examples=5)
@given(seeds)
def test_a_balanced_plan_of_two_classes_alternates_them_evenly(seed: int) -> None:
    labels = np.arange(1000) < 20
    plan = TrainPlan([500, 500], global_batch=100, seed=seed, class_balance=1.0, labels=labels.astype(int))
    rare = np.array([labels[plan.ids(Position(0, step))].mean() for step in range(10)])
    assert rare.mean() == 0.5
    assert (np.abs(rare - 0.5) < 0.35).all()
