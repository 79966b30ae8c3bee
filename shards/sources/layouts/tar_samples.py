"""Pair the images of a WebDataset tar with their labels.

As in WebDataset itself (`webdataset.tariterators`), the key of a member is all before the first dot of its file name,
folders included, and the rest is its suffix, in any case. Where we differ from it:

- The members of a sample may stand anywhere in the tar. `group_by_keys` makes a sample of neighbours only, so that tars
  that were not written in the order of their keys give it samples without labels.
- A key that occurs twice is refused. `group_by_keys` refuses neighbours alone.
- Hidden files are left out, `d/._x.jpg` among them, which `base_plus_ext` takes for key `d/` and suffix `_x.jpg`.
- The image is the member whose suffix says so, and the label the one of suffix `cls`. There, the caller names them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from shards.errors import UserError, reading
from shards.files.regular import open_regular
from shards.sources.layouts.members import LABEL_SUFFIX, Member, members
from shards.sources.naming.labels import MAX_LABEL, LabelReader, NoLabelError
from shards.sources.scan import TEST
from shards.sources.unused import UnusedEntry, UnusedFiles

IMAGE_ORDER = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
"""Which image of a sample of several is used, the first of these; others follow in the order of their suffixes."""
NO_LABEL = "image without a label"
NO_IMAGE = "label without an image"
_MAX_LABEL_BYTES = 4 * MAX_LABEL + 16  # of UTF-8, with white space around
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # `tar_file_iterator` skips these
_SHOWN_SUFFIXES = 8


@dataclass(frozen=True)
class TarSample:
    """An image in a tar, and its label."""

    key: str
    image: Member
    label: int
    """As `LabelReader.read` gives it."""


def read_tar(path: Path, labels: LabelReader, split: str) -> tuple[list[TarSample], tuple[UnusedEntry, ...]]:
    """Pair the images of a tar with their labels, wherever they stand in it.

    The image of a sample that has several is the first by `IMAGE_ORDER`. A suffix with a dot in it (KEY.left.jpg) is an
    image where the tar has no others, and only one such suffix. All members are held in memory, at most `MAX_MEMBERS`.

    Args:
        labels: reads the labels.
        split: of a test split, images without labels are counted as unused instead of refused.

    Returns:
        The samples in the order of their images in the tar, and the files that belong to none.

    Raises:
        UserError: the tar is compressed or damaged, or has no samples; a key occurs twice, or more often because it
            ends at the first dot; or a label cannot be used.
        StorageFailed: it cannot be read.
    """
    unused = UnusedFiles()
    found = []
    for member in members(path):
        reason = _ignored(member.name)
        if reason:
            unused.add(reason, f"{path.name}/{member.name}")
        else:
            found.append(member)
    found.sort(key=attrgetter("key"))
    image_suffixes = _image_suffixes(path, found)
    pairs = []
    for key, group in groupby(found, attrgetter("key")):
        pair, others = _pair(path, key, list(group), image_suffixes)
        pairs += pair
        for reason, member in others:
            unused.add(reason, f"{path.name}/{member.name}")
    if not pairs and split != TEST:
        raise UserError(f"{path}: no samples in it: {_what_it_has(found)}")
    pairs.sort(key=lambda pair: pair[1].offset)
    samples = []
    with reading(path), os.fdopen(open_regular(path), "rb") as file:
        for key, image, label in pairs:
            text = os.pread(file.fileno(), min(label.size, _MAX_LABEL_BYTES), label.offset)
            try:
                samples.append(TarSample(key, image, labels.read(text, f"{path}: {label.name}")))
            except NoLabelError:
                if split != TEST:
                    raise
                unused.add(NO_LABEL, f"{path.name}/{image.name}")
    return samples, unused.entries()


def _ignored(name: str) -> str | None:
    """Why a member is left out whatever its suffix; None for others."""
    folders = name.split("/")
    if folders[-1].startswith("._") or "__MACOSX" in folders:
        return "resource fork of macOS"
    if any(part.startswith(".") and part not in (".", "..") for part in folders):
        return "hidden file"
    return "metadata of WebDataset" if _WEBDATASET_META.match(name) else None


def _image_suffixes(path: Path, found: list[Member]) -> list[str]:
    """The suffixes that make a member the image of its sample, in the order in which they are taken.

    Raises:
        UserError: all have dots in them, and they are several.
    """
    suffixes = {member.suffix: member for member in found if member.is_image}
    plain = {suffix for suffix in suffixes if "." not in suffix}
    if not plain and len(suffixes) > 1:
        member = next(iter(suffixes.values()))
        raise UserError(
            f"{path}: {member.name}: the key of a sample ends at the first dot of the file name, so this is key "
            f"'{member.key}' with suffix '{member.suffix}', and the tar has {len(suffixes):,} such suffixes of images; "
            "make it again with one KEY.jpg for each sample and no other dots in the file names"
        )
    rank = {suffix: place for place, suffix in enumerate(IMAGE_ORDER)}
    return sorted(plain or suffixes, key=lambda suffix: (rank.get(suffix, len(rank)), suffix))


def _pair(
    path: Path, key: str, group: Sequence[Member], image_suffixes: list[str]
) -> tuple[list[tuple[str, Member, Member]], list[tuple[str, Member]]]:
    """Key, image and label of the members of one key, if it has both; and the others, each with the reason.

    Raises:
        UserError: an image or a label occurs twice.
    """
    by_suffix: dict[str, Member] = {}
    for member in group:
        before = by_suffix.setdefault(member.suffix, member)
        if before is not member and (member.suffix in image_suffixes or member.suffix == LABEL_SUFFIX):
            raise UserError(
                f"{path}: {member.name}: key '{key}' has two files of suffix '{member.suffix}', at bytes "
                f"{before.offset:,} and {member.offset:,}; make the tar again with a key of its own for each sample "
                "(tar --sort=name of a folder, instead of joined tars)"
            )
    image = next((by_suffix[suffix] for suffix in image_suffixes if suffix in by_suffix), None)
    label = by_suffix.get(LABEL_SUFFIX)
    others = []
    for member in group:
        if image and label:
            reason = "beside an image and its label"
        elif label:
            reason = NO_IMAGE if member is label else "beside a label without an image"
        else:
            reason = NO_LABEL if member.is_image else "not part of a sample of image and label"
        if not (image and label and (member is image or member is label)):
            others.append((reason, member))
    return ([(key, image, label)] if image and label else []), others


def _what_it_has(found: Sequence[Member]) -> str:
    """What a tar without samples has and lacks, and what to do."""
    counts = Counter(member.suffix for member in found)
    shown = ", ".join(
        f"{count:,} .{suffix}" if suffix else f"{count:,} without suffix"
        for suffix, count in counts.most_common(_SHOWN_SUFFIXES)
    )
    expected = "expected KEY.jpg and KEY.cls (a class number, or the name of the class)"
    images = sum(member.is_image for member in found)
    if not images:
        return f"found {shown or 'no files'}; {expected}"
    if LABEL_SUFFIX in counts:
        return f"found {shown}, but no key has both an image and a label; {expected}"
    if images == len(found):
        return (
            f"found {shown} and no labels; {expected}; a tar of class folders, or of one class, must be unpacked to "
            "class folders (tar xf)"
        )
    return f"found {shown}; {expected}; write labels that are in other files to KEY.cls"
