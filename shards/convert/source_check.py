"""Whether a source is the one that a set was made from, or is being made from."""

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

_LOOKED_AT = 30_000  # folders and archives of a split; ImageNet-21k has 21,841, another source one for every image
_ARCHIVES = (b".tar", b".parquet")


def check_exists(source: Path) -> None:
    """Refuse a source that is not there.

    Raises:
        UserError: it is not.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; give the source that the set is to be made from")


def source_name(source: Path) -> str:
    """Return a source's place, links resolved, as it is kept in the work folder."""
    return display_name(os.fsencode(source.resolve()))


def check_finished(work: WorkFolder, manifest: Manifest, source: Path, layout: Layout | None = None) -> None:
    """Refuse to take a finished set for that of another source, or of one that has changed since. Lists the source.

    A source that was removed since is noted: the set needs it no more.

    Raises:
        UserError: the source is another.
        StorageFailed: it cannot be read.
    """
    out = work.out
    made = next((one for one in get_args(Layout) if one == manifest.made.get("source")), None)
    if made is None:
        raise UserError(f"{out}: is a set that 'pipeline shard' did not make; give another --out")
    if layout not in (None, made):
        raise UserError(
            f"{out}: is a set made from a source read as '{made}', not '{layout}'; leave out --from, or give another "
            "--out"
        )
    if not source.exists():
        if not was_converted_from(out, source_name(source)):
            raise UserError(
                f"{source}: no such file or folder, and not known as the source of the finished set {out}; give the "
                "source that it was made from, or another --out"
            )
        print_notes([f"{source}: not there any more, so the set was not compared with it"])
        return
    now = _identity_now(source, made)
    if isinstance(now, UserError) or now.digest != manifest.made.get("source_digest"):
        folders = [quoted(entry.folder) for entry in manifest.classes]
        raise UserError(
            f"{out}: is a set made from another source than {source}, or from what that held before it was changed "
            f"(the set has the classes {join_first(folders)}); give another --out, or remove {out} to make it anew"
        )


def check_same_source(out: Path, plan: ConversionPlan, source: Path, layout: Layout | None = None) -> None:
    """Refuse to resume from another place than that with which the conversion began.

    Raises:
        UserError: it is another.
    """
    if plan.source != source_name(source):
        raise UserError(f"{out}: was begun from {plan.source}, not from {source}; give that, or another --out")
    if layout not in (None, plan.layout):
        raise UserError(
            f"{out}: was begun from a source read as '{plan.layout}', not '{layout}'; leave out --from, "
            "or give another --out"
        )


def check_unchanged(
    work: WorkFolder, plan: ConversionPlan, source: Path, is_needed: Callable[[], bool], *, times_first: bool = False
) -> None:
    """Refuse to resume from a source that is not what it was when it was listed.

    Where all shards are made, what was removed from the source meanwhile is noted, as nothing is read from it any more.

    Args:
        is_needed: whether images are still to be read.
        times_first: list the source only where the times of its folders and archives differ: many parts of a conversion
            that list it at once would overload its server.

    Raises:
        UserError: images came, or have other sizes, labels or contents; or some are gone, and needed.
        StorageFailed: it cannot be read.
    """
    if times_first and source.exists() and not _look_changed(work, plan):
        return
    fact, only_gone = _difference(work, plan, source)
    if not fact:
        return
    if not only_gone or is_needed():
        raise UserError(
            f"{work.out}: was begun from {source}, which is not what it was then: {fact}; restore the source, or give "
            "another --out"
        )
    print_notes([f"{source}: {fact}; all shards were made before, so the set is complete without them"])


def _difference(work: WorkFolder, plan: ConversionPlan, source: Path) -> tuple[str, bool]:
    """Return how a source differs from what was listed, '' where it does not; and whether it only lacks something."""
    if not source.exists():
        return "it is not there any more", True
    now = _identity_now(source, plan.layout)
    if isinstance(now, UserError):
        return f"it cannot be read as it was ({now})", _holds_nothing_new(work, plan, source)
    if now.digest == plan.digest:
        return "", False
    if plan.layout == "parquet":
        what, was, found = "file", _Items.of_files(plan.source_files), _Items.of_files(now.files)
    else:
        split_off = bool(plan.options["val_fraction"])
        listed = {split: work.load_listing(split)[0] for split in plan.shards}
        what, was, found = "image", _Items.of_images(listed, split_off), _Items.of_images(now.splits, split_off)
    came, gone, other = ~np.isin(found.keys, was.keys), ~np.isin(was.keys, found.keys), _differ(found, was)
    mark = "size" if what == "image" else "content"
    facts = [
        f"{format_count(int(np.count_nonzero(which)), what)} {fact} "
        f"(such as {things.name(int(np.flatnonzero(which)[0]))})"
        for things, which, fact in (
            (found, came, "added"),
            (was, gone, "removed"),
            (found, other, f"with another {mark}"),
        )
        if which.any()
    ]
    if not facts:
        return "its labels, the order or names of its classes, or contents of images differ", False
    return ", ".join(facts), not came.any() and not other.any()


