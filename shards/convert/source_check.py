"""Check that a source is the one from which a set was or is being converted, and that it has not changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.convert.conversion_plan import ConversionPlan
from shards.convert.join import print_notes
from shards.convert.source_attribute import was_converted_from
from shards.convert.work_folder import WorkFolder
from shards.errors import UserError
from shards.format.manifest import Manifest
from shards.images.formats import named_as_image
from shards.redact import display_name
from shards.sources.identity import Identity
from shards.sources.layouts.detect import current_identity
from shards.sources.listing import Listing
from shards.sources.naming.classes import format_count, join_first, quoted
from shards.sources.scan import TRAIN, VAL, Layout

# Maximum number of folders and archives whose times are compared, per split. ImageNet-21k has 21,841 folders; some
# sources have one folder per image.
_MAX_COMPARED = 30_000
_ARCHIVES = (b".tar", b".parquet")


def check_exists(source: Path) -> None:
    """Raise UserError if the source does not exist."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; specify the source to convert")


def source_name(source: Path) -> str:
    """Return the absolute path of a source with links resolved, in the form that the conversion plan stores."""
    return display_name(os.fsencode(source.resolve()))


def check_finished(work: WorkFolder, manifest: Manifest, source: Path, layout: Layout | None = None) -> None:
    """Check that a finished set was converted from `source` and that the source is unchanged. Lists the source.

    If the source no longer exists, only a note is printed: a finished set does not need it.

    Raises:
        UserError: the set was converted from a different source, or the source has changed.
        StorageFailed: the source cannot be read.
    """
    out = work.out
    made = next((one for one in get_args(Layout) if one == manifest.made.get("source")), None)
    if made is None:
        raise UserError(f"{out}: is a set that 'pipeline shard' did not write; specify another --out")
    if layout not in (None, made):
        raise UserError(
            f"{out}: is a set converted from a source of layout '{made}', not '{layout}'; omit --from, or specify "
            "another --out"
        )
    if not source.exists():
        if not was_converted_from(out, source_name(source)):
            raise UserError(
                f"{source}: no such file or folder, and not known to be the source of the finished set {out}; specify "
                "the source of that set, or another --out"
            )
        print_notes([f"{source}: no longer exists, so the set was not compared with it"])
        return
    now = _identity_now(source, made)
    if isinstance(now, UserError) or now.digest != manifest.made.get("source_digest"):
        folders = [quoted(entry.folder) for entry in manifest.classes]
        raise UserError(
            f"{out}: was converted from a different source than {source}, or before that source was changed (the set "
            f"has the classes {join_first(folders)}); specify another --out, or remove {out} to convert again"
        )


def check_same_source(out: Path, plan: ConversionPlan, source: Path, layout: Layout | None = None) -> None:
    """Check that a conversion is resumed with the source and layout with which it was started.

    Raises:
        UserError: the source or the layout differs.
    """
    if plan.source != source_name(source):
        raise UserError(
            f"{out}: contains a conversion of {plan.source}, not of {source}; specify that source, or another --out"
        )
    if layout not in (None, plan.layout):
        raise UserError(
            f"{out}: contains a conversion of a source of layout '{plan.layout}', not '{layout}'; omit --from, or "
            "specify another --out"
        )


def check_unchanged(
    work: WorkFolder, plan: ConversionPlan, source: Path, is_needed: Callable[[], bool], *, times_first: bool = False
) -> None:
    """Check that the source is unchanged since it was listed, before a conversion is resumed.

    If all shards are already written, removed images only cause a note, because nothing more is read from the source.

    Args:
        is_needed: returns whether images still have to be read.
        times_first: list the source only if the times of its folders and archives have changed. Many parts that list it
            at the same time would overload its server.

    Raises:
        UserError: images were added, or have different sizes, labels or contents; or needed images were removed.
        StorageFailed: the source cannot be read.
    """
    if times_first and source.exists() and not _may_have_changed(work, plan):
        return
    fact, only_removed = _compare_with_listing(work, plan, source)
    if not fact:
        return
    if not only_removed or is_needed():
        raise UserError(
            f"{work.out}: the source {source} has changed since the conversion was started: {fact}; restore the "
            "source, or specify another --out"
        )
    print_notes([f"{source}: {fact}; all shards were written before, so the set is complete without them"])


def _compare_with_listing(work: WorkFolder, plan: ConversionPlan, source: Path) -> tuple[str, bool]:
    """Return how a source differs from its listing ('' if it does not), and whether images were only removed."""
    if not source.exists():
        return "it no longer exists", True
    now = _identity_now(source, plan.layout)
    if isinstance(now, UserError):
        only_removed = _has_only_listed_files(work, plan, source)
        return f"it can no longer be read with layout '{plan.layout}' ({now})", only_removed
    if now.digest == plan.digest:
        return "", False
    if plan.layout == "parquet":
        what, listed, found = "file", _Items.of_files(plan.source_files), _Items.of_files(now.files)
    else:
        split_off = bool(plan.options["val_fraction"])
        listings = {split: work.load_listing(split)[0] for split in plan.shards}
        what, listed, found = "image", _Items.of_images(listings, split_off), _Items.of_images(now.splits, split_off)
    added, removed = ~np.isin(found.keys, listed.keys), ~np.isin(listed.keys, found.keys)
    modified = _modified_items(found, listed)
    mark = "size" if what == "image" else "content"
    facts = [
        f"{format_count(int(np.count_nonzero(which)), what)} {fact} "
        f"(such as {things.name(int(np.flatnonzero(which)[0]))})"
        for things, which, fact in (
            (found, added, "added"),
            (listed, removed, "removed"),
            (found, modified, f"with a different {mark}"),
        )
        if which.any()
    ]
    if not facts:
        return "its labels, the order or names of its classes, or the content of images differ", False
    return ", ".join(facts), not added.any() and not modified.any()


