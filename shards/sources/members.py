"""Members of a tar, or of a tar inside a tar, as byte ranges of the file."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.sources.folder import named_as_image

_READ_AHEAD = 2**16


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
    def is_image(self) -> bool:
        """By its name: opening each member would mean reading the whole tar."""
        return named_as_image(self.base.encode("utf-8", "surrogateescape"))


def members(path: Path, start: int = 0, stop: int | None = None) -> list[Member]:
    """List the regular files of an uncompressed tar that lies in bytes start to stop of `path`.

    Raises:
        UserError: it is missing, no tar, damaged, or ends within a member.
    """
    found = []
    try:
        with path.open("rb", buffering=_READ_AHEAD if start == 0 else 0) as file:
            end = os.fstat(file.fileno()).st_size if stop is None else stop
            file.seek(start)
            with tarfile.TarFile(fileobj=file, errorlevel=2, errors="surrogateescape") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers them all
                    if info.offset_data + info.size > end:
                        raise UserError(f"{path}: ends within {info.name}: truncated; copy or download it again")
                    if info.isreg():
                        found.append(Member(info.name, info.offset_data, info.size))
                # tarfile takes a damaged header for the end.
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset).strip(b"\0"):
                    raise UserError(f"{path}: damaged at byte {tar.offset:,}; copy or download it again")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except tarfile.TarError as error:
        raise UserError(f"{path}: no tar, or a damaged one ({error}); copy or download it again") from error
    return found
