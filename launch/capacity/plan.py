"""Predict every number of nodes, for every global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.capacity.costs.step import Cluster, Step, predict, useful_nodes
from launch.capacity.figures import Figure
from launch.capacity.measured import read_measured
from launch.capacity.sources import Sources
from launch.config.errors import RecipeError
from launch.engine.sync_batchnorm import group_size, syncs_over_ranks
from pipeline.batch_shape import PlanError, check_enough_samples

if TYPE_CHECKING:
    from launch.capacity.options import Capacity


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for some global batches and numbers of nodes."""

    options: Capacity
    cluster: Cluster
    device: str
    images: int
    """Training images of an epoch."""
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    steps: Mapping[int, tuple[Step, ...]]
    """Predictions by global batch, in ascending order of nodes; empty if no number of nodes is possible."""
    impossible: Mapping[int, Mapping[int, str]]
    """By global batch, the reason for each number of nodes that is not possible."""

    def training_steps(self, global_batch: int) -> int:
        """Return the optimizer steps of the training."""
        return self.options.epochs * (self.images // global_batch)

    def hours(self, step: Step) -> float:
        """Return the hours of all steps, without evaluations, checkpoints and starts."""
        return self.training_steps(step.global_batch) * step.seconds / 3600

    def useful(self, global_batch: int) -> int | None:
        """Return the largest useful number of nodes; None if none is possible."""
        steps = self.steps[global_batch]
        return useful_nodes(steps, self.options.min_efficiency) if steps else None

    def efficiency(self, step: Step) -> float:
        """Return the images/s per node, relative to those of the smallest possible number of nodes."""
        first = self.steps[step.global_batch][0]
        return step.images_per_second / step.nodes / (first.images_per_second / first.nodes)


def plan(options: Capacity) -> Plan:
    """Predict all combinations of global batch and number of nodes.

    Raises:
        UserError: a file of --measured or the set is invalid, or nothing can be predicted for the model.
    """
    sources = Sources(options, read_measured(options.measured, str(options.spec)))
    cluster = sources.cluster()
    steps: dict[int, tuple[Step, ...]] = {}
    impossible: dict[int, dict[int, str]] = {}
    for batch in options.global_batches:
        found: list[Step] = []
        reasons = impossible.setdefault(batch, {})
        for nodes in options.node_counts:
            try:
                _check(sources, cluster.local_ranks * nodes, batch)
                found.append(predict(cluster, nodes, batch))
            except (PlanError, RecipeError) as error:
                reasons[nodes] = str(error)
        steps[batch] = tuple(found)
    return Plan(
        options=options,
        cluster=cluster,
        device=sources.device,
        images=sources.images,
        figures=tuple(sources.figures.used),
        notes=tuple(sources.figures.notes),
        steps=steps,
        impossible=impossible,
    )


def _check(sources: Sources, ranks: int, global_batch: int) -> None:
    """Raise PlanError or RecipeError where training would, except for the division of the global batch."""
    options = sources.options
    check_enough_samples(sources.images, global_batch, world=ranks, micro_batch=options.micro_batch, pairs=True)
    if syncs_over_ranks(options.sync_bn, ranks, sources.torch_device):
        group_size(options.sync_bn, ranks)
