"""Where images come from: every source gives a `Scan`, and nothing after it knows which source it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shards.listing import Listing
from shards.manifest import ClassEntry


@dataclass(frozen=True)
class Scan:
    """What a source holds."""

    kind: str
    """Name of the layout."""
    classes: tuple[ClassEntry, ...]
    splits: dict[str, Listing]
    ignored: int = 0
    """Files that are no images, by name and by content."""
    notes: tuple[str, ...] = field(default=())
    """Lines that the person should see."""


def scan(source: Path) -> Scan:
    """Recognise a source and list what it holds.

    Raises:
        UserError: there is nothing, or nothing usable, at `source`.
    """
    from shards.sources.folder import scan_folder

    return scan_folder(source)
