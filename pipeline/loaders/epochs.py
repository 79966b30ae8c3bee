"""Iterate over training batches: one epoch per `for` loop, as with torch's DataLoader, or as one stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.background import BackgroundLoader
from pipeline.batch import Batch
from pipeline.options import LoaderOptions
from pipeline.phases.train_phase import TrainPhase, phase_at
from pipeline.plan import Position, TrainPlan
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from shards.errors import UserError
from shards.format.dataset import ShardSet

UNLIMITED_EPOCHS = 1 << 31
"""Epochs of a loader without a last epoch. Its background thread works until `close`."""


class EpochLoader(BackgroundLoader):
    """Base class of `TrainLoader`: the position in the plan.

    A `for` loop delivers one epoch, and the next loop the following epoch. `next(loader)` and `stream` continue across
    epochs. In both cases the batches of the next epoch are prefetched while the last ones of an epoch are consumed.

    Args:
        dataset, split, device, dtype, options, memory_cache: see `BackgroundLoader`.
        plan: the order of the samples.
        phases: image size, augmentation, and rows of each global batch that this rank delivers, by step.
        epochs: number of epochs, counted from the start of training. None: unlimited.
        start: first position to deliver.
    """

    def __init__(
        self,
        dataset: ShardSet,
        split: str,
        plan: TrainPlan,
        phases: tuple[TrainPhase, ...],
        *,
        epochs: int | None,
        start: Position,
        device: torch.device | str | None,
        dtype: torch.dtype,
        options: LoaderOptions,
        memory_cache: SharedPixels | None = None,
    ) -> None:
        super().__init__(
            dataset,
            split,
            device=device,
            dtype=dtype,
            options=options,
            seed=plan.seed,
            rank=phases[0].shape.rank,
            world=phases[0].shape.world,
            caches=True,
            memory_cache=memory_cache,
        )
        self._plan, self._phases = plan, phases
        self._epochs = UNLIMITED_EPOCHS if epochs is None else epochs
        self._next = start
        self._loop: object | None = None  # identifies the most recent `for` loop
        self._loop_epoch: int | None = None  # the epoch that it delivers

    def __len__(self) -> int:
        """Return the number of micro-batches of the complete epoch that the next batch belongs to."""
        first = self.epoch * self._plan.steps_per_epoch
        borders = [phase.first_step for phase in self._phases[1:]] + [first + self._plan.steps_per_epoch]
        batches = 0
        for phase, border in zip(self._phases, borders, strict=True):
            steps = min(border, first + self._plan.steps_per_epoch) - max(phase.first_step, first)
            batches += max(steps, 0) * phase.shape.accumulation
        return batches

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, counted from 0. After an epoch's last batch, this is the following epoch."""
        return self._next.epoch

    def __iter__(self) -> Iterator[Batch]:
        """Begin the next epoch, or continue the epoch in which the loader was created or loaded.

        A loop that was left with `break` is not continued: the following loop delivers the next epoch, as with torch's
        DataLoader. To continue it, use `loader.stream()`, or `loader.load_state_dict(loader.state_dict())` before the
        following loop.

        Raises:
            UserError: all epochs have been delivered.
        """
        if self.epoch + self._within_loop >= self._epochs:
            raise UserError(
                f"all {self._epochs} epochs of this loader have been delivered; create it with a larger number of "
                "epochs, or call set_epoch to repeat one"
            )
        return self._loop_over_epoch()

    def _loop_over_epoch(self) -> Iterator[Batch]:
        # A loop begins with its first batch: some training loops (Lightning's) create iterators that they never use.
        if self._within_loop:
            self._seek(Position(self.epoch + 1, 0))
        loop = self._loop = object()
        self._loop_epoch = self.epoch
        while self._loop is loop:
            if not self._within_loop:
                return
            yield next(self)
        raise RuntimeError(
            "this iterator is not valid any more, because another loop over the same loader was begun, or its position "
            "was set"
        )

    def __next__(self) -> Batch:
        """Return the next batch of the training, also across the end of an epoch.

        Raises:
            StopIteration: all epochs have been delivered.
        """
        batch = super().__next__()
        if batch.micro == self._phase(batch.position).shape.accumulation - 1:
            self._next = self._plan.after(batch.position)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Let the next `for` loop deliver this epoch, as with torch's DistributedSampler.

        It is optional, because every loop delivers the next epoch. It does nothing if the loader is in this epoch and
        no loop over it has begun, so an epoch whose state was loaded is continued.
        """
        if epoch != self.epoch or self._within_loop:
            self._seek(self._checked(epoch, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step of which every micro-batch was delivered.

        The state may be saved after any batch, also after the last one of an epoch. With gradient accumulation, a state
        that was taken between the micro-batches of a step is the position before this step.

        Returns:
            `{"epoch": int, "step": int, "plan": {...}}`, the same on every rank and for every world size. `plan`
            identifies the set and the order of its samples.
        """
        return {"epoch": self._next.epoch, "step": self._next.step, "plan": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of a `state_dict`, which may be of another world size.

        Prefetched batches are discarded.

        Raises:
            UserError: the state is that of another plan (set, selection, global batch, seed, lanes, ...), or not
                a state of a training loader.
        """
        try:
            epoch, step, plan = state["epoch"], state["step"], dict(state["plan"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "not a state of a training loader: expected the dictionary that its state_dict() returned, with "
                "'epoch', 'step' and 'plan'"
            ) from None
        changed = [
            f"{name} was {plan.get(name)}, and is {value}"
            for name, value in self._identity.items()
            if plan.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the loader's state is of another plan ({'; '.join(changed)}): create the loader with the arguments "
                "that it had when the state was saved"
            )
        self._seek(self._checked(epoch, step))

    @property
    def _within_loop(self) -> bool:
        """Whether the epoch of the most recent loop is not complete."""
        return self._loop_epoch == self.epoch

    def _phase(self, position: Position) -> TrainPhase:
        return phase_at(self._phases, self._plan.steps_before(position))

    @property
    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "index_hash": self._dataset.split(self._split).index_hash,
            "selection": self._dataset.selection_digest(self._split),
            "samples": plan.samples,
            "global_batch": plan.global_batch,
            "seed": plan.seed,
            "lanes": plan.lanes,
            "shuffle_block_size": plan.shuffle_block_size,
            "class_balance": plan.balance.exponent if plan.balance else 0.0,
        }

    def _checked(self, epoch: int, step: int) -> Position:
        """Return a position.

        Raises:
            UserError: it is not in the plan.
        """
        integers = isinstance(epoch, int) and isinstance(step, int)
        if not integers or epoch < 0 or not 0 <= step < self._plan.steps_per_epoch:
            raise UserError(
                f"epoch {epoch!r}, step {step!r}: expected whole numbers, an epoch from 0 and a step from 0 to "
                f"{self._plan.steps_per_epoch - 1}"
            )
        return Position(epoch, step)

    def _seek(self, position: Position) -> None:
        """Continue from a position. Prefetched batches are discarded."""
        self._stop()
        self._next, self._loop, self._loop_epoch = position, None, None
