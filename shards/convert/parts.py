"""One conversion divided among processes that know nothing of each other, such as the tasks of an array job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shards.convert.work_folder import WorkFolder
from shards.errors import UserError
from shards.files.lock import LockHeld, file_lock, is_locked


@dataclass(frozen=True)
class ConversionPart:
    """One of the parts, 1 to `of`, into which a conversion is divided."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> ConversionPart:
        """Read K/N.

        Raises:
            UserError: it is no K/N with 1 <= K <= N.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text[:40]}: expected K/N with K from 1 to N, as in 3/16, and N below a million")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def lock_suffix(self) -> str:
        return f"-of-{self.of}.lock"

    @property
    def lock_name(self) -> str:
        return f"part-{self.number}{self.lock_suffix}"


ALL_SHARDS = ConversionPart(1, 1)


@contextmanager
def lock_part(work: WorkFolder, part: ConversionPart) -> Iterator[None]:
    """Hold the lock of a part. Whoever divides the work otherwise is refused: it would be done twice.

    Raises:
        LockHeld: another process is at work on the part, or on a part of another division.
    """
    with file_lock(work.path / part.lock_name, f"part {part} of {work.out}"):
        for other in work.path.glob("part-*.lock"):
            if not other.name.endswith(part.lock_suffix) and is_locked(other):
                raise LockHeld(f"{work.out}: is being made in other parts ({other.stem}); wait for them, or end them")
        yield
