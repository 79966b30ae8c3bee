"""What a model costs: parameters, multiply-accumulates, bytes kept for the backward pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fat.blocks import FASA
from fat.model import Trunk

BATCH = 2  # BatchNorm cannot train on one value per channel, which is all that a single 32x32 image leaves it


@dataclass(frozen=True)
class Cost:
    """Of one image at one size."""

    parameters: int
    """Trainable numbers."""
    conv_macs: int
    """Multiply-accumulates of convolutions and linear layers: what the paper counts."""
    attention_macs: int
    """Multiply-accumulates of the two attention products, q k^T and softmax times v."""
    product_elements: int
    """Numbers that convolutions, linear layers and attention take in and give out in one forward pass, weights left
    out: what must pass through memory if everything between them is done while these pass by."""
    activation_bytes: int
    """Bytes that eager autograd keeps between forward and backward in the parameters' dtype, attention written out; the
    copies that a device makes to suit its layout, some 3 % on a CPU, come on top."""

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.conv_macs + self.attention_macs

    @property
    def training_flops(self) -> int:
        """Floating-point operations of forward and backward, as model FLOP utilisation counts them: two for each
        multiply-accumulate, and the backward pass is twice the forward."""
        return 6 * self.macs

    def fused_bytes(self, itemsize: int, *, training: bool = True) -> int:
        """Bytes that perfectly fused blocks move, in numbers of `itemsize` bytes; the floor of memory traffic.

        Training passes each number three times: inputs are read forward, read again for the weight's gradient, and
        their own gradient is written; outputs are written forward, and their gradient is read for either gradient.
        """
        return (3 if training else 1) * itemsize * self.product_elements


def count(model: Trunk, size: int | tuple[int, int] = 224) -> Cost:
    """The cost of one image, found by running a copy of the model on the meta device: nothing is computed.

    size: side of a square image in pixels, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    twin = copy.deepcopy(model).to("meta").train()
    conv_macs = attention_macs = elements = 0

    def add_layer(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal conv_macs, elements
        conv_macs += output.numel() * layer.weight[0].numel()
        elements += inputs[0].numel() + output.numel()

    def add_attention(fasa: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal attention_macs, elements
        keys = -(-output.shape[2] // fasa.window) * -(-output.shape[3] // fasa.window)
        attention_macs += 2 * output.numel() * keys
        elements += 2 * output.numel() + 2 * output.shape[0] * output.shape[1] * keys  # q, result; k, v

    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add_layer)
        elif isinstance(module, FASA):
            module.register_forward_hook(add_attention)

    own = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their identities apart

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    dtype = next(twin.parameters()).dtype
    images = torch.empty(BATCH, twin.config.in_chans, height, width, dtype=dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = twin(images)
    del output
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        conv_macs=conv_macs // BATCH,
        attention_macs=attention_macs // BATCH,
        product_elements=elements // BATCH,
        activation_bytes=sum(storage.nbytes() for storage in kept.values()) // BATCH,
    )
