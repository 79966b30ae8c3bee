"""Count the files of a source of tars or Parquet files that are not these archives: indexes, lists, unused images."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from shards.format.manifest import MANIFEST_NAME, REJECTS_NAME
from shards.redact import display_name
from shards.sources.naming.split_lists import split_list_warnings, splits_of_list
from shards.sources.scan import Layout
from shards.sources.unused import UnusedFiles
from shards.sources.walk import MAX_DEPTH, is_shard_set, list_folder

TAR_INDEX = "index of a tar"
PART_OF_SET = "metadata of the shard set that is read"
_INDEX_SUFFIX = ".idx"  # indexes written by DALI's wds2idx and by this project
_SET_FILES = (MANIFEST_NAME.encode(), REJECTS_NAME.encode())
_SET_SUFFIXES = (b".index.npy", b".beton")


def count_non_archive_files(
    source: Path, used: Collection[Path], layout: Layout, splits: Collection[str], unused: UnusedFiles
) -> list[str]:
    """Count the files below a source that are not among its archives; return warnings about them.

    Args:
        source: folder or file; nothing is counted for a file.
        used: the archives of the source.
        layout: layout of the archives.
        splits: splits of the archives.
        unused: receives the counts.
    """
    if source.is_file():
        return []
    is_set = is_shard_set(bytes(source))
    images: list[bytes] = []
    lists: list[Path] = []
    pending, seen = [source], set()
    while pending:
        folder = pending.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen or len(folder.relative_to(source).parts) > MAX_DEPTH:
            continue
        seen.add((status.st_dev, status.st_ino))
        contents = list_folder(folder)
        below = b"" if folder == source else os.fsencode(folder.relative_to(source)) + b"/"
        contents.add_to(unused, below, folder)
        images += [below + name for name in contents.images]
        for name in [*contents.images, *contents.files]:
            path = folder / os.fsdecode(name)
            if path in used:
                continue
            if path.suffix == _INDEX_SUFFIX and path.with_suffix(".tar") in used:
                unused.add(TAR_INDEX, below + name)
            elif is_set and folder == source and (name in _SET_FILES or name.endswith(_SET_SUFFIXES)):
                unused.add(PART_OF_SET, below + name)
            else:
                unused.add("not an archive that is read", below + name)
                lists += [path] if splits_of_list(path.name) else []
        pending += [folder / os.fsdecode(name) for name in reversed(contents.folders)]
    return [*_unused_image_warnings(source, used, layout, images), *split_list_warnings(lists, splits)]


def _unused_image_warnings(source: Path, used: Collection[Path], layout: Layout, images: list[bytes]) -> list[str]:
    if not images:
        return []
    archives = sorted(used)
    folders = {path.split(b"/")[-2] for path in images if b"/" in path}
    remedy = (
        "to convert class folders instead, use --from folder"
        if len(folders) > 1
        else "move the files that do not belong to the source out of it"
    )
    more = f" and {len(archives) - 1:,} more" if len(archives) > 1 else ""
    return [
        f"{source}: read as layout {layout} because of {archives[0]}{more}, so {len(images):,} image files (such as "
        f"{display_name(images[0])}) are not used; {remedy}"
    ]
