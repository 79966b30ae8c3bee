"""One round of a soak, with its shared storage, and the invariants that are checked at its end."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.run.metrics_file import final_timeline, read_metrics
from launch.run.status import read_status
from tests.soak import invariants
from tests.soak.accounting import Failure
from tests.soak.nodes import Node
from tests.soak.ranks import options
from tests.soak.records import Batch
from tests.soak.reference import Plan, References, plan_of, segments
from tests.soak.schedule import RoundPlan
from tests.soak.storage import mounted
from tests.soak.supervisor import Supervisor

STORAGE_MEGABYTES = 48
FINAL_FILES = ("weights-last.safetensors", "weights-ema-last.safetensors")


@dataclass
class RoundResult:
    """Result of a round."""

    number: int
    failures: list[Failure]
    violations: list[str]
    planned: int
    began: float
    wall: float = 0.0
    """Seconds of the run with failures, from its first start to its end."""
    training: float = 0.0
    """Seconds of the steps that are in the final weights, without waiting for data."""
    step_seconds: float = 0.0
    """Mean duration of these steps."""
    steps: int = 0
    executed: int = 0
    starts: int = 0
    reference_seconds: float = 0.0
    statistics_required: bool = False
    """Whether BatchNorm's statistics must have the same bits as in the uninterrupted run."""
    statistics_equal: bool = False
    """Whether they must, and do."""
    checked: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        kept = asdict(self)
        del kept["failures"], kept["began"]
        return {name: round(value, 2) if isinstance(value, float) else value for name, value in kept.items()}


def run_round(
    plan: RoundPlan, nodes: list[Node], references: References, *, data: Path, folder: Path, seed: int, epochs: int,
    pace: float, say: Callable[[str], None] = print,
) -> RoundResult:  # fmt: skip
    """Run a round in `folder`, which is removed if no invariant is violated; else it has a copy of the run folder.

    Args:
        references: uninterrupted runs, with one of which the round is compared.
        data: data set, which is copied before it is damaged.
        seed: seed of the training.
        epochs: length of the training.
        pace: minimum duration of a step in seconds.
        say: prints a line.
    """
    folder.mkdir(parents=True)
    damaged_data, run = folder / "set", folder / "shared" / "run"
    shutil.copytree(data, damaged_data)

    def options_of(run: Path, data: Path) -> list[str]:
        return options(run=run, data=data, seed=seed, epochs=epochs, zero=plan.zero, feed_process=plan.feed_process)

    training_plan = plan_of(options_of(run, data))
    storage = mounted(folder / "shared", folder / "shared.img", megabytes=STORAGE_MEGABYTES)
    with storage as shared, _restored_after(nodes):
        try:
            supervisor = Supervisor(
                plan, nodes, folder=folder, storage=shared, run=run, data=damaged_data, pace=pace, say=say,
                options=options_of(run, damaged_data),
            )  # fmt: skip
            began = time.monotonic()
            supervisor.train()
            result = RoundResult(
                plan.number, supervisor.failures, supervisor.violations, len(plan.failures), began,
                wall=time.monotonic() - began, statistics_required=not supervisor.moved_saves,
            )  # fmt: skip
            _summarize(result, supervisor)
            result.violations += _check_nodes(supervisor)
            final = supervisor.records.final()
            if set(final) >= set(range(training_plan.steps)):
                began = time.monotonic()
                parts = segments(supervisor.records, training_plan, supervisor.damaged)
                reference, expected = references.get(parts, options_of, clean=data, damaged=damaged_data)
                result.reference_seconds = time.monotonic() - began
                _compare(result, supervisor, training_plan, reference, expected)
            else:
                result.violations.append(f"only {len(final)} of {training_plan.steps} steps were done")
        except Exception:
            _keep(run, folder)
            raise
        if result.violations:
            _keep(run, folder)
    if not result.violations:
        shutil.rmtree(folder)
    return result


