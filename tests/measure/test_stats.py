"""Reference values, hand-worked examples, and the two claims of the speed comparison, simulated."""

import math

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from vitlib.measure import stats
from vitlib.measure.stats import Interval


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe, Statist. Med. 17, 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_values(right: int, n: int, low: float, high: float) -> None:
    assert stats.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="greater than"):
        stats.wilson(3, 2)


def _pairs(*, lost: int, gained: int, n: int = 818, both: int = 700) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.zeros(n, bool), np.zeros(n, bool)
    before[: both + lost] = True
    after[:both] = True
    after[both + lost : both + lost + gained] = True
    return before, after


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(8, 1, 2 * (1 + 9) / 2**9), (8, 0, 2 / 2**8), (0, 0, 1.0), (3, 3, 1.0), (1, 8, 20 / 512)],
)
def test_mcnemar_is_the_exact_binomial(lost: int, gained: int, p: float) -> None:
    assert stats.mcnemar(*_pairs(lost=lost, gained=gained)) == (lost, gained, pytest.approx(p))


def test_pairs_of_different_length_are_refused() -> None:
    for function in (stats.mcnemar, stats.flips, stats.paired_difference):
        with pytest.raises(ValueError, match="one length"):
            function([True, False], [True])


def test_holm_worked_by_hand_with_a_row_that_was_not_run() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last is raised to the one before it.
    adjusted = stats.holm([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, np.nan, 0.06, 0.02])
    assert stats.holm([]).shape == (0,) and stats.holm([0.6, 0.9]).max() == 1.0


def test_the_original_study_layer_21_is_not_shown() -> None:
    *_, p = stats.mcnemar(*_pairs(lost=8, gained=0))
    adjusted = stats.holm([p, *np.full(49, 0.5)])
    assert p == pytest.approx(0.0078, abs=5e-5) and adjusted[0] == pytest.approx(0.39, abs=5e-3)
    difference = stats.paired_difference(*_pairs(lost=8, gained=0))
    assert stats.verdict(difference=difference, p_adjusted=adjusted[0], margin=0.01) == "not shown"


def test_paired_difference_without_discordant_pairs_still_has_a_width() -> None:
    z = scipy_stats.norm.ppf(0.975)
    difference = stats.paired_difference(*_pairs(lost=0, gained=0))
    bound = z**2 / (818 + z**2)
    assert difference == pytest.approx((0.0, -bound, bound))
    assert stats.paired_difference([1, 1], [0, 0])[:2] == (-1.0, -1.0)


def test_paired_difference_is_antisymmetric_and_covers() -> None:
    one, other = (stats.paired_difference(*_pairs(lost=a, gained=b)) for a, b in ((12, 3), (3, 12)))
    assert (other.estimate, other.low, other.high) == pytest.approx((-one.estimate, -one.high, -one.low))
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        outcome = rng.choice(3, size=200, p=[0.05, 0.02, 0.93])  # lost, gained, neither: true -0.03
        interval = stats.paired_difference(outcome != 1, outcome != 0)
        covered += interval.low <= -0.03 <= interval.high
    assert covered >= 276  # 95 % expected; fewer has a probability below 1 in 200


@pytest.mark.parametrize(
    ("interval", "p", "expected"),
    [
        (Interval(-0.030, -0.040, -0.020), 0.001, "different"),
        (Interval(-0.004, -0.006, -0.002), 0.010, "different"),  # inside the margin, and yet found
        (Interval(0.020, 0.010, 0.030), 0.010, "different"),  # a gain
        (Interval(-0.002, -0.008, 0.004), 0.700, "non-inferior"),
        (Interval(-0.002, -0.008, 0.004), math.nan, "non-inferior"),
        (Interval(-0.010, -0.020, 0.000), 0.300, "not shown"),
        (Interval(0.0, 0.0, 0.0), 1.000, "not shown"),  # a bootstrap without discordant pairs
        (Interval(math.nan, math.nan, math.nan), math.nan, "not shown"),
    ],
)
def test_verdict(interval: Interval, p: float, expected: str) -> None:
    assert stats.verdict(difference=interval, p_adjusted=p, margin=0.01) == expected


