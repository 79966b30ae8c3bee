"""Reading a checkpoint's state (launch/run/state_file.py): the same tensors as safetensors reads, with one copy."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.run.checkpoint import STATE, Checkpoint, FileEntry, Fingerprint, hash_file
from launch.run.progress import Progress
from launch.run.state_file import tensors_of

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=5), st.booleans())
def test_tensors_are_those_that_were_saved(tensors: dict[str, tuple[torch.dtype, list[int]]], metadata: bool) -> None:
    state = {name: torch.randn(shape).mul(9).to(dtype) for name, (dtype, shape) in tensors.items()}
    state.pop("__metadata__", None)
    found = tensors_of(bytearray(safetensors.torch.save(state, {"a": "b"} if metadata else None)))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].equal(tensor)


def file_with(header: Any, data: bytes = bytes(8)) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def test_the_file_of_which_invalid_ones_are_made_is_valid() -> None:
    assert tensors_of(file_with(entry()))["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "content",
    [
        bytearray(),
        bytearray(b"\xff" * 100),
        file_with(b"not JSON"),
        file_with(b"[" * 5000),
        file_with([]),
        file_with({"w": {"a": "b"}}),
        file_with(entry(dtype="F7")),
        file_with(entry(dtype=4)),
        file_with(entry(shape=[3])),
        file_with(entry(shape=[-2])),
        file_with(entry(shape=[2**40, 2**40])),
        file_with(entry(shape=[1] * 100)),
        file_with(entry(data_offsets=[0, 16])),
        file_with(entry(data_offsets=[8, 0])),
        file_with(entry(data_offsets=[-8, 0])),
        file_with(entry(data_offsets=[2**50, 2**50 + 8])),
        file_with(entry(shape=[1], data_offsets=[2, 6])),  # not aligned
        file_with(entry(evil=1)),
    ],
)
def test_invalid_files_are_rejected(content: bytearray) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        tensors_of(content)


def test_the_state_is_held_once(tmp_path: Path) -> None:
    size = 8 << 20
    safetensors.torch.save_file({f"model/{i}": torch.ones(size // 16) for i in range(4)}, tmp_path / STATE)
    found = Checkpoint(tmp_path, Progress(), Fingerprint({}, {}), FileEntry(*hash_file(tmp_path / STATE)))
    tracemalloc.start()
    try:
        state = found.load()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(tensor.nbytes for tensor in state.values()) == size
    assert peak < 1.5 * size
