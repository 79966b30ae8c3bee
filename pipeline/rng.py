"""Counter-based random numbers: every draw is a pure function of its key, in any order and on any machine.

The generators of libraries are not used, because their streams may change between versions. Neither are `numpy.exp` and
similar functions, because their last bits depend on the CPU's vector width. The operations used here (integer
arithmetic, IEEE addition, multiplication, division and square root) give the same bits everywhere. The golden values in
tests/unit/test_rng.py must never change: other values would change the data of every run.
"""

from __future__ import annotations

from enum import IntEnum
from math import factorial

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

# Constants of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
INCREMENT, FACTOR1, FACTOR2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFT1, SHIFT2, SHIFT3 = 30, 27, 31
# The same for arrays, because NumPy takes longer to convert a Python integer than to compute with it.
GOLDEN, MIX1, MIX2 = map(np.uint64, (INCREMENT, FACTOR1, FACTOR2))
_RIGHT1, _RIGHT2, _RIGHT3 = map(np.uint64, (SHIFT1, SHIFT2, SHIFT3))
_MASK = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """The purpose of a draw. It is part of every key, so that different purposes have independent numbers.

    Never renumber: the numbers are hashed.
    """

    SHARD_ORDER = 1
    ROTATION = 2
    SHUFFLE_BLOCK_ORDER = 3
    CROP = 4
    FLIP = 5
    RAND_AUGMENT = 6
    ERASE = 7
    ERASE_NOISE = 8
    MIX = 9
    DROP_PATH = 10
    REPLACEMENT = 11
    SHUFFLE = 12
    INIT = 13
    CLASS_QUOTA = 14
    CLASS_ORDER = 15
    FRACTION = 16
    MEMORY_CACHE = 17
    CPU_DECODE = 18


def mix64(x: U64) -> U64:
    """Apply the finalizer of SplitMix64, a bijection of uint64 in which every input bit affects every output bit.

    The caller suppresses NumPy's overflow warnings; doing so here would cost as much as the arithmetic.
    """
    x = (x ^ (x >> _RIGHT1)) * MIX1
    x = (x ^ (x >> _RIGHT2)) * MIX2
    return x ^ (x >> _RIGHT3)


def bits(stream: Stream, *key: ArrayLike) -> U64:
    """Draw 64 random bits for each element of the broadcast key.

    Args:
        stream: purpose of the draw.
        key: integers (negative values wrap) or integer arrays that broadcast together, usually seed, epoch, sample id
            and a counter.

    Returns:
        uint64 of the key's broadcast shape.
    """
    state, at = _mix_int(int(stream)), 0
    # Python's integers need a tenth of the time of arrays of one element.
    while at < len(key) and isinstance(word := key[at], int):
        state, at = _mix_int(state ^ (word & _MASK)), at + 1
    return extend(np.asarray(state, dtype=np.uint64)[()], *key[at:])


def extend(state: U64, *key: ArrayLike) -> U64:
    """Append words to the key of a draw: `extend(bits(s, a), b)` equals `bits(s, a, b)`."""
    with np.errstate(over="ignore"):
        for word in key:
            state = mix64((state ^ _as_u64(word)) + GOLDEN)
    return state


def _mix_int(x: int) -> int:
    """Return mix64(x + GOLDEN) of one integer in 0 to 2^64 - 1."""
    x = (x + INCREMENT) & _MASK
    x = ((x ^ (x >> SHIFT1)) * FACTOR1) & _MASK
    x = ((x ^ (x >> SHIFT2)) * FACTOR2) & _MASK
    return x ^ (x >> SHIFT3)


def uniform(stream: Stream, *key: ArrayLike) -> NDArray[np.float64]:
    """Draw uniform float64 values in [0, 1) with 53 random bits, of the key's broadcast shape."""
    return (bits(stream, *key) >> np.uint64(11)) * np.float64(1.0 / (1 << 53))


def integers(high: ArrayLike, stream: Stream, *key: ArrayLike) -> NDArray[np.int64]:
    """Draw int64 values in [0, high), of the key's broadcast shape.

    `high` is at most 2^31, so that the bias of the multiply-shift method stays below 2^-32.
    """
    top = bits(stream, *key) >> np.uint64(32)
    return ((top * _as_u64(high)) >> np.uint64(32)).astype(np.int64)


def normal(stream: Stream, *key: ArrayLike) -> NDArray[np.float64]:
    """Draw standard normal float64 values of the key's broadcast shape, as quantiles of a 52-bit uniform draw."""
    u = ((bits(stream, *key) >> np.uint64(12)) + np.float64(0.5)) * (1.0 / (1 << 52))
    return normal_quantile(u)


def beta(alpha: float, stream: Stream, *key: ArrayLike) -> NDArray[np.float64]:
    """Draw Beta(alpha, alpha) float64 values of the key's broadcast shape.

    The value is G1 / (G1 + G2) of two gamma draws, whose keys have one more word each. It is computed from logarithms,
    so that a small alpha does not underflow.
    """
    words = (_as_u64(word)[..., None] for word in key)
    first, second = np.moveaxis(_log_gamma_draw(alpha, stream, *words, np.arange(2)), -1, 0)
    return 1.0 / (1.0 + exp(second - first))


