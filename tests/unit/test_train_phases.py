"""Progressive resizing in the training loader: each phase delivers the batches of a loader of its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import Batch, LoaderOptions, PlanError, UserError, train_loader
from pipeline.augment.recipe import AugmentRecipe, augment_recipe, with_magnitude
from pipeline.batch_shape import BatchShape
from pipeline.loader import TrainLoader
from pipeline.phases.size_schedule import SizeSchedule
from pipeline.phases.train_phase import TrainPhase, check_phases, phase_at, phases_of
from pipeline.plan import Position, TrainPlan
from shards.format.dataset import ShardSet

GLOBAL, EPOCHS = 24, 2
# Sizes change within epochs, and within the blocks of 16 steps whose mixing is drawn together.
SCHEDULE = SizeSchedule.parse("0:32,20:32,60:96,90:64")
MICRO_BATCHES = {32: 12, 96: 2}
FAT = augment_recipe("fat", size=64)


def shape_of(world: int = 1, rank: int = 0, *, pairs: bool = True, micro_batch: int | None = None) -> BatchShape:
    return BatchShape(global_batch=GLOBAL, world=world, rank=rank, pairs=pairs, micro_batch=micro_batch)


def plan_of(dataset: ShardSet) -> TrainPlan:
    return TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16, pairs=True)


def phases(plan: TrainPlan, shape: BatchShape, augment: AugmentRecipe = FAT, **given: Any) -> tuple[TrainPhase, ...]:
    steps = plan.steps_per_epoch
    return phases_of(SCHEDULE, augment=augment, shape=shape, total_steps=EPOCHS * steps, steps_per_epoch=steps, **given)


def progressive(
    dataset: ShardSet,
    shape: BatchShape,
    *,
    augment: AugmentRecipe = FAT,
    options: LoaderOptions | None = None,
    start: Position | None = None,
) -> TrainLoader:
    plan = plan_of(dataset)
    return TrainLoader(
        dataset,
        plan,
        shape,
        augment,
        epochs=EPOCHS,
        start=start,
        device="cpu",
        options=options,
        phases=phases(plan, shape, augment, micro_batches={} if shape.world > 1 else MICRO_BATCHES),
    )


def row(batch: Batch) -> tuple[Any, ...]:
    lam = None if batch.lam is None else batch.lam.numpy().tobytes()
    images, labels = batch.images.contiguous().numpy().tobytes(), batch.labels.tolist()
    return (batch.position, batch.micro, tuple(batch.images.shape), batch.ids.tolist(), labels, lam, images)


def rows(loader: TrainLoader, count: int | None = None) -> list[tuple[Any, ...]]:
    with loader:
        return [row(batch) for batch in islice(loader.stream(), count)]


@pytest.mark.parametrize("name", ["fat", "light"])
@pytest.mark.parametrize("kind", ["dali", "feed process", "synthetic"])
def test_each_phase_delivers_the_batches_of_a_loader_of_its_size(photos: Path, name: str, kind: str) -> None:
    dataset, augment = ShardSet(photos), augment_recipe(name, size=64)
    process = LoaderOptions(feed_process="on" if kind == "feed process" else "off")
    options = LoaderOptions(loader="synthetic") if kind == "synthetic" else process
    plan = plan_of(dataset)
    all_phases = phases(plan, shape_of(), augment, micro_batches=MICRO_BATCHES)
    assert len(all_phases) > 3
    found = rows(progressive(dataset, shape_of(), augment=augment, options=options))
    compared = slice(4 if kind == "synthetic" else None)  # synthetic images and labels are random
    expected = []
    ends = [phase.first_step for phase in all_phases[1:]] + [EPOCHS * plan.steps_per_epoch]
    for phase, end in zip(all_phases, ends, strict=True):
        fixed = TrainLoader(
            dataset,
            plan,
            phase.shape,
            phase.augment,
            epochs=EPOCHS,
            start=plan.at(phase.first_step),
            device="cpu",
            options=options,
        )
        expected += rows(fixed, (end - phase.first_step) * phase.shape.accumulation)
    assert [batch[compared] for batch in found] == [batch[compared] for batch in expected]


@settings(max_examples=4, deadline=None)
@given(data=st.data(), worlds=st.permutations([1, 2, 3]))
def test_a_training_resumes_within_a_phase_at_another_world_size(
    photos: Path, data: st.DataObject, worlds: list[int]
) -> None:
    """All ranks together deliver the same images, whichever world size each part of the training had."""
    dataset = ShardSet(photos)
    plan = plan_of(dataset)
    total = EPOCHS * plan.steps_per_epoch
    stops = sorted(data.draw(st.lists(st.integers(1, total - 1), min_size=2, max_size=2, unique=True)))
    begin, parts, state = 0, [], None
    for world, end in zip(worlds, [*stops, total], strict=True):
        by_rank = []
        for rank in range(world):
            loader = progressive(dataset, shape_of(world, rank))
            if state is not None:
                loader.load_state_dict(state)
            accumulation = [phase_at(loader._phases, step).shape.accumulation for step in range(begin, end)]
            with loader:
                batches = [[next(loader) for _ in range(count)] for count in accumulation]
                saved = loader.state_dict()
            by_rank.append(batches)
        state = saved if end < total else None
        for step in range(end - begin):
            of_step = [batch for batches in by_rank for batch in batches[step]]
            parts.append(([i for batch in of_step for i in batch.ids.tolist()], joined(of_step)))
        begin = end
    for (ids, images), (expected_ids, expected) in zip(parts, whole_training(dataset), strict=True):
        assert ids == expected_ids
        assert torch.equal(images, expected)


def joined(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


_whole: list[tuple[list[int], torch.Tensor]] = []


def whole_training(dataset: ShardSet) -> Iterator[tuple[list[int], torch.Tensor]]:
    if not _whole:
        with progressive(dataset, shape_of()) as loader:
            by_step: dict[Position, list[Batch]] = {}
            for batch in loader.stream():
                by_step.setdefault(batch.position, []).append(batch)
        _whole.extend(([i for b in of_step for i in b.ids.tolist()], joined(of_step)) for of_step in by_step.values())
    return iter(_whole)


def test_the_length_of_an_epoch_counts_the_micro_batches_of_its_phases(photos: Path) -> None:
    dataset = ShardSet(photos)
    with progressive(dataset, shape_of(), options=LoaderOptions(loader="synthetic")) as loader:
        lengths = []
        for _ in range(EPOCHS):
            length = len(loader)
            assert len(list(loader)) == length
            lengths.append(length)
    assert lengths[0] != lengths[1]


def test_a_position_between_the_micro_batches_of_a_step_is_that_before_the_step(photos: Path) -> None:
    plan = plan_of(ShardSet(photos))
    with progressive(ShardSet(photos), shape_of(), options=LoaderOptions(loader="synthetic")) as loader:
        for batch in loader.stream():
            step, state = plan.steps_before(batch.position), loader.state_dict()
            done = step + (batch.micro == phase_at(loader._phases, step).shape.accumulation - 1)
            assert plan.steps_before(Position(state["epoch"], state["step"])) == done


# -- phases ------------------------------------------------------------------------------------------------------------


def test_phases_follow_the_schedule() -> None:
    schedule = SizeSchedule.parse("0:128,65:192,85:224")
    found = phases_of(
        schedule,
        augment=augment_recipe("fat"),
        shape=BatchShape(global_batch=1024, world=4, micro_batch=64, pairs=True),
        total_steps=1000,
        steps_per_epoch=100,
        min_strength=1 / 3,
        micro_batches={128: 256, 160: 128},
    )
    assert [phase.first_step for phase in found] == [0, 163, 488, 750]
    assert [phase.augment.size for phase in found] == [128, 160, 192, 224]
    assert [phase.shape.micro_rows for phase in found] == [256, 128, 64, 64]
    assert [phase.shape.accumulation for phase in found] == [1, 2, 4, 4]
    assert [phase.strength for phase in found] == pytest.approx([1 / 3, 5 / 9, 7 / 9, 1])
    assert [phase.augment.rand_augment for phase in found] == [
        f"rand-m{magnitude}-mstd0.5-inc1" for magnitude in (3, 5, 7, 9)
    ]


def test_without_a_schedule_there_is_one_phase() -> None:
    shape = shape_of()
    found = phases_of(None, augment=FAT, shape=shape, total_steps=10, steps_per_epoch=5)
    assert found == (TrainPhase(first_step=0, augment=FAT, shape=shape, strength=1.0),)


def test_a_micro_batch_that_does_not_divide_the_rank_names_the_size(photos: Path) -> None:
    plan = plan_of(ShardSet(photos))
    with pytest.raises(PlanError, match="images of 96 pixels: micro-batch 10 does not divide the 24 rows of a rank"):
        phases(plan, shape_of(), micro_batches={96: 10})


@pytest.mark.parametrize(
    ("policy", "magnitude", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", 5, "rand-m5-mstd0.5-inc1"),
        ("rand-mstd0.5", 3, "rand-m3-mstd0.5"),  # the default magnitude
        ("rand-m9-n3-m7", 0, "rand-m0-n3"),
    ],
)
def test_the_magnitude_of_a_policy_is_replaced(policy: str, magnitude: int, expected: str) -> None:
    assert with_magnitude(policy, magnitude) == expected


def test_phases_that_change_the_plan_are_rejected() -> None:
    phase = TrainPhase(first_step=0, augment=FAT, shape=shape_of())
    for wrong in (
        [replace(phase, first_step=1)],
        [phase, phase],
        [phase, replace(phase, first_step=3, shape=shape_of(2))],
        [replace(phase, augment=replace(FAT, erase=0.5))],
    ):
        with pytest.raises(ValueError, match=r"in more than micro-batch size|begin at the steps"):
            check_phases(wrong, shape_of(), FAT)
    check_phases([phase, replace(phase, first_step=3, augment=replace(FAT, size=96))], shape_of(), FAT)


# -- public function ---------------------------------------------------------------------------------------------------


def test_the_public_loader_takes_a_size_schedule(photos: Path) -> None:
    arguments: dict[str, Any] = {"batch_size": GLOBAL, "options": LoaderOptions(loader="synthetic"), "rank": 0}
    with train_loader(photos, size_schedule="0e:32,1e:32,1e:64", world=1, **arguments) as loader:
        sizes = [{batch.images.shape[-1] for batch in loader} for _ in range(3)]
    assert sizes == [{32}, {64}, {64}]
    with train_loader(photos, size_schedule="0:32,50:32,50:64", epochs=2, world=1, **arguments) as loader:
        assert [batch.images.shape[-1] for batch in loader] == [32, 32, 32]
        assert [batch.images.shape[-1] for batch in loader] == [64, 64, 64]
    with pytest.raises(UserError, match=r"size 96: size_schedule 0:32,50:32,50:64 ends at 64 pixels; omit size"):
        train_loader(photos, size_schedule="0:32,50:32,50:64", size=96, world=1, **arguments)
    with pytest.raises(UserError, match="is a percentage of the training, whose number of epochs is not given"):
        train_loader(photos, size_schedule="0:32,50:32,50:64", world=1, **arguments)
