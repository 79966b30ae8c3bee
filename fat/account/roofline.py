"""Count bytes and operations of a training step, and the throughput that a device could reach with them.

    python -m fat.account.roofline [--batch 256] [--size 224] [--bandwidth TB/s] [--arithmetic TFLOP/s]
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fat import kernels
from fat.account.arguments import number, parser
from fat.account.cost import count
from fat.batchnorm import BatchNorm
from fat.blocks import FASA
from fat.config import VARIANTS
from fat.layers import GroupNorm1, norm_rows
from fat.model import FAT, MIN_SIZE

BATCH = 2  # with one image, a channel may have a single value, on which BatchNorm cannot train
H200 = (4.3, 989.0)  # TB/s measured with copies; dense bf16 TFLOP/s from NVIDIA's data sheet

aten: Any = torch.ops.aten
# Number of leading arguments that are read twice, because a kernel reads all of a tensor before it can write, or
# because the operation consists of two kernels.
SECOND_READ = {
    aten.native_batch_norm.default: 1,  # the input is read for the statistics, then for the result
    aten._native_batch_norm_legit.default: 1,
    aten._batch_norm_with_update.default: 1,
    aten.native_batch_norm_backward.default: 1,  # grad_out is read for two sums, then for the input gradient
    aten.batch_norm_backward.default: 1,
    aten.native_layer_norm.default: 1,
    aten.native_layer_norm_backward.default: 1,
    aten.native_group_norm.default: 1,
    aten.native_group_norm_backward.default: 1,
    aten.convolution_backward.default: 1,  # grad_out is read for the input gradient and for the weight gradient
    # FAT's kernels (docs/kernels.md).
    torch.ops.fat.norm.default: 1,
    torch.ops.fat.add_norm.default: 1,
    torch.ops.fat.depthwise_norm.default: 1,
    torch.ops.fat.norm_gradient.default: 2,  # both the gradient and the feature map are read twice
    torch.ops.fat.add_norm_gradient.default: 2,
}
# Operations that do most of the arithmetic; all other operations could be fused into them.
PRODUCTS = ("convolution", "mm", "scaled_dot_product", "attend")


@dataclass(frozen=True)
class Roofline:
    """Operations and memory traffic of one image in a training step (forward and backward)."""

    flops: int
    """Floating-point operations: 2 per multiply-accumulate; the backward pass has twice those of the forward pass."""
    eager_bytes: int
    """Bytes read and written in eager mode without FAT's kernels, where no operations are fused."""
    bytes: int
    """Bytes read and written in eager mode with FAT's kernels (`fat.kernels`)."""
    fused_bytes: int
    """Bytes that perfectly fused blocks read and write (`Cost.fused_bytes`)."""
    kernels: int
    """Operations per step in eager mode without FAT's kernels, at any batch size; most are one kernel each."""


def ceiling(flops: float, moved: float, *, bandwidth: float, arithmetic: float) -> float:
    """Return the highest possible throughput in images/s, when memory access and arithmetic overlap perfectly.

    Args:
        flops, moved: floating-point operations and bytes per image.
        bandwidth, arithmetic: the device's bytes/s and FLOP/s.
    """
    return 1 / max(moved / bandwidth, flops / arithmetic)


def roofline(model: FAT, size: int = 224, *, dtype: torch.dtype = torch.bfloat16) -> Roofline:
    """Count operations and bytes of a training step, per image of `size` x `size` pixels.

    No values are computed; it takes about ten seconds. The optimizer is not included: AdamW in fp32 moves 28 bytes per
    parameter and step, 1 % at a batch size of 256.

    Args:
        dtype: bfloat16: autocast with fp32 parameters, as in training on GPUs. float32: no autocast.
    """
    cost = count(model, size)
    small, large, small_fused, large_fused = (
        trace_step(model, size, dtype, batch, use_kernels=use_kernels)
        for use_kernels in (False, True)
        for batch in (BATCH, 2 * BATCH)
    )
    return Roofline(
        flops=cost.training_flops,
        eager_bytes=(large.bytes - small.bytes) // BATCH,  # excludes weights, whose bytes are constant
        bytes=(large_fused.bytes - small_fused.bytes) // BATCH,
        fused_bytes=cost.fused_bytes(dtype.itemsize),
        kernels=small.kernels,
    )


