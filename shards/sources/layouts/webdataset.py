"""Layout webdataset: existing WebDataset tars with KEY.jpg (or another image format) and KEY.cls."""

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
    """Return the sorted tars below a folder, or `source` if it is a file."""
    return files_below(source, ".tar")


def split_of(path: Path, root: Path) -> str:
    """Return the split in a tar's path relative to the source; 'train' if there is none."""
    return named_split(relative_to_source(path, root)) or TRAIN


def compressed_tars(source: Path) -> list[Path]:
    """Return the sorted files below a folder with the suffix of a compressed tar, or `source` if it is a file."""
    return files_below(source, *COMPRESSED_SUFFIXES)


def scan_webdataset(source: Path, classes: Path | None = None) -> Scan:
    """List the samples of all tars.

    Args:
        classes: file that names the classes; see `number_classes`.

    Raises:
        UserError: there are no tars; a tar is compressed, damaged, or without samples; or `number_classes` rejects the
            labels.
    """
    found = list_samples(source)
    numbered = number_classes(
        [found.labels],
        sum(map(len, found.splits.values())),
        known=_manifest_classes(source, largest_label([found.labels])[0]),
        classes=classes,
    )
    digest = digest_of_samples(found.splits)
    for listing in found.splits.values():
        listing.rows["label"] = numbered.labels[0][listing.rows["label"]]
    return Scan("webdataset", numbered.classes, found.splits, found.unused, found.notes, found.warnings, digest=digest)


@dataclass(frozen=True)
class ListedSamples:
    """The samples of all tars; their labels are results of `LabelReader.read`, not yet class numbers."""

    splits: dict[str, Listing]
    labels: FileLabels
    unused: tuple[UnusedEntry, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def list_samples(source: Path) -> ListedSamples:
    """List the samples of all tars; raise UserError for unusable tars as `scan_webdataset` does."""
    tars = tar_files(source)
    unused = UnusedFiles()
    for tar in [] if source.is_file() else compressed_tars(source):
        if not {tar.with_suffix(""), tar.with_suffix(".tar")} & set(tars):
            members(tar)  # raises an error if the tar is compressed
            raise UserError(f"{tar}: not compressed despite its name; rename it so that it ends with .tar")
        unused.add("compressed copy of a tar", tar.name)
    if not tars:
        raise UserError(f"{source}: no tars found")
    named = assign_splits(tars, source)
    archives = {*tars, *compressed_tars(source)}
    warnings = count_non_archive_files(source, archives, "webdataset", set(named.splits.values()), unused)
    builders: dict[str, ListingBuilder] = {}
    labels = LabelReader()
    parts = []
    for tar in tars:
        container = Container.of(tar)
        split = named.splits[tar]
        samples, unused_members = read_tar(tar, labels, split)
        parts.append(unused_members)
        if samples:
            # Use the relative path, because tars in different folders may have the same name.
            stem = relative_to_source(tar, source)[: -len(tar.suffix)]
            builders.setdefault(split, ListingBuilder()).add_ranges(
                container, [_row(stem, one, labels) for one in samples]
            )
    splits = {split: builder.build() for split, builder in builders.items()}
    if not splits:
        raise UserError(f"{source}: its tars contain no images with labels")
    all_unused = merge([unused.entries(), *parts])
    return ListedSamples(
        splits,
        labels.found(),
        all_unused,
        named.all_notes(builders),
        (*named.warnings, *warnings, *incomplete_sample_warnings(all_unused)),
    )


def incomplete_sample_warnings(unused: Iterable[UnusedEntry]) -> tuple[str, ...]:
    """Return warnings about images without labels and labels without images."""
    return tuple(
        f"{entry.count:,} {entry.kind}: {entry.reason} (such as {entry.example}), not used"
        for entry in unused
        if entry.reason in (NO_LABEL, NO_IMAGE)
    )


def _manifest_classes(source: Path, top: int) -> tuple[ClassEntry, ...]:
    """Return the classes of the manifest if the source is a shard set; an empty tuple for other tars.

    Args:
        top: largest class number in the tars.
    """
    if not (source / MANIFEST_NAME).is_file():
        return ()
    classes = Manifest.load(source).classes
    if top >= len(classes):
        raise UserError(
            f"{source / MANIFEST_NAME}: has {len(classes):,} classes, but label {top:,} occurs in the tars, so they do "
            "not belong to this shard set; move the file away to use the class numbers of the tars"
        )
    return classes


def _row(stem: str, sample: TarSample, labels: LabelReader) -> tuple[bytes, int, int, int]:
    name = f"{labels.folder(sample.label)}/{stem}/{sample.image.name}"
    return name.encode("utf-8", "surrogateescape"), sample.image.offset, sample.image.size, sample.label
