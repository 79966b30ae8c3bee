"""Find the images of a command line: files, folders, patterns, and names or an image on standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError, reading, reason_of
from shards.files.regular import NotRegular, open_regular, read_up_to
from shards.images.formats import MAGIC_BYTES, RAW_SUFFIXES, looks_like_image, named_as_image
from shards.images.limits import MAX_ENCODED
from shards.sources.walk import list_folder

STDIN = "-"
MAX_NAMES = 2**28  # maximum bytes of a list of names, which is held in memory


@dataclass(frozen=True)
class ImageSource:
    """An encoded image: a file, or bytes in memory."""

    name: str
    """Path as in the command line, or - for standard input. Bytes that are not UTF-8 are surrogates (os.fsdecode)."""
    data: bytes | None = None
    """The encoded image. None: it is read from the file `name`."""

    def read(self) -> bytes:
        """Return the encoded image: at most one byte more than the largest image that is accepted.

        Raises:
            UserError: it is not a regular file.
            OSError: it cannot be read.
        """
        if self.data is not None:
            return self.data
        handle = open_regular(os.fsencode(self.name))
        try:
            # Allocate the size of the file, not the limit.
            return read_up_to(handle, min(os.fstat(handle).st_size, MAX_ENCODED) + 1)
        finally:
            os.close(handle)


def find_images(arguments: Sequence[str], stdin: BinaryIO) -> tuple[list[ImageSource], int]:
    """Return the images of a command line in its order; those of folders and patterns are sorted by name.

    Args:
        arguments: files, which may have any name; folders, whose images are found recursively; patterns with *, ? or
            [...] (** matches any number of folders); or -.
        stdin: standard input: an encoded image, or names of files, one per line or separated by NUL characters.

    Returns:
        The images, and the number of other files in the folders.

    Raises:
        UserError: a file or folder does not exist, a pattern matches nothing, or there are no images.
        StorageFailed: a folder cannot be read.
    """
    found: list[ImageSource] = []
    others = 0
    for argument in arguments:
        if argument == STDIN:
            found += _from_stdin(stdin)
            continue
        for path in _matches(argument):
            with reading(path):
                if not path.is_dir():
                    found.append(ImageSource(str(path)))
                    continue
                for is_image, file in _files(path, set()):
                    found += [ImageSource(str(file))] if is_image else []
                    others += not is_image
    if not found:
        raise UserError(f"{' '.join(arguments)}: no images found; specify image files, or folders that contain some")
    return found, others


def _matches(argument: str) -> list[Path]:
    path = Path(argument)
    try:
        if os.path.lexists(path):
            return [path]
        matches = sorted(glob.glob(argument, recursive=True)) if glob.has_magic(argument) else []
    except (OSError, ValueError) as error:  # for example, the name is too long or contains a NUL character
        fact = f"not a valid path ({reason_of(error)})"
        raise UserError(f"{argument}: {fact}; specify a file, folder or pattern") from error
    if not matches:
        fact = "no file matches this pattern" if glob.has_magic(argument) else "no such file or folder"
        raise UserError(f"{argument}: {fact}; specify existing images")
    return [Path(match) for match in matches]


def _files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[bool, Path]]:
    """Yield (whether it is an image, path) of the files in and below a folder.

    As in `pipeline shard`, hidden files, metadata of other programs and shard sets are skipped.
    """
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # the folder was visited already, by another link
        return
    seen.add((status.st_dev, status.st_ino))
    contents = list_folder(folder)
    for name in sorted([*contents.images, *contents.files]):
        path = folder / os.fsdecode(name)
        yield named_as_image(name) or _begins_like_image(path), path
    for name in contents.folders:
        yield from _files(folder / os.fsdecode(name), seen)


def _begins_like_image(path: Path) -> bool:
    if os.fsencode(path.suffix.lower()) in RAW_SUFFIXES:  # camera raw files begin like a TIFF
        return False
    try:
        handle = open_regular(path)
    except (NotRegular, OSError):
        return False
    try:
        return looks_like_image(os.read(handle, MAGIC_BYTES))
    finally:
        os.close(handle)


def _from_stdin(stdin: BinaryIO) -> list[ImageSource]:
    start = stdin.read(MAGIC_BYTES)
    if looks_like_image(start):
        return [ImageSource(STDIN, start + stdin.read(MAX_ENCODED + 1 - len(start)))]
    text = start + stdin.read(MAX_NAMES + 1)
    if len(text) > MAX_NAMES:
        raise UserError(f"{STDIN}: more than {MAX_NAMES >> 20} MiB of names; pass them in several parts")
    names = text.split(b"\0") if b"\0" in text else text.splitlines()
    return [ImageSource(os.fsdecode(name)) for name in names if name]
