"""Find the files of a cache."""

from __future__ import annotations

import os
from pathlib import Path


def cached(cache: Path, pattern: str = "*") -> list[Path]:
    """Return the files of all sets in a cache whose names match the pattern."""
    return sorted(path for path in own_folder(cache).glob(f"*/{pattern}") if path.is_file())


def own_folder(cache: Path) -> Path:
    """Return the subfolder that the cache creates in the folder specified with --cache."""
    return cache / f"fat-pipeline-cache-{os.geteuid()}"
