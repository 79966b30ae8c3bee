"""Definition of a test source with its expected conversion result, and helpers to write its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from tests.support.source_folders.images import jpeg

Color = tuple[int, int, int]
SOURCES: list[Source] = []
"""All sources, in the order of definition."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder as users have it, and the correct results of its conversion.

    An expected text may list alternatives, separated by '|'; case is ignored.
    """

    name: str
    make: Callable[[Path], None]
    """Writes the source into an empty folder."""
    images: tuple[dict[str, int], ...]
    """Correct results: split -> number of images; empty if only an error is correct."""
    classes: tuple[str, ...] | None
    """Classes in the order of their labels; None if several results are correct."""
    messages: tuple[str, ...]
    """Texts that the output of a conversion must contain."""
    notes: tuple[str, ...]
    """Texts that the notes and warnings in the output must contain."""
    error: tuple[str, ...] | None
    """Texts that the error must contain; None if an error is wrong."""
    status: int
    """Exit status with the error: 2 for an invalid source, 1 for too many rejects."""
    rejected_by_strict: bool
    """Whether --strict must reject the source."""
    colors: dict[str, Color]
    """Class -> mean color of each of its images."""
    colors_unless: str
    """Text; colors may differ if the output contains it."""
    options: tuple[str, ...]
    """Command-line options."""
    label_files: int
    """Number of files with labels or names, which are neither images nor unused."""
    counts_files: bool
    """Whether the counts are of files, not of samples in tars and Parquet files."""


def source(
    *,
    train: int = 0,
    val: int = 0,
    test: int = 0,
    images: tuple[dict[str, int], ...] = (),
    classes: tuple[str, ...] | None = None,
    messages: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    error: tuple[str, ...] | None = None,
    status: int = 2,
    rejected_by_strict: bool = False,
    colors: dict[str, Color] | None = None,
    colors_unless: str = "",
    options: tuple[str, ...] = (),
    label_files: int = 0,
    counts_files: bool = True,
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add the function's source to `SOURCES`; `train`, `val`, and `test` define `images` if one result is correct."""
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
                messages=messages,
                notes=notes,
                error=error,
                status=status,
                rejected_by_strict=rejected_by_strict,
                colors=colors or {},
                colors_unless=colors_unless,
                options=options,
                label_files=label_files,
                counts_files=counts_files,
            )
        )
        return make

    return add


def put_files(root: Path, names: str, data: bytes | str) -> None:
    """Write a file under each of the names, with brace expansion as in a shell: '{cat,dog}/notes.txt'."""
    for name in expand(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def put_images(root: Path, names: str, encode: Callable[[int], bytes] = jpeg) -> None:
    """Write an image under each of the names; its seed is a hash of the name."""
    for name in expand(names):
        put_files(root, name, encode(crc32(name.encode())))


def expand(names: str) -> Iterator[str]:
    """Yield the names from brace expansion."""
    match = re.search(r"\{([^{}]*)\}", names)
    if match is None:
        yield names
        return
    for word in match[1].split(","):
        yield from expand(names[: match.start()] + word + names[match.end() :])
