"""The tensors of a `torch.save` file, read without executing its pickle.

A pickle is a program: it may import any name and call it, hash what takes hours to hash, or nest until the stack ends.
The released training script saves its settings, a yacs object, beside the weights, so `torch.load(weights_only=True)`
refuses its files, and allowing the class is not enough (a dict subclass is refused again when filled). Here the opcodes
are interpreted one by one: nothing is imported or called, four harmless names have a meaning of our own, every other
object becomes an inert one that swallows whatever is done to it, and dict keys that are no text are dropped unhashed.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PROGRAM = 16 * 2**20
"""Bytes of data.pkl: a checkpoint of fat_b3 with its optimizer's state has 0.4 MB."""
MAX_OPCODES = 500_000
"""Opcodes of data.pkl: that checkpoint has 0.1 million."""
MAX_DIRECTORY = 16 * 2**20
"""Bytes of the archive's directory, about 100 for each tensor; zipfile makes fifteen times as much of them."""
MAX_NESTING = 4
"""Levels of dicts among which state dicts are looked for; trainers nest them in one or two."""
MAX_KEY = 200
"""Characters of the key of a dict in which a state dict is looked for."""

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Checkpoint:
    """The state dicts of an open file."""

    def __init__(self, path: Path, storages: _Storages, state_dicts: dict[str, dict[str, _TensorEntry]]) -> None:
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
                name: self._state_dicts[key][original].view(original, self._storages)
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
            state_dicts = _state_dicts(_interpret(storages.read("data.pkl", MAX_PROGRAM)))
        yield Checkpoint(path, storages, state_dicts)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive or pickle can raise any error
        raise ValueError(f"{path}: not a checkpoint written by torch.save ({_one_line(error)})") from error


def _state_dicts(saved: object) -> dict[str, dict[str, _TensorEntry]]:
    """Return the dicts that hold tensors, by the keys that lead to them; each once, however often it is referred to."""
    found: dict[str, dict[str, _TensorEntry]] = {}
    seen: set[int] = set()
    level = [("", saved)]
    for _ in range(MAX_NESTING):
        deeper: list[tuple[str, object]] = []
        for key, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            tensors = {name: entry for name, entry in value.items() if isinstance(entry, _TensorEntry)}
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


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _TensorEntry:
    """Where a tensor lies in the archive."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, name: str, storages: _Storages) -> Tensor:
        flat = storages.flat(self.storage.key, self.storage.dtype)
        elements = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if elements and (elements > len(flat) or last >= len(flat)):
            raise ValueError(
                f"{name[:100]}: {elements:,} elements up to index {last:,} in a storage of {len(flat):,} elements"
            )
        return flat.as_strided(self.size, self.stride, self.offset) if elements else flat.new_empty(self.size)


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; it is never imported."""

    module: str
    name: str


class _Inert:
    """An object of a class that was not imported."""


_INERT = _Inert()
_MAX_DIMENSIONS = 64  # of torch
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset({"PROTO", "FRAME"})


def _interpret(program: bytes) -> Any:
    """Run a pickle on a stack of plain values, `_TensorEntry`s and inert objects; return what it would return."""
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count == MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} opcodes in its pickle")
        try:
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode, argument)
        except IndexError:
            raise ValueError("its pickle takes more from the stack than there is") from None
    raise ValueError("its pickle has no end")


class _Machine:
    """The state of a pickle: a stack, the stacks below the marks, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:  # noqa: PLR0912, PLR0915 - a case per opcode
        """Execute an opcode. Those that are not listed push their argument, or are refused."""
        stack = self.stack
        match opcode.name:
            case name if name in _IGNORED:
                pass
            case name if name in _LITERALS:
                stack.append(_LITERALS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(_INERT)
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._pop_mark()
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError(f"its pickle refers to entry {argument} of its memo, which it has not made")
                stack.append(self._memo[argument])
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET" | "OBJ" | "INST":
                values = self._pop_mark()
                self.stack.append(_collect(opcode.name, values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode.name[-1]))))
            case "APPEND":
                _extend(stack[-2], self._pop(1))
            case "APPENDS" | "ADDITEMS":
                values = self._pop_mark()
                _extend(self.stack[-1], values)
            case "SETITEM":
                _fill(stack[-3], self._pop(2))
            case "SETITEMS":
                values = self._pop_mark()
                _fill(self.stack[-1], values)
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_Global(*map(str, self._pop(2))))
            case "REDUCE":
                function, arguments = self._pop(2)
                stack.append(_call(function, arguments))
            case "NEWOBJ" | "NEWOBJ_EX":
                self._pop(3 if opcode.name == "NEWOBJ_EX" else 2)
                stack.append(_INERT)
            case "BUILD":  # a state dict carries its modules' versions as an attribute: of no use here
                self._pop(1)
            case "BINPERSID":
                stack.append(_storage(*self._pop(1)))
            case name if not opcode.stack_before and len(opcode.stack_after) == 1 and argument is not None:
                stack.append(argument)
            case name:
                raise ValueError(f"opcode {name} in its pickle")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self._below:
            raise ValueError("its pickle goes back to a mark that it has not set")
        values, self.stack = self.stack, self._below.pop()
        return values


def _collect(name: str, values: list[Any]) -> Any:
    """Convert the items above a mark to the type that the opcode creates."""
    match name:
        case "TUPLE":
            return tuple(values)
        case "LIST":
            return values
        case "DICT":
            found: dict[str, Any] = {}
            _fill(found, values)
            return found
        case _:
            return _INERT


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)


def _fill(target: Any, values: list[Any]) -> None:
    """Keys and values in turn."""
    if isinstance(target, dict):
        for key, value in _pairs(values):
            if isinstance(key, str):
                target[key] = value
            elif isinstance(value, _TensorEntry):
                raise ValueError(f"a tensor under a key of type {type(key).__name__}; expected names")


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)


def _call(function: Any, arguments: Any) -> Any:
    """Return the result that the call of a known function would have."""
    match function:
        case _Global("collections", "OrderedDict"):
            return {}
        case _Global("torch._utils", "_rebuild_tensor_v2"):
            return _tensor(*arguments)
        case _Global("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        case _:
            return _INERT


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _TensorEntry:
    if not isinstance(storage, _Storage) or not (isinstance(size, tuple) and isinstance(stride, tuple)):
        raise ValueError("a tensor without storage or shape")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor whose shape, strides or offset are not natural numbers")
    return _TensorEntry(storage, offset, size, stride)


def _storage(pid: Any) -> _Storage:
    match pid:
        case ("storage", _Global("torch", name), str(key), *_) if name in DTYPES:
            return _Storage(key, DTYPES[name])
        case ("storage", _Global(_, name), *_):
            raise ValueError(f"a storage of the unknown type {name[:100]}")
        case _:
            raise ValueError("a storage that is not described as torch.save does")
