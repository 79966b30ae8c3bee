"""Random damages to the files of a folder: what disks, copies and people do to them."""

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
    """What was done, for people and for repair."""

    kind: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.kind} {' and '.join(path.name for path in self.paths)}"


def files_of(folder: Path) -> list[Path]:
    """All regular files below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def damage(folder: Path, draw: Random, *, kinds: tuple[str, ...] = KINDS) -> Damage:
    """Damage one file (or exchange two) below `folder`."""
    kind = draw.choice(kinds)
    # Small files are as interesting as large ones: every file is equally likely.
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
    """A copy of a folder that may be damaged and is removed at the end."""
    shutil.copytree(folder, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


def repair(damage: Damage, whole: Path, damaged: Path) -> None:
    """Put the original files back."""
    for path in damage.paths:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(whole / path.relative_to(damaged), path)
