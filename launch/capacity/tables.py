"""Show predictions as tables: one for each global batch, and the list of figures with their sources."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.capacity.plan import Plan


def show(plan: Plan, console: Console) -> None:
    """Print the tables."""
    console.print(Text(describe(plan), style="bold"))
    for batch in plan.steps:
        console.print()
        console.print(Text(f"global batch {batch:,}: {plan.training_steps(batch):,} steps", style="bold"))
        if plan.steps[batch]:
            console.print(_predictions(plan, batch))
        for nodes, reason in plan.impossible[batch].items():
            console.print(Text(f"{_nodes(nodes)}: not possible ({reason})"))
        console.print(Text(useful(plan, batch)))
    console.print()
    console.print(Text("figures", style="bold"))
    console.print(_figures(plan))
    for note in plan.notes:
        console.print(Text(f"note: {note}"))


def describe(plan: Plan) -> str:
    """Describe the training in one line."""
    options, cluster = plan.options, plan.cluster
    engine = f"ZeRO {cluster.zero}" if cluster.zero else "DDP"
    over = {None: "per rank", 0: "over all ranks"}.get(cluster.sync_bn, f"over groups of {cluster.sync_bn} ranks")
    unit = ("GPU" if cluster.overlaps else "rank") + ("s" if cluster.local_ranks != 1 else "")
    epochs = f"{options.epochs:,} epoch{'s' if options.epochs != 1 else ''}"
    return (
        f"{cluster.workload.model}, {options.size} pixels, {epochs} of {plan.images:,} images; "
        f"{plan.device}, {cluster.local_ranks} {unit} per node; {engine}, BatchNorm {over}"
    )


def useful(plan: Plan, batch: int) -> str:
    """Say how many nodes are useful."""
    count, factor = plan.useful(batch), 2 * plan.options.min_efficiency
    if count is None:
        return "useful: none of these numbers of nodes is possible"
    return f"useful: up to {_nodes(count)} (each doubling gives at least {factor:.3g} x images/s)"


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' if count != 1 else ''}"


def _predictions(plan: Plan, batch: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in (
        "nodes",
        "images\nper rank",
        "images/s",
        "step",
        "limited by",
        "effic-\niency",
        "hours",
        "node-\nhours",
    ):
        table.add_column(title, justify="left" if title == "limited by" else "right", no_wrap=title != "limited by")
    for step in plan.steps[batch]:
        hours = plan.hours(step)
        table.add_row(
            f"{step.nodes:,}",
            f"{step.rank_batch:,}",
            _number(step.images_per_second),
            f"{1e3 * step.seconds:,.1f} ms",
            step.limit,
            f"{plan.efficiency(step):.0%}",
            _number(hours),
            _number(hours * step.nodes),
        )
    return table


def _figures(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for figure in plan.figures:
        table.add_row(Text(figure.name), Text(figure.text), Text(f"{figure.kind}: {figure.source}"))
    return table


def _number(value: float) -> str:
    """Format with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:,.2f}"
