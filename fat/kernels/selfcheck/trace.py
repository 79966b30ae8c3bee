"""Trace the operator calls of a model's training step and evaluation, for the self-check."""

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
LARGEST_ODD = 31  # maximum rows of the first stage's feature map at the odd image size
STEM_STRIDE = 4
ODD_CHANNELS = 20  # a number of channels that is not a multiple of a tile's channels or of 16 bytes


def cases(
    model: Trunk, size: int, dtype: torch.dtype, *, gradients: bool = True, frozen_norms: bool = False
) -> list[Case]:
    """Return the operator calls to check for a model, without duplicates, ordered by family.

    Args:
        model: the model; a copy of it is traced, on tensors without memory.
        size: side of the square images in pixels.
        dtype: bfloat16: autocast with float32 parameters. float32: no autocast.
        gradients: include the calls of training; otherwise only those of evaluation.
        frozen_norms: BatchNorm is in evaluation mode during training (`--freeze-bn`).
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
        # Keep calls at the odd image size only if they use the same tiles, and so the same compiled kernels, as the
        # calls at the model's image size.
        same_tiles = [o for r, o in _paired(real, odd_calls) if o.map_rows() and _tiles(r) == _tiles(o)]
        odd_channels = _odd_channels(same_tiles or odd_calls)
        wanted = dict.fromkeys([*real, *found[1], *same_tiles, *odd_channels, *_many_tiles(real)])
    order = {name: FAMILIES.index(families[-1]) for name, families in OPERATORS.items()}
    return sorted(wanted, key=lambda case: order[case.operator])


def odd_rows(size: int) -> int:
    """Choose an odd number of rows for the first stage's feature map that has the same tiles as the real image size."""
    real, least = -(-size // STEM_STRIDE), MIN_SIZE // STEM_STRIDE + 1
    tried = range(min(LARGEST_ODD, 2 * real + 1), least - 1, -2)
    return next((rows for rows in tried if tiles.best(rows) == tiles.best(real)), least)


class _Calls(TorchDispatchMode):
    """Records calls of the operators `fat::*`."""

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
    """Remove the blocks of each stage whose calls are the same as those of another block, and return the model.

    Two kinds of blocks are special: the model's first block has no drop path, and a stage's last block may have
    stride 2.
    """
    for index, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        blocks = list(stage.blocks)
        first = 2 if index == 0 else 1
        if len(blocks) > first + 1:
            stage.blocks = nn.ModuleList([*blocks[:first], blocks[-1]])
    return model


def _trace(twin: Trunk, what: str, sides: int | tuple[int, int], dtype: torch.dtype) -> list[Case]:
    """Return the calls of one pass, in order.

    what: "train", "eval" or "frozen" (training with BatchNorm in evaluation mode).
    """
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
    """Pair the corresponding calls of two passes of the same model.

    Operators with different numbers of calls are skipped: whether attention uses FAT's kernels depends on the image
    size.
    """
    counts = [Counter(case.operator for case in calls) for calls in (real, odd)]
    common = ([c for c in calls if counts[0][c.operator] == counts[1][c.operator]] for calls in (real, odd))
    return zip(*common, strict=True)


def _tiles(case: Case) -> list[int]:
    return [tiles.best(rows) for rows in case.map_rows()]


def _odd_channels(calls: Sequence[Case]) -> list[Case]:
    """Return a call of each operator with `ODD_CHANNELS` channels; for convolutions, with the smallest kernel."""
    smallest: dict[str, Case] = {}
    for case in calls:
        if case.map_rows():
            kept = smallest.setdefault(case.operator, case)
            if (case.taps or 0) < (kept.taps or 0):
                smallest[case.operator] = case
    return [case.with_channels(ODD_CHANNELS) for case in smallest.values()]


def _many_tiles(calls: Sequence[Case]) -> list[Case]:
    """Return the smallest convolution with statistics, at a batch size at which they are merged in two rounds."""
    smallest = min((case for case in calls if case.operator == "depthwise_stats"), key=_numbers, default=None)
    return [] if smallest is None else [smallest.with_batch(tiles.MERGED_EACH + 1)]


def _numbers(case: Case) -> int:
    return sum(a.numel for a in case.arguments if isinstance(a, Spec))
