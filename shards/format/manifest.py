"""The manifest `dataset.json`: the content of a shard set and how it was created.

It is written last, so a folder without a manifest is not a finished shard set. It contains no time, host name or number
of workers or parts: the same input and options give the same bytes.
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
"""Maximum size of dataset.json in bytes; nothing larger is downloaded or parsed."""
MAX_VALUES = 4_000_000
"""Maximum number of values in dataset.json, which limits the memory for parsing it to a few hundred MB."""
MAX_KEYS = 10_000
"""Maximum number of keys of one object in dataset.json."""
_REMEDY = "copy it again, or convert the source again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed `dataset.json`."""

    classes: Annotated[tuple[ClassEntry, ...], Field(min_length=1, max_length=MAX_CLASSES), FailFast()]
    splits: Annotated[dict[FileName, SplitEntry], Field(min_length=1), FailFast()]
    made: Provenance = field(default_factory=Provenance)
    version: Literal[2] = 2

    @property
    def shuffled(self) -> bool:
        """Whether the samples were globally shuffled by this project; False for tars that were indexed in place."""
        return self.made.get("shuffled", True)

    def dumps(self) -> str:
        """Return the text of the file, including a hash of its other content."""
        content = {"format": FORMAT, **asdict(self)}
        for split in content["splits"].values():
            if not split["pixels"]:  # omitted, so that programs that only know sets of JPEGs can read those
                del split["pixels"]
        content["hash"] = content_hash(content)
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write FOLDER/dataset.json atomically and durably.

        Raises:
            ShardSetError: the manifest is invalid, so reading it back would fail. Nothing is written.
        """
        path = folder / MANIFEST_NAME
        checked = Manifest.parse(self.dumps().encode("utf-8", "surrogatepass"), path)
        durable_write(path, checked.dumps().encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and parse FOLDER/dataset.json. Raises the errors of `read` and `parse`."""
        return cls.parse(cls.read(folder), folder / MANIFEST_NAME)

    @staticmethod
    def read(folder: Path) -> bytes:
        """Read at most `MAX_MANIFEST_BYTES` + 1 bytes of FOLDER/dataset.json, so that `parse` rejects a larger file.

        Raises:
            ShardSetError: the folder or the manifest does not exist.
            StorageFailed: the manifest cannot be read.
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
            raise ShardSetError(f"{folder}: no such shard set; create it with 'pipeline shard SOURCE --out {folder}'")
        raise ShardSetError(
            f"{folder}: contains no {MANIFEST_NAME}, so it is not a finished shard set; resume its conversion, or "
            "convert a folder of images with 'pipeline shard' and specify the set that it writes"
        )

    @classmethod
    def parse(cls, content: bytes, source: Path | str) -> Manifest:
        """Parse and check a manifest.

        Args:
            content: content of dataset.json, at most `MAX_MANIFEST_BYTES` + 1 bytes of it.
            source: file or URL, for messages.

        Raises:
            ShardSetError: the manifest has another format or version, or is damaged, modified or inconsistent.
        """
        try:
            raw = _load(content)
        except (ValueError, RecursionError) as error:
            raise ShardSetError(f"{source}: unreadable manifest ({error}); {_REMEDY}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardSetError(f"{source}: not a '{FORMAT}' manifest; specify a set from 'pipeline shard'")
        if raw.get("version") != VERSION:
            raise ShardSetError(
                f"{source}: manifest version {_short(raw.get('version'))}, but this tool reads version {VERSION}; "
                "use the tool version that wrote it, or convert the source again"
            )
        try:
            document = parse_json(content, _DOCUMENT, limit=MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise ShardSetError(f"{source}: damaged manifest: {error}; {_REMEDY}") from None
        manifest = cls(**{each.name: getattr(document, each.name) for each in fields(cls)})
        found = content_hash(raw)
        if found != document.hash:
            raise ShardSetError(
                f"{source}: modified since it was written: expected hash {document.hash}, found {found}; {_REMEDY}"
            )
        if inconsistency := _inconsistency(manifest):
            raise ShardSetError(f"{source}: damaged manifest: {inconsistency}; {_REMEDY}")
        return manifest


@dataclass(frozen=True, kw_only=True)
class _Document(Manifest):
    """Complete content of dataset.json."""

    format: Literal["fat-pipeline shard set"]
    hash: Digest


_DOCUMENT = TypeAdapter(_Document)


def _load(content: bytes) -> Any:
    """Parse JSON with limits that bound the memory of the result and of schema errors.

    Raises:
        ValueError, RecursionError: invalid JSON, a limit is exceeded, or an object has a duplicate key.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"more than the {MAX_MANIFEST_BYTES:,} bytes that are allowed")
    # Each list or object adds its first value, and each comma one more, so this is at least the number of values.
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
        raise ValueError(f"more than the {MAX_VALUES:,} values that are allowed")

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(pairs) > MAX_KEYS:
            raise ValueError(f"an object with more than {MAX_KEYS:,} keys")
        if len(result) < len(pairs):
            raise ValueError("an object with a duplicate key")
        return result

    return json.loads(content.decode("utf-8"), object_pairs_hook=as_dict)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:20]}..."


def _inconsistency(manifest: Manifest) -> str | None:
    """Return the first inconsistency between fields of a manifest; None if it is consistent."""
    names = {MANIFEST_NAME, REJECTS_NAME}
    for split, entry in manifest.splits.items():
        beton = entry.beton
        total = sum(shard.samples for shard in entry.shards)
        if total != entry.samples:
            return f"split '{split}' has {entry.samples:,} samples, but its shards have {total:,} in total"
        files = [entry.index]
        if beton is not None:
            files.append(beton.name)
            if len(beton.segments) != len(entry.shards):
                return f"split '{split}' has {len(entry.shards):,} shards, but {len(beton.segments):,} .beton segments"
            if entry.tars:
                files.append(beton.index)
            elif (beton.index, beton.index_hash) != (entry.index, entry.index_hash):
                return (
                    f"split '{split}': its .beton has the index '{beton.index}', but the split has '{entry.index}'"
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
                return f"'{file}' is listed twice"
            names.add(file)
    return None


def tool_version() -> str:
    """Return name and version of this project, for the manifest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fat-pipeline {version('fat-pipeline')}"
    except PackageNotFoundError:  # the project runs from a source checkout and is not installed
        return "fat-pipeline"


def content_hash(document: dict[str, Any]) -> str:
    """Hash a manifest except its field "hash", independently of white space and the order of keys.

    Returns:
        xxh3-64, 16 hex digits.
    """
    content = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))
