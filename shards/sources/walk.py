"""List the folders of a source, without hidden files and metadata of other programs."""

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

METADATA = "metadata of a file manager, NAS system, version control, or archive"
HIDDEN = "hidden"
SHARD_SET = "a shard set"
MAX_DEPTH = 6
"""Maximum folder depth of tars and Parquet files (example: refs/convert/parquet/default/train/0000.parquet)."""
WORK_FOLDER = ".making"
MAX_COUNTED = 1_000_000
"""Maximum number of files and folders that are counted in a folder that is not used."""
MAX_KEPT = 2_000_000
"""Maximum number of names in the cache of `cached_folder_listings`, at about 100 bytes each."""
_SNAPSHOTS = frozenset({".snapshot", ".snapshots", ".zfs", "~snapshot", "#snapshot", "@recently-snapshot"})
"""Folders of snapshots, which contain a copy of the file system for each day; their files are not counted."""

# Names in lower case: folders of copies, thumbnails, and deleted files, and files that describe a folder.
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
        # Linux, Android, image viewers
        b"lost+found", b"lost.dir", b".directory", b".thumbnails", b".nomedia", b".picasaoriginals", b"picasa.ini",
        b".picasa.ini", b"zbthumbnail.info",
        # programming
        b".ipynb_checkpoints", b"__pycache__", b".git", b".svn", b".hg",
    )
)  # fmt: skip
_METADATA_PATTERN = re.compile(rb"\.trash(es)?|\.trash-\d+|found\.\d{3}")


def skip_reason(name: bytes) -> str | None:
    """Return why a file or folder of this name is skipped; None if it is not skipped."""
    lower = name.lower()
    if lower in _METADATA_NAMES or _METADATA_PATTERN.fullmatch(lower) or name.startswith(APPLE_DOUBLE):
        return METADATA
    return HIDDEN if name.startswith(b".") else None


@dataclass
class FolderContents:
    """Sorted names of the entries of a folder."""

    folders: list[bytes] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    """Files with the suffix of an image."""
    files: list[bytes] = field(default_factory=list)
    """Files without the suffix of an image."""
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    """(name, reason) of skipped entries."""

    def add_to(self, unused: UnusedFiles, below: bytes, folder: Path) -> None:
        """Count the skipped files, including those in skipped folders.

        Args:
            below: path of the folder relative to the source, ending with '/'; empty for the source.
            folder: path of the folder.
        """
        for name, reason in self.skipped:
            path = folder / os.fsdecode(name)
            unused.add(reason, below + name, kind=os.fsdecode(name), count=count_files(path))


@dataclass
class _Cache:
    """Results that `cached_folder_listings` keeps."""

    contents: dict[Path, FolderContents] = field(default_factory=dict)
    files: dict[Path, int] = field(default_factory=dict)
    names: int = 0


_cache: ContextVar[_Cache | None] = ContextVar("folder_listings", default=None)


@contextmanager
def cached_folder_listings() -> Iterator[None]:
    """Cache the results of `list_folder` and `count_files` until the block ends.

    Detecting and scanning a layout list the same folders many times, and on a network file system a walk of a million
    files takes minutes.
    """
    if _cache.get() is not None:
        yield
        return
    token = _cache.set(_Cache())
    try:
        yield
    finally:
        _cache.reset(token)


def count_files(path: Path) -> int:
    """Return the number of files in and below a folder, at most `MAX_COUNTED`; 1 for a file or an empty folder.

    Links are not followed. Snapshot folders and folders that cannot be read count as 1.
    """
    if path.is_symlink() or not path.is_dir() or path.name.lower() in _SNAPSHOTS:
        return 1
    cache = _cache.get() or _Cache()
    if path not in cache.files:
        cache.files[path] = _count_files(path)
    return cache.files[path]


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
    cache = _cache.get() or _Cache()
    contents = cache.contents.get(folder)
    if contents is None:
        contents = _list(folder)
        cache.names += len(contents.folders) + len(contents.images) + len(contents.files) + len(contents.skipped)
        if cache.names <= MAX_KEPT:
            cache.contents[folder] = contents
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
    """Return the sorted files below a folder that have one of the suffixes (in any case), or `source` if it is a file.

    Folders that `skip_reason` rejects, and shard sets below the source, are skipped.

    Raises:
        OSError: a folder cannot be read.
    """
    if source.is_file():
        return [source]
    encoded = tuple(suffix.encode() for suffix in suffixes)
    return sorted(_files_below(source, encoded, MAX_DEPTH, set()))


def _files_below(folder: Path, suffixes: tuple[bytes, ...], depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # the folder was visited already, by another link
        return
    seen.add((status.st_dev, status.st_ino))
    contents = list_folder(folder)
    yield from (folder / os.fsdecode(name) for name in contents.files if name.lower().endswith(suffixes))
    if depth:
        for name in contents.folders:
            yield from _files_below(folder / os.fsdecode(name), suffixes, depth - 1, seen)


def is_shard_set(folder: bytes) -> bool:
    """Return whether a folder is a shard set, complete or in conversion."""
    if os.path.lexists(os.path.join(folder, os.fsencode(WORK_FOLDER))):
        return True
    has_manifest = os.path.lexists(os.path.join(folder, MANIFEST_NAME.encode()))
    return has_manifest and any(name.endswith(b".index.npy") for name in os.listdir(folder))
