"""Malicious weights files: files that would cost a reader minutes or gigabytes, or that are inconsistent.

`SAFETENSORS` and `CHECKPOINTS` map the name of each kind to a function that writes such a file.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Storage:
    """A tensor's storage, which `torch.save` writes as a separate member of the archive."""

    key: str = "0"
    kind: str = "FloatStorage"
    elements: int = 1


@dataclass(frozen=True)
class Claim:
    """A tensor as described in a pickle; its storage need not exist or be large enough."""

    size: tuple[Any, ...] = (1,)
    stride: tuple[Any, ...] = (1,)
    offset: int = 0
    storage: Storage = Storage()

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (self.storage, self.offset, self.size, self.stride, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, Storage):
            return "storage", getattr(torch, obj.kind), obj.key, "cpu", obj.elements
        return None


def program(saved: object) -> bytes:
    """Return the pickle that `torch.save` would write for an object in which tensors are replaced by `Claim`."""
    out = io.BytesIO()
    _Pickler(out, 2).dump(saved)
    return out.getvalue()


def write_checkpoint(
    path: Path, pickled: bytes, storages: Iterable[tuple[str, bytes]] = (("0", bytes(4)),), compressed: str = ""
) -> None:
    """Write an archive in the format of `torch.save`, with the member `compressed` compressed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pickled), *((f"data/{key}", content) for key, content in storages)):
            archive.writestr(f"a/{name}", content, zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED)


def write_directory(path: Path, members: int) -> None:
    """Write an archive that consists only of a directory, which lists one member `members` times."""
    entry = b"PK\1\2" + bytes(24) + b"\1\0" + bytes(16) + b"a"
    end = b"PK\5\6" + bytes(8) + struct.pack("<II", len(entry) * members, 0) + bytes(2)
    path.write_bytes(entry * members + end)


def write_safetensors(path: Path, header: bytes, content: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file. length: the header length that the file states, if it is wrong."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content)


def _header(**tensor: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **tensor}}).encode()


_PROTO = b"\x80\x02"


def _write_two(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program({}))
        archive.writestr("b/data.pkl", program({}))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: write_safetensors(path, b"", length=0),
    "header of 2^63 bytes": lambda path: write_safetensors(path, b"{}", length=2**63),
    "header of 90 MB": lambda path: write_safetensors(path, b"{}" + b" " * 90_000_000),
    "header without JSON": lambda path: write_safetensors(path, b"hello"),
    "deep header": lambda path: write_safetensors(path, b'{"a":' * 100_000),
    "tensor outside of the file": lambda path: write_safetensors(
        path, _header(shape=[4], data_offsets=[0, 16 * 10**9])
    ),
    "shape that overflows": lambda path: write_safetensors(path, _header(shape=[2**62, 8], data_offsets=[0, 0])),
    "negative offset": lambda path: write_safetensors(path, _header(data_offsets=[-4, 0])),
    "unknown dtype": lambda path: write_safetensors(path, _header(dtype="F7"), bytes(4)),
    "bytes that belong to no tensor": lambda path: write_safetensors(path, _header(), bytes(1000)),
}

CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "no archive": lambda path: _write(path, b"PK\5\6" + bytes(18)),
    "compressed storage of 200 MB": lambda path: write_checkpoint(
        path, program({"model": {"x": Claim()}}), [("0", bytes(200_000_000))], "data/0"
    ),
    "compressed pickle": lambda path: write_checkpoint(path, program({"x": Claim()}), compressed="data.pkl"),
    "stride 0 of 3 billion elements": lambda path: write_checkpoint(path, program({"x": Claim((3 * 10**9,), (0,))})),
    "stride 0 of 10^18 elements": lambda path: write_checkpoint(path, program({"x": Claim((10**18,), (0,))})),
    "shape whose product overflows": lambda path: write_checkpoint(path, program({"x": Claim((2**40,) * 3, (0,) * 3)})),
    "more elements than the storage": lambda path: write_checkpoint(path, program({"x": Claim((100,))})),
    "negative offset": lambda path: write_checkpoint(path, program({"x": Claim(offset=-5)})),
    "negative stride": lambda path: write_checkpoint(path, program({"x": Claim(stride=(-1,))})),
    "negative size": lambda path: write_checkpoint(path, program({"x": Claim((-1,))})),
    "shape of strings": lambda path: write_checkpoint(path, program({"x": Claim(("q",))})),
    "strides longer than shape": lambda path: write_checkpoint(path, program({"x": Claim((1,), (1, 1))})),
    "key of another file": lambda path: write_checkpoint(
        path, program({"x": Claim(storage=Storage("../../../../etc/passwd"))})
    ),
    "storage of an unknown type": lambda path: write_checkpoint(
        path, program({"x": Claim(storage=Storage(kind="QInt8Storage"))})
    ),
    "names other than strings": lambda path: write_checkpoint(path, program({"model": {5: Claim(), ("a",): Claim()}})),
    "pickle of 20 MB": lambda path: write_checkpoint(path, _PROTO + b"]" * 20_000_000 + b"."),
    "pickle of a million opcodes": lambda path: write_checkpoint(path, _PROTO + b"]" * 1_000_000 + b"."),
    "pickle nested 200,000 deep": lambda path: write_checkpoint(path, _PROTO + b"(" * 200_000 + b"t" * 200_000 + b"."),
    "key that takes 2^60 steps to hash": lambda path: write_checkpoint(
        path, _PROTO + b"}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."
    ),
    "key nested 200,000 deep": lambda path: write_checkpoint(path, _PROTO + b"}K\x01" + b"\x85" * 200_000 + b"K\x01s."),
    "integer of 2 GB": lambda path: write_checkpoint(path, _PROTO + b"\x8b\xff\xff\xff\x7fx."),
    "integer of 3 million digits": lambda path: write_checkpoint(path, b"I" + b"9" * 3_000_000 + b"\n."),
    "empty stack": lambda path: write_checkpoint(path, _PROTO + b"0" * 5 + b"."),
    "mark that was never set": lambda path: write_checkpoint(path, _PROTO + b"t."),
    "pickle without STOP": lambda path: write_checkpoint(path, _PROTO + b"]"),
    "memo that was never set": lambda path: write_checkpoint(path, _PROTO + b"h\x07."),
    "no pickle": lambda path: write_checkpoint(path, b"\xff" * 100),
    "directory of 400,000 members": lambda path: write_directory(path, 400_000),
    "two pickles": _write_two,
}
