"""The comment at the beginning of a recipe, which is its README, as in big_vision.

    # One line about the recipe.
    #
    # Source:   papers and code that the choices come from
    # Hours:    expected duration, on what; further facts
    # Accuracy: expected top-1 accuracy and its source, or "not trained yet"; further facts
    # Command:  exact command
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FIELDS = ("Source", "Hours", "Accuracy", "Command")
_FIELD = re.compile(rf"# ({'|'.join(_FIELDS)}): +(\S.*)")


@dataclass(frozen=True)
class RecipeHeader:
    """What the first comment of a recipe says."""

    name: str
    """Name for --recipe."""
    summary: str
    source: str
    hours: str
    accuracy: str
    command: str


def read_header(path: Path) -> RecipeHeader:
    """Return the header of a recipe of this project.

    Raises:
        ValueError: the header does not have the form above.
    """
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    fields = {match[1]: match[2] for line in rest if (match := _FIELD.fullmatch(line))}
    if not first.startswith("# ") or fields.keys() != set(_FIELDS):
        raise ValueError(f"{path}: expected a summary and the fields {', '.join(_FIELDS)} in the first comment")
    return RecipeHeader(path.stem, first[2:], **{name.lower(): text for name, text in fields.items()})
