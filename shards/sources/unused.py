"""Count the files of a source that are not used, for the summary of a conversion and for dataset.json."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from shards.redact import one_line
from shards.schema import Count

MAX_ENTRIES = 500
"""Maximum number of (reason, kind) pairs; further kinds are counted together by reason as kind 'other'."""
MAX_TEXT = 4096

Text = Annotated[str, Field(max_length=MAX_TEXT)]


@dataclass(frozen=True, kw_only=True)
class UnusedEntry:
    """Number of files, folders, or samples of one kind that are not used for one reason."""

    reason: Text
    """For example 'not an image' or 'hidden'."""
    kind: Text
    """Suffix in lower case ('.txt'), name of a folder, or 'rows' (Parquet)."""
    count: Count
    example: Text
    """Path of the first one, relative to the source."""


@dataclass
class UnusedFiles:
    """Counts the files that a scan does not use."""

    _counts: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, path: bytes | str, *, kind: str | None = None, count: int = 1) -> None:
        """Count one file, or `count` files.

        Args:
            reason: why they are not used.
            path: relative to the source; the first one of each (reason, kind) is kept as the example.
            kind: kind of the files; None: the suffix of `path`.
        """
        text = one_line(path.decode("utf-8", "backslashreplace") if isinstance(path, bytes) else path)[:MAX_TEXT]
        if kind is None:
            kind = os.path.splitext(text)[1].lower() or "no suffix"
        key = (reason, kind)
        if key not in self._counts and len(self._counts) >= MAX_ENTRIES:
            key = (reason, "other")
        so_far, example = self._counts.get(key, (0, text))
        self._counts[key] = (so_far + count, example)

    def entries(self) -> tuple[UnusedEntry, ...]:
        """Return the counts, sorted by reason and kind."""
        return tuple(
            UnusedEntry(reason=reason, kind=kind, count=count, example=example)
            for (reason, kind), (count, example) in sorted(self._counts.items())
        )


def merge(parts: Iterable[Iterable[UnusedEntry]]) -> tuple[UnusedEntry, ...]:
    """Return the sums of the counts of several scans."""
    total = UnusedFiles()
    for part in parts:
        for entry in part:
            total.add(entry.reason, entry.example, kind=entry.kind, count=entry.count)
    return total.entries()
