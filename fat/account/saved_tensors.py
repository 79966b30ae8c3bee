"""Measure the memory that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context that records the tensors that autograd saves, except the model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.of_model: Set[int] = {
            tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())
        }
        """Addresses of the storages of the model's parameters and buffers."""
        self._saved: dict[int, torch.UntypedStorage] = {}  # keeping a reference prevents reuse of the address
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the saved storages. A storage that several operations save is counted once."""
        return sum(storage.nbytes() for storage in self._saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.of_model:
            self._saved[storage._cdata] = storage
        return tensor
