"""Training and evaluation passes on tensors without memory, to record the kernels that they would launch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fat.account.roofline import GpuFASA
from fat.batchnorm import BatchNorm
from fat.blocks import FASA

Module = TypeVar("Module", bound=nn.Module)


def training_step(
    model: nn.Module,
    images: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    freeze_bn: bool = False,
) -> Callable[[], object]:
    """Return a function that runs the forward and backward pass of one micro-batch.

    Args:
        model: on any device, not compiled or wrapped. It is not modified.
        images: shape [B, C, H, W].
        dtype: bfloat16 or float16: dtype of the images and of autocast. float32: no autocast.
        freeze_bn: BatchNorm layers are in evaluation mode.
    """

    def step() -> None:
        twin = fake_twin(model).train()
        for module in twin.modules():
            if freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with torch.enable_grad():
            _forward(twin, images, dtype).float().sum().backward()

    return step


def evaluation(
    model: nn.Module, images: tuple[int, int, int, int], *, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    """Return a function that runs the forward pass of one batch in evaluation mode. Arguments as in `training_step`."""

    def evaluate() -> None:
        with torch.no_grad():
            _forward(fake_twin(model).eval(), images, dtype)

    return evaluate


def _forward(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    images = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output: Tensor = model(images)
    return output


def fake_twin(model: Module) -> Module:
    """Copy a model to the CPU with new parameters and buffers, which under `FakeTensorMode` have no memory."""
    modules: dict[nn.Module, nn.Module] = {}
    tensors: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor not in tensors:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return tensors[tensor]

    def twin(module: nn.Module) -> nn.Module:
        if module in modules:
            return modules[module]
        new = modules[module] = copy.copy(module)
        new.__dict__["_compiled_call_impl"] = None
        new.__dict__["_parameters"] = {name: fake(tensor) for name, tensor in module._parameters.items()}
        new.__dict__["_buffers"] = {name: fake(tensor) for name, tensor in module._buffers.items()}
        new.__dict__["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        if isinstance(module, FASA) and type(module).attention is FASA.attention:
            new.__class__ = GpuFASA
        elif isinstance(module, BatchNorm):
            new.__class__ = BatchNorm  # uses one rank's statistics: a collective would wait for other ranks
        return new

    return cast(Module, twin(model))
