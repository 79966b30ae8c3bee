"""Where a cache keeps its files."""

from __future__ import annotations

import os
from pathlib import Path


def cached(place: Path, pattern: str = "*") -> list[Path]:
    """The files of all sets in the cache in `place`, by the pattern of their names."""
    return sorted(path for path in own_folder(place).glob(f"*/{pattern}") if path.is_file())


def own_folder(place: Path) -> Path:
    """The cache's folder in the one that --cache names."""
    return place / f"fat-pipeline-cache-{os.geteuid()}"
