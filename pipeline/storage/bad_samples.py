"""Handling of bad samples (damaged or missing bytes): stop the run, or use replacement samples."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from pipeline import rng
from pipeline.rng import Stream
from pipeline.storage.reader import Encoded, Fault, SampleReader
from shards.errors import ShardSetError

log = logging.getLogger(__name__)

# A replacement sample may be bad too. This many bad ones in a row mean that most of the set is damaged.
MAX_REPLACEMENTS = 100
# Number of these that are drawn from the bad sample's class, before samples of other classes.
SAME_CLASS_REPLACEMENTS = 10


class BadSamples:
    """Replaces bad samples, up to a budget.

    The replacement sample is a function of (seed, epoch, id of the bad sample) and of which samples are bad. It is
    therefore the same on every rank and at every world size, and every rank keeps its number of steps. It has the
    class of the bad sample, if that has other good samples, so that the shares of the classes do not change.

    Args:
        budget: distinct bad samples to tolerate; 0: raise on the first one.
        samples: number of samples in the split.
        seed: seed of the run.
    """

    def __init__(self, *, budget: int, samples: int, seed: int) -> None:
        self._budget, self._samples, self._seed = budget, samples, seed
        self.ids: set[int] = set()
        """Ids of the bad samples found so far."""

    @property
    def count(self) -> int:
        """Number of distinct bad samples found so far."""
        return len(self.ids)

    def replace_bad_samples(self, encoded: Encoded, reader: SampleReader, *, epoch: int) -> Encoded:
        """Return the batch with every bad row replaced; its `ids` name the samples that it now contains.

        Raises:
            ShardSetError: the budget is 0 or exceeded.
        """
        if not encoded.faults:
            return encoded
        ids, rows, raw, images = encoded.ids.copy(), encoded.rows.copy(), encoded.raw.copy(), list(encoded.images)
        stored = None if encoded.stored is None else encoded.stored.copy()
        for fault in sorted(encoded.faults, key=lambda fault: fault.row):
            self._note(fault)
            found = self._replacement(fault, int(rows["label"][fault.row]), reader, epoch)
            log.warning("epoch %d: bad sample replaced by sample %d: %s", epoch, found.ids[0], fault.error)
            ids[fault.row], rows[fault.row], raw[fault.row] = found.ids[0], found.rows[0], found.raw[0]
            images[fault.row] = found.images[0]
            if stored is not None and found.stored is not None:
                stored[fault.row] = found.stored[0]
        return dataclasses.replace(encoded, ids=ids, rows=rows, raw=raw, images=images, stored=stored, faults=[])

    def _replacement(self, fault: Fault, label: int, reader: SampleReader, epoch: int) -> Encoded:
        same_class = reader.ids_of_class(label)
        same_class = same_class[same_class != fault.id]
        for attempt in range(MAX_REPLACEMENTS):
            limited = attempt < SAME_CLASS_REPLACEMENTS and len(same_class) > 0
            among = len(same_class) if limited else self._samples
            chosen = rng.integers(among, Stream.REPLACEMENT, self._seed, epoch, fault.id, attempt)
            chosen = same_class[chosen] if limited else chosen
            found = reader.read(np.atleast_1d(chosen))
            if not found.faults:
                return found
            self._note(found.faults[0])
        raise ShardSetError(
            f"all {MAX_REPLACEMENTS} replacement samples drawn for a bad sample are bad too; run 'pipeline verify' on "
            f"the set; the bad sample: {fault.error}"
        )

    def _note(self, fault: Fault) -> None:
        self.ids.add(fault.id)
        if self._budget == 0:
            raise fault.error
        if len(self.ids) > self._budget:
            raise ShardSetError(
                f"found {len(self.ids)} bad samples, more than --bad-samples skip:{self._budget} allows; run 'pipeline "
                f"verify' on the set; the last one: {fault.error}"
            )
