"""List the members of a tar, or of a tar inside a tar, as byte ranges of the file.

Nothing is extracted, and member names are never used as paths.
"""

from __future__ import annotations

import os
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NoReturn

from shards.errors import UserError, first_line, storage_error
from shards.files.regular import open_regular
from shards.images.formats import named_as_image

LABEL_SUFFIX = "cls"
MAX_MEMBERS = 2**22
"""Maximum number of regular files in a tar: their names and offsets need about 1 GB of memory."""
MAX_EXTENSION = 2**17
"""Maximum bytes of an extension header (a long name or pax records), which tarfile reads into memory."""
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_READ_AHEAD = 2**16
_AGAIN = "copy or download it again"
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip", (".gz", ".tgz")),
    b"BZh": ("bzip2", "bunzip2", (".bz2", ".tbz", ".tbz2")),
    b"\xfd7zXZ": ("xz", "unxz", (".xz", ".txz")),
    b"(\xb5/\xfd": ("zstd", "unzstd --rm", (".zst", ".tzst")),
}
"""First bytes of a compressed file -> its format, the command to decompress it, and the suffixes that it requires."""
_MAGIC = max(map(len, _COMPRESSED))
COMPRESSED_SUFFIXES = tuple(
    suffix if suffix.startswith(".t") else f".tar{suffix}"
    for *_, suffixes in _COMPRESSED.values()
    for suffix in suffixes
)
"""Suffixes of compressed tars."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    """Offset of the first byte in the outermost tar."""
    size: int

    @property
    def base(self) -> str:
        return self.name[self.name.rfind("/") + 1 :]

    @property
    def key(self) -> str:
        """Everything before the first dot of the file name, including folders."""
        return self.name[: len(self.name) - len(self.base)] + self.base.partition(".")[0]

    @property
    def suffix(self) -> str:
        """Everything after the first dot of the file name, in lower case; empty if there is no dot."""
        return self.base.partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """Whether the name is that of an image; checking the content would require reading the whole tar."""
        return _named_as_image(self.name)


def members(path: Path, start: int = 0, stop: int | None = None, inside: str = "") -> list[Member]:
    """List the regular files of an uncompressed tar, which is bytes `start` to `stop` of the file `path`.

    Args:
        inside: name of the inner tar, for messages.

    Raises:
        UserError: the tar is missing, not a tar, compressed, damaged, or truncated; it has more than `MAX_MEMBERS`
            files; or an image or a label is a link or a sparse file, and therefore not a byte range of the tar.
        StorageFailed: it cannot be read.
    """
    shown = f"{path}: {inside}" if inside else f"{path}"
    try:
        with os.fdopen(open_regular(path), "rb", buffering=_READ_AHEAD if start == 0 else 0) as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            file.seek(start)
            _reject_compressed(os.pread(file.fileno(), _MAGIC, start), path, inside)
            found = list(islice(read_members(file, end, shown), MAX_MEMBERS + 1))
            if len(found) > MAX_MEMBERS:
                raise UserError(f"{shown}: contains more than {MAX_MEMBERS:,} files; split it into several tars")
            return found
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file") from None
    except OSError as error:
        raise storage_error(path, error) from error


def read_members(file: IO[bytes], end: int, shown: str) -> Iterator[Member]:
    """Yield the regular files of the tar from the current position of `file` to byte `end`.

    Raises:
        UserError: see `members`.
    """
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_Header, errorlevel=2, errors="surrogateescape") as tar:
            at = -1
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps all members in memory
                if info.size < 0 or tar.offset <= at:
                    raise UserError(f"{shown}: damaged: {info.name} has an invalid size, {info.size:,} bytes; {_AGAIN}")
                at = tar.offset
                if info.offset >= end:  # belongs to the outer tar, because the inner tar has no end-of-archive blocks
                    return
                if info.offset_data + (info.size if info.isreg() else 0) > end:
                    raise UserError(f"{shown}: truncated: the file ends within {info.name}; {_AGAIN}")
                if info.issparse():
                    _reject_sparse(info.name)
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
                elif (info.islnk() or info.issym()) and _is_used(info.name):
                    raise UserError(
                        f"{shown}: {info.name} is a link to {info.linkname}; create the tar again so that it contains "
                        "the file (tar --hard-dereference --dereference)"
                    )
            # tarfile treats a damaged header as the end of the archive.
            file.seek(tar.offset)
            if tar.offset < end and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UserError(f"{shown}: damaged at byte {tar.offset:,}; {_AGAIN}")
    except _UnusableHeader as error:
        raise UserError(f"{shown}: {error}") from None
    # tarfile converts the numbers and text of a damaged header without checks.
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"{shown}: not a tar, or damaged ({first_line(error)}); {_AGAIN}") from error


def _reject_compressed(start: bytes, path: Path, inside: str) -> None:
    for magic, (name, command, suffixes) in _COMPRESSED.items():
        if not start.startswith(magic):
            continue
        why = f"compressed with {name}, but images are read as byte ranges, which requires an uncompressed tar"
        if inside:
            raise UserError(f"{path}: {inside}: {why}; run '{command} {inside}', then create the outer tar again")
        file = str(path)
        steps = [] if file.endswith(suffixes) else [shlex.join(["mv", file, file := file + suffixes[0]])]
        steps.append(f"{command} {shlex.quote(file)}")
        raise UserError(
            f"{path}: {why}; decompress it ({' && '.join(steps)}), or unpack it (tar xf) if it contains class folders"
        )


class _UnusableHeader(Exception):
    """Raised for a header that cannot be used; the message is the reason."""


def _reject_sparse(name: str) -> NoReturn:
    raise _UnusableHeader(f"{name} is a sparse file; create the tar again without --sparse")


class _Header(tarfile.TarInfo):
    """A header whose size is checked before tarfile reads or skips that number of bytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise _UnusableHeader(f"damaged: {header.name} has an invalid size of {header.size:,} bytes; {_AGAIN}")
        if header.type in _EXTENSIONS and header.size > MAX_EXTENSION:
            raise _UnusableHeader(f"contains a header of {header.size:,} bytes; at most {MAX_EXTENSION:,} are allowed")
        if header.type == tarfile.GNUTYPE_SPARSE:
            _reject_sparse(header.name)
        return header

    # The block map of a sparse file may have any length, and tarfile would read the entire map.
    def _proc_gnusparse_00(self, next: tarfile.TarInfo, *_: object) -> None:
        _reject_sparse(next.name)

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def _named_as_image(name: str) -> bool:
    return named_as_image(name[name.rfind("/") + 1 :].encode("utf-8", "surrogateescape"))


def _is_used(name: str) -> bool:
    base = name[name.rfind("/") + 1 :]
    return _named_as_image(name) or (base.lower().endswith(f".{LABEL_SUFFIX}") and not base.startswith("."))
