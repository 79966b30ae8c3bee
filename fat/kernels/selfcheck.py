"""Compare every family of kernels with torch before a model is trained with them.

    found = selfcheck.run(selfcheck.cases(model, size, torch.bfloat16), device)

The operator calls are the model's own, traced from its forward and backward pass: its channels, kernel sizes and maps
at a batch of 2, once at its image size and once at an odd one. Inputs are drawn from a seed, the memory that kernels
write to is NaN beforehand. A result passes if it is within

    one unit in the last place of its dtype  +  2^-18 of the largest result

of the same in float64 (`fat.kernels.reference`). The first term is the rounding of the result. The second is for sums
in float32 in another order, with approximated exponentials: 32 units in float32's last place, 4 times what the tests
allow (tests/support/kernel_checks.py), because a false alarm costs speed, and a wrong kernel is wrong by far more. What
an operator computes from its stored result (a map's statistics, a folded bias) is compared with the same of that
result.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fat import kernels
from fat.batchnorm import BatchNorm
from fat.kernels import reference
from fat.kernels.families import BATCH_NORM, CONVOLUTION, FAMILIES, NORM, OPERATORS, WEIGHT_GRADIENT, disabled
from fat.kernels.impl import tiles
from fat.kernels.prefill.work import fake_twin
from fat.model import MIN_SIZE, Stage, Trunk

BATCH = 2
SUMMING = 2.0**-18  # of the largest result
LARGEST_ODD = 31  # rows of the first stage's map at the odd image size
STEM_STRIDE = 4
ODD_CHANNELS = 20  # fills no tile, and no 16-byte access
ODD_HEADS = 2  # whose 10 channels fill no tile
DROP_SCALES = (0.0, 1.25)  # of drop path: of every two samples one is left out

# Results of operators that have several: name, and the family that a wrong one is blamed on.
RESULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "depthwise_norm": (("map", CONVOLUTION), ("normalised map", NORM), ("mean", NORM), ("rstd", NORM)),
    "depthwise_moments": (("map", CONVOLUTION), ("mean", BATCH_NORM), ("variance", BATCH_NORM)),
    "depthwise_moments_gradient": (
        ("gradient by the map", BATCH_NORM),
        ("gradient by weight", WEIGHT_GRADIENT),
        ("gradient by bias", WEIGHT_GRADIENT),
    ),
}
SUMS = {  # arguments that are divided by the map's size
    "depthwise_moments_gradient": ("grad_mean", "grad_var"),
    "norm_relu_gradient": ("grad_bias", "grad_weight"),
}
POSITIVE = ("var", "rstd", "running_var")  # arguments that are variances or their reciprocal roots


class KernelFault(Exception):
    """A kernel has left the device unusable for this process."""


@dataclass(frozen=True)
class Failure:
    """Why a family is switched off."""

    family: str
    operator: str
    shape: str
    """Of the first map and, where there is one, the kernel."""
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} on {self.shape} {self.dtype}: {self.reason}"


class Check(Protocol):
    """One comparison of one family with torch; `Case` is one, augmentation has others."""

    @property
    def families(self) -> tuple[str, ...]:
        """The families whose kernels are launched, the one that is checked last."""

    @property
    def operator(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the family that is wrong and how, or None. Raises whatever the kernels raise."""

    def launch(self) -> object:
        """Launch its kernels on CPU tensors of any values, for a recorder of launches (`fat.kernels.prefill`)."""


