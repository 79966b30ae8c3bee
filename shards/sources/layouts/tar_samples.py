"""Pair the images of a WebDataset tar with their labels.

As in WebDataset (`webdataset.tariterators`), the key of a member is everything before the first dot of its file name,
including folders; the rest is its suffix, in any case. Differences from WebDataset:

- The members of a sample may be anywhere in the tar. `group_by_keys` groups only adjacent members, so it returns
  samples without labels from tars that are not sorted by key.
- Any duplicate key is rejected. `group_by_keys` rejects only adjacent duplicates.
- Hidden files are skipped, including `d/._x.jpg`, for which `base_plus_ext` returns key `d/` and suffix `_x.jpg`.
- The image is the member with the suffix of an image, and the label is the member with suffix `cls`. In WebDataset, the
  caller selects both.
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
"""Preferred suffixes, in order, if a sample has several images; other suffixes follow in alphabetical order."""
NO_LABEL = "image without a label"
NO_IMAGE = "label without an image"
_MAX_LABEL_BYTES = 4 * MAX_LABEL + 16  # maximum size of a label in UTF-8, including white space
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # metadata, which webdataset's `tar_file_iterator` skips
_SHOWN_SUFFIXES = 8


@dataclass(frozen=True)
class TarSample:
    """An image in a tar, and its label."""

    key: str
    image: Member
    label: int
    """Result of `LabelReader.read`."""


def read_tar(path: Path, labels: LabelReader, split: str) -> tuple[list[TarSample], tuple[UnusedEntry, ...]]:
    """Pair the images of a tar with their labels, in any order of members.

    If a sample has several images, `IMAGE_ORDER` decides. A suffix with a dot in it (KEY.left.jpg) is used as an image
    only if it is the only image suffix of the tar. All members, at most `MAX_MEMBERS`, are held in memory.

    Args:
        labels: reader of the labels.
        split: split of the tar; in a test split, images without labels are counted as unused instead of rejected.

    Returns:
        The samples in the order of their images in the tar, and the files that belong to no sample.

    Raises:
        UserError: the tar is compressed or damaged, or has no samples; a key occurs several times; or a label is
            invalid.
        StorageFailed: the tar cannot be read.
    """
    unused = UnusedFiles()
    found = []
    for member in members(path):
        reason = _skip_reason(member.name)
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
        raise UserError(f"{path}: no samples: {_describe_members(found)}")
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


def _skip_reason(name: str) -> str | None:
    """Return why a member is skipped regardless of its suffix; None if it is not skipped."""
    folders = name.split("/")
    if folders[-1].startswith("._") or "__MACOSX" in folders:
        return "macOS resource fork"
    if any(part.startswith(".") and part not in (".", "..") for part in folders):
        return "hidden file"
    return "WebDataset metadata" if _WEBDATASET_META.match(name) else None


def _image_suffixes(path: Path, found: list[Member]) -> list[str]:
    """Return the image suffixes of a tar in the order of preference.

    Raises:
        UserError: there are several, and all of them contain dots.
    """
    suffixes = {member.suffix: member for member in found if member.is_image}
    plain = {suffix for suffix in suffixes if "." not in suffix}
    if not plain and len(suffixes) > 1:
        member = next(iter(suffixes.values()))
        raise UserError(
            f"{path}: {member.name}: the key of a sample ends at the first dot of the file name, so this is key "
            f"'{member.key}' with suffix '{member.suffix}', and the tar has {len(suffixes):,} such image suffixes; "
            "create it again with one KEY.jpg per sample and no other dots in the file names"
        )
    rank = {suffix: place for place, suffix in enumerate(IMAGE_ORDER)}
    return sorted(plain or suffixes, key=lambda suffix: (rank.get(suffix, len(rank)), suffix))


def _pair(
    path: Path, key: str, group: Sequence[Member], image_suffixes: list[str]
) -> tuple[list[tuple[str, Member, Member]], list[tuple[str, Member]]]:
    """Find the image and the label among the members of one key.

    Returns:
        A list of one (key, image, label), empty if one of them is missing; and the unused members, with the reason.

    Raises:
        UserError: an image or a label occurs twice.
    """
    by_suffix: dict[str, Member] = {}
    for member in group:
        before = by_suffix.setdefault(member.suffix, member)
        if before is not member and (member.suffix in image_suffixes or member.suffix == LABEL_SUFFIX):
            raise UserError(
                f"{path}: {member.name}: key '{key}' has two files with suffix '{member.suffix}', at bytes "
                f"{before.offset:,} and {member.offset:,}; create the tar again with a unique key per sample "
                "(tar --sort=name of a folder, instead of concatenated tars)"
            )
    image = next((by_suffix[suffix] for suffix in image_suffixes if suffix in by_suffix), None)
    label = by_suffix.get(LABEL_SUFFIX)
    others = []
    for member in group:
        if image and label:
            reason = "additional file of a sample"
        elif label:
            reason = NO_IMAGE if member is label else "additional file of a label without an image"
        else:
            reason = NO_LABEL if member.is_image else "not part of a sample"
        if not (image and label and (member is image or member is label)):
            others.append((reason, member))
    return ([(key, image, label)] if image and label else []), others


def _describe_members(found: Sequence[Member]) -> str:
    """Describe the contents of a tar without samples, and what to do."""
    counts = Counter(member.suffix for member in found)
    shown = ", ".join(
        f"{count:,} .{suffix}" if suffix else f"{count:,} without a suffix"
        for suffix, count in counts.most_common(_SHOWN_SUFFIXES)
    )
    expected = "expected KEY.jpg and KEY.cls (a class number or class name)"
    images = sum(member.is_image for member in found)
    if not images:
        return f"found {shown or 'no files'}; {expected}"
    if LABEL_SUFFIX in counts:
        return f"found {shown}, but no key has both an image and a label; {expected}"
    if images == len(found):
        return (
            f"found {shown}, but no labels; {expected}; unpack a tar of class folders, or of one class, to class "
            "folders (tar xf)"
        )
    return f"found {shown}, but no labels; {expected}; if the labels are in other files, write them to KEY.cls"
