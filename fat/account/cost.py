"""Count a model's parameters, multiply-accumulates and bytes stored for the backward pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fat.account.saved_tensors import SavedTensors
from fat.blocks import FASA
from fat.model import Trunk

BATCH = 2  # BatchNorm cannot train on one value per channel, which a single 32x32 image would give it


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass of one image at one image size."""

    parameters: int
    """Number of trainable parameters."""
    conv_macs: int
    """Multiply-accumulates of convolutions and linear layers, which the paper counts."""
    attention_macs: int
    """Multiply-accumulates of the two attention products, q k^T and softmax times v."""
    product_elements: int
    """Input and output elements of convolutions, linear layers and attention in one forward pass, without weights: the
    elements that must pass through memory if all other operations are fused into these."""
    activation_bytes: int
    """Bytes that eager autograd stores between forward and backward pass in the parameters' dtype, without fused
    attention. Copies to other memory formats, about 3 % on a CPU, are not included."""

    @property
    def macs(self) -> int:
        """Total multiply-accumulates."""
        return self.conv_macs + self.attention_macs

    @property
    def training_flops(self) -> int:
        """Floating-point operations of forward and backward pass, as counted for model FLOP utilization (MFU): two for
        each multiply-accumulate, and twice as many in the backward as in the forward pass."""
        return 6 * self.macs

    def fused_bytes(self, itemsize: int, *, training: bool = True) -> int:
        """Return the bytes that perfectly fused blocks move: a lower bound on memory traffic.

        In training each element is moved three times. Inputs are read in the forward pass, read again for the weight
        gradient, and their gradient is written. Outputs are written in the forward pass, and their gradient is read
        twice, for the input and the weight gradient.

        itemsize: bytes per element.
        """
        return (3 if training else 1) * itemsize * self.product_elements


def count(model: Trunk, size: int | tuple[int, int] = 224) -> Cost:
    """Count the cost of one image by running a copy of the model on the meta device, without computing values.

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
        # The first term counts the elements of queries and result, the second those of keys and values.
        elements += 2 * output.numel() + 2 * output.shape[0] * output.shape[1] * keys

    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add_layer)
        elif isinstance(module, FASA):
            module.register_forward_hook(add_attention)

    dtype = next(twin.parameters()).dtype
    images = torch.empty(BATCH, twin.config.in_chans, height, width, dtype=dtype, device="meta")
    saved = SavedTensors(twin)
    with saved:
        output = twin(images)
    del output
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        conv_macs=conv_macs // BATCH,
        attention_macs=attention_macs // BATCH,
        product_elements=elements // BATCH,
        activation_bytes=saved.nbytes // BATCH,
    )
