"""Class-balanced sampling: how often each sample of the training split is drawn in an epoch.

A class of n samples gets a share of the draws that is proportional to n ** (1 - exponent): its natural share with
exponent 0, the same share as every other class with exponent 1, and square-root sampling with 0.5. Source: Kang et al.
2020, "Decoupling representation and classifier for long-tailed recognition" (arXiv 1910.09217), section 3.1, where
1 - exponent is called q.

The draws are not independent, as they are in `torch.utils.data.WeightedRandomSampler`:

- Every epoch of a split of N samples has exactly N draws, and the draws of a class are its share of N, rounded up or
  down. One random number per epoch decides this for all classes such that the expected number is exactly the share.
- A class's samples are drawn in turn, in a hashed order, and each epoch continues where the previous one ended. So the
  numbers of times that two samples of a class were drawn since the start of training differ by at most 1.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.rng import U64, Stream, bits, exp, log, uniform

_CHUNK = 1 << 20  # samples that are processed at a time, so that temporary arrays are small


class ClassBalance:
    """The draws of each epoch, a pure function of the arguments.

    Args:
        labels: class number of each sample, integers [samples], ordered by sample id.
        exponent: 0 (natural shares) to 1 (equal shares).
        seed: seed of the run.
    """

    def __init__(self, labels: NDArray[np.integer], exponent: float, *, seed: int) -> None:
        counts = np.bincount(labels)
        self.samples, self.exponent, self.seed = len(labels), exponent, seed
        self._labels = labels.astype(np.min_scalar_type(len(counts)))  # this array is pickled, so it should be small
        self._counts = counts
        # `np.power` is not used, because its last bits depend on the CPU.
        weights = np.where(counts > 0, exp((1 - exponent) * log(np.maximum(counts, 1).astype(np.float64))), 0.0)
        ends = np.cumsum(weights)
        self._ends = ends / ends[-1] * self.samples

    @property
    def expected(self) -> NDArray[np.float64]:
        """Expected number of draws of each class in an epoch, float64 [classes]; their sum is the number of samples."""
        return np.diff(self._ends, prepend=0.0)

    @property
    def draws_per_sample(self) -> tuple[float, float]:
        """Expected number of draws of a sample in an epoch, in the largest and in the smallest class."""
        per_sample = (self.expected / np.maximum(self._counts, 1))[self._counts > 0]
        return float(per_sample.min()), float(per_sample.max())

    def quotas(self, epoch: int) -> NDArray[np.int64]:
        """Return the number of draws of each class in an epoch, int64 [classes]: `expected`, rounded up or down."""
        offset = uniform(Stream.CLASS_QUOTA, self.seed, epoch)
        # The sum may round up to the next number, although the offset is below 1.
        ends = np.minimum(np.floor(self._ends + offset).astype(np.int64), self.samples)
        return np.diff(ends, prepend=0)

    def draws(self, epoch: int) -> NDArray[np.uint32]:
        """Return the ids of all samples that an epoch draws, ascending, uint32 [samples].

        An id is repeated as often as its sample is drawn.
        """
        quotas = self.quotas(epoch)
        before = np.zeros_like(quotas)
        for earlier in range(epoch):
            before += self.quotas(earlier)
        sizes = np.maximum(self._counts, 1)
        rounds, rest, first = quotas // sizes, quotas % sizes, before % sizes
        drawn, filled = np.empty(self.samples, np.uint32), 0
        for start in range(0, self.samples, _CHUNK):
            labels, turn = self._labels[start : start + _CHUNK], self._turns[start : start + _CHUNK].astype(np.int64)
            after_first = (turn - first[labels]) % sizes[labels]
            times = rounds[labels] + (after_first < rest[labels])
            ids = np.repeat(np.arange(start, start + len(labels), dtype=np.uint32), times)
            drawn[filled : filled + len(ids)] = ids
            filled += len(ids)
        return drawn

    @cached_property
    def _turns(self) -> NDArray[np.uint32]:
        """Place of each sample in the hashed order of its class, uint32 [samples]."""
        order = shuffled_by_class(self._labels, bits(Stream.CLASS_ORDER, self.seed, np.arange(self.samples)))
        turns = np.empty(self.samples, np.uint32)
        turns[order] = np.arange(self.samples) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        return turns


def shuffled_by_class(labels: NDArray[np.integer], keys: U64) -> NDArray[np.int64]:
    """Return the positions of all samples, sorted by class and then by the highest bits of hashed keys.

    Args:
        labels: class number of each sample, integers [samples].
        keys: uint64 [samples].
    """
    # Sorting one array of 64-bit numbers is several times faster than sorting by two keys. At least 12 bits of the key
    # remain, because labels have at most 20 bits and positions 32.
    of_label, of_position = int(labels.max()).bit_length(), len(labels).bit_length()
    packed = keys >> np.uint64(of_label + of_position) << np.uint64(of_position)
    packed |= labels.astype(np.uint64) << np.uint64(64 - of_label)
    packed |= np.arange(len(labels), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64((1 << of_position) - 1)).astype(np.int64)
