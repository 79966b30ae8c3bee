"""Layout class-tars: one tar per class, CLASS.tar or SPLIT/CLASS.tar, as ImageNet-21k is distributed.

Nothing is unpacked: the images are byte ranges of the tars.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

from shards.errors import UserError, reading
from shards.files.regular import open_regular
from shards.format.manifest_fields import ClassEntry
from shards.sources.layouts.members import LABEL_SUFFIX, Member, members, read_members
from shards.sources.layouts.webdataset import tar_files
from shards.sources.listing import Container, ListingBuilder
from shards.sources.naming.classes import class_order, display_class_names, human_names
from shards.sources.naming.non_archive_files import count_non_archive_files
from shards.sources.naming.splits import assign_splits, relative_to_source, splits_in
from shards.sources.scan import Scan
from shards.sources.unused import UnusedFiles
from shards.sources.walk import skip_reason

_INSPECTED_TARS, _INSPECTED_MEMBERS = 4, 64
_NUMBERED = re.compile(r".*[-_.]\d{3,}|\d{4,}|(part|shard|batch|chunk)\W*\d+", re.IGNORECASE)
"""Names of numbered shards: pets-000001."""


def are_class_tars(tars: list[Path]) -> bool:
    """Return whether tars look like one tar per class: several tars of images only, without a split in their names.

    Raises:
        UserError: one of the inspected tars is damaged.
        StorageFailed: one of the inspected tars cannot be read.
    """
    return (
        len(tars) > 1
        and not any(splits_in(tar.stem) for tar in tars)
        and all(map(_holds_images, tars[:_INSPECTED_TARS]))
    )


def scan_class_tars(source: Path) -> Scan:
    """List the images of all tars; the class of an image is the name of its tar without .tar.

    Raises:
        UserError: there are no tars, or a tar has no images or is damaged.
        StorageFailed: a tar cannot be read.
    """
    tars = tar_files(source)
    if not tars:
        raise UserError(f"{source}: no tars found; expected CLASS.tar with the images of one class")
    named = assign_splits(tars, source, by_folder=True)
    names = class_order({os.fsencode(tar.stem) for tar in tars})
    class_names = display_class_names(names, source, "class tars")
    labels = {name: label for label, name in enumerate(names)}
    builders: dict[str, ListingBuilder] = {}
    unused = UnusedFiles()
    warnings = count_non_archive_files(source, set(tars), "class-tars", set(named.splits.values()), unused)
    for tar in tars:
        container = Container.of(tar)
        name = os.fsencode(tar.stem)
        used, folders = [], set[str]()
        for member in members(tar):
            reason = _reason_unused(member)
            if reason is None:
                folders.add(member.name.rpartition("/")[0].removeprefix("./"))
                used.append((name + b"/" + _bytes(member.base), member.offset, member.size, labels[name]))
            else:
                if member.name.endswith(f".{LABEL_SUFFIX}"):
                    raise UserError(
                        f"{tar}: contains a label ({member.name}), so it is not the tar of one class; use --from "
                        "webdataset"
                    )
                unused.add(reason, f"{relative_to_source(tar, source)}/{member.name}")
        if len(folders) > 1:
            raise UserError(
                f"{tar}: contains {len(folders):,} folders (such as {max(folders)}), so it is not the tar of one "
                "class; unpack the tars (tar xf) and convert the folder of class folders"
            )
        if not used:
            raise UserError(f"{tar}: the class tar has no images; copy or download it again, or remove it")
        builders.setdefault(named.splits[tar], ListingBuilder()).add_ranges(container, used)
    readable = human_names(source) if source.is_dir() else {}
    if all(_NUMBERED.fullmatch(tar.stem) for tar in tars):
        warnings.append(
            f"{tars[0]}: read as class '{class_names[0]}', although all tars are named like numbered shards"
        )
    return Scan(
        "class-tars",
        tuple(replace(ClassEntry(folder=folder), name=readable.get(folder)) for folder in class_names),
        {split: builder.build() for split, builder in builders.items()},
        unused.entries(),
        (
            f"{source}: the tars contain only images, so each tar is read as one class: {len(names):,} classes",
            *named.all_notes(builders),
        ),
        (*named.warnings, *warnings),
    )


def _holds_images(tar: Path) -> bool:
    """Return whether the first members of a tar are images only."""
    with reading(tar), os.fdopen(open_regular(tar), "rb") as file:
        found = read_members(file, os.fstat(file.fileno()).st_size, f"{tar}")
        reasons = [_reason_unused(member) for member in itertools.islice(found, _INSPECTED_MEMBERS)]
    return None in reasons and "not an image" not in reasons


def _reason_unused(member: Member) -> str | None:
    for part in member.name.split("/"):
        reason = skip_reason(_bytes(part)) if part != "." else None
        if reason is not None:
            return reason
    return None if member.is_image else "not an image"


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
