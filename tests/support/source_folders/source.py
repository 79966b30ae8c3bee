"""What a source folder is, what its owner means by it, and how its files are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from tests.support.source_folders.images import jpeg

Colour = tuple[int, int, int]
SOURCES: list[Source] = []
"""Every source, in the order of its definition."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder as people have it, and what is right to make of it.

    A text that must be said may give alternatives, separated by '|'; case does not count.
    """

    name: str
    make: Callable[[Path], None]
    """Writes the source into an empty folder."""
    images: tuple[dict[str, int], ...]
    """Split -> images of a set that is right, or several of these; empty where only a refusal is right."""
    classes: tuple[str, ...] | None
    """In the order of their labels; None where several are right."""
    says: tuple[str, ...]
    """Texts that the output of a conversion must hold."""
    notes: tuple[str, ...]
    """Texts that its lines which begin with 'note:' or 'doubt:' must hold."""
    refused: tuple[str, ...] | None
    """Texts that the refusal must hold; None where a refusal is wrong."""
    status: int
    """Exit status of the refusal: 2 for a source that is not fit, 1 where too many images were rejected."""
    doubtful: bool
    """Whether --strict must refuse it."""
    colours: dict[str, Colour]
    """Class -> mean of every image."""
    unless_noted: str
    """Text; colours may be otherwise where the output holds it."""
    options: tuple[str, ...]
    """Of the command line."""
    lists: int
    """Files that give labels or names, so they are neither images nor unused."""
    files_count: bool
    """Whether files are what is used; in tars and Parquet it is samples."""


def source(
    *,
    train: int = 0,
    val: int = 0,
    test: int = 0,
    images: tuple[dict[str, int], ...] = (),
    classes: tuple[str, ...] | None = None,
    says: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    refused: tuple[str, ...] | None = None,
    status: int = 2,
    doubtful: bool = False,
    colours: dict[str, Colour] | None = None,
    unless_noted: str = "",
    options: tuple[str, ...] = (),
    lists: int = 0,
    files_count: bool = True,
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add the function's source to `SOURCES`; `train`, `val` and `test` stand for `images` where one set is right."""
    counts = {split: count for split, count in (("train", train), ("val", val), ("test", test)) if count}
    if counts:
        images = (counts, *images)

    def add(make: Callable[[Path], None]) -> Callable[[Path], None]:
        SOURCES.append(
            Source(
                name=make.__name__,
                make=make,
                images=images,
                classes=classes,
                says=says,
                notes=notes,
                refused=refused,
                status=status,
                doubtful=doubtful,
                colours=colours or {},
                unless_noted=unless_noted,
                options=options,
                lists=lists,
                files_count=files_count,
            )
        )
        return make

    return add


def put(root: Path, names: str, data: bytes | str) -> None:
    """Write a file under each of the names, which may hold braces as in a shell: '{cat,dog}/notes.txt'."""
    for name in expand(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def pictures(root: Path, names: str, encode: Callable[[int], bytes] = jpeg) -> None:
    """Write a picture, made of a seed that differs from name to name, under each of the names."""
    for name in expand(names):
        put(root, name, encode(crc32(name.encode())))


def expand(names: str) -> Iterator[str]:
    """Yield the names that a text with braces stands for."""
    match = re.search(r"\{([^{}]*)\}", names)
    if match is None:
        yield names
        return
    for word in match[1].split(","):
        yield from expand(names[: match.start()] + word + names[match.end() :])
