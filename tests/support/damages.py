"""Apply random damage to the files of a folder, as disk faults, failed copies and users cause it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

KINDS = ("flip", "overwrite", "truncate", "append", "empty", "remove", "folder", "forbid", "exchange")


@dataclass(frozen=True)
class Damage:
    """A damage that was applied, for messages and for `repair`."""

    kind: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.kind} {' and '.join(path.name for path in self.paths)}"


def files_of(folder: Path) -> list[Path]:
    """Return all regular files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def damage(folder: Path, draw: Random, *, kinds: tuple[str, ...] = KINDS) -> Damage:
    """Damage one random file, or exchange two, below `folder`."""
    kind = draw.choice(kinds)
    # Every file is equally likely, because small files matter as much as large ones.
    path = draw.choice(files_of(folder))
    size = path.stat().st_size
    at = draw.randrange(size) if size else 0
    paths: tuple[Path, ...] = (path,)
    if kind in ("flip", "overwrite") and size:
        with path.open("r+b") as file:
            file.seek(at)
            old = file.read(1 if kind == "flip" else draw.choice((4, 64, 4096)))
            file.seek(at)
            file.write(bytes([old[0] ^ 1 << draw.randrange(8)]) if kind == "flip" else draw.randbytes(len(old)))
    elif kind == "truncate":
        os.truncate(path, at)
    elif kind == "append":
        with path.open("ab") as file:
            file.write(draw.choice((b"\0" * 100, b"x", b"\n{", draw.randbytes(5000))))
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "remove":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "forbid":
        path.chmod(0)
    elif kind == "exchange":
        others = [other for other in files_of(folder) if other != path]
        other = draw.choice([file for file in others if file.name == path.name] or others)
        spare = path.with_name(f"{path.name}.spare")
        path.rename(spare)
        other.rename(path)
        spare.rename(other)
        paths = (path, other)
    return Damage(kind, paths)


@contextlib.contextmanager
def copied(folder: Path, target: Path) -> Iterator[Path]:
    """Yield a copy of a folder, which is removed at the end."""
    shutil.copytree(folder, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


def repair(damage: Damage, original: Path, damaged: Path) -> None:
    """Restore the damaged files from the original folder."""
    for path in damage.paths:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(original / path.relative_to(damaged), path)