class Trace(TorchDispatchMode):
    """Sum the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.product_bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fat.depthwise_stats.default:
            args = (args[0], None, *args[2:])  # the input of GELU is only saved for the backward pass, not read
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        if _accesses_memory(func, inputs, outputs):
            moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
            moved += sum(map(_size, inputs[: SECOND_READ.get(func, 0)]))
            bias = _bias_bytes(func, args, outputs)
            self.bytes += moved + bias
            self.kernels += 1 + (bias > 0)
            if any(name in func.name() for name in PRODUCTS):
                self.product_bytes += moved
        return result


def _bias_bytes(func: Any, args: Any, outputs: list[Tensor]) -> int:
    """Return the additional bytes of a convolution's bias. cuDNN does not add it, so PyTorch adds it to the result in a
    second kernel, and computes its gradient by a separate sum."""
    if func is aten.convolution.default and args[2] is not None:
        return 2 * _size(outputs[0])
    if func is aten.convolution_backward.default and args[-1][2]:
        return _size(args[0])
    return 0


def _accesses_memory(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether an operation reads or writes memory: it is not a view and not an allocation."""
    if not outputs or "aten::empty" in func.name() or "aten::new_empty" in func.name():
        return False
    if func._schema.is_mutable:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return any(tensor.untyped_storage()._cdata not in storages for tensor in outputs)


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory, in which broadcast dimensions count once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.dtype.itemsize


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for entry in tree:
            yield from _tensors(entry)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


class GpuFASA(FASA):
    """FASA with the attention that is used on GPUs, for counting on another device."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class GpuGroupNorm1(GroupNorm1):
    """GroupNorm1 with the implementation that is used on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_rows(x.float(), self.weight, self.bias, self.eps)


def trace_step(model: FAT, size: int, dtype: torch.dtype, batch: int, *, use_kernels: bool = False) -> Trace:
    """Trace the operations of a training step on `batch` images as a GPU would run them, on tensors without memory.

    use_kernels: with FAT's kernels.
    """
    trace = Trace()
    with FakeTensorMode(), torch.device("cpu"):
        twin = FAT(model.config)
        replacements: dict[type[nn.Module], type[nn.Module]] = {FASA: GpuFASA}
        if not use_kernels:
            replacements |= {GroupNorm1: GpuGroupNorm1, BatchNorm: nn.BatchNorm2d}
        for module in twin.modules():
            module.__class__ = replacements.get(type(module), type(module))
        twin.train()  # train() decides again which layers are fused (FusingModule)
        images = torch.empty(batch, model.config.in_chans, size, size, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        with trace, kernels.assume_available() if use_kernels else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = twin(images)
            F.cross_entropy(logits.float(), labels).backward()
    return trace


def table(batch: int, size: int, bandwidth: float, arithmetic: float) -> str:
    """Return a Markdown table of a training step of each variant under bf16 autocast.

    bandwidth, arithmetic: the device's TB/s and TFLOP/s.
    """
    limits = {"bandwidth": bandwidth * 1e12, "arithmetic": arithmetic * 1e12}
    columns = (
        *("TFLOP", "kernels eager", "GB eager", "GB FAT kernels", "GB fused"),
        *("img/s eager", "img/s FAT kernels", "img/s fused"),
    )
    lines = [("variant", *columns), ("-",) * (len(columns) + 1)]
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            found = roofline(FAT(config), size)
        lines.append(
            (
                name,
                f"{found.flops * batch / 1e12:.2f}",
                f"{found.kernels:,}",
                f"{found.eager_bytes * batch / 1e9:.0f}",
                f"{found.bytes * batch / 1e9:.0f}",
                f"{found.fused_bytes * batch / 1e9:.0f}",
                f"{ceiling(found.flops, found.eager_bytes, **limits):,.0f}",
                f"{ceiling(found.flops, found.bytes, **limits):,.0f}",
                f"{ceiling(found.flops, found.fused_bytes, **limits):,.0f}",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    arguments = parser("fat.account.roofline", __doc__)
    size, rate = number(int, MIN_SIZE, 8192), number(float, 1e-3, 1e6)
    arguments.add_argument("--batch", type=number(int, 1, 1_000_000), default=256, help="images per step")
    arguments.add_argument("--size", type=size, default=224, help="side of the square images in pixels")
    arguments.add_argument("--bandwidth", type=rate, default=H200[0], help="memory bandwidth in TB/s (default: H200)")
    arguments.add_argument("--arithmetic", type=rate, default=H200[1], help="bf16 peak in TFLOP/s (default: H200)")
    options = arguments.parse_args()
    print("counting the operations of four models (about a minute)", file=sys.stderr, flush=True)
    print(table(options.batch, options.size, options.bandwidth, options.arithmetic))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly if the reader of the output has exited
    main()
