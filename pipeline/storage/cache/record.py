"""The record of a cache folder: the files that the cache has created and may therefore count and remove.

The record is an append-only text file. A line is written and synced, under the folder's lock, before the file that it
names is created. A process that is killed can therefore leave a line without a file, which is harmless, but never a
file without a line. Each line starts with a hash of the folder's identity and of the rest of the line. A line that is
truncated, altered or copied from another folder is ignored, and the file that it names is not touched.
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
_HEAD = 36  # length of the first line, in bytes
# The record is rewritten when more than this number of its lines describe no existing file.
_MAX_STALE = 2000

State = Literal["part", "whole", "gone"]
Key = tuple[str, str]
"""Key of a recorded file: (folder of the set, name of the file)."""
_Token = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
_LINE = TypeAdapter(tuple[State, FileName, FileName, Count, _Token])


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    folder: str
    """Name of the set's folder in the cache."""
    name: str
    size: int
    """Size of the complete file in bytes."""
    token: str
    """Random component of the partial file's name."""
    state: State
    """`part`: incomplete. `whole`: renamed to its final name, or about to be. `gone`: removed."""

    @property
    def key(self) -> Key:
        return self.folder, self.name

    @property
    def part(self) -> str:
        """Name of the partial file."""
        return f"{self.name[:_SHOWN_OF_NAME]}.{self.token}{PART}"


def new_entry(folder: str, name: str, size: int) -> Entry:
    return Entry(folder, name, size, secrets.token_hex(8), "part")


class Record:
    """A folder's record as read by this process. The caller of each method holds the folder's lock."""

    def __init__(self, folder: Path, *, remedy: str, shared: bool) -> None:
        self.path, self._remedy, self._shared = folder / NAME, remedy, shared
        self.entries: dict[Key, Entry] = {}
        self._head, self._identity, self._read, self._lines = b"", "", 0, 0
        self.damaged = 0
        """Number of damaged lines."""

    @contextlib.contextmanager
    def opened(self, folder: int, identity: str) -> Iterator[None]:
        """Read the lines added since the last call. `put` may be called inside the block.

        Args:
            folder: descriptor of the cache's folder.
            identity: identity of the cache, from its marker.
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
            self._read_until(os.fstat(self._handle).st_size)
            if self._lines > len(self.entries) + _MAX_STALE:
                self._compact(folder)
            yield
        finally:
            os.close(self._handle)

    def put(self, entry: Entry, *, durable: bool = True) -> None:
        """Add or replace an entry.

        Raises:
            OSError: the disk is full, or failed; the record is unchanged.
        """
        self._append(_line(entry, self._identity), durable=durable)
        self._apply(entry)

    def _open(self, folder: int) -> int:
        flags = os.O_RDWR | os.O_CREAT
        return open_file(NAME, flags, folder=folder, path=self.path, remedy=self._remedy, shared=self._shared)

    def _read_until(self, size: int) -> None:
        content = os.pread(self._handle, size - self._read, self._read)
        *lines, _incomplete = content.split(b"\n")  # `_append` terminates an incomplete line before the next one
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
        """Replace the record atomically by one with the current entries only."""
        lines = [_head_line(self._identity), *(_line(entry, self._identity) for entry in self.entries.values())]
        with contextlib.suppress(OSError):  # if this fails, a later call tries again
            write_file(NAME, b"".join(lines), folder=folder, path=self.path, remedy=self._remedy, shared=self._shared)
            os.close(self._handle)
            self._handle = self._open(folder)
            self._head, self._read, self._lines = lines[0], os.fstat(self._handle).st_size, len(self.entries)


def _head_line(identity: str) -> bytes:
    """Return a random first line, by which other processes notice that the file was rewritten."""
    content = json.dumps(secrets.token_hex(8)).encode()
    return _hash(content, identity) + b" " + content + b"\n"


def _line(entry: Entry, identity: str) -> bytes:
    content = json.dumps([entry.state, entry.folder, entry.name, entry.size, entry.token]).encode()
    return _hash(content, identity) + b" " + content + b"\n"


def _parse(line: bytes, identity: str) -> Entry | Literal["other", "damaged"]:
    """Parse a line. Return "other" for the first line, which is valid but not an entry."""
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
