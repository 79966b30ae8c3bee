"""Validation of untrusted data, redaction of credentials, and waiting."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shards.errors import ShardSetError, StorageFailed, storage_error
from shards.files import waiting
from shards.redact import redact
from shards.schema import Count, Digest, FileName, Finite, parse_json, plain_file_name


@dataclass(frozen=True)
class Entry:
    name: FileName
    hash: Digest
    samples: Count = 0
    ratio: Finite = 0.0


ENTRY = TypeAdapter(Entry)
HASH = "0123456789abcdef"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".bashrc", "/etc/passwd", "../x", "a/b", "a\\b", "a\nb", "a\0b", "x" * 256]
)
def test_file_names_that_could_leave_the_folder_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        plain_file_name(name)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.index.npy", "ünï 1.beton", "a..b"])
def test_plain_file_names_are_accepted(name: str) -> None:
    assert plain_file_name(name) == name


@pytest.mark.parametrize(
    ("document", "fact"),
    [
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"17", "object"),
        (b'{"name": "a"}', "hash"),
        (b'{"name": "../a", "hash": "%s"}' % HASH.encode(), "name: not a plain file name, found '../a'"),
        (b'{"name": "a", "hash": "xyz"}', "hash"),
        (b'{"name": "a", "hash": "%s", "samples": -1}' % HASH.encode(), "samples"),
        (b'{"name": "a", "hash": "%s", "samples": 1e400}' % HASH.encode(), "samples"),
        (b'{"name": "a", "hash": "%s", "samples": "1"}' % HASH.encode(), "samples"),
        (b'{"name": "a", "hash": "%s", "samples": true}' % HASH.encode(), "samples"),
        (b'{"name": "a", "hash": "%s", "ratio": NaN}' % HASH.encode(), "ratio"),
        (b'{"name": "a", "hash": "%s", "evil": 1}' % HASH.encode(), "evil"),
    ],
)
def test_invalid_documents_are_rejected_with_one_line(document: bytes, fact: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fact)) as caught:
        parse_json(document, ENTRY, limit=1 << 20)
    assert "\n" not in str(caught.value)


def test_a_document_above_the_size_limit_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="21 bytes, more than the 20"):
        parse_json(b" " * 21, ENTRY, limit=20)


def test_a_valid_document_is_accepted() -> None:
    assert parse_json(b'{"name": "a", "hash": "%s", "samples": 3}' % HASH.encode(), ENTRY, limit=99) == Entry(
        "a", HASH, 3
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/set: gone", "https://***@host/set: gone"),
        ("https://me:p@ss@host:8/set", "https://***@host:8/set"),
        ("hf://token@host/a and s3://k:s@b/c", "hf://***@host/a and s3://***@b/c"),
        ("https://host/a?X-Amz-Signature=abc&y=1", "https://host/a?***"),
        ("https://host/a@b", "https://host/a@b"),
        ("me@host: no URL", "me@host: no URL"),
        ("/data/set", "/data/set"),
    ],
)
def test_credentials_are_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


@given(st.text(alphabet="ab:/@?#& \n", max_size=40))
def test_redaction_is_idempotent(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (FileNotFoundError(2, "No such file or directory"), ShardSetError, 2),
        (PermissionError(13, "Permission denied"), StorageFailed, 1),
        (OSError(5, "Input/output error"), StorageFailed, 1),
        (OSError(116, "Stale file handle"), StorageFailed, 1),
    ],
)
def test_failing_storage_is_distinguished_from_invalid_input(error: OSError, kind: type, status: int) -> None:
    judged = storage_error("/data/a.tar", error)
    assert type(judged) is kind
    assert judged.exit_code == status
    assert str(judged).startswith("/data/a.tar: ")


def test_a_long_wait_is_logged_and_times_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    wait = waiting.Wait("/cache/.lock: held by process 7", limit=100, remedy="end that process")
    with caplog.at_level(logging.WARNING):
        while clock[0] <= 100:
            wait.pause(1.0)
    with pytest.raises(StorageFailed, match=r"held by process 7: timed out after 101 s"):
        wait.pause(1.0)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "/cache/.lock: held by process 7: still waiting after 10 s",
        "/cache/.lock: held by process 7: still waiting after 70 s",
    ]
