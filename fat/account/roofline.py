"""`python -m fat.account.roofline`: bytes and operations of a training step, counted from the models, and the speed
that a device of given bandwidth and arithmetic could reach with them."""

from __future__ import annotations

import argparse
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
from fat.account.cost import count
from fat.batchnorm import BatchNorm
from fat.blocks import FASA
from fat.config import VARIANTS
from fat.layers import GroupNorm1, norm_rows
from fat.model import FAT

BATCH = 2  # BatchNorm cannot train on fewer values than that
H200 = (4.3, 989.0)  # TB/s as copies reach it, dense bf16 TFLOP/s as the maker states it

aten: Any = torch.ops.aten
# How many of the first arguments are read again: by kernels that must see all of a tensor before they can write, and
# by those that are two.
SECOND_READ = {
    aten.native_batch_norm.default: 1,  # statistics, then the result
    aten._native_batch_norm_legit.default: 1,
    aten._batch_norm_with_update.default: 1,
    aten.native_batch_norm_backward.default: 1,  # two sums, then the gradient
    aten.batch_norm_backward.default: 1,
    aten.native_layer_norm.default: 1,
    aten.native_layer_norm_backward.default: 1,
    aten.native_group_norm.default: 1,
    aten.native_group_norm_backward.default: 1,
    aten.convolution_backward.default: 1,  # one kernel for the input's gradient, one for the weight's
    # Our own (docs/kernels.md).
    torch.ops.fat.norm.default: 1,
    torch.ops.fat.add_norm.default: 1,
    torch.ops.fat.depthwise_norm.default: 1,
    torch.ops.fat.norm_gradient.default: 2,  # the gradient and the map
    torch.ops.fat.add_norm_gradient.default: 2,
}
# Where arithmetic is; everything between could be done while their operands pass by.
PRODUCTS = ("convolution", "mm", "scaled_dot_product", "attend")


@dataclass(frozen=True)
class Roofline:
    """Of one image in a training step (forward and backward)."""

    flops: int
    """Floating-point operations: 2 per multiply-accumulate; backward is twice forward."""
    eager_bytes: int
    """What the kernels of an eager run, without ours, read and write, each by itself."""
    bytes: int
    """The same with our kernels (`fat.kernels`), the other operations still by themselves."""
    fused_bytes: int
    """What perfectly fused blocks read and write (`Cost.fused_bytes`)."""
    kernels: int
    """Operations that an eager run starts per step, whatever the batch; most are one kernel."""


def ceiling(flops: float, passed: float, *, bandwidth: float, arithmetic: float) -> float:
    """Images per second that a device cannot exceed, memory and arithmetic overlapping perfectly.

    Args:
        flops, passed: operations and bytes per image.
        bandwidth, arithmetic: the device's, in bytes/s and FLOP/s.
    """
    return 1 / max(passed / bandwidth, flops / arithmetic)


def roofline(model: FAT, size: int = 224, *, dtype: torch.dtype = torch.bfloat16) -> Roofline:
    """Count a training step, per image of `size` x `size` pixels; nothing is computed, but it takes some ten seconds.

    The optimiser is left out: with AdamW in fp32 28 bytes a parameter and step, 1 % at a batch of 256.

    Args:
        dtype: bfloat16 = autocast over fp32 parameters, as training runs on GPUs; float32 = without.
    """
    cost = count(model, size)
    less, more, less_ours, more_ours = (
        trace_step(model, size, dtype, batch, ours=ours) for ours in (False, True) for batch in (BATCH, 2 * BATCH)
    )
    return Roofline(
        flops=cost.training_flops,
        eager_bytes=(more.bytes - less.bytes) // BATCH,  # what there is of weights is the same at any batch
        bytes=(more_ours.bytes - less_ours.bytes) // BATCH,
        fused_bytes=cost.fused_bytes(dtype.itemsize),
        kernels=less.kernels,
    )


class Trace(TorchDispatchMode):
    """Adds up what every operation that touches memory reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.product_bytes = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fat.depthwise_stats.default:
            args = (args[0], None, *args[2:])  # what x is the GELU of is for the backward pass
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        if _moves(func, inputs, outputs):
            passed = sum(map(_size, inputs)) + sum(map(_size, outputs))
            passed += sum(map(_size, inputs[: SECOND_READ.get(func, 0)]))
            bias = _bias_bytes(func, args, outputs)
            self.bytes += passed + bias
            self.kernels += 1 + (bias > 0)
            if any(name in func.name() for name in PRODUCTS):
                self.product_bytes += passed
        return result


def _bias_bytes(func: Any, args: Any, outputs: list[Tensor]) -> int:
    """What a convolution's bias costs beside it: cuDNN's do without, so torch adds it to the result afterwards, and
    sums the gradient for it."""
    if func is aten.convolution.default and args[2] is not None:
        return 2 * _size(outputs[0])
    if func is aten.convolution_backward.default and args[-1][2]:
        return _size(args[0])
    return 0


def _moves(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation is more than another look at the same memory, or memory not yet written."""
    if not outputs or "aten::empty" in func.name() or "aten::new_empty" in func.name():
        return False
    if func._schema.is_mutable:
        return True
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return any(tensor.untyped_storage()._cdata not in known for tensor in outputs)


def _size(tensor: Tensor) -> int:
    """Bytes of it that are there: what is broadcast is read once."""
    real = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        real *= length if stride else 1
    return real * tensor.dtype.itemsize


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for entry in tree:
            yield from _tensors(entry)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


class _OnGpuFASA(FASA):
    """Attention as it is on a GPU, wherever it is counted."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class _OnGpuNorm(GroupNorm1):
    """The norm as it is on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_rows(x.float(), self.weight, self.bias, self.eps)


def trace_step(model: FAT, size: int, dtype: torch.dtype, batch: int, *, ours: bool = False) -> Trace:
    """The operations of a training step on `batch` images, as a GPU would run them, on memory that is not there; with
    our kernels, or without."""
    trace = Trace()
    with FakeTensorMode(), torch.device("cpu"):
        twin = FAT(model.config)
        swaps: dict[type[nn.Module], type[nn.Module]] = {FASA: _OnGpuFASA}
        if not ours:
            swaps |= {GroupNorm1: _OnGpuNorm, BatchNorm: nn.BatchNorm2d}
        for module in twin.modules():
            module.__class__ = swaps.get(type(module), type(module))
        twin.train()  # decides again what is fused
        images = torch.empty(batch, model.config.in_chans, size, size, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        with trace, kernels.assume_available() if ours else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = twin(images)
            F.cross_entropy(logits.float(), labels).backward()
    return trace


def table(batch: int, size: int, bandwidth: float, arithmetic: float) -> str:
    """Markdown: a training step of each variant under bf16 autocast; bandwidth in TB/s, arithmetic in TFLOP/s."""
    limits = {"bandwidth": bandwidth * 1e12, "arithmetic": arithmetic * 1e12}
    columns = ("TFLOP", "kernels eager", "GB eager", "GB ours", "GB fused", "img/s eager", "img/s ours", "img/s fused")
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--bandwidth", type=float, default=H200[0], help="TB/s of the device (an H200's)")
    parser.add_argument("--arithmetic", type=float, default=H200[1], help="TFLOP/s of the device, bf16 (an H200's)")
    options = parser.parse_args()
    print(table(options.batch, options.size, options.bandwidth, options.arithmetic))


if __name__ == "__main__":
    main()