def _keep(run: Path, folder: Path) -> None:
    """Copy the run folder out of the storage, which is removed."""
    if run.is_dir():
        shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("PREEMPT"))


@contextlib.contextmanager
def _restored_after(nodes: list[Node]) -> Iterator[None]:
    """Restore the nodes afterwards, whatever has happened."""
    with contextlib.ExitStack() as stack:  # an error at one node does not prevent the others
        for node in nodes:
            stack.callback(node.restore)
        yield


def _summarize(result: RoundResult, supervisor: Supervisor) -> None:
    records = supervisor.records
    timeline = {done.step: done for done in records.steps}
    result.steps, result.executed, result.starts = len(timeline), len(records.steps), len(supervisor.starts)
    result.training = sum(done.seconds for done in timeline.values())
    result.step_seconds = result.training / max(1, len(timeline))
    lost = sum(failure.lost_steps for failure in result.failures)
    if lost != result.executed - result.steps:
        result.violations.append(
            f"{result.executed - result.steps} steps were repeated, but {lost} are attributed to failures"
        )


def _check_nodes(supervisor: Supervisor) -> list[str]:
    """Check that nothing runs on the nodes, and that no shared memory and no local checkpoints are left there."""
    found = []
    for node in supervisor.nodes:
        if node.processes():
            found.append(f"{node.name}: processes remain: {node.processes()}")
        files = [str(path.relative_to(node.local)) for path in node.local.rglob("*") if not path.is_dir()]
        # Local checkpoints of a failed start remain until the next start on that node (docs/resuming.md).
        elsewhere = node is not supervisor.nodes[supervisor.placement[0]]
        left = [name for name in files if not (elsewhere and name.startswith("fat-checkpoints-"))]
        if left:
            found.append(f"{node.name}: files are left in /dev/shm: {left}")
    return found


def _compare(
    result: RoundResult, supervisor: Supervisor, plan: Plan, reference: dict[int, Batch], expected: Path
) -> None:
    """Check the invariants, and count what holds if there is no violation."""
    records, run, damaged = supervisor.records, supervisor.run, supervisor.damaged
    final = records.final()
    timeline = {step: batch for step, start in final.items() if (batch := start.batch(step)) is not None}
    found, skipped = invariants.exactly_once(
        timeline, plan.ids, samples=plan.samples, steps_per_epoch=plan.steps_per_epoch, damaged=damaged
    )
    result.violations += found
    other, executions = invariants.same_batches(records, reference, plan.ids, damaged)
    result.violations += other
    result.violations += invariants.complete_steps(records)
    if read_status(run) != "finished":
        result.violations.append(f"the status of the run is {read_status(run)}")
    tensors = compare_tensors(result, run, expected, steps=plan.steps)
    result.violations += invariants.contiguous_metrics(final_timeline(read_metrics(run)), plan.steps)
    if result.violations:
        return
    result.checked = {
        "epochs": plan.steps // plan.steps_per_epoch,
        "samples delivered exactly once": sum(len(batch.ids) for batch in timeline.values()) - skipped,
        "damaged samples skipped exactly once": skipped,
        "executions of steps with equal samples and images": executions,
        "tensors equal to the uninterrupted run": tensors,
    }


def compare_tensors(result: RoundResult, run: Path, expected: Path, *, steps: int) -> int:
    """Compare weights and the last checkpoint with those of the uninterrupted run; return the number of tensors."""
    tensors, exact, equal = 0, result.statistics_required, []
    for name in (*FINAL_FILES, f"checkpoints/step-{steps:08d}/state.safetensors"):
        if not (run / name).is_file():
            result.violations.append(f"{name} is missing")
            equal.append(False)
            continue
        wrong, count = invariants.same_tensors(run / name, expected / name, exact_statistics=exact)
        result.violations += wrong
        tensors += count
        equal.append(invariants.same_statistics(run / name, expected / name))
    result.statistics_equal = exact and all(equal)
    return tensors
