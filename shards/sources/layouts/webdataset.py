"""Existing WebDataset tars: KEY.jpg (or another image) and KEY.cls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.format.manifest import MANIFEST_NAME, Manifest
from shards.format.manifest_fields import ClassEntry
from shards.sources.identity import digest_of_samples
from shards.sources.layouts.members import COMPRESSED_SUFFIXES, members
from shards.sources.layouts.tar_samples import NO_IMAGE, NO_LABEL, TarSample, read_tar
from shards.sources.listing import Container, Listing, ListingBuilder
from shards.sources.naming.labels import FileLabels, LabelReader, largest_label, number_classes
from shards.sources.naming.non_archive_files import count_non_archive_files
from shards.sources.naming.splits import assign_splits, named_split, relative_to_source
from shards.sources.scan import TRAIN, Scan
from shards.sources.unused import UnusedEntry, UnusedFiles, merge
from shards.sources.walk import files_below


def tar_files(source: Path) -> list[Path]:
    """The tars below a folder, by name; the file itself where `source` is one."""
    return files_below(source, ".tar")


def split_of(path: Path, root: Path) -> str:
    """The split that a tar's path below the source names, else 'train'."""
    return named_split(relative_to_source(path, root)) or TRAIN


def compressed_tars(source: Path) -> list[Path]:
    """Return the tars, where `tar_files` looks, whose names say that they are compressed."""
    return files_below(source, *COMPRESSED_SUFFIXES)


def scan_webdataset(source: Path, classes: Path | None = None) -> Scan:
    """List the samples of all tars.

    Args:
        classes: file that names the classes, as `number_classes` takes it.

    Raises:
        UserError: no tars, a compressed or damaged one, no samples in one, or labels that `number_classes` refuses.
    """
    found = list_samples(source)
    numbered = number_classes(
        [found.labels],
        sum(map(len, found.splits.values())),
        known=_known(source, largest_label([found.labels])[0]),
        classes=classes,
    )
    digest = digest_of_samples(found.splits)
    for listing in found.splits.values():
        listing.rows["label"] = numbered.labels[0][listing.rows["label"]]
    return Scan("webdataset", numbered.classes, found.splits, found.unused, found.notes, found.warnings, digest=digest)


@dataclass(frozen=True)
class Listed:
    """The samples of all tars, before their labels are those of classes."""

    splits: dict[str, Listing]
    labels: FileLabels
    unused: tuple[UnusedEntry, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def list_samples(source: Path) -> Listed:
    """List the samples of all tars; raises what `scan_webdataset` raises of tars."""
    tars = tar_files(source)
    unused = UnusedFiles()
    for tar in [] if source.is_file() else compressed_tars(source):
        if not {tar.with_suffix(""), tar.with_suffix(".tar")} & set(tars):
            members(tar)  # raises, as it is compressed
            raise UserError(f"{tar}: a tar that is not compressed, whatever its name says; rename it to end with .tar")
        unused.add("compressed copy of a tar", tar.name)
    if not tars:
        raise UserError(f"{source}: no tars in it")
    named = assign_splits(tars, source)
    beside = count_non_archive_files(source, {*tars, *compressed_tars(source)}, "webdataset", set(named.splits.values()), unused)
    builders: dict[str, ListingBuilder] = {}
    labels = LabelReader()
    parts = []
    for tar in tars:
        container = Container.of(tar)
        split = named.splits[tar]
        samples, others = read_tar(tar, labels, split)
        parts.append(others)
        if samples:
            stem = relative_to_source(tar, source)[: -len(tar.suffix)]  # tars of one name may stand in several folders
            builders.setdefault(split, ListingBuilder()).add_ranges(
                container, [_row(stem, one, labels) for one in samples]
            )
    splits = {split: builder.build() for split, builder in builders.items()}
    if not splits:
        raise UserError(f"{source}: no images with labels in its tars")
    everything = merge([unused.entries(), *parts])
    return Listed(
        splits,
        labels.found(),
        everything,
        named.all_notes(builders),
        (*named.warnings, *beside, *incomplete_sample_warnings(everything)),
    )


def incomplete_sample_warnings(unused: Iterable[UnusedEntry]) -> tuple[str, ...]:
    """Return warnings about images without labels and labels without images."""
    return tuple(
        f"{entry.count:,} {entry.kind}: {entry.reason} (such as {entry.example}), not used"
        for entry in unused
        if entry.reason in (NO_LABEL, NO_IMAGE)
    )


def _known(source: Path, top: int) -> tuple[ClassEntry, ...]:
    """The classes of a set of ours; none of other tars.

    Args:
        top: largest class number in the tars.
    """
    if not (source / MANIFEST_NAME).is_file():
        return ()
    classes = Manifest.load(source).classes
    if top >= len(classes):
        raise UserError(
            f"{source / MANIFEST_NAME}: {len(classes):,} classes, but label {top:,} occurs in the tars: they are not "
            "of this set; move the file away to shard the tars by their own numbers"
        )
    return classes


def _row(stem: str, sample: TarSample, labels: LabelReader) -> tuple[bytes, int, int, int]:
    name = f"{labels.folder(sample.label)}/{stem}/{sample.image.name}"
    return name.encode("utf-8", "surrogateescape"), sample.image.offset, sample.image.size, sample.label
