"""`dataset.json`: what a shard set contains and how it was made.

Written last, so a folder without a manifest is not (yet) a shard set. It holds no time, host, worker or part count: the
same input and options give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from shards.durable import durable_write
from shards.errors import ShardSetError

FORMAT = "fat-pipeline shard set"
VERSION = 1
MANIFEST_NAME = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class ClassEntry:
    """One class; its label is its place in the manifest's list."""

    folder: str
    """Folder name or synset id in the source."""
    name: str | None = None
    """Human-readable name where the source knows one."""

    @property
    def title(self) -> str:
        return self.name or self.folder


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of a split."""

    name: str
    samples: int
    bytes: int
    """Size of the file."""
    hash: str
    """xxh3-64 of the file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class BetonEntry:
    """The split as one FFCV file."""

    name: str
    bytes: int
    """Size of the file."""
    mode: Literal["jpg", "raw", "smart"]
    """What it stores: JPEGs, pixels, or pixels where they take at most `smart_ratio` times the JPEG's bytes."""
    smart_ratio: float
    segments: tuple[str, ...]
    """xxh3-64 of each shard's part of the file, 16 hex digits."""


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split: its shards in sample order, and its index."""

    samples: int
    shards: tuple[ShardEntry, ...]
    """Where there are no tars, each names the .beton, in which the shard is a run of bytes; the index's offsets, sizes
    and hashes are then those of what the .beton stores."""
    index: str
    """File name of the index beside the manifest."""
    index_hash: str
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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed `dataset.json`."""

    classes: tuple[ClassEntry, ...]
    splits: dict[str, SplitEntry]
    made: dict[str, Any] = field(default_factory=dict)
    """Tool version, seed, options that change bytes, counts of repaired, rejected and ignored files."""
    version: int = VERSION

    @property
    def shuffled(self) -> bool:
        """Whether the order of the samples is our global shuffle; not so where existing tars were indexed."""
        return bool(self.made.get("shuffled", True))

    def dumps(self) -> str:
        """The file's text, with a hash of all the rest of it, by which `pipeline verify` notices alterations."""
        content = {"format": FORMAT, **asdict(self)}
        return _dumps(content | {"hash": xxhash.xxh3_64_hexdigest(_dumps(content).encode())})

    def save(self, folder: Path) -> None:
        """Publish atomically and durably."""
        durable_write(folder / MANIFEST_NAME, self.dumps().encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read FOLDER/dataset.json.

        Raises:
            ShardSetError: no such folder or manifest, unreadable, or of another format or version.
        """
        path = folder / MANIFEST_NAME
        if not folder.exists():
            raise ShardSetError(f"{folder}: no such shard set; make one with 'pipeline shard SOURCE --out {folder}'")
        if not path.is_file():
            raise ShardSetError(
                f"{folder}: no {MANIFEST_NAME}, so this is no finished shard set; "
                f"run (or resume) 'pipeline shard SOURCE --out {folder}'"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ShardSetError(f"{path}: unreadable manifest ({error}); shard the source again") from error
        return cls._parse(raw, path)

    @classmethod
    def _parse(cls, raw: Any, path: Path) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardSetError(f"{path}: not a '{FORMAT}' manifest; point to the output of 'pipeline shard'")
        if raw.get("version") != VERSION:
            raise ShardSetError(
                f"{path}: manifest version {raw.get('version')}, this tool reads version {VERSION}; "
                "use the tool version that made it, or shard the source again"
            )
        try:
            return cls(
                classes=tuple(ClassEntry(**entry) for entry in raw["classes"]),
                splits={
                    name: SplitEntry(
                        samples=int(split["samples"]),
                        shards=tuple(ShardEntry(**shard) for shard in split["shards"]),
                        index=split["index"],
                        index_hash=split["index_hash"],
                        beton=_parse_beton(split.get("beton")),
                    )
                    for name, split in raw["splits"].items()
                },
                made=raw["made"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardSetError(f"{path}: damaged manifest ({error!r}); shard the source again") from error


def _parse_beton(raw: dict[str, Any] | None) -> BetonEntry | None:
    return BetonEntry(**raw | {"segments": tuple(raw["segments"])}) if raw else None


def tool() -> str:
    """Name and version, for the manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fat-pipeline {version('fat-pipeline')}"
    except PackageNotFoundError:  # run from a checkout
        return "fat-pipeline"


def _dumps(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
