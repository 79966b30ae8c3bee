"""The parts of `dataset.json`: classes, splits and their files, and how the set was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import FailFast, Field, StringConstraints
from typing_extensions import TypedDict

from shards.schema import Count, Digest, FileName, Finite

MAX_CLASSES = 1_000_000
"""Classes of a set; larger labels are taken for damage, before anything is allocated for them."""
MAX_SAMPLES = 1 << 32
"""Samples of a split."""


Text = Annotated[str, StringConstraints(max_length=4096)]
Positive = Annotated[int, Field(ge=1, le=1 << 53)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class ClassEntry:
    """One class; its label is its place in the manifest's list."""

    folder: Text
    """Folder name or synset id in the source."""
    name: Text | None = None
    """Human-readable name where the source knows one."""

    @property
    def title(self) -> str:
        return self.name or self.folder


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of a split."""

    name: FileName
    samples: Samples
    bytes: Positive
    """Size of the file."""
    hash: Digest
    """xxh3-64 of the file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class BetonEntry:
    """The split as one FFCV file."""

    name: FileName
    bytes: Positive
    """Size of the file."""
    mode: Literal["jpg", "raw", "smart"]
    """What it stores: JPEGs, pixels, or pixels where they take at most `smart_ratio` times the JPEG's bytes."""
    smart_ratio: Annotated[Finite, Field(ge=1)]
    segments: Annotated[tuple[Digest, ...], FailFast()]
    """xxh3-64 of each shard's part of the file, 16 hex digits."""
    index: FileName
    """Index of what the file stores: offsets, sizes and hashes of its JPEGs or pixels. The split's own index where
    there are no tars."""
    index_hash: Digest
    """xxh3-64 of that index file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split: its shards in sample order, and its index."""

    samples: Samples
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1), FailFast()]
    """Where there are no tars, each names the .beton, in which the shard is a run of bytes; the index's offsets, sizes
    and hashes are then those of what the .beton stores."""
    index: FileName
    """File name of the index beside the manifest."""
    index_hash: Digest
    """xxh3-64 of the index file, 16 hex digits."""
    beton: BetonEntry | None = None
    """The same samples in the same order for FFCV, if asked for."""

    @property
    def tars(self) -> bool:
        """Whether the split's shards are tars."""
        return self.beton is None or self.shards[0].name != self.beton.name

    @property
    def files(self) -> dict[str, int]:
        """Name -> bytes of the data files."""
        files = {shard.name: shard.bytes for shard in self.shards}
        return files | ({self.beton.name: self.beton.bytes} if self.beton else {})


class ImageCounts(TypedDict, total=False):
    """What became of the images of a split: reason -> images."""

    repaired: Annotated[dict[Text, Count], FailFast()]
    rejected: Annotated[dict[Text, Count], FailFast()]


class UnusedRecord(TypedDict):
    """Files, folders or samples of one kind that were not used, for one reason (`shards.sources.unused`)."""

    reason: Text
    kind: Text
    count: Count
    example: Text


class Provenance(TypedDict, total=False):
    """How a set was made."""

    tool: Text
    """Name and version."""
    source: Text
    """Layout of the source."""
    source_digest: Digest
    """Tells the source from others, and from itself after it has changed (`shards.sources.identity`)."""
    shuffled: bool
    """Whether the order of the samples is our global shuffle; not so where existing tars were indexed."""
    class_run: Annotated[dict[FileName, Annotated[Finite, Field(ge=0)]], FailFast()]
    """Split -> mean length of the runs of one label, where the order is not our shuffle."""
    options: Annotated[dict[Text, Scalar | dict[Text, Scalar]], FailFast()]
    """Those that change bytes."""
    images: Annotated[dict[FileName, ImageCounts], FailFast()]
    """Split -> counts."""
    unused: Annotated[list[UnusedRecord], FailFast()]
    """What of the source the set does not use."""
    notes: Annotated[list[Text], FailFast()]
    """What was said of the source."""
    doubts: Annotated[list[Text], FailFast()]
    """What may well be a mistake in the source."""
    rejects_hash: Digest | None
    """xxh3-64 of the list of rejects; None when there is none."""
