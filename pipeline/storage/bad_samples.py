"""What becomes of samples whose bytes are damaged or gone: the run stops, or others take their places."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from pipeline import rng
from pipeline.rng import Stream
from pipeline.storage.reader import Encoded, Fault, SampleReader
from shards.errors import ShardSetError

log = logging.getLogger(__name__)

# A substitute may be damaged itself. If so many in a row are, the set is no set.
TRIES = 100


class BadSamples:
    """Puts substitutes in the places of bad samples, as long as a budget lasts.

    The substitute is a function of (seed, epoch, bad id) and of which samples are damaged, so every rank and world size
    comes to the same, and no rank's steps become fewer.

    Args:
        budget: different bad samples to put up with; 0 = none.
        samples: of the split.
        seed: of the run.
    """

    def __init__(self, *, budget: int, samples: int, seed: int) -> None:
        self._budget, self._samples, self._seed = budget, samples, seed
        self.ids: set[int] = set()
        """Ids of the bad samples met so far."""

    @property
    def count(self) -> int:
        """Different bad samples met so far."""
        return len(self.ids)

    def replace_bad_samples(self, encoded: Encoded, reader: SampleReader, *, epoch: int) -> Encoded:
        """The batch with all rows good; its `ids` are those of what it holds.

        Raises:
            ShardSetError: the budget is used up, or 0.
        """
        if not encoded.faults:
            return encoded
        ids, rows, raw, images = encoded.ids.copy(), encoded.rows.copy(), encoded.raw.copy(), list(encoded.images)
        for fault in sorted(encoded.faults, key=lambda fault: fault.row):
            self._note(fault)
            found = self._substitute(fault, reader, epoch)
            log.warning("epoch %d: sample %d takes the place of a bad one: %s", epoch, found.ids[0], fault.error)
            ids[fault.row], rows[fault.row], raw[fault.row] = found.ids[0], found.rows[0], found.raw[0]
            images[fault.row] = found.images[0]
        return dataclasses.replace(encoded, ids=ids, rows=rows, raw=raw, images=images, faults=[])

    def _substitute(self, fault: Fault, reader: SampleReader, epoch: int) -> Encoded:
        for attempt in range(TRIES):
            chosen = rng.integers(self._samples, Stream.REPLACEMENT, self._seed, epoch, fault.id, attempt)
            found = reader.read(np.atleast_1d(chosen))
            if not found.faults:
                return found
            self._note(found.faults[0])
        raise ShardSetError(f"{TRIES} substitutes for a bad sample are bad as well; the sample: {fault.error}")

    def _note(self, fault: Fault) -> None:
        self.ids.add(fault.id)
        if self._budget == 0:
            raise fault.error
        if len(self.ids) > self._budget:
            raise ShardSetError(
                f"{len(self.ids)} bad samples are more than --bad-samples skip:{self._budget} allows; "
                f"the last one: {fault.error}"
            )
