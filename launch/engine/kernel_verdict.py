"""What a comparison of kernels with torch has found: kept in a file, and made one for all ranks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fat.kernels.selfcheck import Failure
from launch.machine.world import World

Source = Literal["compared now", "compared before", "not compared"]


@dataclass(frozen=True)
class Verdict:
    """What the comparison has found, the same on every rank."""

    checked: tuple[str, ...] = ()
    """Families that were compared with torch."""
    failed: tuple[Failure, ...] = ()
    """Those of them that are switched off, and why."""
    source: Source = "not compared"
    seconds: float = 0.0
    """That the comparison took, without compilation."""
    notes: tuple[str, ...] = ()
    """Why nothing was compared."""
    warnings: tuple[str, ...] = ()
    """What went wrong beside the kernels: no comparison could be made, or its verdict could not be kept."""
    compilation: str = ""
    """How many kernels were compiled before their first launch, on rank 0's node."""

    @property
    def summary(self) -> str:
        """For the log, in a line."""
        if not self.checked:
            return "; ".join((self.source, *self.notes, *self.warnings))
        when = f"{self.source} in {self.seconds:.1f} s" if self.source == "compared now" else self.source
        off = ", ".join(failure.family for failure in self.failed)
        return f"{len(self.checked)} families {when}; {f'switched off: {off}' if off else 'all agree with torch'}"

    @property
    def resolved(self) -> dict[str, str]:
        """For people and the log, beside those of the engine."""
        return {"kernel check": self.summary} | ({"kernel compilation": self.compilation} if self.compilation else {})

    def lines(self) -> list[str]:
        """A warning for each family that is switched off, and what else people should know."""
        again = " (found by an earlier comparison)" if self.source == "compared before" else ""
        warnings = [
            f"warning: the {failure.family} kernels do not agree with torch{again} and are switched off: {failure}"
            for failure in self.failed
        ]
        return [*warnings, *(f"warning: {line}" for line in self.warnings)]

    def to_dict(self) -> dict[str, Any]:
        """For recipe.json."""
        return {
            "checked": list(self.checked),
            "failed": [failure.to_dict() for failure in self.failed],
            "source": self.source,
            "seconds": round(self.seconds, 2),
            "notes": [*self.notes, *self.warnings],
            "compilation": self.compilation,
        }


def cache_folder() -> Path:
    """Where verdicts are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fat-pipeline" / "kernel-checks"


def read_verdict(path: Path, key: dict[str, Any]) -> Verdict | None:
    """The verdict in a file; None where there is none for this key, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        failed = tuple(Failure(**{name: str(value) for name, value in entry.items()}) for entry in content["failed"])
        checked = tuple(map(str, content["checked"]))
        if unknown := {failure.family for failure in failed} - set(checked):
            raise ValueError(f"families {unknown}")
        return Verdict(checked, failed, "compared before", float(content["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it is compared again, and the file replaced


def join_verdicts(mine: Verdict | None, world: World) -> Verdict:
    """One verdict for all ranks: what failed on any of them. Collective."""
    verdicts = [verdict for verdict in world.gather(mine) if verdict is not None]
    failed: dict[str, Failure] = {}
    for verdict in verdicts:
        for failure in verdict.failed:
            failed.setdefault(failure.family, failure)
    sources = [verdict.source for verdict in verdicts]
    return Verdict(
        checked=tuple(dict.fromkeys(family for verdict in verdicts for family in verdict.checked)),
        failed=tuple(failed.values()),
        source=next((source for source in ("compared now", "compared before") if source in sources), "not compared"),
        seconds=max(verdict.seconds for verdict in verdicts),
        notes=tuple(dict.fromkeys(note for verdict in verdicts for note in verdict.notes)),
        warnings=tuple(dict.fromkeys(line for verdict in verdicts for line in verdict.warnings)),
        compilation=verdicts[0].compilation,
    )