def test_bootstrap_of_a_mean_agrees_with_theory_and_repeats_itself() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 900)
    interval = stats.paired_bootstrap(values, resamples=4000)
    error = values.std() / 30
    expected = (values.mean(), values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    assert interval == pytest.approx(expected, abs=0.006)
    assert interval == stats.paired_bootstrap(values, resamples=4000)


def test_bootstrap_of_too_little_is_unknown() -> None:
    assert stats.paired_bootstrap([3.0])[0] == 3.0 and math.isnan(stats.paired_bootstrap([3.0]).low)
    assert all(math.isnan(value) for few in ([], [1.0, math.nan, 2.0]) for value in stats.paired_bootstrap(few))


def halves(values: np.ndarray, repeats: int = 200) -> Interval:
    return stats.rank_correlation(*stats.random_halves(values, repeats=repeats))


def test_halves_of_the_pictures_tell_signal_from_noise() -> None:
    noise = np.random.default_rng(0).normal(size=(12, 400))
    assert halves(noise + np.linspace(0, 2, 12)[:, None]).estimate > 0.95
    assert abs(halves(noise).estimate) < 0.5
    assert all(math.isnan(value) for value in halves(np.ones((3, 8))))


def test_halves_that_tie_are_left_out() -> None:
    """Two pictures of 40 tell the blocks apart: where both fall into one half, the other ranks nothing."""
    values = np.zeros((4, 40))
    values[:, :2] = np.arange(4)[:, None]
    assert halves(values).estimate == pytest.approx(1.0)


def test_fewest_significant_is_the_first_that_holm_lets_pass() -> None:
    for tests in (1, 2, 50, 51):
        k = stats.fewest_significant(tests)

        def adjusted(pictures: int, tests: int = tests) -> float:
            p = stats.mcnemar(np.zeros(pictures, bool), np.ones(pictures, bool))[2]
            return float(stats.holm([p] + [1.0] * (tests - 1))[0])

        assert adjusted(k) < stats.SIGNIFICANCE <= adjusted(k - 1)
    assert stats.fewest_significant(50) == 11


def test_halves_rank_as_scipy_does() -> None:
    values = np.random.default_rng(2).integers(0, 3, size=(6, 2)).astype(float)  # with ties
    expected = scipy_stats.spearmanr(values[:, 0], values[:, 1]).statistic
    assert halves(values, repeats=5).estimate == pytest.approx(expected)


@pytest.mark.parametrize(("q", "n"), [(90, 64), (95, 130), (99, 662)])
def test_published_thresholds_follow_from_the_stated_rule(q: int, n: int) -> None:
    assert stats.samples_needed(q) == n
    beyond = scipy_stats.binom(n, 1 - q / 100)
    assert beyond.sf(1) >= 0.99 > scipy_stats.binom(n - 1, 1 - q / 100).sf(1)
    assert math.isnan(stats.percentile(np.ones(n - 1), q)) and stats.percentile(np.ones(n), q) == 1.0


def test_median_interval_resamples_rounds() -> None:
    rounds = [np.full(50, level) for level in (10.0, 11.0, 12.0, 13.0, 14.0)]
    interval = stats.median_interval(rounds)
    assert interval.estimate == 12.0 and interval.low <= 11.0 and interval.high >= 13.0


def _timed_pair(rng: np.random.Generator, slowdown: float, rounds: int = 20) -> list[np.ndarray]:
    """Latencies (rounds, 10) of both: shared drift, 1 % jitter of rounds and of samples, 5 % outliers."""
    drift = 10 * np.exp(np.cumsum(rng.normal(0, 0.01, (rounds, 1)), axis=0))

    def arm(factor: float) -> np.ndarray:
        jitter = rng.normal(0, 0.01, (rounds, 1)) + rng.normal(0, 0.01, (rounds, 10))
        outlier = np.where(rng.random((rounds, 10)) < 0.05, rng.uniform(1.1, 3.0, (rounds, 10)), 1.0)
        return drift * factor * np.exp(jitter) * outlier

    return [arm(1.0), arm(slowdown)]


@pytest.mark.parametrize(("slowdown", "expected"), [(1.0, "same"), (1.02, "slower"), (1 / 1.02, "faster")])
def test_speed_comparison_is_right_in_95_of_100_runs(slowdown: float, expected: str) -> None:
    rng = np.random.default_rng(0)
    found = [stats.same_or_slower(*_timed_pair(rng, slowdown)) for _ in range(100)]
    assert found.count(expected) >= 95


def test_speed_comparison_admits_what_it_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    few = _timed_pair(rng, 1.5, rounds=stats.MINIMUM_ROUNDS - 1)
    assert stats.same_or_slower(*few) == stats.TOO_FEW_ROUNDS
    noisy = [stats.same_or_slower(*np.exp(rng.normal(0, 0.3, (2, 20)))) for _ in range(100)]
    assert noisy.count("not shown") >= 95
    assert stats.same_or_slower(np.ones(20), np.ones(20)) == "same"


def test_times_faster_is_the_ratio_of_the_printed_medians_and_covers() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        before, after = _timed_pair(rng, 0.5)
        found = stats.times_faster(before, after)
        medians = [stats.median_interval(list(rounds)).estimate for rounds in (before, after)]
        assert found.estimate == pytest.approx(medians[0] / medians[1])
        covered += found.low <= 2.0 <= found.high
    assert covered >= 88  # 95 % expected of a percentile interval, a little less of a median
    own = [np.full(3, level) for level in (1.0, 2.0, 9.0)]
    assert stats.times_faster(own, own) == (1.0, 1.0, 1.0)  # the two sides of a round are resampled together
    assert math.isnan(stats.times_faster([[2.0]], [[1.0]]).low)
    five = stats.times_faster(*_timed_pair(rng, 5.0, rounds=4))
    assert 0.15 < five.low < five.estimate < five.high < 0.25  # few rounds are enough to see that


@pytest.mark.parametrize("function", [stats.same_or_slower, stats.times_faster])
def test_latencies_of_different_rounds_are_refused(function) -> None:
    with pytest.raises(ValueError, match="one length"):
        function([1.0, 2.0], [1.0])


def test_hodges_lehmann_by_hand() -> None:
    assert stats.hodges_lehmann([1.0, 2.0, 9.0]) == (3.5, -math.inf, math.inf)
    # n = 10: the tabulated critical value at 5 % is 8, so the 9th smallest average is the bound.
    x = np.array([1.1, 2.3, 3.2, 4.7, 5.0, 6.6, 7.9, 8.1, 9.4, 12.0])
    averages = np.sort([(x[i] + x[j]) / 2 for i in range(10) for j in range(i, 10)])
    assert stats.hodges_lehmann(x)[1:] == (averages[8], averages[-9])


def test_kl_is_scipys_and_survives_large_logits() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 3, (50, 102)), rng.normal(0, 3, (50, 102))
    expected = special.rel_entr(special.softmax(before, axis=1), special.softmax(after, axis=1)).sum(axis=1)
    np.testing.assert_allclose(stats.kl_divergence(before, after), expected, rtol=1e-10)
    np.testing.assert_allclose(stats.kl_divergence(before + 1e4, after - 1e4), expected, rtol=1e-8)


