"""Existing WebDataset tars: KEY.jpg (or another image) and KEY.cls side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError, reading
from shards.listing import Container, ListingBuilder
from shards.manifest import MANIFEST_NAME, ClassEntry, Manifest
from shards.regular import open_regular
from shards.sources.classes import check_label, numbered_classes
from shards.sources.members import LABEL_SUFFIX, Member, members
from shards.sources.scan import TRAIN, Scan
from shards.sources.splits import below_source, named_split, split_files
from shards.sources.unused import UnusedEntry, UnusedFiles, merge
from shards.sources.walk import files_below

MAX_LABEL = 20
"""Bytes of a .cls member."""


@dataclass(frozen=True)
class TarSample:
    """An image in a tar, and its label."""

    key: str
    image: Member
    label: int


def tar_files(source: Path) -> list[Path]:
    """The tars below a folder, by name; the file itself where `source` is one."""
    return files_below(source, ".tar")


def split_of(path: Path, root: Path) -> str:
    """The split that a tar's path below the source names, else 'train'."""
    return named_split(below_source(path, root)) or TRAIN


def scan_webdataset(source: Path) -> Scan:
    """List the samples of all tars.

    Raises:
        UserError: no tars, no samples in one, a damaged tar, or a label that is no number.
    """
    tars = tar_files(source)
    if not tars:
        raise UserError(f"{source}: no tars in it")
    named = split_files(tars, source)
    builders: dict[str, ListingBuilder] = {}
    top = 0
    unused: list[tuple[UnusedEntry, ...]] = []
    for tar in tars:
        container = Container.of(tar)
        samples, others = read_tar(tar)
        unused.append(others)
        top = max(top, *(sample.label for sample in samples))
        stem = below_source(tar, source)[: -len(tar.suffix)]  # tars of one name may stand in several folders
        builders.setdefault(named.splits[tar], ListingBuilder()).add_ranges(
            container,
            [
                (f"{sample.label}/{stem}/{sample.image.name}".encode("utf-8", "surrogateescape"), *_place(sample))
                for sample in samples
            ],
        )
    return Scan(
        "webdataset",
        _classes(source, top),
        {split: builder.build() for split, builder in builders.items()},
        merge(unused),
        named.notes_on(builders),
        named.doubts,
    )


def _classes(source: Path, top: int) -> tuple[ClassEntry, ...]:
    """The classes of a set of ours; of other tars, the numbers to `top`."""
    if not (source / MANIFEST_NAME).is_file():
        return numbered_classes(top)
    classes = Manifest.load(source).classes
    if top >= len(classes):
        raise UserError(
            f"{source / MANIFEST_NAME}: {len(classes):,} classes, but label {top:,} occurs in the tars: they are not "
            "of this set; move the file away to shard the tars by their own numbers"
        )
    return classes


def read_tar(path: Path) -> tuple[list[TarSample], tuple[UnusedEntry, ...]]:
    """The samples of a tar, in its order, and its files that belong to none.

    Raises:
        UserError: it is damaged, has no samples, a sample of several images, or a label that is no class number.
        StorageFailed: it cannot be read.
    """
    samples = []
    unused = UnusedFiles()
    found = members(path)
    with reading(path), os.fdopen(open_regular(path), "rb") as file:
        for key, group in _groups(path, found):
            images = [suffix for suffix, member in group.items() if member.is_image]
            label = group.get(LABEL_SUFFIX)
            if not images or label is None:
                for member in group.values():
                    unused.add("not part of a sample of image and label", f"{path.name}/{member.name}")
                continue
            for suffix, member in group.items():
                if suffix not in (images[0], LABEL_SUFFIX):
                    unused.add("beside an image and its label", f"{path.name}/{member.name}")
            if len(images) > 1:
                raise UserError(
                    f"{path}: sample {key} has {len(images)} images ({', '.join(images)}), and nothing says which one "
                    f"to train on; make the tar again with one KEY.jpg and one KEY.{LABEL_SUFFIX} for each sample"
                )
            text = os.pread(file.fileno(), min(label.size, MAX_LABEL + 1), label.offset)
            samples.append(TarSample(key, group[images[0]], parse_label(text, f"{path}: {label.name}")))
    if not samples:
        raise UserError(f"{path}: no samples in it; expected KEY.jpg and KEY.{LABEL_SUFFIX} side by side")
    return samples, unused.entries()


def parse_label(text: bytes, shown: str) -> int:
    """Read a class number: ASCII decimal digits, with white space around them at most.

    Args:
        shown: where it stands, for messages.

    Raises:
        UserError: it is something else, or not below `MAX_CLASSES`.
    """
    digits = text.strip()
    if len(text) > MAX_LABEL or not re.fullmatch(rb"[0-9]+", digits):
        raise UserError(f"{shown}: {text!r} is no class number; expected a decimal one of {MAX_LABEL} bytes at most")
    check_label(int(digits), shown)
    return int(digits)


def _groups(path: Path, found: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members that follow each other and share all before the first dot of their base name: key, suffix -> member.

    Raises:
        UserError: a suffix occurs twice in such a group: two samples of one key, whose parts cannot be told apart.
    """
    key: str | None = None
    group: dict[str, Member] = {}
    for member in found:
        dot = member.name.find(".", member.name.rfind("/") + 1)
        stem, suffix = (member.name[:dot], member.name[dot + 1 :].lower()) if dot >= 0 else (member.name, "")
        if stem != key:
            if key is not None:
                yield key, group
            key, group = stem, {}
        if suffix in group and (member.is_image or suffix == LABEL_SUFFIX):
            raise UserError(
                f"{path}: {member.name} follows another one of that name; make the tar again with a key of its own "
                "for each sample"
            )
        group[suffix] = member
    if key is not None:
        yield key, group


def _place(sample: TarSample) -> tuple[int, int, int]:
    return sample.image.offset, sample.image.size, sample.label
