"""FAT's Triton kernels, and the choice between them and plain PyTorch.

    if kernels.can_use(x):
        y = kernels.depthwise(x, weight, bias)

The kernels require Triton and a CUDA device of compute capability 8.0 or higher. They accept feature maps [B, C, H, W]
in channels-last memory, in float32, bfloat16 or float16. Everything else is computed by PyTorch, as are `torch.export`,
ONNX export and everything under `kernels.use("off")`. An operator whose kernel family is switched off
(`fat.kernels.families`) also falls back to PyTorch. With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for
tests.

Under autocast, feature maps are read and stored in autocast's dtype, weights remain fp32, and sums are fp32.
docs/kernels.md explains what is fused and why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat.batchnorm import BatchNorm
from fat.kernels import ops
from fat.kernels.families import FAMILIES, disable, disabled, switched_off
from fat.kernels.impl import tiles
from fat.kernels.ops.checks import DTYPES, SIZES, STRIDES

__all__ = [
    "FAMILIES",
    "SIZES",
    "STRIDES",
    "Mode",
    "add",
    "add_norm",
    "assume_available",
    "attend",
    "available",
    "batch_norm_relu",
    "can_attend",
    "can_use",
    "depthwise",
    "depthwise_gate",
    "depthwise_norm",
    "depthwise_stats",
    "disable",
    "disabled",
    "fold",
    "gate",
    "mode",
    "norm",
    "pointwise",
    "supported",
    "switched_off",
    "update_running_stats",
    "use",
]

Mode = Literal["auto", "off", "unchecked"]
MODES: tuple[Mode, ...] = ("auto", "off", "unchecked")
MIN_CAPABILITY = (8, 0)  # the first capability with bfloat16


def can_use(*maps: Tensor) -> bool:
    """Return whether the kernels accept all of these feature maps. Weights may have any floating-point dtype."""
    return all(
        x.ndim == 4
        and x.numel() > 0
        and x.dtype in DTYPES
        and available(x.device.type)
        and x.is_contiguous(memory_format=torch.channels_last)
        for x in maps
    )


_mode: ContextVar[Mode] = ContextVar("mode", default="auto")
_assumed = ContextVar("assumed", default=False)


def mode() -> Mode:
    """Return the mode that `use` has set; "auto" by default."""
    return _mode.get()


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Set whether forward passes in this context use the kernels.

    The mode is a context variable: it applies to the current thread, and new threads start with "auto". Backward
    passes, which autograd runs in other threads, use the mode of their forward pass.

    Args:
        mode: "auto": use the kernels; `launch` runs the self-check, which compares them with PyTorch, before it trains,
            measures or evaluates a model. "off": use only PyTorch. "unchecked": use the kernels without the self-check.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"{mode}: expected {', '.join(MODES[:-1])} or {MODES[-1]}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def assume_available() -> Iterator[None]:
    """Treat the kernels as available on any device, for tracing with tensors that have no memory."""
    token = _assumed.set(True)
    try:
        yield
    finally:
        _assumed.reset(token)


def available(device: str) -> bool:
    """Return whether the kernels can run on a device type, "cuda" or "cpu", in the current mode.

    A compiled model keeps the result from the time of its compilation.
    """
    # This check is not in `can_use`, because PyTorch 2.11's compiler assumes that is_exporting() is true in functions
    # that it compiles. It does not compile this function, but calls it.
    if torch.compiler.is_exporting():
        return False
    if _assumed.get():
        return True
    return mode() != "off" and supported(device)


# Same effect as torch.compiler.assume_constant_result, which would import the compiler and Triton and take a second.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supported(device: str) -> bool:
    """Return whether the kernels can run on a device type, "cuda" or "cpu", in a mode other than "off"."""
    return _supported(device, os.environ.get("TRITON_INTERPRET") == "1")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, residual: bool = False) -> Tensor:
    """Compute a depthwise k x k convolution with padding k // 2. weight: [C, 1, k, k]. residual: add x, in fp32."""
    return ops.depthwise(_cast(x), weight, bias, stride, residual)


