"""Statistics of the study: intervals, paired tests, and what may be concluded from them.

Everything is paired: the baseline and the variant see the same images, or are timed in the same round. Numpy arrays go
in, plain floats and small named tuples come out. A number that could not be measured is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # its submodules load when first used, which takes seconds
from numpy.typing import ArrayLike, NDArray

SIGNIFICANCE = 0.05  # of the Holm-adjusted p-value; a row below it is called different
MINIMUM_ROUNDS = 8  # the smallest signed-rank p of n rounds is 2 / 2^n; n = 8 is the first with p < 0.01
TOO_FEW_ROUNDS = "too few rounds"


class Interval(NamedTuple):
    """An estimate with its confidence bounds, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


def proportion(right: ArrayLike) -> Interval:
    """The share of true values in `right` (n,), with Wilson's interval."""
    right = np.asarray(right, dtype=bool)
    return Interval(float(right.mean()), *wilson(int(right.sum()), len(right)))


def columns(name: str, interval: Interval) -> dict[str, float]:
    """The columns `name`, `<name>_low` and `<name>_high` of a record's row."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % bounds of a proportion `right / n` by the score interval. ValueError unless 0 <= right <= n and n > 0.

    It keeps its coverage near 100 % accuracy (Wilson, JASA 22, 1927; method 3 of Newcombe, Statist. Med. 17, 1998).
    """
    bounds = scipy.stats.binomtest(int(right), int(n)).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def mcnemar(baseline_right: ArrayLike, variant_right: ArrayLike) -> tuple[int, int, float]:
    """Images lost and gained, and the p of the exact two-sided McNemar test; both inputs bool, shape (n_images,).

    Given their number, lost pairs are Binomial(lost + gained, 1/2) if the two models are equally accurate
    (McNemar, Psychometrika 12, 1947). Without discordant pairs p = 1. ValueError if shapes differ.
    """
    lost, gained, _ = _discordant(baseline_right, variant_right)
    p = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return lost, gained, float(p)


def paired_difference(baseline_right: ArrayLike, variant_right: ArrayLike) -> Interval:
    """Difference of accuracy, variant minus baseline, as a fraction, with the paired 95 % score interval.

    Both inputs bool, shape (n_images,). Where no pair is discordant the bootstrap of this difference has width zero;
    here the bounds are then +-z^2 / (n + z^2). Source: Tango, Statist. Med. 17, 1998. ValueError if shapes differ.
    """
    lost, gained, n = _discordant(baseline_right, variant_right)
    z = float(scipy.stats.norm.ppf(0.975))

    def upper(gained: int, lost: int) -> float:
        """Largest difference that the data do not reject: there the score falls to -z."""
        if gained == n:
            return 1.0
        start = (gained - lost) / n
        return float(scipy.optimize.brentq(lambda d: _tango_score(d, gained, lost, n) + z, start, 1 - 1e-12))

    return Interval((gained - lost) / n, low=-upper(lost, gained), high=upper(gained, lost))


def _discordant(baseline_right: ArrayLike, variant_right: ArrayLike) -> tuple[int, int, int]:
    """Numbers of images that were lost, gained, and of all."""
    before, after = _paired(baseline_right, variant_right, dtype=bool)
    return int(np.count_nonzero(before & ~after)), int(np.count_nonzero(~before & after)), len(before)


def _tango_score(difference: float, gained: int, lost: int, n: int) -> float:
    """Score of a supposed difference; `q`, the rate of lost pairs, is estimated under that supposition."""
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    distance = gained - lost - n * difference
    return distance / math.sqrt(variance) if variance > 0 else 0.0


def fewest_significant(tests: int) -> int:
    """Fewest images that must all change to the same side for a Holm-adjusted p below SIGNIFICANCE of `tests` tests.

    With k discordant pairs on one side and none on the other, McNemar's exact p is 2^(1-k), the smallest that a
    difference of k images can have; Holm multiplies the smallest p by `tests`.
    """
    return 2 + math.floor(math.log2(tests / SIGNIFICANCE))  # the first k with tests * 2^(1-k) < SIGNIFICANCE


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p-values, in the order given; shape (n_tests,) in and out.

    Valid under any dependence of the tests, and these share their images (Holm, Scand. J. Statist. 6, 1979).
    NaN is a row that was not run: it stays NaN and does not count as a test.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = len(order) - np.arange(len(order))  # the smallest p pays for all tests, the largest for itself
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * steps), 1.0)
    return adjusted


def verdict(*, difference: Interval, p_adjusted: float, margin: float) -> str:
    """What a row of the accuracy table may claim: "different", "non-inferior" or "not shown".

    `difference` is variant minus baseline, in the unit of `margin` > 0, the largest loss that would be accepted.

    1. "different" if the Holm-adjusted p is below SIGNIFICANCE, also for a gain and for a loss inside the margin.
    2. "non-inferior" if the interval's lower bound is above -margin.
    3. "not shown" otherwise: no difference was found, nor was a relevant loss excluded. NaN ends here.

    An interval of width zero is no evidence. A 95 % interval makes rule 2 a one-sided test at 2.5 %, not adjusted for
    the number of rows.
    """
    if p_adjusted < SIGNIFICANCE:  # False for NaN
        return "different"
    informative = difference.high > difference.low  # False for NaN
    return "non-inferior" if informative and difference.low > -margin else "not shown"


