"""The invariants of the soak (tests/soak) find a lost, a repeated and an exchanged sample, and other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.soak import invariants
from tests.soak.records import Batch, Records
from tests.soak.reference import Plan, Segment, segments
from tests.soak.round import FINAL_FILES, RoundResult, compare_tensors

SAMPLES, PER_EPOCH, BATCH = 12, 3, 4
PLAN = {
    step: tuple((step % PER_EPOCH * BATCH + row + 5 * (step // PER_EPOCH)) % SAMPLES for row in range(BATCH))
    for step in range(2 * PER_EPOCH)
}


def batch(ids: tuple[int, ...]) -> Batch:
    return Batch(ids, tuple(f"pixels-{i}" for i in ids))


def check(timeline: dict[int, Batch], damaged: tuple[int, ...] = ()) -> tuple[list[str], int]:
    return invariants.exactly_once(timeline, PLAN, samples=SAMPLES, steps_per_epoch=PER_EPOCH, damaged=damaged)


def as_planned() -> dict[int, Batch]:
    return {step: batch(ids) for step, ids in PLAN.items()}


def test_a_run_as_planned_has_every_sample_once() -> None:
    assert check(as_planned()) == ([], 0)


@pytest.mark.parametrize("step", PLAN)
def test_every_lost_step_is_found(step: int) -> None:
    timeline = as_planned()
    del timeline[step]
    found, _ = check(timeline)
    assert found[0] == f"steps that were never done: [{step}]"
    assert any(f"epoch {step // PER_EPOCH}: 4 samples are lost" in line for line in found)


def test_a_repeated_sample_is_found_together_with_the_one_that_is_lost() -> None:
    timeline = as_planned()
    ids = list(PLAN[4])
    lost, ids[2] = ids[2], ids[1]
    timeline[4] = batch(tuple(ids))
    found, _ = check(timeline)
    assert found == [
        f"epoch 1: 1 samples are lost, such as [{lost}]",
        f"epoch 1: 1 samples are repeated, such as [{ids[1]}]",
        f"step 4, row 2: sample {ids[1]} instead of {lost}",
    ]


def test_a_repeated_batch_is_found() -> None:
    timeline = as_planned()
    timeline[1] = timeline[0]
    found, _ = check(timeline)
    assert "step 1, row 0: sample 0 instead of 4" in found


def test_a_batch_that_is_too_short_is_found() -> None:
    timeline = as_planned()
    timeline[0] = batch(PLAN[0][:3])
    found, _ = check(timeline)
    assert found[0] == "step 0 has 3 samples, but the plan has 4"


def test_only_damaged_samples_may_be_skipped() -> None:
    timeline = as_planned()
    damaged = PLAN[2][3]
    ids = (*PLAN[2][:3], PLAN[2][0])
    timeline[2] = batch(ids)
    assert check(timeline, damaged=(damaged,)) == ([], 1)
    assert check(timeline, damaged=((damaged + 1) % SAMPLES,))[0]


# -- records of ranks


def write(folder: Path, start: int, world: int, steps: list[int], *, killed: int | None = None, **changed: Any) -> None:
    """Write the records of a start; in step `killed` only rank 0 had begun."""
    rows = BATCH // world
    for rank in range(world):
        lines = []
        for step in steps:
            ids = list(PLAN[step][rank * rows : (rank + 1) * rows])
            ids = changed.get(f"ids_{step}_{rank}", ids)
            if step == killed and rank:
                break
            lines.append({"kind": "begin", "step": step, "rank": rank, "world": world, "ids": ids,
                          "pixels": [f"pixels-{i}" for i in ids]})  # fmt: skip
            if step != killed:
                lines.append({"kind": "done", "step": step, "rank": rank, "time": 10.0 * start + step, "seconds": 0.5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"start-{start}-rank-{rank}.jsonl").write_text(text + '{"kind": "beg')  # killed while it wrote


def read(folder: Path) -> Records:
    records = Records(folder)
    records.update()
    return records


def test_the_final_timeline_has_the_last_execution_of_every_step(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, [0, 1, 2, 3], killed=3)
    write(tmp_path, 1, 4, [2, 3, 4, 5])
    records = read(tmp_path)
    assert {step: start.number for step, start in records.final().items()} == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 1}
    assert [(done.start, done.step) for done in records.steps] == [
        (0, 0),
        (0, 1),
        (0, 2),
        *((1, i) for i in range(2, 6)),
    ]
    assert invariants.complete_steps(records) == []
    assert invariants.same_batches(records, as_planned(), PLAN, ()) == ([], 7)
    parts = segments(records, Plan(PLAN, SAMPLES, PER_EPOCH, 6), ())
    assert parts == [Segment(2, 2, False), Segment(6, 4, False)]


def test_a_step_that_was_not_repeated_after_a_kill_is_found(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, [0, 1, 2, 3], killed=3)
    write(tmp_path, 1, 2, [4, 5])
    (found,) = invariants.complete_steps(read(tmp_path))
    assert "step 3 of start 0" in found


def test_a_repeated_step_with_other_samples_is_found(tmp_path: Path) -> None:
    write(tmp_path, 0, 2, [0, 1, 2], ids_2_0=[7, 6])
    write(tmp_path, 1, 2, [2, 3, 4, 5])
    (found,), count = invariants.same_batches(read(tmp_path), as_planned(), PLAN, ())
    assert "start 0, step 2, which was repeated" in found
    assert count == 7


def test_the_final_execution_must_equal_the_uninterrupted_run_also_in_damaged_rows(tmp_path: Path) -> None:
    damaged = PLAN[1][0]
    write(tmp_path, 0, 2, list(PLAN), ids_1_0=[PLAN[1][2], PLAN[1][1]])
    records = read(tmp_path)
    assert invariants.same_batches(records, as_planned(), PLAN, (damaged,))[0]
    replaced = as_planned() | {1: batch((PLAN[1][2], *PLAN[1][1:]))}
    assert invariants.same_batches(records, replaced, PLAN, (damaged,))[0] == []
    parts = segments(records, Plan(PLAN, SAMPLES, PER_EPOCH, 6), (damaged,))
    assert parts == [Segment(1, 2, False), Segment(6, 2, True)]


# -- weights and metrics


def test_weights_must_have_the_same_bits_and_statistics_may_be_rounded_differently(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tensors = {"fc.weight": torch.ones(3), "bn.running_mean": torch.ones(3)}
    save_file(tensors, theirs)
    next_up = torch.nextafter(torch.ones(3), torch.full((3,), 2.0))
    for changed, exact, equal in (
        ({}, True, True),
        ({"fc.weight": next_up}, False, False),
        ({"bn.running_mean": next_up}, False, True),
        ({"bn.running_mean": next_up}, True, False),
        ({"bn.running_mean": torch.full((3,), 1.01)}, False, False),
    ):
        save_file(tensors | changed, ours)
        found, count = invariants.same_tensors(ours, theirs, exact_statistics=exact)
        assert (found == []) is equal, (changed, exact)
        assert count == (2 if equal else 0)
    save_file({"fc.weight": torch.ones(3)}, ours)
    assert "other tensors" in invariants.same_tensors(ours, theirs, exact_statistics=False)[0][0]


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("changed", [*FINAL_FILES, "checkpoints/step-00000006/state.safetensors", None])
def test_one_bit_of_the_statistics_is_a_violation_if_they_must_be_equal(
    tmp_path: Path, changed: str | None, required: bool
) -> None:
    tensors = {"fc.weight": torch.ones(3), "bn.running_var": torch.ones(3)}
    other = tensors | {"bn.running_var": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}
    for folder in ("run", "expected"):
        for name in (*FINAL_FILES, "checkpoints/step-00000006/state.safetensors"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(other if (folder, name) == ("run", changed) else tensors, tmp_path / folder / name)
    result = RoundResult(0, [], [], 0, 0.0, statistics_required=required)
    count = compare_tensors(result, tmp_path / "run", tmp_path / "expected", steps=6)
    if changed and required:
        assert result.violations == [
            f"{Path(changed).name}: 1 of 2 tensors differ: bn.running_var (by up to 1.2e-07)",
        ]
    else:
        assert (result.violations, count) == ([], 6)
    assert result.statistics_equal is (required and not changed)


def test_files_without_statistics_are_not_counted_as_equal(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(3)}, tmp_path / "weights")
    assert not invariants.same_statistics(tmp_path / "weights", tmp_path / "weights")


@pytest.mark.parametrize(("steps", "message"), [
    ([1, 2, 3], None),
    ([1, 3], "lost steps [2], repeated steps []"),
    ([1, 2, 2, 3], "lost steps [], repeated steps [2]"),
])  # fmt: skip
def test_metrics_have_every_step_once(steps: list[int], message: str | None) -> None:
    lines = [{"kind": "start", "step": 0}, *({"kind": "train", "step": step} for step in steps)]
    found = invariants.contiguous_metrics(lines, 3)
    assert found == ([f"metrics.jsonl: {message}"] if message else [])
