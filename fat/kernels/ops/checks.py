"""The maps that the operators take: [B, C, H, W] in channels-last memory, of a few dtypes, on one device."""

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


def expect(first: Tensor, *others: Tensor) -> None:
    """Raises ValueError unless all are alike and as the kernels read them."""
    for x in (first, *others):
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"a map of shape {tuple(x.shape)} and strides {x.stride()}: fat::* kernels expect [B, C, H, W] in "
                "channels-last memory; use .contiguous(memory_format=torch.channels_last)"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"a map in {x.dtype}: fat::* kernels expect one of {', '.join(map(str, DTYPES))}")
        if (x.device, x.dtype) != (first.device, first.dtype):
            raise ValueError(
                f"maps on {first.device} in {first.dtype} and on {x.device} in {x.dtype}: expected one device and dtype"
            )


def expect_weight(weight: Tensor, x: Tensor, stride: int, residual: bool) -> None:
    kernel = weight.shape[-1]
    if weight.shape != (x.shape[1], 1, kernel, kernel) or kernel not in SIZES:
        raise ValueError(
            f"depthwise weights of shape {tuple(weight.shape)} for {x.shape[1]} channels: expected "
            f"[{x.shape[1]}, 1, k, k] with k one of {', '.join(map(str, SIZES))}"
        )
    if stride not in STRIDES or (residual and stride != 1):
        raise ValueError(f"stride {stride}, residual {residual}: expected stride 1, or stride 2 without residual")
    if weight.device != x.device:
        raise ValueError(f"depthwise weights on {weight.device} and a map on {x.device}: expected one device")


def empty_feature_map(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def on_its_device(function: Function) -> Function:
    """Triton launches on the current device, torch's operators on their tensors'."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *rest, **options)
        return function(first, *rest, **options)

    return run  # type: ignore[return-value]
