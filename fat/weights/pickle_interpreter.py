"""Interpret a pickle of tensors without executing it.

A pickle is a program: it can import and call any function, hash objects that take hours to hash, or nest objects until
the stack overflows. Here the opcodes are interpreted one by one, and nothing is imported or called. The names that a
state dict needs (`_call`, `_storage`) are implemented here; every other object is replaced by an inert one, on which
all operations have no effect. Dict keys that are not strings are dropped without being hashed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MAX_OPCODES = 500_000
"""Maximum opcodes of data.pkl. A checkpoint of fat_b3 with its optimizer's state has 0.1 million."""

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
_MAX_DIMENSIONS = 64  # maximum number of a tensor's dimensions in PyTorch
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset({"PROTO", "FRAME"})


@dataclass(frozen=True)
class StorageKey:
    """Name of the archive member that contains a storage, and the storage's dtype."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor in the archive."""

    storage: StorageKey
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A module attribute that the pickle refers to; it is never imported."""

    module: str
    name: str


class _Inert:
    """Replacement for an object whose class is not imported."""


_INERT = _Inert()


def interpret(program: bytes) -> Any:
    """Interpret a pickle and return its value, made of plain values, `TensorEntry` and inert objects."""
    interpreter = _Interpreter()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count == MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} opcodes")
        try:
            if opcode.name == "STOP":
                return interpreter.stack.pop()
            interpreter.step(opcode, argument)
        except IndexError:
            raise ValueError("its pickle pops from an empty stack") from None
    raise ValueError("its pickle has no STOP opcode")


class _Interpreter:
    """The state of a pickle: a stack, the stacks below the marks, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:  # noqa: PLR0912, PLR0915 - a case per opcode
        """Interpret an opcode. An unlisted opcode pushes its argument, or raises ValueError if it has none."""
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
                    raise ValueError(f"its pickle reads entry {argument} of the memo, which it has not written")
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
            case "BUILD":  # sets attributes, which are not needed: those of a state dict are module versions
                self._pop(1)
            case "BINPERSID":
                stack.append(_storage(*self._pop(1)))
            case name if not opcode.stack_before and len(opcode.stack_after) == 1 and argument is not None:
                stack.append(argument)
            case name:
                raise ValueError(f"its pickle has the unsupported opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self._below:
            raise ValueError("its pickle pops a mark that it has not set")
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
    """Store alternating keys and values in a dict."""
    if isinstance(target, dict):
        for key, value in _pairs(values):
            if isinstance(key, str):
                target[key] = value
            elif isinstance(value, TensorEntry):
                raise ValueError(f"a dict of tensors has a key of type {type(key).__name__}; expected strings")


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)


def _call(function: Any, arguments: Any) -> Any:
    """Return the result of calling a function that is implemented here; for all other functions, an inert object."""
    match function:
        case _Global("collections", "OrderedDict"):
            return {}
        case _Global("torch._utils", "_rebuild_tensor_v2"):
            return _tensor(*arguments)
        case _Global("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        case _:
            return _INERT


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorEntry:
    if not isinstance(storage, StorageKey) or not (isinstance(size, tuple) and isinstance(stride, tuple)):
        raise ValueError("a tensor has no storage or no shape")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has an invalid shape, stride or offset; expected non-negative integers")
    return TensorEntry(storage, offset, size, stride)


def _storage(pid: Any) -> StorageKey:
    match pid:
        case ("storage", _Global("torch", name), str(key), *_) if name in DTYPES:
            return StorageKey(key, DTYPES[name])
        case ("storage", _Global(_, name), *_):
            raise ValueError(f"a storage has the unsupported type {name[:100]}")
        case _:
            raise ValueError("a storage is not described in the format of torch.save")
