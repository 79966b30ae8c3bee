"""Existing WebDataset tars: KEY.jpg (or another image) and KEY.cls side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.listing import ListingBuilder
from shards.manifest import MANIFEST_NAME, ClassEntry, Manifest
from shards.sources.members import Member, members
from shards.sources.scan import TRAIN, VAL, Scan

LABEL_SUFFIX = "cls"
_MAX_LABEL = 20  # characters
_VAL = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class TarSample:
    """An image in a tar, and its label."""

    key: str
    image: Member
    label: int


def tar_files(source: Path) -> list[Path]:
    """The tars of a folder and of its train/ and val/, by name."""
    if source.is_file():
        return [source]
    return sorted(path for folder in (source, source / TRAIN, source / VAL) for path in folder.glob("*.tar"))


def split_of(path: Path, root: Path) -> str:
    """The split that a tar's name (or its folder's, below the source) tells: 'val' where it says so, else 'train'."""
    below = path.name if path.parent == root else f"{path.parent.name}/{path.name}"
    return VAL if _VAL.search(below) else TRAIN


def scan_webdataset(source: Path) -> Scan:
    """List the samples of all tars.

    Raises:
        UserError: no tars, no samples in one, a damaged tar, or a label that is no number.
    """
    tars = tar_files(source)
    if not tars:
        raise UserError(f"{source}: no tars in it")
    builders: dict[str, ListingBuilder] = {}
    ignored = top = 0
    for tar in tars:
        samples, others = read_tar(tar)
        ignored += others
        top = max(top, *(sample.label for sample in samples))
        builders.setdefault(split_of(tar, source), ListingBuilder()).add(
            tar,
            [
                (f"{sample.label}/{tar.stem}/{sample.image.name}".encode("utf-8", "surrogateescape"), *_place(sample))
                for sample in samples
            ],
        )
    return Scan(
        "webdataset",
        known_classes(source) or tuple(ClassEntry(folder=str(label)) for label in range(top + 1)),
        {split: builder.build() for split, builder in builders.items()},
        ignored,
    )


def known_classes(source: Path) -> tuple[ClassEntry, ...] | None:
    """The classes of a set of ours."""
    return Manifest.load(source).classes if (source / MANIFEST_NAME).is_file() else None


def read_tar(path: Path) -> tuple[list[TarSample], int]:
    """The samples of a tar, in its order, and how many of its files belong to none.

    Raises:
        UserError: it is damaged, has no samples, or a label that is no number.
    """
    samples = []
    files = 0
    with path.open("rb") as file:
        for key, group in _groups(members(path)):
            files += len(group)
            image = next((member for member in group.values() if member.is_image), None)
            label = group.get(LABEL_SUFFIX)
            if image is None or label is None:
                continue
            text = os.pread(file.fileno(), min(label.size, _MAX_LABEL), label.offset)
            try:
                samples.append(TarSample(key, image, int(text)))
            except ValueError:
                raise UserError(f"{path}: {label.name}: {text!r} is no class number; expected a decimal one") from None
    if not samples:
        raise UserError(f"{path}: no samples in it; expected KEY.jpg and KEY.{LABEL_SUFFIX} side by side")
    return samples, files - 2 * len(samples)


def _groups(found: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members that follow each other and share all before the first dot of their base name: key, suffix -> member."""
    key: str | None = None
    group: dict[str, Member] = {}
    for member in found:
        dot = member.name.find(".", member.name.rfind("/") + 1)
        stem, suffix = (member.name[:dot], member.name[dot + 1 :].lower()) if dot >= 0 else (member.name, "")
        if stem != key:
            if key is not None:
                yield key, group
            key, group = stem, {}
        group[suffix] = member
    if key is not None:
        yield key, group


def _place(sample: TarSample) -> tuple[int, int, int]:
    return sample.image.offset, sample.image.size, sample.label