def _log_gamma_draw(alpha: float, stream: Stream, *key: ArrayLike) -> NDArray[np.float64]:
    """Draw the logarithm of a Gamma(alpha) value.

    Source: Marsaglia and Tsang 2000, "A simple method for generating gamma variables". Their method draws
    Gamma(alpha + 1), and a power of a uniform draw reduces it to Gamma(alpha). An attempt is accepted with a
    probability above 0.95; all 16 attempts fail with a probability of 10^-20.
    """
    d = alpha + 1.0 - 1.0 / 3.0

    def attempt(*numbered: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return log(v) and whether the attempt is accepted, for keys that end in the number of the attempt."""
        x = normal(stream, *numbered, 0)
        root = 1.0 + x / np.sqrt(9.0 * d)
        v = root * root * root
        log_v = 3.0 * log(np.maximum(root, 1e-300))
        log_u = log(1.0 - uniform(stream, *numbered, 1))
        # An attempt with root <= 0 is never accepted, because clamping root makes log_v very negative.
        return log_v, log_u < 0.5 * x * x + d - d * v + d * log_v

    words = np.broadcast_arrays(*map(_as_u64, key))
    log_v, accepted = attempt(*words, 0)
    if not accepted.all():  # rare: all 16 attempts are computed only for keys whose first attempt failed
        log_vs, others = attempt(*(word[~accepted][:, None] for word in words), np.arange(16))
        first = others.argmax(axis=1)
        log_v[~accepted] = log_vs[np.arange(len(first)), first]
    log_power = log(1.0 - uniform(stream, *key, 16)) / alpha
    return log(d) + log_v + log_power


def seed64(stream: Stream, *key: int) -> int:
    """Return a non-negative 63-bit seed for a library's generator, such as `torch.manual_seed`."""
    return int(bits(stream, *key)) >> 1


def _as_u64(word: ArrayLike) -> U64:
    if isinstance(word, int):
        return np.asarray(word & _MASK, dtype=np.uint64)
    array = np.asarray(word)
    if array.dtype == np.uint64:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"expected a key of integers, got {array.dtype}")
    return array.astype(np.int64).view(np.uint64)


# Elementary functions that use IEEE operations only, so they give the same bits on every machine. They are within 2
# units in the last place of the true value (normal_quantile: relative error 1e-14).

_LN2_HIGH = 6.93147180369123816490e-01  # the low 21 bits are zero, so the product with an exponent is exact
_LN2_LOW = 1.90821492927058770002e-10
_LOG2_E = 1.4426950408889634
_SQRT_HALF = 0.7071067811865476


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute e^x in float64, by a Taylor series around the nearest multiple of ln 2. Infinite for x above 709."""
    x = np.clip(x, -800.0, 800.0)
    power = np.rint(x * _LOG2_E)
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    with np.errstate(over="ignore"):
        return np.ldexp(_horner(rest, _EXP), power.astype(np.int32))


def log(x: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Compute the natural logarithm of positive normal float64 values.

    It is the series of 2 atanh((m - 1) / (m + 1)), where m is the mantissa.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    power = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return power * _LN2_HIGH + (2.0 * s * _horner(s * s, _ATANH) + power * _LN2_LOW)


def normal_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the inverse distribution function of the standard normal at p in (0, 1), float64.

    Source: Wichura 1988, "Algorithm AS 241: the percentage points of the normal distribution", PPND16.
    """
    q = p - 0.5
    r = 0.180625 - q * q
    middle = q * _horner(r, _AS241_MIDDLE[0]) / _horner(r, _AS241_MIDDLE[1])
    t = np.sqrt(-log(np.minimum(p, 1.0 - p)))
    near = _horner(t - 1.6, _AS241_NEAR[0]) / _horner(t - 1.6, _AS241_NEAR[1])
    far = _horner(t - 5.0, _AS241_FAR[0]) / _horner(t - 5.0, _AS241_FAR[1])
    tail = np.copysign(np.where(t <= 5.0, near, far), q)
    return np.where(np.abs(q) <= 0.425, middle, tail)


def _horner(x: NDArray[np.float64], coefficients: tuple[float, ...]) -> NDArray[np.float64]:
    """Evaluate the polynomial with these coefficients, the constant term first."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


_EXP = tuple(1.0 / factorial(n) for n in range(15))
_ATANH = tuple(1.0 / (2 * n + 1) for n in range(12))

# Coefficients of numerator and denominator, the constant term first, for |p - 1/2| <= 0.425, for tails with
# sqrt(-log p) <= 5, and for the remaining tails.
_AS241_MIDDLE = (
    (3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
     45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
    (1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
     21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610),
)  # fmt: skip
_AS241_NEAR = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
     0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_AS241_FAR = (
    (6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
     0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip
