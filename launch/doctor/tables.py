"""Show the measurements as tables, and the findings as lines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.doctor.findings import Finding, exclude_option
from launch.doctor.measurements.report import NetworkReport, RankReport, Report
from launch.doctor.units import bandwidth, bytes_text, flops, latency
from shards.memory import GIB
from shards.redact import printable

MAX_PAIRS = 10
"""Pairs of hosts that are listed, the slowest first."""


def show(report: Report, findings: Sequence[Finding], exclude: Sequence[str], console: Console) -> None:
    """Print the tables and the findings."""
    tables = [_hosts(report), _devices(report), _input(report)]
    if report.network is not None:
        tables += [_all_reduce(report.network, len(report.ranks)), _pairs(report.network)]
    for table in tables:
        if table.rows:
            console.print(Text(table.caption_above, style="bold"))
            console.print(table)
            console.print()
    ranks, hosts = _count(len(report.ranks), "rank"), _count(len(report.nodes), "host")
    measured = f"{ranks} on {hosts}, {report.seconds:.0f} s"
    if not findings:
        console.print(f"no problems found ({measured})")
        return
    console.print(f"{_count(len(findings), 'problem')} found ({measured}):")
    for finding in findings:  # one line each, and an option that can be copied, however narrow the terminal is
        console.print(Text(printable(f"- {finding.message}")), soft_wrap=True)
    if exclude:
        console.print(Text(f"SLURM option to exclude these hosts: {exclude_option(exclude)}"), soft_wrap=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


class Titled(Table):
    """A table with a title that may be wider than the table, where rich would wrap it."""

    caption_above = ""


def _table(title: str, *columns: str) -> Titled:
    table = Titled(box=None, pad_edge=False)
    table.caption_above = printable(title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _hosts(report: Report) -> Titled:
    table = _table("hosts", "host", "ranks", "cores", "memory free", "/dev/shm free", "max files", "clock", "load")
    for node in report.nodes:
        limit = f" ({node.cores_limit})" if node.cores_limit else ""
        shm = "-" if node.shm is None else f"{(node.shm_free or 0) / GIB:,.1f}/{bytes_text(node.shm)}"
        offset = node.clock_offset
        table.add_row(
            Text(printable(node.host)),
            f"{node.local_ranks}",
            f"{node.cores}/{node.cores_total}{limit}",
            f"{node.memory_free / GIB:,.1f}/{bytes_text(node.memory)}",
            shm,
            "no limit" if node.open_files < 0 else f"{node.open_files:,}",
            "-" if offset is None else f"{1e3 * offset:+.1f} ms",
            f"{node.load:.1f}",
        )
    return table


def _devices(report: Report) -> Titled:
    table = _table("devices", "host", "device", "matmul", "memory copy", "CPU time", "GPU clock")
    for host in dict.fromkeys(rank.host for rank in report.ranks):
        ranks = [rank for rank in report.ranks if rank.host == host]
        names = list(dict.fromkeys(rank.device_name for rank in ranks))
        received = [rank.cpu_received for rank in ranks if rank.cpu_received is not None]
        clocks = [rank.gpu.clock for rank in ranks if rank.gpu is not None and rank.gpu.clock is not None]
        table.add_row(
            Text(printable(host)),
            Text(printable(f"{f'{len(ranks)} x ' if len(ranks) > 1 else ''}{', '.join(names)}")),
            _range(ranks, lambda rank: rank.matmul, flops),
            _range(ranks, lambda rank: rank.copy, bandwidth),
            f"{min(received):.0%}" if received else "-",
            f"{min(clocks)} MHz" if clocks else "-",
        )
    return table


def _range(
    ranks: Sequence[RankReport], figure: Callable[[RankReport], float | None], text: Callable[[float], str]
) -> str:
    """Return the figure of one rank, or the smallest and the median of several."""
    values = [value for rank in ranks if (value := figure(rank)) is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return text(values[0])
    return f"min {text(min(values))}, median {text(statistics.median(values))}"


def _input(report: Report) -> Titled:
    table = _table(f"input: {report.data}", "host", "read", "decode")
    for host in dict.fromkeys(rank.host for rank in report.ranks):
        ranks = [rank for rank in report.ranks if rank.host == host]
        read = [rank.read for rank in ranks if rank.read is not None]
        decode = [rank.decode for rank in ranks if rank.decode is not None]
        if read or decode:
            table.add_row(
                Text(printable(host)),
                bandwidth(sum(read)) if read else "-",
                f"{sum(decode):,.0f} images/s" if decode else "-",
            )
    return table


def _all_reduce(network: NetworkReport, ranks: int) -> Titled:
    table = _table(f"all-reduce over {ranks} ranks", "size", "time", "bus bandwidth")
    table.add_row("8 bytes", latency(network.latency), "-")
    for entry in network.all_reduce:
        size = f"{entry.bytes >> 20} MiB" if entry.bytes >= 1 << 20 else f"{entry.bytes >> 10} KiB"
        table.add_row(size, latency(entry.seconds), bandwidth(entry.bus_bandwidth))
    return table


def _pairs(network: NetworkReport) -> Titled:
    pairs = sorted(network.pairs, key=lambda pair: pair.bandwidth)
    slowest = f", the slowest {MAX_PAIRS} of {len(pairs)}" if len(pairs) > MAX_PAIRS else ""
    table = _table(f"pairs of hosts{slowest}", "hosts", "latency", "bandwidth")
    for pair in pairs[:MAX_PAIRS]:
        table.add_row(Text(printable(" - ".join(pair.hosts))), latency(pair.latency), bandwidth(pair.bandwidth))
    return table
