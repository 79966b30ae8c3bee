"""Buffers that are used again (pipeline/storage/buffer_pool.py): only when nothing refers to them any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.storage.buffer_pool import BufferPool


def weighted_sum(tensor: torch.Tensor) -> Any:
    """A loss whose graph has saved the tensor for its gradient."""
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
def test_memory_is_used_again_when_nothing_refers_to_it_and_not_before(derive: Callable[[torch.Tensor], Any]) -> None:
    buffers = BufferPool()
    tensor = buffers.empty((4, 3), torch.float32).fill_(2)
    place = tensor.data_ptr()
    kept = derive(tensor)
    del tensor
    other = buffers.empty((4, 3), torch.float32)
    assert other.data_ptr() != place
    del kept
    assert buffers.empty((4, 3), torch.float32).data_ptr() == place


def test_a_smaller_tensor_may_have_a_larger_one_s_memory_not_the_other_way_round() -> None:
    buffers = BufferPool()
    place = buffers.empty((100,), torch.uint8).data_ptr()
    small = buffers.empty((10, 2), torch.int32)
    assert small.data_ptr() == place
    assert small.shape == (10, 2)
    del small
    assert buffers.empty((150,), torch.uint8).data_ptr() != place


def test_it_keeps_few_buffers() -> None:
    buffers = BufferPool()
    tensors = [buffers.empty((10,), torch.uint8) for _ in range(50)]
    del tensors
    assert len(buffers._free) < 10


def test_memory_that_the_garbage_collector_frees_inside_a_call_is_used_by_the_next() -> None:
    buffers = BufferPool()
    tensors = [buffers.empty((10,), torch.uint8)]
    place = tensors[0].data_ptr()

    def collect() -> None:
        with buffers._lock:
            tensors.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), "waits for a lock that its own thread holds"
    assert buffers.empty((10,), torch.uint8).data_ptr() == place


def test_pinned_memory_is_asked_for_once_a_buffer_and_done_without_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    real = torch.empty

    def empty(size: int, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(size)
        if len(asked) > 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    buffers = BufferPool(pinned=True)
    first = buffers.empty((100,), torch.uint8).fill_(1)
    place = first.data_ptr()
    assert len(asked) == 1
    del first
    kept = buffers.empty((100,), torch.uint8)
    assert (kept.data_ptr(), len(asked)) == (place, 1)
    others = [buffers.empty((100,), torch.uint8).fill_(2) for _ in range(3)]
    assert len(asked) == 2, "after a failure it is not tried again"
    assert len(caplog.messages) == 1
    assert "(CUDA error: out of memory)" in caplog.text
    assert len({one.data_ptr() for one in (kept, *others)}) == 4
