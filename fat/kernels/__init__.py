"""FAT's own kernels (Triton), and the choice between them and plain torch.

    if kernels.can_use(x):
        y = kernels.depthwise(x, weight, bias)

They serve maps [B, C, H, W] in channels-last memory on CUDA devices of compute capability 8.0 and up, where Triton is
installed; float32, bfloat16 and float16. All else, and all of it under `kernels.use("off")`, is left to torch; so are
`torch.export` and ONNX. An operator whose family of kernels is switched off (`fat.kernels.families`) runs in torch.
With TRITON_INTERPRET=1 they serve CPU maps, slowly: that is how they are tested.

Under autocast maps are read and stored in its dtype, weights stay as they are (fp32) and sums are in fp32.
docs/kernels.md says what is fused and why.
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
MIN_CAPABILITY = (8, 0)  # bfloat16


def can_use(*maps: Tensor) -> bool:
    """Whether the kernels take these maps as they are, all of them. Weights may be in any float dtype."""
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
    """The mode that `use` has set, else "auto"."""
    return _mode.get()


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Set whether forward passes inside use the kernels.

    The mode is a context variable: it holds in this thread, and a new one starts with "auto". Backward passes, which
    autograd runs in threads of its own, go by the mode of their forward pass.

    Args:
        mode: auto = use them; `launch` compares them with torch before it trains, measures or evaluates a model. off =
            torch alone. unchecked = use them without that comparison.

    Raises:
        ValueError: another mode.
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
    """The kernels count as available on any device, to trace what they would do on tensors without memory."""
    token = _assumed.set(True)
    try:
        yield
    finally:
        _assumed.reset(token)


def available(device: str) -> bool:
    """Whether there are kernels for that type of device, "cuda" or "cpu", here and now.

    A compiled model keeps the answer that it was compiled with.
    """
    # Here, not in `serves`: the compiler of torch 2.11 takes is_exporting() to be true whatever it is asked in,
    # but calls this function as it is.
    if torch.compiler.is_exporting():
        return False
    if _assumed.get():
        return True
    return mode() != "off" and supported(device)


# What torch.compiler.assume_constant_result does; the decorator imports the compiler: a second, and Triton.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supported(device: str) -> bool:
    """Whether there are kernels for that type of device, in any mode but "off"."""
    return _supported(device, os.environ.get("TRITON_INTERPRET") == "1")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, residual: bool = False) -> Tensor:
    """Depthwise k x k convolution with padding k // 2, plus x in fp32 where `residual`. weight: [C, 1, k, k]."""
    return ops.depthwise(_cast(x), weight, bias, stride, residual)


def can_attend(q: Tensor, kv: Tensor, heads: int) -> bool:
    """Whether `attend` takes these maps."""
    return can_use(q, kv) and tiles.attention_fits(q.shape[1] // heads, kv.shape[2] * kv.shape[3])


def attend(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(scale * q k^T) v by heads. q [B, C, H, W]; kv [B, 2 C, h, w], keys first; returns q's shape."""
    return ops.attend(_cast(q), _cast(kv), heads, scale)


def depthwise_gate(q: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """SiLU(depthwise(q)) * SiLU(other). The backward pass works depthwise(q) out again."""
    return ops.depthwise_gate(_cast(q), weight, bias, _cast(other))


def depthwise_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, residual: bool = False, gelu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(`depthwise` of x, or of GELU(x), its mean and its variance without correction, fp32 [C]), differentiable all."""
    x = _cast(x)
    if gelu:  # whose gradient is taken on the way out of the convolution's
        return ops.depthwise_stats(F.gelu(x.detach()), x, weight, bias, stride, residual)
    return ops.depthwise_stats(x, None, weight, bias, stride, residual)


def fold(
    after: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights [O, C, 1, 1] and bias [O] with which `after`, a 1x1 convolution, does the norm's work too, in dtype."""
    assert after.bias is not None
    return ops.fold(after.weight, after.bias, norm.weight, norm.bias, mean, var, norm.eps, dtype)


def update_running_stats(norm: BatchNorm, drift: Tensor, var: Tensor, count: int) -> None:
    """`BatchNorm.update_running_stats`, in one launch; in none where the backward pass repeats the forward one."""
    batches, momentum = norm.num_batches_tracked, norm.momentum
    if torch.compiler.is_compiling():  # joins what there is to do
        norm.update_running_stats(drift, var, count)
    elif momentum and batches is not None:
        correction = norm.correction(count)
        ops.update_running_stats(
            norm.running_mean, norm.running_var, batches, drift.detach(), var.detach(), momentum, correction
        )


def batch_norm_relu(x: Tensor, before: Tensor | None, norm: BatchNorm) -> Tensor:
    """ReLU(norm(x + before)) in training, with BatchNorm over the batch, whose running statistics are moved. x: without
    the bias `before` of the convolution behind it, which a norm takes out again; its gradient is zero."""
    result, mean, var = ops.batch_norm_relu(_cast(x), before, norm)
    drift = mean - norm.running_mean if before is None else mean - norm.running_mean + before.detach()
    update_running_stats(norm, drift, var, x.numel() // x.shape[1])
    return result


def gate(local: Tensor, other: Tensor) -> Tensor:
    """SiLU(local) * SiLU(other)."""
    return ops.gate(_cast(local), _cast(other))


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm with one group, statistics in fp32, in x's dtype. weight, bias: [C]."""
    return ops.norm(_cast(x), weight, bias, eps)[0]


def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale * branch, worked out in fp32, in x's dtype. scale: fp32 [B], one factor per sample."""
    return ops.add(_cast(x), _cast(branch), scale)


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(`add`, `norm` of it)."""
    total, normalised, _, _ = ops.add_norm(_cast(x), _cast(branch), scale, weight, bias, eps)
    return total, normalised


def depthwise_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + depthwise(x), `norm` of it)."""
    total, normalised, _, _ = ops.depthwise_norm(_cast(x), weight, bias, norm_weight, norm_bias, eps)
    return total, normalised


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution by torch's matrix products, with the gradient by bias from our own sums."""
    return ops.pointwise(_cast(x), weight, bias)


def _cast(x: Tensor) -> Tensor:
    """Custom operators take no part in autocast; this is the part that a convolution's maps take in it."""
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