@dataclass(frozen=True)
class Spec:
    """A tensor argument of an operator."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_map: bool
    """[B, C, H, W] in channels-last memory."""

    def empty(self) -> Tensor:
        """Make an uninitialised CPU tensor."""
        layout = torch.channels_last if self.is_map else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, memory_format=layout)


@dataclass(frozen=True)
class Case:
    """A call of an operator `fat::*`: tensors by their shapes, other arguments as they are."""

    operator: str
    arguments: tuple[Any, ...]

    @property
    def families(self) -> tuple[str, ...]:
        return OPERATORS[self.operator]

    @property
    def shape(self) -> str:
        first = next(a for a in self.arguments if isinstance(a, Spec))
        text = f"{'map' if first.is_map else 'weights'} {_times(first.shape)}"
        taps = self._taps
        return f"{text}, kernel {taps}x{taps}" if taps else text

    @property
    def dtype(self) -> str:
        first = next(a for a in self.arguments if isinstance(a, Spec))
        return str(first.dtype).removeprefix("torch.")

    @property
    def _taps(self) -> int | None:
        """The depthwise kernel's side."""
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
        """The heights of its maps, which decide how a tile is made."""
        return [a.shape[2] for a in self.arguments if isinstance(a, Spec) and a.is_map]

    def with_channels(self, channels: int) -> Case:
        """Return the same call on maps of another number of channels."""
        old = next(a.shape[1] for a in self.arguments if isinstance(a, Spec) and a.is_map)

        def changed(name: str, a: Any) -> Any:
            if not isinstance(a, Spec):
                return ODD_HEADS if name == "heads" else a
            where = 1 if a.is_map else 0
            if len(a.shape) <= where or a.shape[where] not in (old, 2 * old):  # keys and values are one map
                return a
            return replace(a, shape=(*a.shape[:where], a.shape[where] // old * channels, *a.shape[where + 1 :]))

        named = zip(self._function._schema.arguments, self.arguments, strict=True)
        return Case(self.operator, tuple(changed(argument.name, a) for argument, a in named))

    def with_batch(self, batch: int) -> Case:
        """Return the same call on maps of another batch size."""

        def changed(a: Any) -> Any:
            return replace(a, shape=(batch, *a.shape[1:])) if isinstance(a, Spec) and a.is_map else a

        return Case(self.operator, tuple(map(changed, self.arguments)))

    def launch(self) -> tuple[Tensor, ...]:
        """Call the operator on CPU tensors of any values, for a recorder of launches (`fat.kernels.prefill`)."""
        return _call(self._function, [a.empty() if isinstance(a, Spec) else a for a in self.arguments])

    def compare(self, device: torch.device) -> tuple[str, str] | None:
        """Return the family that is wrong and how, or None. Raises whatever the kernels raise."""
        draw = Draw(device, self)
        arguments = [draw.tensor(a) if isinstance(a, Spec) else a for a in self.arguments]
        with poisoned_memory():
            found = _call(self._function, _copies(arguments))
        wide = [_widened(a) if self._function._schema.is_mutable else a for a in arguments]
        exact = _call(getattr(reference, self.operator), wide, self._function, own=found[0])
        names = RESULTS.get(self.operator, ())
        for number, (own, wanted) in enumerate(zip(found, exact, strict=True)):
            name, family = names[number] if names else (_numbered(number, len(found)), self.families[-1])
            if wrong := mismatch(own, wanted):
                return family, f"{name}: {wrong}"
        return None


def cases(
    model: Trunk, size: int, dtype: torch.dtype, *, gradients: bool = True, frozen_norms: bool = False
) -> list[Case]:
    """List the operator calls to compare for a model, without duplicates, ordered by family.

    Args:
        model: is left as it is; its copy is traced on tensors without memory.
        size: side of the square images in pixels.
        dtype: bfloat16 = autocast over float32 parameters; float32 = without.
        gradients: also those of training; else of evaluation alone.
        frozen_norms: BatchNorm stays in evaluation mode in training (`--freeze-bn`).
    """
    traced: list[tuple[str, int | tuple[int, int]]] = [("eval", size)]
    if gradients:
        rows = odd_rows(size)
        odd = (STEM_STRIDE * rows, STEM_STRIDE * (rows + 6))
        training = "frozen" if frozen_norms else "train"
        traced = [(training, size), ("eval", size), (training, odd)]
    with FakeTensorMode(), torch.device("cpu"):
        twin = _shortened(fake_twin(model))
        found = [_trace(twin, what, sides, dtype) for what, sides in traced]
    wanted = dict.fromkeys(case for calls in found for case in calls)
    if gradients:
        real, odd_calls = found[0], found[-1]
        # Odd maps for which tiles are made as for the model's own: the same compiled kernels.
        alike = [o for r, o in _paired(real, odd_calls) if o.map_rows() and _tiles(r) == _tiles(o)]
        wanted = dict.fromkeys([*real, *found[1], *alike, *_odd_channels(alike or odd_calls), *_many_tiles(real)])
    order = {name: FAMILIES.index(families[-1]) for name, families in OPERATORS.items()}
    return sorted(wanted, key=lambda case: order[case.operator])


def odd_rows(size: int) -> int:
    """Choose an odd number of rows for the first stage's map that is tiled like the map of the real image size."""
    real, least = -(-size // STEM_STRIDE), MIN_SIZE // STEM_STRIDE + 1
    tried = range(min(LARGEST_ODD, 2 * real + 1), least - 1, -2)
    return next((rows for rows in tried if tiles.best(rows) == tiles.best(real)), least)


def run(checks: Iterable[Check], device: torch.device) -> list[Failure]:
    """Compare, and return the first failure of each family that fails. Synchronises the device after every check.

    A family that has failed is not checked further, nor are operators that launch its kernels too.

    Raises:
        KernelFault: a kernel has made the device unusable (an illegal address, for instance).
    """
    failures: dict[str, Failure] = {}
    with disabled():
        for check in checks:
            if not failures.keys().isdisjoint(check.families):
                continue
            try:
                wrong = check.compare(device)
                _wait(device)  # so that a fault is this check's
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                wrong = check.families[-1], f"{type(error).__name__}: {_first_line(error)}"
                _expect_usable(device, Failure(wrong[0], check.operator, check.shape, check.dtype, wrong[1]))
            if wrong is not None:
                failures[wrong[0]] = Failure(wrong[0], check.operator, check.shape, check.dtype, wrong[1])
    return list(failures.values())


def mismatch(own: Tensor, exact: Tensor) -> str | None:
    """Describe how `own` is out of bounds; None if it is within them. NaN and infinity never are.

    Args:
        exact: what is expected, float64 for floating results.
    """
    eps = torch.finfo(own.dtype).eps if own.dtype.is_floating_point else 0.0
    exact = exact.double()
    allowed = eps * exact.abs() + SUMMING * exact.abs().max()
    error = (own.double() - exact).abs()
    fine = error <= allowed  # NaN is not
    if bool(fine.all()):
        return None
    if missing := int((~own.isfinite()).sum()):
        return f"{missing} of {own.numel()} values are NaN or infinite"
    worst = int((error - allowed).argmax())
    return (
        f"off by {float(error.flatten()[worst]):.3g} where the bound is {float(allowed.flatten()[worst]):.3g} "
        f"({int((~fine).sum())} of {own.numel()} values out of bounds)"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that missing writes and early reads show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Draw:
    """Draws normal tensors with a mean other than 0 on a device, seeded by the case."""

    def __init__(self, device: torch.device, case: Case) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))
        # Gradients by a map's mean and variance are divided by its size; as large as the map's own gradient they count.
        largest = max((a for a in case.arguments if isinstance(a, Spec) and a.is_map), key=_numel, default=None)
        self._count = 1 if largest is None else _numel(largest) // largest.shape[1]
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
            drawn = drawn / spec.shape[-1]  # sums of k x k products about as large as the map
        else:
            drawn = drawn + 0.5
        drawn = drawn * self._count if spec.name in self._scaled else drawn
        layout = torch.channels_last if spec.is_map else torch.contiguous_format
        return drawn.to(spec.dtype).contiguous(memory_format=layout)


class _Calls(TorchDispatchMode):
    """Records the calls of operators `fat::*`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Case] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fat":
            named = zip(func._schema.arguments, args, strict=True)
            self.found.append(Case(func._opname, tuple(_spec(argument.name, value) for argument, value in named)))
        return func(*args, **(kwargs or {}))


def _spec(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    is_map = value.ndim == 4 and name not in ("weight", "folded")
    return Spec(name, tuple(value.shape), value.dtype, is_map)


def _shortened(model: Trunk) -> Trunk:
    """The model with only those blocks of each stage whose calls differ: the first block of the first stage has no drop
    path, and the last block of a stage may reduce."""
    for index, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        blocks = list(stage.blocks)
        first = 2 if index == 0 else 1
        if len(blocks) > first + 1:
            stage.blocks = nn.ModuleList([*blocks[:first], blocks[-1]])
    return model


def _trace(twin: Trunk, what: str, sides: int | tuple[int, int], dtype: torch.dtype) -> list[Case]:
    """Return one pass's calls in order; what: "train", "eval" or "frozen" (training with BatchNorm in eval mode)."""
    twin.train(what != "eval")
    if what == "frozen":
        for module in twin.modules():
            if isinstance(module, BatchNorm):
                module.eval()
    height, width = (sides, sides) if isinstance(sides, int) else sides
    images = torch.empty(BATCH, twin.config.in_chans, height, width, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    calls = _Calls()
    with calls, kernels.assumed(), torch.set_grad_enabled(what != "eval"):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = twin(images)
        if what != "eval":
            F.cross_entropy(outputs.float(), torch.zeros(BATCH, dtype=torch.long)).backward()
    return calls.found


def _paired(real: Sequence[Case], odd: Sequence[Case]) -> Iterator[tuple[Case, Case]]:
    """Pair the calls of two passes over one model.

    A map's size decides whether attention is ours, so that its operators may be in one pass alone.
    """
    numbers = [Counter(case.operator for case in calls) for calls in (real, odd)]
    own, others = ([c for c in calls if numbers[0][c.operator] == numbers[1][c.operator]] for calls in (real, odd))
    return zip(own, others, strict=True)


def _tiles(case: Case) -> list[int]:
    return [tiles.best(rows) for rows in case.map_rows()]


def _odd_channels(calls: Sequence[Case]) -> list[Case]:
    """Return a call of each operator on maps whose channels fill no tile; of convolutions, with the smallest kernel."""
    smallest: dict[str, Case] = {}
    for case in calls:
        if case.map_rows():
            kept = smallest.setdefault(case.operator, case)
            if (case._taps or 0) < (kept._taps or 0):
                smallest[case.operator] = case
    return [case.with_channels(ODD_CHANNELS) for case in smallest.values()]


def _many_tiles(calls: Sequence[Case]) -> list[Case]:
    """Return the smallest convolution with moments, at a batch size whose moments take two rounds to join."""
    smallest = min((case for case in calls if case.operator == "depthwise_moments"), key=_numbers, default=None)
    return [] if smallest is None else [smallest.with_batch(tiles.JOINED_EACH + 1)]


def _call(function: Any, arguments: Sequence[Any], schema_of: Any = None, **options: Any) -> tuple[Tensor, ...]:
    """Return the results; of an operator that returns None, the arguments that it has changed."""
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _expect_usable(device: torch.device, failure: Failure) -> None:
    try:
        _wait(device)
    except Exception as error:
        raise KernelFault(
            f"the {failure.family} kernels have made {device} unusable for this process ({failure})"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the error's first line; of Triton's compilation errors, which begin with the source, the message's."""
    text = getattr(error, "error_message", None) or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def _numbered(number: int, count: int) -> str:
    return "result" if count == 1 else f"result {number + 1} of {count}"


def _numbers(case: Case) -> int:
    return sum(_numel(a) for a in case.arguments if isinstance(a, Spec))


def _numel(spec: Spec) -> int:
    return torch.Size(spec.shape).numel()


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
