"""The JSON of `pipeline capacity --json` (docs/capacity.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.capacity.costs.step import Step
from launch.capacity.plan import Plan


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the predictions, and the figures with their sources. Seconds, images/s and hours are the units."""
    options, cluster = plan.options, plan.cluster
    return {
        "model": cluster.workload.model,
        "size": options.size,
        "epochs": options.epochs,
        "images": plan.images,
        "device": plan.device,
        "ranks_per_node": cluster.local_ranks,
        "zero": cluster.zero,
        "sync_bn": {None: "off", 0: "on"}.get(cluster.sync_bn, f"group:{cluster.sync_bn}"),
        "min_efficiency": options.min_efficiency,
        "figures": [dataclasses.asdict(figure) for figure in plan.figures],
        "notes": list(plan.notes),
        "global_batches": [
            {
                "global_batch": batch,
                "steps": plan.training_steps(batch),
                "useful_nodes": plan.useful(batch),
                "predictions": [_prediction(plan, step) for step in steps],
                "impossible": [{"nodes": nodes, "reason": reason} for nodes, reason in plan.impossible[batch].items()],
            }
            for batch, steps in plan.steps.items()
        ],
    }


def _prediction(plan: Plan, step: Step) -> dict[str, Any]:
    hours = plan.hours(step)
    return {
        "nodes": step.nodes,
        "ranks": step.ranks,
        "rank_batch": step.rank_batch,
        "images_per_second": step.images_per_second,
        "step_seconds": step.seconds,
        "limit": step.limit,
        "terms": step.terms,
        "all_reduce_seconds": step.all_reduce,
        "efficiency": plan.efficiency(step),
        "hours": hours,
        "node_hours": hours * step.nodes,
    }
