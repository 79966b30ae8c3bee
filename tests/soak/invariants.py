"""What must be true after a round, whatever has failed in it. Every function returns the violations that it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.soak.records import Batch, Records

STATISTICS = ("running_mean", "running_var")
# Of BatchNorm's statistics, if the run was saved at other steps than the uninterrupted one: every save averages them
# over the ranks, which changes their rounding.
TOLERANCE = 1e-5
MAX_MESSAGES = 5
"""Number of messages of one invariant; more would not help."""


def exactly_once(
    timeline: Mapping[int, Batch], plan: Mapping[int, Sequence[int]], *, samples: int, steps_per_epoch: int,
    damaged: Collection[int] = (),
) -> tuple[list[str], int]:  # fmt: skip
    """Check that every epoch has each sample exactly once.

    Args:
        timeline: batch by step, of the executions that are in the final weights.
        plan: ids by step, as they are without damage.
        samples: number of samples of an epoch, whose ids begin with 0.
        damaged: samples that may be skipped: another sample is in their row.

    Returns:
        Violations, and the number of skipped samples.
    """
    found: list[str] = []
    rows: list[str] = []
    skipped = 0
    missing = sorted(plan.keys() - timeline.keys())
    if missing:
        found.append(f"steps that were never done: {missing[:MAX_MESSAGES]}")
    epochs: dict[int, Counter[int]] = {}
    for step, batch in sorted(timeline.items()):
        seen = epochs.setdefault(step // steps_per_epoch, Counter())
        planned = plan.get(step, ())
        if len(batch.ids) != len(planned):
            found.append(f"step {step} has {len(batch.ids)} samples, but the plan has {len(planned)}")
            continue
        for row, (delivered, expected) in enumerate(zip(batch.ids, planned, strict=True)):
            if delivered != expected and expected in damaged:
                skipped += 1
                seen[expected] += 1  # skipped once instead of delivered once
                continue
            if delivered != expected:
                rows.append(f"step {step}, row {row}: sample {delivered} instead of {expected}")
            seen[delivered] += 1
    for epoch, seen in epochs.items():
        lost = sorted(set(range(samples)) - seen.keys())
        repeated = sorted(sample for sample, times in seen.items() if times > 1)
        if lost:
            found.append(f"epoch {epoch}: {len(lost)} samples are lost, such as {lost[:MAX_MESSAGES]}")
        if repeated:
            found.append(f"epoch {epoch}: {len(repeated)} samples are repeated, such as {repeated[:MAX_MESSAGES]}")
    return found[:MAX_MESSAGES] + rows[:MAX_MESSAGES], skipped


def same_batches(
    records: Records, reference: Mapping[int, Batch], plan: Mapping[int, Sequence[int]], damaged: Collection[int]
) -> tuple[list[str], int]:
    """Check that every execution of a step, also of steps that were repeated, has the samples of the uninterrupted run.

    Rows of damaged samples may differ in executions before the final one, because the damage came between them.

    Returns:
        Violations, and the number of executions.
    """
    found, count = [], 0
    final = records.final()
    for start, step, batch in records.executions():
        count += 1
        expected = reference.get(step)
        if expected is None:
            found.append(f"start {start}, step {step}: not a step of the uninterrupted run")
        elif final[step].number == start and batch != expected:
            found.append(f"start {start}, step {step}: other samples or images than in the uninterrupted run")
        elif _without(batch, plan[step], damaged) != _without(expected, plan[step], damaged):
            found.append(f"start {start}, step {step}, which was repeated: other samples than in the uninterrupted run")
    return found[:MAX_MESSAGES], count


def _without(batch: Batch, planned: Sequence[int], damaged: Collection[int]) -> list[tuple[int, str]]:
    """Return the rows of a batch without those of damaged samples."""
    rows = zip(batch.ids, batch.pixels, planned, strict=True)
    return [(sample, pixels) for sample, pixels, expected in rows if expected not in damaged]


def complete_steps(records: Records) -> list[str]:
    """Check that every final execution of a step was begun by all ranks and done on rank 0."""
    return [
        f"step {step} of start {start.number} is in the final weights, but not all ranks have done it"
        for step, start in sorted(records.final().items())
        if start.batch(step) is None or 0 not in start.done.get(step, {})
    ][:MAX_MESSAGES]


def same_tensors(found: Path, expected: Path, *, exact_statistics: bool) -> tuple[list[str], int]:
    """Check that a safetensors file has the same bits as that of the uninterrupted run.

    Args:
        exact_statistics: whether this includes BatchNorm's statistics, which otherwise agree to `TOLERANCE`.

    Returns:
        Violations, and the number of tensors.
    """
    ours, theirs = load_file(found), load_file(expected)
    if ours.keys() != theirs.keys():
        return [f"{found.name}: other tensors than in the uninterrupted run: {sorted(ours.keys() ^ theirs.keys())}"], 0
    wrong = []
    for name, tensor in ours.items():
        if not exact_statistics and name.endswith(STATISTICS):
            equal = torch.allclose(tensor, theirs[name], rtol=TOLERANCE, atol=TOLERANCE)
        else:
            equal = tensor.equal(theirs[name])
        if not equal:
            largest = float((tensor.double() - theirs[name].double()).abs().max())
            wrong.append(f"{name} (by up to {largest:.2g})")
    if wrong:
        return [f"{found.name}: {len(wrong)} of {len(ours)} tensors differ: {', '.join(wrong[:MAX_MESSAGES])}"], 0
    return [], len(ours)


def same_statistics(found: Path, expected: Path) -> bool:
    """Return whether BatchNorm's statistics, of which there are some, have the same bits in two safetensors files."""
    ours, theirs = load_file(found), load_file(expected)
    names = [name for name in theirs if name.endswith(STATISTICS)]
    return bool(names) and all(name in ours and ours[name].equal(theirs[name]) for name in names)


def contiguous_metrics(lines: Sequence[Mapping[str, object]], steps: int) -> list[str]:
    """Check that the metrics without repeated steps have every step once, in order."""
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    if trained == list(range(1, steps + 1)):
        return []
    lost = sorted(set(range(1, steps + 1)) - set(trained))
    repeated = sorted(step for step, times in Counter(trained).items() if times > 1)
    return [f"metrics.jsonl: lost steps {lost[:MAX_MESSAGES]}, repeated steps {repeated[:MAX_MESSAGES]}"]
