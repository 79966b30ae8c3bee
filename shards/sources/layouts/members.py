"""Members of a tar, or of a tar inside a tar, as byte ranges of the file.

Names are data here: nothing is extracted, and no path is ever made of them.
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
"""Regular files of a tar that is read: about 1 GB of memory for their names and places."""
MAX_EXTENSION = 2**17
"""Bytes of a header that extends another one: a long name, or pax records. tarfile reads them whole."""
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
"""First bytes of a compressed file -> its format, the command that uncompresses it, and the suffixes it asks for."""
_MAGIC = max(map(len, _COMPRESSED))
COMPRESSED_SUFFIXES = tuple(
    suffix if suffix.startswith(".t") else f".tar{suffix}"
    for *_, suffixes in _COMPRESSED.values()
    for suffix in suffixes
)
"""Ends of the names of compressed tars."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    """Of its first byte in the outermost tar."""
    size: int

    @property
    def base(self) -> str:
        return self.name[self.name.rfind("/") + 1 :]

    @property
    def key(self) -> str:
        """All before the first dot of the file's name, folders included."""
        return self.name[: len(self.name) - len(self.base)] + self.base.partition(".")[0]

    @property
    def suffix(self) -> str:
        """All after the first dot of the file's name, in lower case; empty where there is none."""
        return self.base.partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """By its name: opening each member would mean reading the whole tar."""
        return _named_as_image(self.name)


def members(path: Path, start: int = 0, stop: int | None = None, inside: str = "") -> list[Member]:
    """List the regular files of an uncompressed tar that lies in bytes start to stop of `path`.

    Args:
        inside: name of the inner tar, for messages.

    Raises:
        UserError: it is missing, no tar, compressed, damaged, or ends within a member; it has more than `MAX_MEMBERS`;
            or an image or a label in it is a link or a sparse file, whose bytes do not stand in one piece in the tar.
        StorageFailed: it cannot be read.
    """
    shown = f"{path}: {inside}" if inside else f"{path}"
    try:
        with os.fdopen(open_regular(path), "rb", buffering=_READ_AHEAD if start == 0 else 0) as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            file.seek(start)
            _refuse_compressed(os.pread(file.fileno(), _MAGIC, start), path, inside)
            found = list(islice(read_members(file, end, shown), MAX_MEMBERS + 1))
            if len(found) > MAX_MEMBERS:
                raise UserError(f"{shown}: more than {MAX_MEMBERS:,} files; split it into several tars")
            return found
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file") from None
    except OSError as error:
        raise storage_error(path, error) from error


def read_members(file: IO[bytes], end: int, shown: str) -> Iterator[Member]:
    """List the regular files of the tar that begins at the current position of `file` and lies before byte `end`.

    Raises:
        UserError: as `members`.
    """
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_Header, errorlevel=2, errors="surrogateescape") as tar:
            at = -1
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it remembers them all
                if info.size < 0 or tar.offset <= at:
                    raise UserError(f"{shown}: {info.name}: a size of {info.size:,} bytes: damaged; {_AGAIN}")
                at = tar.offset
                if info.offset >= end:  # the next member of the outer tar: this one lacks its end-of-archive blocks
                    return
                if info.offset_data + (info.size if info.isreg() else 0) > end:
                    raise UserError(f"{shown}: ends within {info.name}: truncated; {_AGAIN}")
                if info.issparse():
                    _refuse_sparse(info.name)
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
                elif (info.islnk() or info.issym()) and _is_used(info.name):
                    raise UserError(
                        f"{shown}: {info.name}: a link to {info.linkname}; make the tar again with the file itself "
                        "in it (tar --hard-dereference --dereference)"
                    )
            # tarfile takes a damaged header for the end.
            file.seek(tar.offset)
            if tar.offset < end and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UserError(f"{shown}: damaged at byte {tar.offset:,}; {_AGAIN}")
    except _Refused as error:
        raise UserError(f"{shown}: {error}") from None
    # A damaged header may hold any number or text; tarfile converts them as they come.
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"{shown}: no tar, or a damaged one ({first_line(error)}); {_AGAIN}") from error


def _refuse_compressed(start: bytes, path: Path, inside: str) -> None:
    for magic, (name, command, suffixes) in _COMPRESSED.items():
        if not start.startswith(magic):
            continue
        why = f"compressed by {name}; images are read in place, as byte ranges, which a compressed tar does not have"
        if inside:
            raise UserError(f"{path}: {inside}: {why}; make the outer tar again with '{command} {inside}' done before")
        file = str(path)
        steps = [] if file.endswith(suffixes) else [shlex.join(["mv", file, file := file + suffixes[0]])]
        steps.append(f"{command} {shlex.quote(file)}")
        raise UserError(
            f"{path}: {why}; uncompress it ({' && '.join(steps)}), or unpack it (tar xf) where it holds class folders"
        )


class _Refused(Exception):
    """Why a header cannot be used."""


def _refuse_sparse(name: str) -> NoReturn:
    raise _Refused(f"{name}: a sparse file; make the tar again without --sparse")


class _Header(tarfile.TarInfo):
    """A header whose sizes are checked before tarfile reads anything of that size, or skips it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise _Refused(f"{header.name}: a size of {header.size:,} bytes: damaged; {_AGAIN}")
        if header.type in _EXTENSIONS and header.size > MAX_EXTENSION:
            raise _Refused(f"a header of {header.size:,} bytes, more than the {MAX_EXTENSION:,} that one may have")
        if header.type == tarfile.GNUTYPE_SPARSE:
            _refuse_sparse(header.name)
        return header

    # The map of a sparse file is as long as its maker likes, and tarfile would read it to its end.
    def _proc_gnusparse_00(self, next: tarfile.TarInfo, *_: object) -> None:
        _refuse_sparse(next.name)

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def _named_as_image(name: str) -> bool:
    return named_as_image(name[name.rfind("/") + 1 :].encode("utf-8", "surrogateescape"))


def _is_used(name: str) -> bool:
    base = name[name.rfind("/") + 1 :]
    return _named_as_image(name) or (base.lower().endswith(f".{LABEL_SUFFIX}") and not base.startswith("."))
