"""What a source's folders hold, and what of it is never looked at."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from shards.format.manifest import MANIFEST_NAME
from shards.images.formats import APPLE_DOUBLE, named_as_image
from shards.sources.unused import UnusedFiles

METADATA = "metadata of a file manager, NAS system, version control or archive"
HIDDEN = "hidden"
SHARD_SET = "a shard set"
MAX_DEPTH = 6
"""Folders between a source and a file of it that holds samples (refs/convert/parquet/default/train/0000.parquet)."""
WORK_FOLDER = ".making"
MAX_COUNTED = 1_000_000
"""Files and folders that are counted in a folder that is not used."""
MAX_KEPT = 2_000_000
"""Names that an `cached_folder_listings` keeps, about 100 bytes each."""
_SNAPSHOTS = frozenset({".snapshot", ".snapshots", ".zfs", "~snapshot", "#snapshot", "@recently-snapshot"})
"""They hold the whole store once more for each day: never entered."""

# In lower case. Folders with copies, thumbnails and deleted files, and files that describe a folder.
_METADATA_NAMES = frozenset(
    (
        # macOS and its file servers
        b"__macosx", b".ds_store", b".appledouble", b".appledb", b".appledesktop", b".spotlight-v100", b".fseventsd",
        b".temporaryitems", b".documentrevisions-v100", b".apdisk", b".volumeicon.icns", b"icon\r", b"temporary items",
        b"network trash folder", b"thevolumesettingsfolder", b"thefindbycontentfolder",
        # Windows
        b"$recycle.bin", b"system volume information", b"thumbs.db", b"ehthumbs.db", b"ehthumbs_vista.db",
        b"desktop.ini",
        # Synology, QNAP, NetApp
        b"@eadir", b"#recycle", b"#snapshot", b"@tmp", b"@recycle", b"@recently-snapshot", b"@__thumb", b".@__thumb",
        b"@sharebin", b"~snapshot", b".snapshot", b".snapshots", b".zfs",
        # Linux, Android, picture viewers
        b"lost+found", b"lost.dir", b".directory", b".thumbnails", b".nomedia", b".picasaoriginals", b"picasa.ini",
        b".picasa.ini", b"zbthumbnail.info",
        # programming
        b".ipynb_checkpoints", b"__pycache__", b".git", b".svn", b".hg",
    )
)  # fmt: skip
_METADATA_PATTERN = re.compile(rb"\.trash(es)?|\.trash-\d+|found\.\d{3}")


def skip_reason(name: bytes) -> str | None:
    """Return why a file or folder of this name is not looked at; None where it is."""
    lower = name.lower()
    if lower in _METADATA_NAMES or _METADATA_PATTERN.fullmatch(lower) or name.startswith(APPLE_DOUBLE):
        return METADATA
    return HIDDEN if name.startswith(b".") else None


@dataclass
class FolderContents:
    """What stands directly in a folder; names, sorted."""

    folders: list[bytes] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    """By their names."""
    files: list[bytes] = field(default_factory=list)
    """All others."""
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    """Name and reason."""

    def add_to(self, unused: UnusedFiles, below: bytes, folder: Path) -> None:
        """Count what is skipped: files, and those in skipped folders.

        Args:
            below: path of the folder below the source, ending with '/'; empty for the source.
            folder: the folder.
        """
        for name, reason in self.skipped:
            path = folder / os.fsdecode(name)
            unused.add(reason, below + name, kind=os.fsdecode(name), count=count_files(path))


@dataclass
class _Found:
    """What was found so far in an `cached_folder_listings`."""

    contents: dict[Path, FolderContents] = field(default_factory=dict)
    files: dict[Path, int] = field(default_factory=dict)
    names: int = 0


_found: ContextVar[_Found | None] = ContextVar("found", default=None)


@contextmanager
def cached_folder_listings() -> Iterator[None]:
    """Keep what `look` and `count_files` find until the block ends, in which a source is recognised and scanned.

    Both look at the same folders many times, and a network file system takes minutes for each walk of a million files.
    """
    if _found.get() is not None:
        yield
        return
    token = _found.set(_Found())
    try:
        yield
    finally:
        _found.reset(token)


def count_files(path: Path) -> int:
    """Return the number of files in and below a folder, at most `MAX_COUNTED`; 1 for a file or an empty folder.

    Links are not followed. Snapshots of a file server and folders that cannot be read count as 1.
    """
    if path.is_symlink() or not path.is_dir() or path.name.lower() in _SNAPSHOTS:
        return 1
    found = _found.get() or _Found()
    if path not in found.files:
        found.files[path] = _count_files(path)
    return found.files[path]


def _count_files(path: Path) -> int:
    files = 0
    for folders, (_, _, names) in enumerate(os.walk(path)):
        files += len(names)
        if files + folders >= MAX_COUNTED:
            break
    return max(1, files)


def list_folder(folder: Path) -> FolderContents:
    """List a folder.

    Raises:
        OSError: it cannot be read.
    """
    found = _found.get() or _Found()
    contents = found.contents.get(folder)
    if contents is None:
        contents = _list(folder)
        found.names += len(contents.folders) + len(contents.images) + len(contents.files) + len(contents.skipped)
        if found.names <= MAX_KEPT:
            found.contents[folder] = contents
    return contents


def _list(folder: Path) -> FolderContents:
    contents = FolderContents()
    with os.scandir(bytes(folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            reason = skip_reason(entry.name)
            if reason is None and _is_folder(entry):
                reason = SHARD_SET if is_shard_set(entry.path) else None
                kind = contents.folders
            else:
                kind = contents.images if named_as_image(entry.name) else contents.files
            if reason is None:
                kind.append(entry.name)
            else:
                contents.skipped.append((entry.name, reason))
    return contents


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def files_below(source: Path, *suffixes: str) -> list[Path]:
    """The files below a folder whose names end so (in any case), sorted; the file itself where `source` is one.

    Folders that `skip_reason` names, and shard sets below the source, are not entered.

    Raises:
        OSError: a folder cannot be read.
    """
    if source.is_file():
        return [source]
    wanted = tuple(suffix.encode() for suffix in suffixes)
    return sorted(_files_below(source, wanted, MAX_DEPTH, set()))


def _files_below(folder: Path, wanted: tuple[bytes, ...], depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder that is read anyway
        return
    seen.add((status.st_dev, status.st_ino))
    contents = list_folder(folder)
    yield from (folder / os.fsdecode(name) for name in contents.files if name.lower().endswith(wanted))
    if depth:
        for name in contents.folders:
            yield from _files_below(folder / os.fsdecode(name), wanted, depth - 1, seen)


def is_shard_set(folder: bytes) -> bool:
    """Return whether a folder is a set of this project, or one that is being made."""
    if os.path.lexists(os.path.join(folder, os.fsencode(WORK_FOLDER))):
        return True
    has_manifest = os.path.lexists(os.path.join(folder, MANIFEST_NAME.encode()))
    return has_manifest and any(name.endswith(b".index.npy") for name in os.listdir(folder))
