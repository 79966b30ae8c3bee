"""Count the directory listings of this process."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_counters: list[tuple[str, Counter[str]]] = []
_hooks: list[object] = []


@contextmanager
def count_listings(top: Path) -> Iterator[Counter[str]]:
    """Count how often `top` and each folder below it is listed in the block; keys are paths relative to `top`."""
    if not _hooks:  # audit hooks cannot be removed
        sys.addaudithook(_hook)
        _hooks.append(_hook)
    counter: Counter[str] = Counter()
    _counters.append((os.path.realpath(top), counter))
    try:
        yield counter
    finally:
        _counters.pop()


def _hook(event: str, args: tuple[object, ...]) -> None:
    if not _counters or event not in ("os.listdir", "os.scandir"):
        return
    path = args[0]
    if not isinstance(path, str | bytes | os.PathLike):  # a file descriptor or None (the current folder)
        return
    folder = os.path.realpath(os.fsdecode(path))
    for top, counter in _counters:
        if folder == top or folder.startswith(f"{top}/"):
            counter[os.path.relpath(folder, top)] += 1
