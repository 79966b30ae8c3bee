"""Count the operations of any model, for the utilization of the device and for --dry-run."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fat
from fat.account.cost import Cost
from fat.account.saved_tensors import SavedTensors
from launch.models.create import ROWS, trial

aten: Any = torch.ops.aten
# All other counted operations, such as bmm, are products of activations, as in attention.
LAYERS = (aten.convolution, aten.mm, aten.addmm)


def count(model: nn.Module, size: int) -> Cost:
    """Count the cost of an image of `size` x `size` pixels. Exact for FAT (`fat.count`).

    For other models, PyTorch's FLOP counter counts the matrix products and convolutions of a forward pass, normally on
    the meta device. Operations that it does not know, such as those of custom kernels, are not counted.

    Raises:
        UserError: the model does not support images of this size.
    """
    if isinstance(model, fat.FAT):
        return fat.count(model, size)
    twin, images, output = trial(model, size)
    del output
    saved = SavedTensors(twin)
    flops, products = FlopCounterMode(display=False), _Products(saved.of_model)
    with torch.random.fork_rng(devices=[]), flops, products, saved:
        output = twin(images)
    del output
    counts = flops.get_flop_counts()["Global"]
    layers = sum(n for operator, n in counts.items() if operator in LAYERS)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        conv_macs=layers // (2 * ROWS),
        attention_macs=(flops.get_total_flops() - layers) // (2 * ROWS),
        product_elements=products.elements // ROWS,
        activation_bytes=saved.nbytes // ROWS,
    )


class _Products(TorchDispatchMode):
    """Sums the input and output elements of matrix products and convolutions, without weights."""

    def __init__(self, of_model: Set[int]) -> None:
        super().__init__()
        self._of_model = of_model
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
            self.elements += sum(t.numel() for t in tensors if t.untyped_storage()._cdata not in self._of_model)
        return result