def _has_only_listed_files(work: WorkFolder, plan: ConversionPlan, source: Path) -> bool:
    """Return whether all images and archives of a source that can no longer be scanned are in the listing, unchanged.

    Always False if the source has Parquet files, because the listing contains the files unpacked from them.
    """
    images: dict[bytes, int] = {}
    archives: dict[bytes, tuple[int, int]] = {}
    for split in plan.shards if plan.layout != "parquet" else ():
        listing, _ = work.load_listing(split)
        for entry in listing.entries(0, len(listing)):
            path = os.fsencode(entry.container.path)
            if entry.offset is None:
                images[path + b"/" + entry.name.rpartition(b"/")[2]] = entry.size
            else:
                archives[path] = (entry.container.size, entry.container.mtime)
    for folder, _, names in os.walk(os.fsencode(source.absolute())):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.exists(path):  # a dangling symbolic link
                continue
            status = os.stat(path)
            if path.lower().endswith(_ARCHIVES):
                known = archives.get(path) == (status.st_size, int(status.st_mtime))
            else:
                known = images.get(path) == status.st_size if named_as_image(name) else True
            if not known:
                return False
    return True


@dataclass(frozen=True)
class _Items:
    """Names and sizes of the images of a source, or names and digests of its files."""

    keys: NDArray[np.uint64]
    """uint64 [items]: hash of each name."""
    marks: NDArray[np.uint64]
    """uint64 [items]: size of each image, or digest of each file."""
    name: Callable[[int], str]
    """Function that returns the path of an item."""

    @classmethod
    def of_files(cls, files: Mapping[str, str]) -> _Items:
        names = list(files)
        keys = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], dtype=np.uint64)
        return cls(keys, np.array([int(mark, 16) for mark in files.values()], dtype=np.uint64), names.__getitem__)

    @classmethod
    def of_images(cls, splits: Mapping[str, Listing], split_off: bool) -> _Items:
        """Describe the images of all splits.

        Args:
            split_off: the validation split was split off the training images (--val-fraction).
        """
        listings = [(TRAIN if split_off and split == VAL else split, one) for split, one in sorted(splits.items())]
        keys = np.fromiter(
            (
                xxhash.xxh3_64_intdigest(split.encode() + b"/" + listing.name(i))
                for split, listing in listings
                for i in range(len(listing))
            ),
            dtype=np.uint64,
            count=sum(len(listing) for _, listing in listings),
        )
        sizes = np.concatenate([np.asarray(listing.rows["size"], dtype=np.uint64) for _, listing in listings])

        def name(item: int) -> str:
            for _, listing in listings:
                if item < len(listing):
                    return next(listing.entries(item, item + 1)).path
                item -= len(listing)
            raise IndexError(item)

        return cls(keys, sizes, name)


def _modified_items(found: _Items, listed: _Items) -> NDArray[np.bool_]:
    """Return bool [found items]: True for each item that was listed with a different size or digest."""
    differ = np.zeros(len(found.keys), dtype=bool)
    _, in_found, in_listed = np.intersect1d(found.keys, listed.keys, return_indices=True)
    differ[in_found] = found.marks[in_found] != listed.marks[in_listed]
    return differ


def _may_have_changed(work: WorkFolder, plan: ConversionPlan) -> bool:
    """Return whether a listed folder or archive, or a parent folder of one, may have changed since the listing.

    This includes a change in the same second in which the listing started, because times are in whole seconds.
    """
    if plan.layout == "parquet":  # the listing has only the unpacked files, and Parquet files are fast to compare
        return True
    scan_start = int(work.scan_time())
    times = [(Path(os.fsdecode(unquote_to_bytes(path))), mtime) for path, mtime in plan.folders.items()]
    for split in plan.shards:
        times += [(one.path, one.mtime) for one in work.load_listing(split)[0].containers[:_MAX_COMPARED]]
    for path, mtime in times:
        try:
            now = int(path.stat().st_mtime)
        except FileNotFoundError:
            return True
        if now != mtime or now >= scan_start:
            return True
    return False


def folder_times(listings: Mapping[str, Listing], source: Path, out: Path) -> dict[str, int]:
    """Return the modification times of the parent folders of all listed folders and archives, in seconds since 1970.

    The parent folder of the set is excluded, because creating the set changes it. Paths are percent-encoded, because
    they may not be valid UTF-8.
    """
    parents = {parent for one in listings.values() for container in one.containers for parent in container.path.parents}
    inside = sorted(parent for parent in parents if parent == source or source in parent.parents)
    return {quote_from_bytes(os.fsencode(one)): int(one.stat().st_mtime) for one in inside if one != out.parent}


def _identity_now(source: Path, layout: Layout) -> Identity | UserError:
    """Return the current identity of the source, or the reason why it cannot be read with this layout."""
    try:
        return current_identity(source.absolute(), layout)
    except UserError as error:
        if error.exit_code != UserError.exit_code:  # the storage failed; the source may be valid
            raise
        return error