def paired_bootstrap(
    *paired: ArrayLike, statistic: Callable[..., ArrayLike] = np.mean, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval (95 %) of `statistic(*paired, axis=)` of per-image values, each (n_images,).

    All arrays are resampled together. Bounds are NaN for one value, and all for no value or a NaN. Source: Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    arrays = tuple(np.asarray(values, dtype=np.float64) for values in paired)
    n = len(arrays[0])
    estimate = float(np.asarray(statistic(*arrays, axis=0))) if n else math.nan
    if n < 2 or np.isnan(arrays).any():
        return Interval(estimate, math.nan, math.nan)
    how = {"n_resamples": resamples, "batch": 250, "rng": np.random.default_rng(seed)}  # a batch takes a few MB
    found = scipy.stats.bootstrap(arrays, statistic, paired=True, vectorized=True, method="percentile", **how)
    bounds = found.confidence_interval
    return Interval(estimate, float(bounds.low), float(bounds.high))


def random_halves(per_image_values: ArrayLike, *, repeats: int = 200, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Means over the two halves of `repeats` random splits of the images; (n, n_images) in, twice (repeats, n) out.

    ValueError below two rows or images.
    """
    values = np.asarray(per_image_values, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"expected (n_blocks, n_images), both at least 2, got {values.shape}")
    first = np.arange(values.shape[1]) < values.shape[1] // 2
    masks = np.random.default_rng(seed).permuted(np.tile(first, (repeats, 1)), axis=1)
    halves = (mask.astype(np.float64) for mask in (masks, ~masks))
    return tuple(half @ values.T / half.sum(axis=1, keepdims=True) for half in halves)


def rank_correlation(first: ArrayLike, second: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Spearman's rank correlation of two scores of n things, with a percentile bootstrap interval (95 %) over these.

    Both inputs (n,), or (m, n) for m measurements of both, as `random_halves` gives: then the mean over them, and each
    resample draws one. Measurements in which a side ties throughout are left out; NaN if none is left.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    rng, size = np.random.default_rng(seed), (resamples, a.shape[1])
    rows, columns = rng.integers(len(a), size=(resamples, 1)), rng.integers(a.shape[1], size=size)
    each, found = (
        values[~np.isnan(values)] for values in (_spearman(a, b), _spearman(a[rows, columns], b[rows, columns]))
    )
    low, high = np.percentile(found, [2.5, 97.5]) if each.size else (math.nan, math.nan)
    return Interval(float(each.mean()) if each.size else math.nan, float(low), float(high))


def _spearman(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Spearman's correlation of each row of two arrays (m, n); NaN where a row ties throughout."""
    ranks = (scipy.stats.rankdata(values, axis=1) for values in (first, second))
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))


def samples_needed(q: float) -> int:
    """Samples below which the q-th percentile (50 < q < 100) is not reported: 64 for P90, 130 for P95, 662 for P99.

    The smallest n at which at least two samples are beyond the true percentile with 99 % probability, so that it need
    not rest on one outlier: 1 - n q^(n-1) + (n-1) q^n >= 0.99 (Wilks, Ann. Math. Statist. 12, 1941).
    """
    share, n = q / 100, 2
    while 1 - n * share ** (n - 1) + (n - 1) * share**n < 0.99:
        n += 1
    return n


def percentile(samples: ArrayLike, q: float) -> float:
    """The q-th percentile (q in percent) of samples of any shape, in their unit; NaN below `samples_needed(q)`."""
    values = np.asarray(samples, dtype=np.float64).ravel()
    return float(np.percentile(values, q)) if len(values) >= samples_needed(q) else math.nan


def median_interval(samples_by_round: Sequence[ArrayLike]) -> Interval:
    """Median of the rounds' medians, in the samples' unit, with its 95 % bootstrap interval over rounds.

    Samples of a round share its clock, temperature and neighbours: resampled alone, the interval would be too narrow.
    Bounds are NaN for a single round.
    """
    return paired_bootstrap(_round_medians(samples_by_round), statistic=np.median)


def times_faster(baseline_by_round: Sequence[ArrayLike], variant_by_round: Sequence[ArrayLike]) -> Interval:
    """How many times faster a variant is than the baseline: the ratio of their median latencies, above 1 if faster.

    Both inputs hold the latencies of each round; round i of both was measured side by side. The 95 % interval resamples
    rounds, both sides together; NaN for one round. ValueError unless both have as many rounds.
    """

    def ratio(before: NDArray, after: NDArray, axis: int) -> NDArray:
        return np.median(before, axis=axis) / np.median(after, axis=axis)

    medians = _paired(_round_medians(baseline_by_round), _round_medians(variant_by_round))
    return paired_bootstrap(*medians, statistic=ratio)


