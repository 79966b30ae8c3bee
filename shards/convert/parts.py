"""One conversion divided among processes that know nothing of each other, such as the tasks of an array job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shards.convert.work import Work
from shards.errors import UserError
from shards.files.lock import Held, hold, is_held


@dataclass(frozen=True)
class Part:
    """One of the parts, 1 to `of`, into which a conversion is divided."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
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


WHOLE = Part(1, 1)


@contextmanager
def hold_part(work: Work, part: Part) -> Iterator[None]:
    """Hold the lock of a part. Whoever divides the work otherwise is refused: it would be done twice.

    Raises:
        Held: another process is at work on the part, or on a part of another division.
    """
    with hold(work.path / part.lock_name, f"part {part} of {work.out}"):
        for other in work.path.glob("part-*.lock"):
            if not other.name.endswith(part.lock_suffix) and is_held(other):
                raise Held(f"{work.out}: is being made in other parts ({other.stem}); wait for them, or end them")
        yield
