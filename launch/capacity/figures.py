"""The figures that predictions use, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from launch.capacity.bandwidth import parse_rate
from shards.redact import printable, redact

Kind = Literal["measured", "given", "reference", "assumed"]
"""measured: a file of --measured, or the set of --data; given: an option; reference: measured on another machine by
this project; assumed: a data sheet, or another assumption."""


@dataclass(frozen=True)
class Figure:
    """A line of the list of sources."""

    name: str
    text: str
    """The value with its unit."""
    kind: Kind
    source: str
    """File, option, or where an assumption comes from."""


@dataclass
class Figures:
    """The figures that were used so far, and notes on what was not measured."""

    used: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, kind: Kind, source: object) -> None:
        self.used.append(Figure(name, text, kind, printable(redact(str(source)))))

    def rate(self, option: str, text: str | None, name: str) -> float | None:
        """Return the rate that an option sets, in bytes/s; None if it sets none.

        Raises:
            UserError: the text of the option is not a rate.
        """
        if text is None:
            return None
        value = parse_rate(option, text)
        self.add(name, rate_text(value), "given", option)
        return value


def rate_text(rate: float) -> str:
    return f"{rate / 1e9:,.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:,.3g} MB/s"
