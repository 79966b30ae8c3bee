"""The figures that predictions use, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
