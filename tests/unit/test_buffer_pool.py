"""The pool of reusable buffers (pipeline/storage/buffer_pool.py): memory is reused only when nothing refers to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.storage.buffer_pool import BufferPool


def weighted_sum(tensor: torch.Tensor) -> Any:
    """Return a loss whose autograd graph has saved the tensor."""
    return (torch.ones(4, 3, requires_grad=True) * tensor).sum()


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[1:, ::2],
        lambda tensor: tensor.numpy(),
        lambda tensor: np.split(tensor.numpy().ravel(), [3, 5])[2],
        lambda tensor: tensor.permute(1, 0).to(torch.float32),
        torch.utils.dlpack.to_dlpack,
        weighted_sum,
    ],
)
def test_memory_is_reused_only_when_nothing_refers_to_it(derive: Callable[[torch.Tensor], Any]) -> None:
    buffers = BufferPool()
    tensor = buffers.empty((4, 3), torch.float32).fill_(2)
    address = tensor.data_ptr()
    kept = derive(tensor)
    del tensor
    other = buffers.empty((4, 3), torch.float32)
    assert other.data_ptr() != address
    del kept
    assert buffers.empty((4, 3), torch.float32).data_ptr() == address


def test_the_memory_of_a_larger_tensor_is_reused_for_a_smaller_one_but_not_vice_versa() -> None:
    buffers = BufferPool()
    address = buffers.empty((100,), torch.uint8).data_ptr()
    small = buffers.empty((10, 2), torch.int32)
    assert small.data_ptr() == address
    assert small.shape == (10, 2)
    del small
    assert buffers.empty((150,), torch.uint8).data_ptr() != address


def test_the_number_of_free_buffers_is_bounded() -> None:
    buffers = BufferPool()
    tensors = [buffers.empty((10,), torch.uint8) for _ in range(50)]
    del tensors
    assert len(buffers._free) < 10


def test_memory_freed_by_the_garbage_collector_during_a_call_is_reused_by_the_next() -> None:
    buffers = BufferPool()
    tensors = [buffers.empty((10,), torch.uint8)]
    address = tensors[0].data_ptr()

    def collect() -> None:
        with buffers._lock:
            tensors.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), "deadlock: waits for a lock that the same thread holds"
    assert buffers.empty((10,), torch.uint8).data_ptr() == address


def test_pageable_memory_is_used_after_pinned_memory_could_not_be_allocated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocated: list[int] = []
    real = torch.empty

    def empty(size: int, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        allocated.append(size)
        if len(allocated) > 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    buffers = BufferPool(pinned=True)
    first = buffers.empty((100,), torch.uint8).fill_(1)
    address = first.data_ptr()
    assert len(allocated) == 1
    del first
    kept = buffers.empty((100,), torch.uint8)
    assert (kept.data_ptr(), len(allocated)) == (address, 1)
    others = [buffers.empty((100,), torch.uint8).fill_(2) for _ in range(3)]
    assert len(allocated) == 2, "no further attempt after a failure"
    assert len(caplog.messages) == 1
    assert "cannot page-lock memory for encoded images (CUDA error: out of memory)" in caplog.text
    assert len({one.data_ptr() for one in (kept, *others)}) == 4