def hodges_lehmann(values: ArrayLike) -> Interval:
    """Robust location of values, shape (n,), and the 95 % interval that the signed-rank test does not reject.

    The estimate is the median of the n (n + 1) / 2 averages of pairs, and the bounds are two of them, by the normal
    approximation; infinite when n is too small for any. Source: Hodges & Lehmann, Ann. Math. Statist. 34, 1963.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    i, j = np.triu_indices(n)
    averages = np.sort((x[i] + x[j]) / 2)
    z = float(scipy.stats.norm.ppf(0.975))
    skipped = math.floor(n * (n + 1) / 4 - z * math.sqrt(n * (n + 1) * (2 * n + 1) / 24))
    low, high = (averages[skipped], averages[-1 - skipped]) if skipped >= 0 else (-math.inf, math.inf)
    return Interval(float(np.median(averages)), float(low), float(high))


def same_or_slower(baseline_rounds: Sequence[ArrayLike], variant_rounds: Sequence[ArrayLike]) -> str:
    """The verdict on two latencies: "same", "slower", "faster", "not shown" or TOO_FEW_ROUNDS.

    Round i of both was measured side by side, so that drift of clock and temperature leaves the ratio of their medians.
    Over rounds, Wilcoxon's signed-rank test of the log ratios (Biometrics Bull. 1, 1945) gives p and Hodges–Lehmann the
    size, both robust to outlying rounds. Differences of 2 % (the tolerance) must be found:

    - "slower" / "faster": p < 0.01 and the estimate beyond half the tolerance, where the two errors balance.
    - "same": otherwise, if the interval excludes the tolerance on both sides.
    - "not shown": too noisy for either. Measure more rounds.
    - TOO_FEW_ROUNDS: below MINIMUM_ROUNDS, where no difference of any size could be significant.

    With 1 % jitter of each round, 1 % of each sample and 5 % of the samples outlying, 20 rounds of 10 samples call A/A
    the same and a 2 % slowdown slower in 99 of 100 runs (12 rounds: in 87). ValueError as in `times_faster`.
    """
    before, after = _paired(_round_medians(baseline_rounds), _round_medians(variant_rounds))
    if len(before) < MINIMUM_ROUNDS:
        return TOO_FEW_ROUNDS
    log_ratio = np.log(after / before)
    interval, limit = hodges_lehmann(log_ratio), math.log1p(0.02)
    p = float(scipy.stats.wilcoxon(log_ratio).pvalue) if np.any(log_ratio) else 1.0
    if p < 0.01 and abs(interval.estimate) > limit / 2:
        return "slower" if interval.estimate > 0 else "faster"
    return "same" if -limit < interval.low and interval.high < limit else "not shown"


def _round_medians(samples_by_round: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Median of each round, shape (n_rounds,); a round may be one number."""
    return np.array([np.median(samples) for samples in samples_by_round], dtype=np.float64)


def kl_divergence(baseline_logits: ArrayLike, variant_logits: ArrayLike) -> NDArray[np.float64]:
    """KL(softmax(baseline) || softmax(variant)) of each image in nats; (n, classes) twice in, (n,) out.

    Computed in float64. A logit that is NaN or +inf makes its image NaN. ValueError if shapes differ.
    """
    before, after = (np.asarray(logits, dtype=np.float64) for logits in (baseline_logits, variant_logits))
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(f"expected (n, classes) twice, got {before.shape} and {after.shape}")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and is meant to be
        p, q = (scipy.special.softmax(logits, axis=1) for logits in (before, after))
    return np.maximum(scipy.special.rel_entr(p, q).sum(axis=1), 0.0)  # rounding may leave -1e-17; NaN passes


def flips(baseline_pred: ArrayLike, variant_pred: ArrayLike) -> int:
    """Number of images whose predicted class changed; both (n,). ValueError if shapes differ."""
    before, after = _paired(baseline_pred, variant_pred)
    return int(np.count_nonzero(before != after))


def topk_right(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> NDArray[np.bool_]:
    """Whether the label is among the k largest logits; (n, classes) and (n,) in, (n,) out.

    Ties go to the lower class index, as argmax does. A row with NaN is wrong: it names no class. k beyond the number of
    classes is always right. ValueError if shapes or labels do not fit, or k < 1.
    """
    scores, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or k < 1:
        raise ValueError(f"expected (n, classes), (n,) and k >= 1, got {scores.shape}, {labels.shape}, {k}")
    if labels.size and (labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise ValueError(f"labels must be in [0, {scores.shape[1]}), got {labels.min()} to {labels.max()}")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(axis=1) & ~np.isnan(scores).any(axis=1)


def topk_accuracy(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Share of images whose label is among the k largest logits (see `topk_right`); NaN for no images."""
    return float(right.mean()) if (right := topk_right(logits, labels, k)).size else math.nan


def _paired(a: ArrayLike, b: ArrayLike, *, dtype: type | None = None) -> tuple[NDArray, NDArray]:
    """Both as one-dimensional arrays of one length; ValueError otherwise, where numpy would broadcast."""
    first, second = np.asarray(a, dtype=dtype), np.asarray(b, dtype=dtype)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs need two arrays of one length, got shapes {first.shape} and {second.shape}")
    return first, second
