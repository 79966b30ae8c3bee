"""One call of an operator, which is compared with its reference in float64."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fat.kernels import reference
from fat.kernels.families import BATCH_NORM, CONVOLUTION, NORM, OPERATORS, WEIGHT_GRADIENT
from fat.kernels.selfcheck.comparison import mismatch, poisoned_memory

ODD_HEADS = 2  # number of heads for ODD_CHANNELS: the 10 channels per head do not fill a tile
DROP_SCALES = (0.0, 1.25)  # drop path factors of samples, alternating: every second sample is dropped

# Operators with several results: each result's name, and the family that is at fault if it is wrong.
RESULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "depthwise_norm": (("output", CONVOLUTION), ("normalized output", NORM), ("mean", NORM), ("rstd", NORM)),
    "depthwise_stats": (("output", CONVOLUTION), ("mean", BATCH_NORM), ("variance", BATCH_NORM)),
    "depthwise_stats_gradient": (
        ("gradient of output", BATCH_NORM),
        ("gradient of weight", WEIGHT_GRADIENT),
        ("gradient of bias", WEIGHT_GRADIENT),
    ),
}
SUMS = {  # arguments that the operator divides by the number of values per channel
    "depthwise_stats_gradient": ("grad_mean", "grad_var"),
    "norm_relu_gradient": ("grad_bias", "grad_weight"),
}
POSITIVE = ("var", "rstd", "running_var")  # arguments that cannot be negative


@dataclass(frozen=True)
class Spec:
    """A tensor argument of an operator."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_map: bool
    """[B, C, H, W] in channels-last memory."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def empty(self) -> Tensor:
        """Create an uninitialized CPU tensor."""
        layout = torch.channels_last if self.is_map else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, memory_format=layout)


@dataclass(frozen=True)
class Case:
    """A call of an operator `fat::*`, with a `Spec` in place of each tensor argument."""

    operator: str
    arguments: tuple[Any, ...]

    @property
    def families(self) -> tuple[str, ...]:
        return OPERATORS[self.operator]

    @property
    def shape(self) -> str:
        first = next(a for a in self.arguments if isinstance(a, Spec))
        text = f"{'feature map' if first.is_map else 'weights'} {_times(first.shape)}"
        taps = self.taps
        return f"{text}, kernel {taps}x{taps}" if taps else text

    @property
    def dtype(self) -> str:
        first = next(a for a in self.arguments if isinstance(a, Spec))
        return str(first.dtype).removeprefix("torch.")

    @property
    def taps(self) -> int | None:
        """Size of the depthwise kernel, if the operator has one."""
        for argument, value in zip(self._function._schema.arguments, self.arguments, strict=True):
            if argument.name == "kernel":
                return int(value)
            if isinstance(value, Spec) and not value.is_map and value.shape[1:2] == (1,):
                return value.shape[-1]
        return None

    @property
    def _function(self) -> Any:
        return getattr(torch.ops.fat, self.operator).default

    def map_rows(self) -> list[int]:
        """Return the heights of the feature maps, which determine the kernels' tiles."""
        return [a.shape[2] for a in self.arguments if isinstance(a, Spec) and a.is_map]

    def with_channels(self, channels: int) -> Case:
        """Return the same call with another number of channels."""
        old = next(a.shape[1] for a in self.arguments if isinstance(a, Spec) and a.is_map)

        def changed(name: str, a: Any) -> Any:
            if not isinstance(a, Spec):
                return ODD_HEADS if name == "heads" else a
            dim = 1 if a.is_map else 0
            if len(a.shape) <= dim or a.shape[dim] not in (old, 2 * old):  # 2 * old: keys and values are in one tensor
                return a
            return replace(a, shape=(*a.shape[:dim], a.shape[dim] // old * channels, *a.shape[dim + 1 :]))

        named = zip(self._function._schema.arguments, self.arguments, strict=True)
        return Case(self.operator, tuple(changed(argument.name, a) for argument, a in named))

    def with_batch(self, batch: int) -> Case:
        """Return the same call with another batch size."""

        def changed(a: Any) -> Any:
            return replace(a, shape=(batch, *a.shape[1:])) if isinstance(a, Spec) and a.is_map else a

        return Case(self.operator, tuple(map(changed, self.arguments)))

    def launch(self) -> tuple[Tensor, ...]:
        """Call the operator on uninitialized CPU tensors, to record its kernel launches (`fat.kernels.prefill`)."""
        return _call(self._function, [a.empty() if isinstance(a, Spec) else a for a in self.arguments])

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the family at fault and a description, or None if the results are correct.

        Raises whatever the kernels raise.
        """
        draw = Draw(device, self)
        arguments = [draw.tensor(a) if isinstance(a, Spec) else a for a in self.arguments]
        with poisoned_memory():
            results = _call(self._function, _copies(arguments))
        wide = [_widened(a) if self._function._schema.is_mutable else a for a in arguments]
        references = _call(getattr(reference, self.operator), wide, self._function, kernel_out=results[0])
        names = RESULTS.get(self.operator, ())
        for number, (actual, expected) in enumerate(zip(results, references, strict=True)):
            name, family = names[number] if names else (_numbered(number, len(results)), self.families[-1])
            if fault := mismatch(actual, expected):
                return family, f"{name}: {fault}"
        return None


class Draw:
    """Draws random tensors on a device, normally distributed with a mean other than 0, with a seed from the case."""

    def __init__(self, device: torch.device, case: Case) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))
        # The operators divide gradients of means and variances by the number of values per channel. Multiplied by it
        # here, they are as large as the gradient of the feature map, so that errors in them are detected.
        maps = [a for a in case.arguments if isinstance(a, Spec) and a.is_map]
        self._count = max((a.numel // a.shape[1] for a in maps), default=1)
        self._scaled = SUMS.get(case.operator, ())

    def tensor(self, spec: Spec) -> Tensor:
        if not spec.dtype.is_floating_point:
            return torch.full(spec.shape, 3, dtype=spec.dtype, device=self._device)
        if spec.name == "scale":
            scales = torch.tensor(DROP_SCALES, dtype=spec.dtype, device=self._device)
            return scales.repeat(-(-spec.shape[0] // len(DROP_SCALES)))[: spec.shape[0]]
        drawn = torch.randn(spec.shape, generator=self._generator, device=self._device)
        if spec.name in POSITIVE:
            drawn = drawn.abs() + 0.5
        elif spec.shape[1:2] == (1,):
            drawn = drawn / spec.shape[-1]  # keeps sums of k x k products about as large as the input
        else:
            drawn = drawn + 0.5
        drawn = drawn * self._count if spec.name in self._scaled else drawn
        layout = torch.channels_last if spec.is_map else torch.contiguous_format
        return drawn.to(spec.dtype).contiguous(memory_format=layout)


def _call(function: Any, arguments: Sequence[Any], schema_of: Any = None, **options: Any) -> tuple[Tensor, ...]:
    """Return the results; for an operator that returns None, the arguments that it has modified."""
    result = function(*arguments, **options)
    if result is None:
        schema = (schema_of or function)._schema
        changed = (a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        return tuple(value for value, written in zip(arguments, changed, strict=True) if written)
    return result if isinstance(result, tuple) else (result,)


def _copies(arguments: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def _widened(a: Any) -> Any:
    return a.double() if isinstance(a, Tensor) and a.dtype.is_floating_point else a


def _numbered(number: int, count: int) -> str:
    return "result" if count == 1 else f"result {number + 1} of {count}"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
