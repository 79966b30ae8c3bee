"""Guards: detect steps with non-finite gradients, and ranks whose weights differ.

The engine skips the update of such a step on the device. The guards count the skipped steps whenever the log reads from
the device, and end training when there are too many in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from launch.config.resilience import WatchdogConfig
from launch.engine.engine import Engine, StepResult
from launch.run.status import RunFailed
from pipeline.loader import Batch
from pipeline.plan import Ids

SHOWN_IDS = 8


class Guards:
    """Collector of step results (`note`) that checks them (`check`, which is collective and reads from the device).

    Args:
        config: only `max_bad_steps` and `compare_every` are used.
    """

    def __init__(self, engine: Engine, config: WatchdogConfig) -> None:
        self._engine, self._max_bad, self._compare_every = engine, config.max_bad_steps, config.compare_every
        self._steps: list[tuple[int, StepResult, list[Ids]]] = []
        self._in_a_row = 0
        self._compared_at = 0
        self.skipped = 0
        """Number of steps skipped since the run started or resumed."""
        self._good_statistics = [buffer.clone() for buffer in engine.statistics()]

    def note(self, step: int, result: StepResult, batches: Sequence[Batch]) -> None:
        """Record a step for the next check."""
        self._steps.append((step, result, [batch.ids for batch in batches]))

    def check(self) -> list[str]:
        """Check the steps since the last call, and return warnings. Collective.

        Raises:
            RunFailed: too many consecutive bad steps (the message names ranks and samples), or weights that
                differ between ranks.
        """
        if not self._steps:
            return []
        finite = torch.stack([result.grad_norm for _, result, _ in self._steps]).isfinite().tolist()
        warnings = []
        for (step, result, ids), good in zip(self._steps, finite, strict=True):
            self._in_a_row = 0 if good else self._in_a_row + 1
            if not good:
                self.skipped += 1
                warnings.append(f"step {step + 1}: non-finite gradients; the update was skipped")
            if self._in_a_row >= self._max_bad:
                raise RunFailed(self._describe_failure(step, result, ids))
        self._repair_statistics(all(finite))
        last = self._steps[-1][0] + 1
        self._steps = []
        if self._compare_every and last - self._compared_at >= self._compare_every:
            self._compared_at = last
            if len(set(self._engine.world.gather(self._engine.digest()))) > 1:
                raise RunFailed(
                    f"step {last}: the weights differ between ranks; resume from the last checkpoint, and check for a "
                    "faulty device and for a rank with different input data or a different seed"
                )
        return warnings

    @torch.no_grad()
    def _repair_statistics(self, all_good: bool) -> None:
        """Restore BatchNorm's running statistics after bad steps, which can set them to NaN; else save them."""
        statistics = self._engine.statistics()
        source, target = (statistics, self._good_statistics) if all_good else (self._good_statistics, statistics)
        if statistics:
            torch._foreach_copy_(target, source)

    def _describe_failure(self, step: int, result: StepResult, micro_batches: list[Ids]) -> str:
        """Describe which ranks had a non-finite loss, and the samples of that step. Collective."""
        world = self._engine.world
        ids = [int(i) for micro_batch in micro_batches for i in micro_batch]
        everyone = world.gather((world.rank, bool(result.loss.isfinite()), ids))
        failing_ranks = "; ".join(
            f"rank {rank}: samples {', '.join(map(str, ids[:SHOWN_IDS]))}, ..."
            for rank, finite, ids in everyone
            if not finite
        )
        return (
            f"{self._max_bad} steps in a row, up to step {step + 1}, had non-finite gradients "
            f"({failing_ranks or 'all losses were finite'}); lower --lr, or try --precision fp32"
        )
