"""`pipeline recipes`: list the recipes of this project, or print one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command import suggestion
from shards.errors import UserError

if TYPE_CHECKING:
    from launch.config.data import DataConfig


@dataclass(frozen=True)
class Recipes:
    """List the recipes of this project with their epochs, image sizes, expected hours and expected accuracies.

    A recipe is used by its name: pipeline train -- --recipe NAME --data SET
    """

    name: tyro.conf.Positional[
        Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: list all recipes)")]
    ] = None
    """Recipe to print, with the reason for each of its values."""

    def run(self) -> int:
        from launch.config.command_line import shipped_recipes

        shipped = shipped_recipes()
        if self.name is None:
            print(_table(shipped.values()), end="")
            return 0
        if self.name not in shipped:
            near = suggestion(self.name, shipped)
            raise UserError(f"{self.name}: no such recipe{near} (expected one of {', '.join(shipped)})")
        print(shipped[self.name].read_text(encoding="utf-8"), end="")
        return 0


def _table(paths: Iterable[Path]) -> str:
    """Return a table with two lines for each recipe."""
    from launch.config.command_line import apply_file
    from launch.config.recipe import Recipe
    from launch.recipes.header import read_header

    rows = [("recipe", "epochs", "size", "expected hours", "expected accuracy")]
    lines = []
    for path in paths:
        header, recipe = read_header(path), apply_file(Recipe(), path)
        # A field begins with what the table shows; after a semicolon follow its conditions.
        hours, accuracy = (text.partition(";")[0] for text in (header.hours, header.accuracy))
        rows.append((header.name, str(recipe.optim.epochs), _sizes(recipe.data), hours, accuracy))
        lines.append(header.summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title, *table = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return f"{title}\n" + "".join(f"{row}\n    {line}\n" for row, line in zip(table, lines, strict=True))


def _sizes(data: DataConfig) -> str:
    """Return the smallest and largest side of the training images in pixels, and that of evaluations if it differs."""
    sizes = str(data.size) if data.sizes is None else f"{data.sizes.smallest} to {data.sizes.largest}"
    return sizes if data.evaluation_size == data.size else f"{sizes}, eval {data.evaluation_size}"
