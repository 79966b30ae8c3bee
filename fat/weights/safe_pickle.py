"""The tensors of a `torch.save` file, read without executing its pickle.

The released training script saves its settings, a yacs object, beside the weights, so `torch.load(weights_only=True)`
refuses its files, and allowing the class is not enough (a dict subclass is refused again when filled). Here the archive
is read within bounds, and its pickle is interpreted (`fat.weights.pickle_machine`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fat.weights.pickle_machine import TensorEntry, interpret

MAX_PROGRAM = 16 * 2**20
"""Bytes of data.pkl: a checkpoint of fat_b3 with its optimizer's state has 0.4 MB."""
MAX_DIRECTORY = 16 * 2**20
"""Bytes of the archive's directory, about 100 for each tensor; zipfile makes fifteen times as much of them."""
MAX_NESTING = 4
"""Levels of dicts among which state dicts are looked for; trainers nest them in one or two."""
MAX_KEY = 200
"""Characters of the key of a dict in which a state dict is looked for."""


class Checkpoint:
    """The state dicts of an open file."""

    def __init__(self, path: Path, storages: _Storages, state_dicts: dict[str, dict[str, TensorEntry]]) -> None:
        self._path, self._storages, self._state_dicts = path, storages, state_dicts

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the tensors of each state dict, by the keys that lead to it, joined by dots; "" = the top level."""
        return {key: list(entries) for key, entries in self._state_dicts.items()}

    def read(self, places: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Read tensors: name in the result -> (key of the state dict, name in it).

        Only their storages are read, each once, so that memory is bounded by the size of the file. Tensors that share a
        storage in the file share their memory.

        Raises ValueError when they do not fit their storages.
        """
        with _explained(self._path):
            return {
                name: self._storages.tensor(original, self._state_dicts[key][original])
                for name, (key, original) in places.items()
            }


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a file written by `torch.save` (torch 1.6 or newer), and find the state dicts in it, nested ones included.

    Raises ValueError when the file is not such a file.
    """
    with ExitStack() as stack:
        with _explained(path):
            _check_directory(path)
            archive = stack.enter_context(zipfile.ZipFile(path))
            storages = _Storages(archive, path.stat().st_size)
            state_dicts = _state_dicts(interpret(storages.read("data.pkl", MAX_PROGRAM)))
        yield Checkpoint(path, storages, state_dicts)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive or pickle can raise any error
        raise ValueError(f"{path}: not a checkpoint written by torch.save ({_one_line(error)})") from error


def _state_dicts(saved: object) -> dict[str, dict[str, TensorEntry]]:
    """Return the dicts that hold tensors, by the keys that lead to them; each once, however often it is referred to."""
    found: dict[str, dict[str, TensorEntry]] = {}
    seen: set[int] = set()
    level = [("", saved)]
    for _ in range(MAX_NESTING):
        deeper: list[tuple[str, object]] = []
        for key, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            tensors = {name: entry for name, entry in value.items() if isinstance(entry, TensorEntry)}
            if tensors:
                found[key] = tensors
            deeper += [
                (f"{key}.{name}" if key else name, inner)
                for name, inner in value.items()
                if isinstance(inner, dict) and len(name) <= MAX_KEY
            ]
        level = deeper
    return found


def printable(text: str, limit: int = 200) -> str:
    """Cut text from a file to `limit` characters and escape what is not printable, so that it is one line."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)


def _check_directory(path: Path) -> None:
    """Refuse a large directory, by the record at the end of the archive (APPNOTE 6.3, sections 4.3.14 to 4.3.16)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    wide = end - 76  # of a Zip64 record and its locator
    if wide >= 0 and tail[wide : wide + 4] == b"PK\6\6":
        size = int.from_bytes(tail[wide + 40 : wide + 48], "little")
    if end >= 0 and size > MAX_DIRECTORY:
        raise ValueError(f"a directory of {size:,} bytes in it, {MAX_DIRECTORY:,} at most expected")


class _Storages:
    """The members of the archive, read when they are first asked for."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._left = archive, size
        names = archive.namelist()
        # torch names the folder inside the archive after the file that it wrote.
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} files data.pkl in it, 1 expected")
        self._root = roots[0]
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        if f"{self._root}/byteorder" in names and self.read("byteorder", 16) != b"little":
            raise ValueError("written on a big-endian machine")

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a member; all that are read are together no more than the file."""
        member = self._archive.getinfo(f"{self._root}/{name}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which torch.save never does; save it again with torch.save")
        if member.compress_size != member.file_size:  # zipfile would take memory for what it states
            raise ValueError(f"{name} has {member.file_size:,} bytes, and {member.compress_size:,} in the archive")
        if member.file_size > min(limit, self._left):
            raise ValueError(f"{name} has {member.file_size:,} bytes, {min(limit, self._left):,} at most expected")
        self._left -= member.file_size
        return self._archive.read(member)

    def flat(self, key: str, dtype: torch.dtype) -> Tensor:
        """A storage as a 1-D tensor."""
        if (key, dtype) not in self._flat:
            content = bytearray(self.read(f"data/{key}", self._left))
            self._flat[key, dtype] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._flat[key, dtype]

    def tensor(self, name: str, entry: TensorEntry) -> Tensor:
        """A tensor as a view of its storage; `name` is for the error."""
        flat = self.flat(entry.storage.key, entry.storage.dtype)
        elements = math.prod(entry.size)
        last = entry.offset + sum((n - 1) * step for n, step in zip(entry.size, entry.stride, strict=True))
        if elements and (elements > len(flat) or last >= len(flat)):
            raise ValueError(
                f"{name[:100]}: {elements:,} elements up to index {last:,} in a storage of {len(flat):,} elements"
            )
        return flat.as_strided(entry.size, entry.stride, entry.offset) if elements else flat.new_empty(entry.size)
