"""The split that a path names."""

from __future__ import annotations

import re

from shards.sources.scan import TRAIN, VAL

_VAL = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)


def named_split(path: str) -> str | None:
    """Return the split (train, val or test) that a path below the source names; None where it names none.

    Args:
        path: folders and file name, separated by '/'.
    """
    if _VAL.search(path):
        return VAL
    return TRAIN if _TRAIN.search(path) else None
