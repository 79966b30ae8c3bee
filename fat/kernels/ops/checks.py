"""Checks of the operators' arguments: memory format, dtype, device and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
SIZES = (3, 5, 7, 9)
STRIDES = (1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def check_feature_maps(first: Tensor, *others: Tensor) -> None:
    """Raise ValueError unless all are feature maps that the kernels accept, of one dtype and on one device."""
    for x in (first, *others):
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"feature map of shape {tuple(x.shape)} and strides {x.stride()}: fat::* operators expect [B, C, H, W] "
                "in channels-last memory; use .contiguous(memory_format=torch.channels_last)"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"feature map in {x.dtype}: fat::* operators expect {', '.join(map(str, DTYPES))}")
        if (x.device, x.dtype) != (first.device, first.dtype):
            raise ValueError(
                f"feature maps on {first.device} in {first.dtype} and on {x.device} in {x.dtype}: expected one device "
                "and one dtype"
            )


def check_depthwise_weight(weight: Tensor, x: Tensor, stride: int, residual: bool) -> None:
    """Raise ValueError unless these are depthwise weights for x that the kernels support."""
    kernel = weight.shape[-1]
    if weight.shape != (x.shape[1], 1, kernel, kernel) or kernel not in SIZES:
        raise ValueError(
            f"depthwise weights of shape {tuple(weight.shape)} for {x.shape[1]} channels: expected "
            f"[{x.shape[1]}, 1, k, k] with k one of {', '.join(map(str, SIZES))}"
        )
    if stride not in STRIDES or (residual and stride != 1):
        raise ValueError(f"stride {stride}, residual {residual}: expected stride 1, or stride 2 without residual")
    if weight.device != x.device:
        raise ValueError(f"depthwise weights on {weight.device}, feature map on {x.device}: expected one device")


def empty_feature_map(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def on_tensor_device(function: Function) -> Function:
    """Make the device of the first argument current during a call, since Triton launches on the current device."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *rest, **options)
        return function(first, *rest, **options)

    return run  # type: ignore[return-value]
