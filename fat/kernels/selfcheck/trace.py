"""The operator calls of a model, to compare them: traced from a training step and an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fat import kernels
from fat.batchnorm import BatchNorm
from fat.kernels.families import FAMILIES, OPERATORS
from fat.kernels.impl import tiles
from fat.kernels.prefill.work import fake_twin
from fat.kernels.selfcheck.case import Case, Spec
from fat.model import MIN_SIZE, Stage, Trunk

BATCH = 2
LARGEST_ODD = 31  # rows of the first stage's map at the odd image size
STEM_STRIDE = 4
ODD_CHANNELS = 20  # fills no tile, and no 16-byte access


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
    with calls, kernels.assume_available(), torch.set_grad_enabled(what != "eval"):
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
            if (case.taps or 0) < (kept.taps or 0):
                smallest[case.operator] = case
    return [case.with_channels(ODD_CHANNELS) for case in smallest.values()]


def _many_tiles(calls: Sequence[Case]) -> list[Case]:
    """Return the smallest convolution with moments, at a batch size whose moments take two rounds to join."""
    smallest = min((case for case in calls if case.operator == "depthwise_stats"), key=_numbers, default=None)
    return [] if smallest is None else [smallest.with_batch(tiles.JOINED_EACH + 1)]


def _numbers(case: Case) -> int:
    return sum(a.numel for a in case.arguments if isinstance(a, Spec))
