"""The record of a cache folder: the files that the cache has created and may count and remove.

A file of lines that only grows. A line is written and synced, under the folder's lock, before the file that it names
appears; so a process that is killed leaves a line without a file, which is harmless, and never a file without a line.
Each line begins with a hash of the folder's identity and of the rest of it: a line that was cut off or altered, or that
belongs to another folder, counts for nothing, and what it named is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import StringConstraints, TypeAdapter

from shards.files.private_folder import open_file, write_file
from shards.schema import Count, FileName, parse_json

NAME = ".record"
PART = ".part"
_SHOWN_OF_NAME = 40
_MAX_LINE = 4096
_HEAD = 36  # bytes of the first line
# Outdated lines, beyond one per file, at which the file is rewritten.
_MAX_STALE = 2000

State = Literal["part", "whole", "gone"]
Key = tuple[str, str]
"""Folder of the set, name of the file."""
_Token = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
_LINE = TypeAdapter(tuple[State, FileName, FileName, Count, _Token])


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    folder: str
    """Folder of the set, inside the cache."""
    name: str
    size: int
    """Bytes of the complete file."""
    token: str
    """Random part of the name of the incomplete file."""
    state: State
    """`part`: incomplete. `whole`: renamed, or about to be."""

    @property
    def key(self) -> Key:
        return self.folder, self.name

    @property
    def part(self) -> str:
        """Random name of the incomplete file."""
        return f"{self.name[:_SHOWN_OF_NAME]}.{self.token}{PART}"


def new_entry(folder: str, name: str, size: int) -> Entry:
    return Entry(folder, name, size, secrets.token_hex(8), "part")


class Record:
    """A folder's record as one process has read it. The caller of each method holds the folder's lock."""

    def __init__(self, folder: Path, *, remedy: str, shared: bool) -> None:
        self.path, self._remedy, self._shared = folder / NAME, remedy, shared
        self.entries: dict[Key, Entry] = {}
        self._head, self._identity, self._read, self._lines = b"", "", 0, 0
        self.damaged = 0
        """Lines that cannot be read."""

    @contextlib.contextmanager
    def opened(self, folder: int, identity: str) -> Iterator[None]:
        """Read what was added since the last time; entries may be put while the block runs.

        Args:
            folder: descriptor of the cache's folder.
            identity: of the cache.
        """
        self._handle = self._open(folder)
        try:
            found = os.fstat(self._handle)
            head = os.pread(self._handle, _HEAD, 0)
            if head != self._head or len(head) < _HEAD or found.st_size < self._read or identity != self._identity:
                self._head, self._identity = head, identity
                self.entries, self._read, self._lines, self.damaged = {}, 0, 0, 0
            if not found.st_size:
                self._append(_head_line(identity), durable=True)
            self._read_on(os.fstat(self._handle).st_size)
            if self._lines > len(self.entries) + _MAX_STALE:
                self._compact(folder)
            yield
        finally:
            os.close(self._handle)

    def put(self, entry: Entry, *, durable: bool = True) -> None:
        """Add a line.

        Raises:
            OSError: the disk is full, or failed; what the record says of the entry is as before.
        """
        self._append(_line(entry, self._identity), durable=durable)
        self._apply(entry)

    def _open(self, folder: int) -> int:
        flags = os.O_RDWR | os.O_CREAT
        return open_file(NAME, flags, folder=folder, path=self.path, remedy=self._remedy, shared=self._shared)

    def _read_on(self, size: int) -> None:
        content = os.pread(self._handle, size - self._read, self._read)
        *lines, _rest = content.split(b"\n")  # the rest is a line that was cut off; the next one follows on it
        for line in lines:
            self._read += len(line) + 1
            entry = _parse(line, self._identity)
            if isinstance(entry, Entry):
                self._apply(entry)
            elif entry == "damaged" and line:
                self.damaged += 1

    def _apply(self, entry: Entry) -> None:
        self._lines += 1
        if entry.state == "gone":
            self.entries.pop(entry.key, None)
        else:
            self.entries[entry.key] = entry

    def _append(self, line: bytes, *, durable: bool) -> None:
        end = os.fstat(self._handle).st_size
        torn = end > self._read
        try:
            self._write((b"\n" if torn else b"") + line, end)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, end)
            raise
        if durable:
            os.fsync(self._handle)
        self.damaged += torn
        self._read = os.fstat(self._handle).st_size

    def _write(self, content: bytes, at: int) -> None:
        while content:
            written = os.pwrite(self._handle, content, at)
            content, at = content[written:], at + written

    def _compact(self, folder: int) -> None:
        """Rewrite the record with the current entries; a process that is killed meanwhile leaves the old file."""
        lines = [_head_line(self._identity), *(_line(entry, self._identity) for entry in self.entries.values())]
        with contextlib.suppress(OSError):  # there is another time
            write_file(NAME, b"".join(lines), folder=folder, path=self.path, remedy=self._remedy, shared=self._shared)
            os.close(self._handle)
            self._handle = self._open(folder)
            self._head, self._read, self._lines = lines[0], os.fstat(self._handle).st_size, len(self.entries)


def _head_line(identity: str) -> bytes:
    """Return a random first line, which distinguishes a rewritten file from the old one."""
    content = json.dumps(secrets.token_hex(8)).encode()
    return _hash(content, identity) + b" " + content + b"\n"


def _line(entry: Entry, identity: str) -> bytes:
    content = json.dumps([entry.state, entry.folder, entry.name, entry.size, entry.token]).encode()
    return _hash(content, identity) + b" " + content + b"\n"


def _parse(line: bytes, identity: str) -> Entry | Literal["other", "damaged"]:
    """What a line says; `other`: the first line."""
    digest, _, content = line.partition(b" ")
    if digest != _hash(content, identity):
        return "damaged"
    try:
        state, folder, name, size, token = parse_json(content, _LINE, limit=_MAX_LINE)
    except ValueError:
        return "other"
    return Entry(folder, name, size, token, state)


def _hash(content: bytes, identity: str) -> bytes:
    return xxhash.xxh3_64_hexdigest(identity.encode() + content).encode()
