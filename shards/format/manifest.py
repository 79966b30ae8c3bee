"""`dataset.json`: what a shard set contains and how it was made.

Written last, so a folder without a manifest is not (yet) a shard set. It holds no time, host, worker or part count: the
same input and options give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import FailFast, Field, TypeAdapter

from shards.errors import ShardSetError
from shards.files.durable import durable_write
from shards.files.regular import open_file
from shards.files.retry import read_with_retries
from shards.format.manifest_fields import MAX_CLASSES, ClassEntry, Provenance, SplitEntry
from shards.schema import Digest, FileName, parse_json

FORMAT = "fat-pipeline shard set"
VERSION = 2
MANIFEST_NAME = "dataset.json"
REJECTS_NAME = "rejects.jsonl"
MAX_MANIFEST_BYTES = 64 << 20
"""Size of dataset.json; nothing larger is downloaded or parsed."""
MAX_VALUES = 4_000_000
"""Values in dataset.json, which bounds the memory of parsing it to some hundred MB."""
MAX_KEYS = 10_000
"""Keys of one object in dataset.json."""
_REMEDY = "copy it again, or shard the source again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed `dataset.json`."""

    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, max_length=MAX_CLASSES), FailFast()]
    splits: Annotated[dict[FileName, SplitEntry], Field(min_length=1), FailFast()]
    made: Provenance = field(default_factory=Provenance)
    version: Literal[2] = 2

    @property
    def shuffled(self) -> bool:
        """Whether the order of the samples is our global shuffle; not so where existing tars were indexed."""
        return self.made.get("shuffled", True)

    def dumps(self) -> str:
        """Return the file's text, with a hash of all the rest of it."""
        content = {"format": FORMAT, **asdict(self)}
        content["hash"] = content_hash(content)
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Publish atomically and durably.

        Raises:
            ShardSetError: it breaks a rule of the format, so that nobody could load it. Nothing is written.
        """
        path = folder / MANIFEST_NAME
        checked = Manifest.parse(self.dumps().encode("utf-8", "surrogatepass"), path)
        durable_write(path, checked.dumps().encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and parse FOLDER/dataset.json. Raises what `read` and `parse` raise."""
        return cls.parse(cls.read(folder), folder / MANIFEST_NAME)

    @staticmethod
    def read(folder: Path) -> bytes:
        """Read FOLDER/dataset.json, or so much of it that `parse` finds it too large.

        Raises:
            ShardSetError: no such folder or manifest.
            StorageFailed: it cannot be read.
        """
        path = folder / MANIFEST_NAME

        def read() -> bytes | None:
            try:
                with open_file(path) as file:
                    return file.read(MAX_MANIFEST_BYTES + 1)
            except FileNotFoundError:
                return None

        content = read_with_retries(path, read)
        if content is not None:
            return content
        if not folder.exists():
            raise ShardSetError(f"{folder}: no such shard set; make one with 'pipeline shard SOURCE --out {folder}'")
        raise ShardSetError(
            f"{folder}: no {MANIFEST_NAME}, so this is no finished shard set; "
            f"run (or resume) 'pipeline shard SOURCE --out {folder}'"
        )

    @classmethod
    def parse(cls, content: bytes, source: Path | str) -> Manifest:
        """Parse and check a manifest, wherever its bytes come from.

        Args:
            content: of dataset.json; read no more than `MAX_MANIFEST_BYTES` + 1 of it.
            source: file or URL, for messages.

        Raises:
            ShardSetError: of another format or version, damaged, altered, or it contradicts itself.
        """
        try:
            raw = _load(content)
        except (ValueError, RecursionError) as error:
            raise ShardSetError(f"{source}: unreadable manifest ({error}); {_REMEDY}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardSetError(f"{source}: not a '{FORMAT}' manifest; point to the output of 'pipeline shard'")
        if raw.get("version") != VERSION:
            raise ShardSetError(
                f"{source}: manifest version {_short(raw.get('version'))}, this tool reads version {VERSION}; "
                "use the tool version that made it, or shard the source again"
            )
        try:
            document = parse_json(content, _DOCUMENT, limit=MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise ShardSetError(f"{source}: damaged manifest: {error}; {_REMEDY}") from None
        manifest = cls(**{each.name: getattr(document, each.name) for each in fields(cls)})
        found = content_hash(raw)
        if found != document.hash:
            raise ShardSetError(
                f"{source}: altered since it was written: hash {document.hash} expected, {found} found; {_REMEDY}"
            )
        if contradiction := _contradiction(manifest):
            raise ShardSetError(f"{source}: damaged manifest: {contradiction}; {_REMEDY}")
        return manifest


@dataclass(frozen=True, kw_only=True)
class _Document(Manifest):
    """All that dataset.json holds."""

    format: Literal["fat-pipeline shard set"]
    hash: Digest


_DOCUMENT = TypeAdapter(_Document)


def _load(content: bytes) -> Any:
    """Parse JSON, with limits that keep its memory, and that of the errors which a schema finds in it, small.

    Raises:
        ValueError, RecursionError: not JSON, beyond a limit, or an object that names a key twice.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"more than the {MAX_MANIFEST_BYTES:,} bytes that it may have")
    # Every value but the first of a list or an object has a comma before it.
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
        raise ValueError(f"more than the {MAX_VALUES:,} values that it may have")

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(pairs) > MAX_KEYS:
            raise ValueError(f"an object of more than {MAX_KEYS:,} keys")
        if len(result) < len(pairs):
            raise ValueError("an object that names a key twice")
        return result

    return json.loads(content.decode("utf-8"), object_pairs_hook=as_dict)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:20]}..."


def _contradiction(manifest: Manifest) -> str | None:
    """Return the first rule between fields that a manifest breaks; None where it breaks none."""
    names = {MANIFEST_NAME, REJECTS_NAME}
    for split, entry in manifest.splits.items():
        beton = entry.beton
        total = sum(shard.samples for shard in entry.shards)
        if total != entry.samples:
            return f"split '{split}' has {entry.samples:,} samples, its shards have {total:,} together"
        files = [entry.index]
        if beton is not None:
            files.append(beton.name)
            if len(beton.segments) != len(entry.shards):
                return f"split '{split}' has {len(entry.shards):,} shards, its .beton {len(beton.segments):,} segments"
            if entry.tars:
                files.append(beton.index)
            elif (beton.index, beton.index_hash) != (entry.index, entry.index_hash):
                return (
                    f"split '{split}': its .beton has the index '{beton.index}', the split has another, '{entry.index}'"
                )
            elif any(
                (shard.name, shard.bytes, shard.hash) != (beton.name, beton.bytes, segment)
                for shard, segment in zip(entry.shards, beton.segments, strict=True)
            ):
                return f"split '{split}': a shard is not a segment of '{beton.name}'"
        if entry.tars:
            files += [shard.name for shard in entry.shards]
        for file in files:
            if file in names:
                return f"'{file}' is named twice"
            names.add(file)
    return None


def tool_version() -> str:
    """Name and version, for the manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fat-pipeline {version('fat-pipeline')}"
    except PackageNotFoundError:  # run from a checkout
        return "fat-pipeline"


def content_hash(document: dict[str, Any]) -> str:
    """Hash a manifest's content but its "hash", independent of white space and of the order of keys.

    Returns:
        xxh3-64, 16 hex digits.
    """
    content = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))