def can_attend(q: Tensor, kv: Tensor, heads: int) -> bool:
    """Return whether `attend` accepts these feature maps."""
    return can_use(q, kv) and tiles.attention_fits(q.shape[1] // heads, kv.shape[2] * kv.shape[3])


def attend(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T) v for each head. q, result: [B, C, H, W]; kv: [B, 2 C, h, w], keys first."""
    return ops.attend(_cast(q), _cast(kv), heads, scale)


def depthwise_gate(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """Compute SiLU(depthwise(q)) * SiLU(other). The backward pass recomputes depthwise(q)."""
    return ops.depthwise_gate(_cast(q), weight, bias, _cast(other))


def depthwise_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, residual: bool = False, gelu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `depthwise` of x, or of GELU(x), and its mean and biased variance per channel, fp32 [C]. All three results
    are differentiable."""
    x = _cast(x)
    if gelu:  # the gradient of GELU is computed in the kernel of the convolution's input gradient
        return ops.depthwise_stats(F.gelu(x.detach()), x, weight, bias, stride, residual)
    return ops.depthwise_stats(x, None, weight, bias, stride, residual)


def fold(
    after: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return weights [O, C, 1, 1] and bias [O], in dtype, of `after(norm(x))` as one 1x1 convolution."""
    assert after.bias is not None
    return ops.fold(after.weight, after.bias, norm.weight, norm.bias, mean, var, norm.eps, dtype)


def update_running_stats(norm: BatchNorm, drift: Tensor, var: Tensor, count: int) -> None:
    """Run `BatchNorm.update_running_stats` in one kernel, or do nothing if activation checkpointing recomputes."""
    batches, momentum = norm.num_batches_tracked, norm.momentum
    if torch.compiler.is_compiling():  # torch.compile fuses these operations itself
        norm.update_running_stats(drift, var, count)
    elif momentum and batches is not None:
        correction = norm.correction(count)
        ops.update_running_stats(
            norm.running_mean, norm.running_var, batches, drift.detach(), var.detach(), momentum, correction
        )


def batch_norm_relu(x: Tensor, bias: Tensor | None, norm: BatchNorm) -> Tensor:
    """Compute ReLU(norm(x + bias)) with batch statistics, and update the running statistics.

    x: result of a convolution without its bias. bias: this bias, [C]; it only changes the running mean, since BatchNorm
    subtracts it, and its gradient is zero.
    """
    result, mean, var = ops.batch_norm_relu(_cast(x), bias, norm)
    drift = mean - norm.running_mean if bias is None else mean - norm.running_mean + bias.detach()
    update_running_stats(norm, drift, var, x.numel() // x.shape[1])
    return result


def gate(local: Tensor, other: Tensor) -> Tensor:
    """Compute SiLU(local) * SiLU(other)."""
    return ops.gate(_cast(local), _cast(other))


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute GroupNorm with one group, with fp32 statistics, in x's dtype. weight, bias: [C]."""
    return ops.norm(_cast(x), weight, bias, eps)[0]


def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """Compute x + scale * branch in fp32, and return it in x's dtype. scale: fp32 [B], a factor per sample."""
    return ops.add(_cast(x), _cast(branch), scale)


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y = `add` of x and branch, and `norm` of y."""
    total, normalized, _, _ = ops.add_norm(_cast(x), _cast(branch), scale, weight, bias, eps)
    return total, normalized


def depthwise_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y = x + depthwise(x), and `norm` of y."""
    total, normalized, _, _ = ops.depthwise_norm(_cast(x), weight, bias, norm_weight, norm_bias, eps)
    return total, normalized


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a 1x1 convolution by PyTorch's matrix product. The bias gradient is computed by FAT's kernel."""
    return ops.pointwise(_cast(x), weight, bias)


def _cast(x: Tensor) -> Tensor:
    """Cast a feature map to autocast's dtype, as PyTorch does for convolutions but not for custom operators."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


@functools.cache
def _supported(device: str, interpreted: bool) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        return not interpreted and torch.cuda.get_device_capability() >= MIN_CAPABILITY
    return device == "cpu" and interpreted