def _holds_nothing_new(work: WorkFolder, plan: ConversionPlan, source: Path) -> bool:
    """Whether all images or archives of a source that cannot be scanned any more were listed, with the same sizes.

    Of Parquet files that are left this is not known, as what was listed is what was unpacked.
    """
    images: dict[bytes, int] = {}
    archives: dict[bytes, tuple[int, int]] = {}
    for split in plan.shards if plan.layout != "parquet" else ():
        listing, _ = work.load_listing(split)
        for entry in listing.entries(0, len(listing)):
            place = os.fsencode(entry.container.path)
            if entry.offset is None:
                images[place + b"/" + entry.name.rpartition(b"/")[2]] = entry.size
            else:
                archives[place] = (entry.container.size, entry.container.mtime)
    for folder, _, names in os.walk(os.fsencode(source.absolute())):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.exists(path):  # a link that leads nowhere
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
    """Images or files of a source."""

    keys: NDArray[np.uint64]
    """Hash of the name of each."""
    marks: NDArray[np.uint64]
    """Size or digest of each."""
    name: Callable[[int], str]

    @classmethod
    def of_files(cls, files: Mapping[str, str]) -> _Items:
        names = list(files)
        keys = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in names], dtype=np.uint64)
        return cls(keys, np.array([int(mark, 16) for mark in files.values()], dtype=np.uint64), names.__getitem__)

    @classmethod
    def of_images(cls, splits: Mapping[str, Listing], split_off: bool) -> _Items:
        """Describe the images of all splits.

        Args:
            split_off: the validation split was taken from the training images, as the source has none.
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

        def name(place: int) -> str:
            for _, listing in listings:
                if place < len(listing):
                    return next(listing.entries(place, place + 1)).path
                place -= len(listing)
            raise IndexError(place)

        return cls(keys, sizes, name)


def _differ(found: _Items, was: _Items) -> NDArray[np.bool_]:
    """Which of the things found had another size or digest; bool [found]."""
    differ = np.zeros(len(found.keys), dtype=bool)
    _, here, there = np.intersect1d(found.keys, was.keys, return_indices=True)
    differ[here] = found.marks[here] != was.marks[there]
    return differ


def _look_changed(work: WorkFolder, plan: ConversionPlan) -> bool:
    """Whether a folder or an archive that was listed, or a folder above one, may have changed since.

    One whose time of last change is not before the listing counts too: within a second, times tell nothing.
    """
    if plan.layout == "parquet":  # the archives that were listed are what was unpacked; the files are few
        return True
    began = int(work.scan_time())
    places = [(Path(os.fsdecode(unquote_to_bytes(path))), mtime) for path, mtime in plan.folders.items()]
    for split in plan.shards:
        places += [(one.path, one.mtime) for one in work.load_listing(split)[0].containers[:_LOOKED_AT]]
    for path, mtime in places:
        try:
            now = int(path.stat().st_mtime)
        except FileNotFoundError:
            return True
        if now != mtime or now >= began:
            return True
    return False


def folder_times(listings: Mapping[str, Listing], source: Path, out: Path) -> dict[str, int]:
    """Return the times of last change of the folders above those of a listing, in seconds since 1970.

    The one that the set is written to is left out: making that changes it. The paths are percent-encoded, as they may
    not be UTF-8.
    """
    parents = {parent for one in listings.values() for container in one.containers for parent in container.path.parents}
    inside = sorted(parent for parent in parents if parent == source or source in parent.parents)
    return {quote_from_bytes(os.fsencode(one)): int(one.stat().st_mtime) for one in inside if one != out.parent}


def _identity_now(source: Path, layout: Layout) -> Identity | UserError:
    """Return what tells the source from others now, or why it cannot be read as of that layout."""
    try:
        return current_identity(source.absolute(), layout)
    except UserError as error:
        if error.exit_code != UserError.exit_code:  # the storage failed
            raise
        return error
