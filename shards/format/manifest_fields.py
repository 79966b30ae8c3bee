"""The fields of `dataset.json`: classes, splits and their files, and how the set was created."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import FailFast, Field, StringConstraints
from typing_extensions import TypedDict

from shards.schema import Count, Digest, FileName, Finite

MAX_CLASSES = 1_000_000
"""Maximum number of classes of a set. Larger labels are rejected as damaged before memory is allocated for them."""
MAX_SAMPLES = 1 << 32
"""Maximum number of samples of a split."""


Text = Annotated[str, StringConstraints(max_length=4096)]
Positive = Annotated[int, Field(ge=1, le=1 << 53)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class ClassEntry:
    """One class. Its label is its position in the manifest's list."""

    folder: Text
    """Folder name or synset id in the source."""
    name: Text | None = None
    """Human-readable name, if the source has one."""

    @property
    def title(self) -> str:
        """Return the human-readable name, or the folder name."""
        return self.name or self.folder


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of a split."""

    name: FileName
    samples: Samples
    bytes: Positive
    """Size of the file in bytes."""
    hash: Digest
    """xxh3-64 of the file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class BetonEntry:
    """The .beton (FFCV) file of a split."""

    name: FileName
    bytes: Positive
    """Size of the file in bytes."""
    mode: Literal["jpg", "raw", "smart"]
    """jpg: JPEGs. raw: pixels. smart: pixels if they need at most `smart_ratio` times the bytes of the JPEG."""
    smart_ratio: Annotated[Finite, Field(ge=1)]
    segments: Annotated[tuple[Digest, ...], FailFast()]
    """xxh3-64 of each segment (one shard's part of the file), 16 hex digits."""
    index: FileName
    """File name of the index with the offsets, sizes and hashes of the stored JPEGs or pixels. The same as the split's
    index if the set has no tars."""
    index_hash: Digest
    """xxh3-64 of the index file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split: its shards, in the order of the samples, and its index."""

    samples: Samples
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1), FailFast()]
    """If the set has no tars, the file name of every shard is that of the .beton, of which the shard is a segment. The
    offsets, sizes and hashes in the index then refer to the .beton."""
    index: FileName
    """File name of the index, in the folder of the manifest."""
    index_hash: Digest
    """xxh3-64 of the index file, 16 hex digits."""
    pixels: bool = False
    """Whether the images in the tars are pixels (KEY.ppm) instead of JPEGs (KEY.jpg)."""
    beton: BetonEntry | None = None
    """FFCV file with the same samples in the same order, if one was written."""

    @property
    def tars(self) -> bool:
        """Whether the split's shards are tars."""
        return self.beton is None or self.shards[0].name != self.beton.name

    @property
    def files(self) -> dict[str, int]:
        """Return name -> size in bytes of all data files."""
        files = {shard.name: shard.bytes for shard in self.shards}
        return files | ({self.beton.name: self.beton.bytes} if self.beton else {})


class ImageCounts(TypedDict, total=False):
    """Re-encoded and rejected images of a split: reason -> number of images."""

    repaired: Annotated[dict[Text, Count], FailFast()]
    rejected: Annotated[dict[Text, Count], FailFast()]


class UnusedRecord(TypedDict):
    """Number of unused files, folders or samples with the same kind and reason (`shards.sources.unused`)."""

    reason: Text
    kind: Text
    count: Count
    example: Text


class Provenance(TypedDict, total=False):
    """How a set was created."""

    tool: Text
    """Name and version of the program."""
    source: Text
    """Source layout."""
    source_digest: Digest
    """Digest that identifies the source and its content (`shards.sources.identity`)."""
    shuffled: bool
    """Whether the samples were globally shuffled by this project; False for tars that were indexed in place."""
    class_run: Annotated[dict[FileName, Annotated[Finite, Field(ge=0)]], FailFast()]
    """Split -> mean number of consecutive samples with the same label, if this project did not shuffle the samples."""
    options: Annotated[dict[Text, Scalar | dict[Text, Scalar]], FailFast()]
    """Options that affect the bytes of the set."""
    filter: Text
    """Antialiasing filter with which images were shrunk."""
    libraries: Annotated[dict[Text, Text], FailFast()]
    """Libraries that decoded, shrunk and encoded the images -> their versions."""
    images: Annotated[dict[FileName, ImageCounts], FailFast()]
    """Split -> numbers of re-encoded and rejected images."""
    unused: Annotated[list[UnusedRecord], FailFast()]
    """Files of the source that are not in the set."""
    notes: Annotated[list[Text], FailFast()]
    """Notes about the source that were printed."""
    warnings: Annotated[list[Text], FailFast()]
    """Warnings about likely mistakes in the source."""
    rejects_hash: Digest | None
    """xxh3-64 of rejects.jsonl; None if no image was rejected."""