def test_kl_of_equals_is_zero_and_of_nan_is_nan() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float16)
    assert (stats.kl_divergence(logits, logits) == 0).all()
    broken = logits.copy()
    broken[3, 1], broken[4, 2] = np.nan, np.inf
    assert np.flatnonzero(np.isnan(stats.kl_divergence(logits, broken))).tolist() == [3, 4]
    assert np.flatnonzero(np.isnan(stats.kl_divergence(broken, logits))).tolist() == [3, 4]
    assert stats.kl_divergence([[0.0, -np.inf]], [[0.0, -np.inf]]) == 0
    with pytest.raises(ValueError, match="classes"):
        stats.kl_divergence(logits, logits[:, :4])


def test_topk_and_flips() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [np.nan, 9.0, 0.0]])
    labels = np.array([0, 1, 2, 1])
    assert [stats.topk_accuracy(logits, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 0.75, 0.75]
    constant = np.zeros((4, 4))
    assert stats.topk_right(constant, np.arange(4), 1).tolist() == [True, False, False, False]
    assert stats.flips([0, 1, 2], [0, 2, 2]) == 1
    assert math.isnan(stats.topk_accuracy(np.zeros((0, 3)), np.zeros(0, int), 1))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        stats.topk_right(logits, [0, 1, 2, 3])


def test_rank_correlation_is_scipys_and_its_interval_widens_with_noise() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    close, far = a + 0.2 * rng.normal(size=40), a + 2 * rng.normal(size=40)
    for b in (close, far):
        found = stats.rank_correlation(a, b)
        assert found.estimate == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
        assert found.low < found.estimate < found.high <= 1
    narrow, wide = (stats.rank_correlation(a, b) for b in (close, far))
    assert narrow.low > 0.8 and wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_random_halves_share_no_picture() -> None:
    values = np.eye(6)[None].repeat(2, axis=0).sum(axis=0)  # picture i counts for row i alone
    first, second = stats.random_halves(values, repeats=50)
    assert first.shape == second.shape == (50, 6) and not (first * second).any()
    assert stats.columns("kl", Interval(1.0, 0.5, 2.0)) == {"kl": 1.0, "kl_low": 0.5, "kl_high": 2.0}
