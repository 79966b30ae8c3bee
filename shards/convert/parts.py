"""Divide a conversion among independent processes, such as the tasks of a SLURM array job."""

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
    """Part number `number` (from 1) of `of` parts of a conversion: every `of`-th shard."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> ConversionPart:
        """Parse K/N.

        Raises:
            UserError: the text is not of the form K/N with 1 <= K <= N.
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
    """Lock a part while the block runs. Fails if another process uses a different number of parts.

    Raises:
        LockHeld: another process is writing this part, or uses a different number of parts, so that shards overlap.
    """
    with file_lock(work.path / part.lock_name, f"part {part} of {work.out}"):
        for other in work.path.glob("part-*.lock"):
            if not other.name.endswith(part.lock_suffix) and is_locked(other):
                raise LockHeld(
                    f"{work.out}: another process divides this conversion into a different number of parts "
                    f"({other.stem}); wait for it, or stop it"
                )
        yield
