"""Read the tensors of a `torch.save` file without executing its pickle.

The released training script saves its settings, a yacs object, together with the weights. `torch.load` with
weights_only=True rejects such files, even if the class is allowed, because it is a dict subclass. Here the archive is
read with size limits, and its pickle is interpreted (`fat.weights.pickle_interpreter`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fat.weights.pickle_interpreter import TensorEntry, interpret

MAX_PROGRAM = 16 * 2**20
"""Maximum bytes of data.pkl. A checkpoint of fat_b3 with its optimizer's state has 0.4 MB."""
MAX_DIRECTORY = 16 * 2**20
"""Maximum bytes of the archive's directory, about 100 per tensor. zipfile uses fifteen times as much memory."""
MAX_NESTING = 4
"""Levels of nested dicts that are searched for state dicts; trainers use one or two."""
MAX_KEY = 200
"""Maximum characters of the key of a nested dict; dicts under longer keys are not searched for state dicts."""


class Checkpoint:
    """State dicts of an open file."""

    def __init__(self, path: Path, storages: _Storages, state_dicts: dict[str, dict[str, TensorEntry]]) -> None:
        self._path, self._storages, self._state_dicts = path, storages, state_dicts

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of each state dict's tensors. Its key is the dot-joined path of dict keys; "" is the top level."""
        return {key: list(entries) for key, entries in self._state_dicts.items()}

    def read(self, locations: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Read tensors.

        Each storage is read at most once, so that memory is limited by the size of the file. Tensors that share a
        storage in the file also share their memory.

        locations: name in the result -> (key of the state dict, name in the state dict).
        Raises ValueError if a tensor is larger than its storage.
        """
        with _name_file_in_errors(self._path):
            return {
                name: self._storages.tensor(original, self._state_dicts[key][original])
                for name, (key, original) in locations.items()
            }


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a file written by `torch.save` (PyTorch 1.6 or newer) and find its state dicts, including nested ones.

    Raises ValueError if the file has another format.
    """
    with ExitStack() as stack:
        with _name_file_in_errors(path):
            _check_directory(path)
            archive = stack.enter_context(zipfile.ZipFile(path))
            storages = _Storages(archive, path.stat().st_size)
            state_dicts = _state_dicts(interpret(storages.read("data.pkl", MAX_PROGRAM)))
        yield Checkpoint(path, storages, state_dicts)


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a corrupt archive or pickle can raise any exception
        raise ValueError(f"{path}: not a checkpoint written by torch.save ({_one_line(error)})") from error


def _state_dicts(saved: object) -> dict[str, dict[str, TensorEntry]]:
    """Return the dicts that contain tensors, by the dot-joined path of dict keys. Each dict is returned once, even if
    the file refers to it several times."""
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
    """Truncate untrusted text to `limit` characters and escape unprintable characters, so that it is one line."""
    truncated = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in truncated)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)


def _check_directory(path: Path) -> None:
    """Raise ValueError if the archive's directory is too large. Its size is in the record at the end of the archive
    (APPNOTE 6.3, sections 4.3.14 to 4.3.16)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    zip64 = end - 76  # a Zip64 record and its locator have 76 bytes
    if zip64 >= 0 and tail[zip64 : zip64 + 4] == b"PK\6\6":
        size = int.from_bytes(tail[zip64 + 40 : zip64 + 48], "little")
    if end >= 0 and size > MAX_DIRECTORY:
        raise ValueError(f"its archive's directory has {size:,} bytes; at most {MAX_DIRECTORY:,} are accepted")


class _Storages:
    """Members of the archive, each read when it is first needed."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._left = archive, size
        names = archive.namelist()
        # torch.save names the folder inside the archive after the file.
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"it contains {len(roots)} files data.pkl, expected 1")
        self._root = roots[0]
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        if f"{self._root}/byteorder" in names and self.read("byteorder", 16) != b"little":
            raise ValueError("it was written on a big-endian machine, which is not supported")

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a member. The total over all calls is limited to the size of the file."""
        member = self._archive.getinfo(f"{self._root}/{name}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which torch.save never does; save the file again with torch.save")
        if member.compress_size != member.file_size:  # zipfile would allocate memory for the size in the directory
            raise ValueError(
                f"{name} has {member.compress_size:,} bytes in the archive, but is listed with {member.file_size:,}"
            )
        if member.file_size > min(limit, self._left):
            raise ValueError(f"{name} has {member.file_size:,} bytes; at most {min(limit, self._left):,} are accepted")
        self._left -= member.file_size
        return self._archive.read(member)

    def flat(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return a storage as a 1-D tensor."""
        if (key, dtype) not in self._flat:
            content = bytearray(self.read(f"data/{key}", self._left))
            self._flat[key, dtype] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._flat[key, dtype]

    def tensor(self, name: str, entry: TensorEntry) -> Tensor:
        """Return a tensor as a view of its storage. `name` is for error messages."""
        flat = self.flat(entry.storage.key, entry.storage.dtype)
        elements = math.prod(entry.size)
        last = entry.offset + sum((n - 1) * step for n, step in zip(entry.size, entry.stride, strict=True))
        if elements and (elements > len(flat) or last >= len(flat)):
            raise ValueError(
                f"{name[:100]} has {elements:,} elements up to index {last:,}, but its storage has {len(flat):,}"
            )
        return flat.as_strided(entry.size, entry.stride, entry.offset) if elements else flat.new_empty(entry.size)
