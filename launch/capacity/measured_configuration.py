"""Compare the configuration that `pipeline bench` measured with the one that is predicted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launch.capacity.measured import Bench
from shards.redact import printable

CORES_TOLERANCE = 0.05
"""Relative difference of the CPU cores per rank that is not noted."""


def differences(
    benches: Iterable[tuple[Path, Bench]], *, zero: int, local_ranks: int, rank_cores: float, cores_known: bool
) -> list[str]:
    """Return a note for each file that measured another ZeRO stage or other CPU cores per rank than predicted.

    Args:
        zero: predicted ZeRO stage.
        rank_cores: predicted CPU cores per rank.
        cores_known: the cores of a node were measured or given, and not derived from those of bench.
    """
    notes = []
    for path, bench in benches:
        measured, found = bench.settings, list[str]()
        if measured.zero not in (None, zero):
            found.append(f"measured ZeRO {measured.zero}, but ZeRO {zero} is predicted")
        if abs(bench.rank_cores - rank_cores) > CORES_TOLERANCE * rank_cores:
            found.append(
                f"measured a rank with {bench.rank_cores:g} CPU cores, but one with {rank_cores:g} is predicted"
            )
        elif not cores_known and measured.ranks != local_ranks:
            found.append(
                f"measured with --ranks {measured.ranks}, and each of the {local_ranks} ranks of a node is assumed to "
                f"have its {bench.rank_cores:g} CPU cores (--cores-per-node sets another number)"
            )
        if found:
            notes.append(
                f"{printable(path)} {' and '.join(found)}; measure with 'pipeline bench SET --ranks {local_ranks} -- "
                f"--zero {zero} --global-batch {measured.batch * local_ranks}' and the options of the training"
            )
    return notes
