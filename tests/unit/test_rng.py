"""Properties and golden values of the counter-based random numbers (pipeline/rng.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import rng
from pipeline.rng import Stream

words = st.integers(-(2**63), 2**64 - 1)


def test_golden_values() -> None:
    """Different values would change the data of every run."""
    assert rng.bits(Stream.CROP, 1, 2, np.arange(3)).tolist() == [
        0xDFECB375C336074A,
        0xBEEBDE5783795D58,
        0xBB1101819B1585BF,
    ]
    assert int(rng.bits(Stream.SHUFFLE)) == 0x943FF9FC99DE8F03
    assert hexed(rng.uniform(Stream.ERASE, 0, np.arange(2))) == ["0x1.38028f22c378bp-1", "0x1.ed3c6fde286e0p-1"]
    assert rng.integers(1000, Stream.SHUFFLE_BLOCK_ORDER, 5, np.arange(5)).tolist() == [342, 523, 492, 87, 671]
    assert hexed(rng.normal(Stream.RAND_AUGMENT, 0, np.arange(2))) == ["0x1.be75a65a764ebp-1", "0x1.b7dbb3488564ap-1"]
    assert hexed(rng.beta(0.8, Stream.MIX, 0, np.arange(2))) == ["0x1.fcfa8274fb75ap-1", "0x1.38c12b7dd481bp-1"]
    assert rng.seed64(Stream.DROP_PATH, 1, 2, 3) == 3509227765423030000
    # Enough values that the first attempt of some gamma draws is not accepted.
    many = rng.beta(0.8, Stream.MIX, 0, np.arange(2000))
    assert xxhash.xxh3_64_hexdigest(many.tobytes()) == "7aeb3be9eb887329"


@pytest.mark.parametrize(
    ("function", "at", "expected"),
    [
        (rng.exp, [-1.0, 0.5, 100.0], ["0x1.78b56362cef38p-2", "0x1.a61298e1e069cp+0", "0x1.3494a9b171bf5p+144"]),
        (rng.log, [0.1, 3.0, 1e10], ["-0x1.26bb1bbb55515p+1", "0x1.193ea7aad030bp+0", "0x1.7069e2aa2aa5bp+4"]),
        (rng.log, [math.sqrt(0.5)], ["-0x1.62e42fefa39eep-2"]),  # at the end of the mantissa's range
        (
            rng.normal_quantile,
            [1e-9, 0.025, 0.6],
            ["-0x1.7fdc11f44b5a7p+2", "-0x1.f5c0331eeff83p+0", "0x1.036d6c4a04b5ap-2"],
        ),
        # At the limits of the rational approximations: sqrt(-log p) = 5 and |p - 1/2| = 0.425.
        (rng.normal_quantile, [1.3887943864964021e-11, 0.075], ["-0x1.aa1b1c13ee525p+2", "-0x1.7085226d3e523p+0"]),
    ],
)
def test_elementary_functions_give_the_same_bits_everywhere(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], at: list[float], expected: list[str]
) -> None:
    assert hexed(function(np.array(at))) == expected


def test_the_mixer_is_splitmix64() -> None:
    """The first outputs of the published generator for seed 0."""
    with np.errstate(over="ignore"):
        mixed = rng.mix64(rng.GOLDEN * np.arange(1, 4, dtype=np.uint64))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.filterwarnings("error")
def test_scalar_keys_overflow_without_a_warning() -> None:
    assert int(rng.extend(np.uint64(2**64 - 1), 2**64 - 1)) == 0xE220A8397B1DCDAF
    assert int(rng.integers(2**31, Stream.SHUFFLE)) == 0x943FF9FC99DE8F03 >> 33


@settings(deadline=None)
@given(st.sampled_from(Stream), st.lists(words, max_size=4), st.lists(words, min_size=1, max_size=8))
def test_a_draw_depends_on_its_key_only(stream: Stream, key: list[int], last: list[int]) -> None:
    whole = rng.bits(stream, *key, np.array([word % 2**64 for word in last], dtype=np.uint64))
    assert whole.tolist() == [int(rng.bits(stream, *key, word)) for word in last]


@settings(deadline=None)
@given(st.sampled_from(Stream), st.lists(words, max_size=3), st.lists(words, max_size=3))
def test_a_longer_key_extends_a_shorter_one(stream: Stream, key: list[int], more: list[int]) -> None:
    assert rng.extend(rng.bits(stream, *key), *more) == rng.bits(stream, *key, *more)


def test_draws_differ_between_streams_words_and_orders_of_words() -> None:
    keys = [(stream, a, b) for stream in Stream for a in range(20) for b in range(20)]
    assert len({int(rng.bits(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("draw", [rng.bits, rng.uniform, rng.normal, partial(rng.beta, 0.8), partial(rng.integers, 9)])
def test_keys_broadcast(draw: Callable[..., NDArray[np.generic]]) -> None:
    table = draw(Stream.CROP, np.arange(3)[:, None], np.arange(40))
    assert table.shape == (3, 40)
    assert table.tolist() == [[draw(Stream.CROP, a, b) for b in range(40)] for a in range(3)]


def test_a_float_key_is_rejected() -> None:
    with pytest.raises(TypeError, match="expected a key of integers, got float64"):
        rng.bits(Stream.CROP, np.array([1.0]))


def test_uniform_fills_the_unit_interval_evenly() -> None:
    u = rng.uniform(Stream.CROP, 0, np.arange(200_000))
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.bincount((u * 64).astype(int), minlength=64)
    assert chi_square(counts) < 64 + 5 * math.sqrt(2 * 64)


@pytest.mark.parametrize("high", [1, 2, 3, 15, 1000, 2**31])
def test_integers_cover_their_range_evenly(high: int) -> None:
    values = rng.integers(high, Stream.RAND_AUGMENT, 0, np.arange(100_000))
    assert values.min() >= 0
    assert values.max() < high
    buckets = min(high, 15)
    counts = np.bincount(values * buckets // high, minlength=buckets)
    assert chi_square(counts) < buckets + 5 * math.sqrt(2 * buckets)


def test_integers_accept_an_array_of_bounds() -> None:
    high = np.arange(1, 1000)
    values = rng.integers(high, Stream.SHUFFLE_BLOCK_ORDER, 3, np.arange(999))
    assert ((values >= 0) & (values < high)).all()


def test_exp_and_log_are_accurate_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-700, 700, 20_001)
    np.testing.assert_array_max_ulp(rng.exp(x), np.array([math.exp(v) for v in x]), maxulp=2)
    y = np.concatenate([2.0 ** np.linspace(-1000, 1000, 20_001), np.linspace(0.9, 1.1, 2_001)])
    np.testing.assert_array_max_ulp(rng.log(y), np.array([math.log(v) for v in y]), maxulp=2)


@pytest.mark.filterwarnings("error")
def test_exp_beyond_the_range_is_zero_or_infinite() -> None:
    x = np.array([-math.inf, -1e9, -800.0, 800.0, 1e9, math.inf])
    assert rng.exp(x).tolist() == [0.0, 0.0, 0.0, math.inf, math.inf, math.inf]


def test_normal_quantile_is_accurate_in_the_middle_and_the_tails() -> None:
    p = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 10_001), 10.0 ** -np.arange(7.0, 17.0)])
    expected = np.array([NormalDist().inv_cdf(float(v)) for v in p])
    np.testing.assert_allclose(rng.normal_quantile(p), expected, rtol=1e-14, atol=1e-14)


def test_normal_has_the_quantiles_of_the_normal_distribution() -> None:
    z = rng.normal(Stream.RAND_AUGMENT, 1, np.arange(200_000))
    share = np.array([0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999])
    np.testing.assert_allclose(np.quantile(z, share), rng.normal_quantile(share), atol=0.05)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 4.0, 50.0])
def test_beta_has_the_moments_of_the_beta_distribution(alpha: float) -> None:
    draws = rng.beta(alpha, Stream.MIX, 0, np.arange(100_000))
    assert ((draws >= 0) & (draws <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * 3 * (2 * alpha + 1) / (2 * alpha + 3)  # central moment of Beta(alpha, alpha)
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(variance / len(draws))
    assert abs(draws.var() - variance) < 5 * math.sqrt((fourth - variance**2) / len(draws))


def test_beta_agrees_with_numpy() -> None:
    """For alpha 0.8, which the fat recipe uses, quantile by quantile."""
    draws = rng.beta(0.8, Stream.MIX, 0, np.arange(200_000))
    share = np.linspace(0.02, 0.98, 25)
    theirs = np.random.default_rng(0).beta(0.8, 0.8, 200_000)
    np.testing.assert_allclose(np.quantile(draws, share), np.quantile(theirs, share), atol=0.006)


def hexed(values: NDArray[np.float64]) -> list[str]:
    return [float(value).hex() for value in values]


def chi_square(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())
