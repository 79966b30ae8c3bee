"""A manifest is validated before it is used: types, ranges, names, sums and its own hash."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from rich.console import Console

from pipeline.storage.cache import record as cache_record
from pipeline.storage.cache.folder import LOCK, MARKER
from pipeline.storage.remote.shard_set import open_set
from shards.commands.info import describe
from shards.errors import ShardSetError
from shards.format.dataset import ShardSet
from shards.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, content_hash
from shards.format.manifest_fields import MAX_CLASSES, BetonEntry, ClassEntry, ShardEntry, SplitEntry
from tests.support.serving import serve

Edit = Callable[[dict[str, Any]], object]
A, B, C = "0123456789abcdef", "00000000000000ff", "fedcba9876543210"


def beton(**changed: Any) -> BetonEntry:
    fields = {"name": "train.beton", "bytes": 900, "mode": "raw", "smart_ratio": 4.0, "segments": (B, C)}
    return BetonEntry(**fields | {"index": "train.beton.index.npy", "index_hash": C} | changed)


TARS = SplitEntry(
    samples=5,
    shards=(
        ShardEntry(name="train-000000.tar", samples=3, bytes=3072, hash=A),
        ShardEntry(name="train-000001.tar", samples=2, bytes=2048, hash=B),
    ),
    index="train.index.npy",
    index_hash=A,
)
BOTH = SplitEntry(samples=5, shards=TARS.shards, index="train.index.npy", index_hash=A, beton=beton())
ALONE = SplitEntry(
    samples=5,
    shards=tuple(ShardEntry(name="train.beton", samples=n, bytes=900, hash=h) for n, h in ((3, B), (2, C))),
    index="train.index.npy",
    index_hash=A,
    beton=beton(index="train.index.npy", index_hash=A),
)
CLASSES = (ClassEntry(folder="n01440764", name="tench"), ClassEntry(folder="[red]x[/]\x1b[31m\n"))


def document(split: SplitEntry) -> dict[str, Any]:
    """Return the parsed dataset.json of a set with one split."""
    made: Any = {
        "tool": "test 1",
        "shuffled": False,
        "class_run": {"train": 1.5},
        "options": {"seed": 3, "beton": {"mode": "raw"}, "quality": None},
        "images": {"train": {"repaired": {"CMYK JPEG": 2}, "rejected": {}}},
        "unused": [{"reason": "not an image", "kind": ".txt", "count": 2, "example": "train/a/b.txt"}],
        "warnings": [],
        "rejects_hash": None,
    }
    return json.loads(Manifest(classes=CLASSES, splits={"train": split}, made=made).dumps())


KINDS = {"tars": TARS, "both": BOTH, "alone": ALONE}


def encoded(content: dict[str, Any], *, rehash: bool = True) -> bytes:
    """Encode a manifest; with `rehash`, with a valid hash like the author of a hostile set."""
    return json.dumps(content | ({"hash": content_hash(content)} if rehash else {})).encode()


def parse(content: bytes) -> Manifest:
    return Manifest.parse(content, "/set/dataset.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_manifest_is_loaded_unchanged(kind: str, tmp_path: Path) -> None:
    manifest = parse(encoded(document(KINDS[kind])))
    assert manifest.splits == {"train": KINDS[kind]}
    assert manifest.classes == CLASSES
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (tmp_path / MANIFEST_NAME).read_text() == manifest.dumps()


def train(edit: Callable[[Any], object]) -> Edit:
    return lambda content: edit(content["splits"]["train"])


def shard(**changed: Any) -> Edit:
    return lambda content: content["splits"]["train"]["shards"][1].update(changed)


def in_beton(**changed: Any) -> Edit:
    return lambda content: content["splits"]["train"]["beton"].update(changed)


@pytest.mark.parametrize(
    ("kind", "edit", "fact"),
    [
        ("tars", lambda c: c.update(format="another"), "not a 'fat-pipeline shard set' manifest"),
        ("tars", lambda c: c.update(version=99), "manifest version 99, but this tool reads version 2"),
        ("tars", lambda c: c.update(version="2"), "manifest version '2', but this tool reads version 2"),
        ("tars", lambda c: c.update(extra=1), "extra"),
        ("tars", lambda c: c.pop("classes"), "classes: "),
        ("tars", lambda c: c["classes"].clear(), "classes: "),
        ("tars", lambda c: c["classes"][0].update(folder=1), "classes.0.folder: "),
        ("tars", lambda c: c["classes"][0].update(name="x" * 5000), "classes.0.name: "),
        ("tars", lambda c: c["splits"].clear(), "splits: "),
        ("tars", lambda c: c["splits"].update({"../x": c["splits"].pop("train")}), "not a plain file name"),
        ("tars", lambda c: c["splits"].update(val=c["splits"]["train"]), "'train.index.npy' is listed twice"),
        ("tars", lambda c: c["made"].update(anything=1), "made.anything: "),
        ("tars", lambda c: c["made"].update(images=[]), "made.images: "),
        ("tars", lambda c: c["made"].update(shuffled="no"), "made.shuffled: "),
        ("tars", lambda c: c["made"].update(class_run={"train": -1.0}), "made.class_run.train: "),
        ("tars", lambda c: c["made"].update(options={"a": {"b": {"c": 1}}}), "made.options.a"),
        ("tars", lambda c: c["made"].update(rejects_hash="x"), "made.rejects_hash: "),
        ("tars", train(lambda s: s.update(samples=6)), "has 6 samples, but its shards have 5 in total"),
        ("tars", train(lambda s: s.update(samples=5.0)), "splits.train.samples: "),
        ("tars", train(lambda s: s["shards"].clear()), "splits.train.shards: "),
        ("tars", train(lambda s: s["shards"].pop()), "has 5 samples, but its shards have 3 in total"),
        (
            "tars",
            train(lambda s: s["shards"].append(s["shards"][0] | {"samples": 1})),
            "has 5 samples, but its shards have 6",
        ),
        ("tars", train(lambda s: s.update(index="../../home/.bashrc")), "splits.train.index: not a plain file name"),
        ("tars", train(lambda s: s.update(index="/etc/passwd")), "splits.train.index: not a plain file name"),
        ("tars", train(lambda s: s.update(index="dataset.json")), "'dataset.json' is listed twice"),
        ("tars", train(lambda s: s.update(index="rejects.jsonl")), "'rejects.jsonl' is listed twice"),
        ("tars", train(lambda s: s.update(index_hash=A.upper())), "splits.train.index_hash: "),
        ("tars", shard(samples=0), "splits.train.shards.1.samples: "),
        ("tars", shard(samples=-1), "splits.train.shards.1.samples: "),
        ("tars", shard(samples=True), "splits.train.shards.1.samples: "),
        ("tars", shard(samples=1 << 70), "splits.train.shards.1.samples: "),
        ("tars", shard(bytes=0), "splits.train.shards.1.bytes: "),
        ("tars", shard(bytes=1 << 60), "splits.train.shards.1.bytes: "),
        ("tars", shard(name="a/b.tar"), "splits.train.shards.1.name: "),
        ("tars", shard(name="train-000000.tar"), "'train-000000.tar' is listed twice"),
        ("tars", shard(name="train.index.npy"), "'train.index.npy' is listed twice"),
        ("tars", shard(hash=None), "splits.train.shards.1.hash: "),
        ("both", in_beton(name="train-000001.tar"), "'train-000001.tar' is listed twice"),
        ("both", in_beton(name="train-000000.tar"), "its .beton has the index 'train.beton.index.npy'"),
        ("both", in_beton(index="train.index.npy"), "'train.index.npy' is listed twice"),
        ("both", in_beton(index="../x"), "splits.train.beton.index: not a plain file name"),
        ("both", in_beton(mode="png"), "splits.train.beton.mode: "),
        ("both", in_beton(smart_ratio=0.5), "splits.train.beton.smart_ratio: "),
        ("both", in_beton(segments=[B]), "has 2 shards, but 1 .beton segments"),
        ("alone", in_beton(index_hash=C), "its .beton has the index 'train.index.npy', but the split has"),
        ("alone", in_beton(segments=[C, B]), "a shard is not a segment of 'train.beton'"),
        ("alone", shard(bytes=901), "a shard is not a segment of 'train.beton'"),
        ("alone", shard(name="other.beton"), "a shard is not a segment of 'train.beton'"),
    ],
)
def test_an_invalid_manifest_is_rejected_even_with_a_valid_hash(kind: str, edit: Edit, fact: str) -> None:
    content = document(KINDS[kind])
    edit(content)
    with pytest.raises(ShardSetError) as caught:
        parse(encoded(content))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("/set/dataset.json: ")
    assert fact in message


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "unreadable manifest"),
        (b"\xff\xfe{", "unreadable manifest"),
        (b"[" * 200_000, "unreadable manifest"),
        (b'{"a": ' * 200_000, "unreadable manifest"),
        (b"[]", "not a 'fat-pipeline shard set' manifest"),
        (b"1" * 10_000, "unreadable manifest"),
        (b'{"format": "fat-pipeline shard set", "version": ' + b"9" * 4000 + b"}", "manifest version 9999"),
        (b'{"format": "fat-pipeline shard set", "version": 2, "classes": [{"folder": "\\ud800"}]}', "hex escape"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "more than the 67,108,864 bytes"),
        (b"[" + b"[]," * 3_000_000 + b"[]]", "more than the 4,000,000 values"),
        (b'{"format": 1, "format": "fat-pipeline shard set"}', "duplicate key"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(10_001)) + b"}", "more than 10,000 keys"),
    ],
)
def test_hostile_documents_are_rejected_with_one_line(content: bytes, fact: str) -> None:
    with pytest.raises(ShardSetError, match=re.escape(fact)) as caught:
        parse(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


HEAD = b'{"format": "fat-pipeline shard set", "version": 2, "hash": "0123456789abcdef", '


@pytest.mark.parametrize(
    "content",
    [
        b'"classes": [' + b"0," * 200_000 + b"0]}",
        b'"classes": [{"folder": "a"}], "splits": {"t": {"shards": [' + b"{}," * 200_000 + b"{}]}}}",
        b'"classes": [{"folder": "a"}], "splits": {' + b",".join(b'"%d": {}' % i for i in range(9_000)) + b"}}",
        b'"made": {"options": {' + b",".join(b'"%d": []' % i for i in range(9_000)) + b"}}}",
    ],
)
def test_a_million_errors_are_reported_once(content: bytes) -> None:
    """Collecting all schema errors, at 1.3 kB each, would need gigabytes for a document of a few megabytes."""
    with pytest.raises(ShardSetError) as caught:
        parse(HEAD + content)
    more = re.search(r"and (\d+) more", str(caught.value))
    assert more is None or int(more[1]) < 10


def test_the_number_of_classes_is_limited() -> None:
    schema = TypeAdapter(Manifest).json_schema()
    assert schema["properties"]["classes"]["maxItems"] == MAX_CLASSES == 1_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def parsed(content: bytes) -> Manifest | None:
    """Return the manifest; None if it is rejected, which must be with one line."""
    try:
        return parse(content)
    except ShardSetError as error:
        if "\n" in str(error):
            raise
        return None


def locations(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in inner for path in [(*at, key), *locations(each, (*at, key))]]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_changed_field_is_rejected(data: st.DataObject, kind: str) -> None:
    """Always with the old hash; with an updated hash unless the new value is valid."""
    whole = document(KINDS[kind])
    content = copy.deepcopy(whole)
    *above, last = data.draw(st.sampled_from(locations(content)))
    parent = content
    for key in above:
        parent = parent[key]
    if data.draw(st.booleans(), label="remove"):
        del parent[last]
    else:
        parent[last] = data.draw(json_values)
    if content == whole and json.dumps(content) == json.dumps(whole):
        return
    assert parsed(encoded(content, rehash=False)) is None
    changed = parsed(encoded(content))
    # A valid value: the manifest can be loaded, and is saved unchanged.
    assert changed is None or parse(changed.dumps().encode()) == changed


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_rejected_or_harmless(data: st.DataObject) -> None:
    whole = parse(encoded(document(BOTH)))
    content = bytearray(whole.dumps().encode())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    assert parsed(bytes(content)) in (None, whole), "only white space may differ"


def test_an_invalid_manifest_is_not_written(tmp_path: Path) -> None:
    split = copy.copy(TARS)
    object.__setattr__(split, "index", "train\n.npy")
    with pytest.raises(ShardSetError, match=r"splits\.train\.index: not a plain file name"):
        Manifest(classes=CLASSES, splits={"train": split}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_the_maximum_size_of_a_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).touch()
    os.truncate(tmp_path / MANIFEST_NAME, 1 << 40)  # a sparse file
    with pytest.raises(ShardSetError, match=r"more than the 67,108,864 bytes"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_manifest_that_is_not_a_file_is_rejected_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / MANIFEST_NAME)
    with pytest.raises(ShardSetError, match=r"dataset\.json: a (fifo|folder), not a regular file"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("name", ["../../victim", "/etc/victim", "..", ".victim", "a/b"])
def test_a_remote_manifest_with_paths_writes_no_file(name: str, tmp_path: Path) -> None:
    """It is rejected when it is parsed: no file is requested, and none is written to the cache or elsewhere."""
    content = document(TARS)
    content["splits"]["train"]["index"] = name
    folder = tmp_path / "server" / "set"
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_bytes(encoded(content))
    (tmp_path / "cache").mkdir()
    with serve(folder) as site, pytest.raises(ShardSetError, match="not a plain file name"):
        open_set(site.url, cache=tmp_path / "cache")
    assert {asked for asked, _, _ in site.log} == {MANIFEST_NAME}
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {MANIFEST_NAME, MARKER, LOCK, cache_record.NAME}


def test_class_names_are_printed_literally(digits: Path, tmp_path: Path) -> None:
    """Brackets are not interpreted as rich markup, nor control characters as terminal commands."""
    content = json.loads((digits / MANIFEST_NAME).read_bytes())
    content["classes"][0] = {"folder": "[red]a[/red]", "name": "\x1b[31mb\n"}
    for path in digits.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).write_bytes(encoded(content))
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(describe(ShardSet(tmp_path)))
    (line,) = [line for line in capture.get().splitlines() if "[red]a[/red]" in line]
    assert "\\x1b[31mb\\n" in line
