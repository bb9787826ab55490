"""Computes means and paired differences of scores, with their 95 % intervals.

Every mean and every difference has a 95 % interval, because a few prompts prove little. A gate uses one end of it. So
each end of an interval of yes/no scores misses the true value in at most 2.5 % of samples. The interval never has zero
width, even if no answer differs. The caller drops and counts unscored answers: NaN is an error. Rows that share a
cluster (variants of one question) are not independent, and do not count as independent rows. Sums replace the scores if
there are too many scores for the memory.

This module does not use prompts, models, files or MLflow. Not covered: Bayesian models, and comparisons of more than
two models beyond Holm's correction.

[Miller] Adding Error Bars to Evals, 2024, arXiv:2411.00640. [Clopper] Clopper and Pearson, Biometrika 26:404, 1934.
[Newcombe] Statistics in Medicine 17:2635, 1998. [McNemar] Psychometrika 12:153, 1947. [Pratt] JASA 54:655, 1959.
[Korn] Korn and Graubard, Survey Methodology 24:193, 1998. [Holm] Scandinavian Journal of Statistics 6:65, 1979.
[Hall] Annals of Statistics 16:927, 1988. [Hesterberg] The American Statistician 69:371, 2015.
[Chen] Evaluating Large Language Models Trained on Code, 2021, arXiv:2107.03374. [Yao] tau-bench, 2024,
arXiv:2406.12045.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

Z_95 = float(special.ndtri(0.975))  # two-sided 5 %, or one-sided 2.5 %
Z_80 = float(special.ndtri(0.80))  # 80 % power
FEW_PAIRS = 10  # with fewer differing pairs, the central limit theorem does not hold well enough
EXACT_PAIRS = 16  # up to this number, all sign patterns (at most 2**16) are counted
RESAMPLES = 1999  # of the bootstrap
MOST_REACH = math.log(100)  # of a bootstrap interval above the logarithm of the mean
RESAMPLED = range(10, 1001)  # clusters: few have too few resamples, and with many the bootstrap changes nothing
FEW_VALUES = 1000  # up to this number, counted values are written out one by one

Clusters = Sequence[Hashable | None]


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` scores. With no scores, all fields except n are NaN. With a single cluster, stderr is NaN."""

    mean: float
    stderr: float
    ci95_low: float
    ci95_high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean of `n` paired differences, candidate minus baseline. A drop is negative.

    `detectable` is the smallest true difference that `n` pairs find with 80 % power at a two-sided 5 % level.
    """

    mean: float
    stderr: float
    ci95_low: float
    ci95_high: float
    p_value: float
    n: int
    detectable: float


def mean_estimate(values: Sequence[float], clusters: Clusters | None = None) -> Estimate:
    """Mean, standard error and 95 % interval of scores.

    `values` and `clusters` have one entry per row. A row with the cluster None is a cluster of its own.

    stderr = sqrt(G/(G-1) * sum over clusters of (sum of residuals)^2) / n, with G clusters and n rows. This is [Miller]
    eq. 4 with the finite-sample factor of Stata and statsmodels. Without clusters, G = n, and stderr is sd/sqrt(n).

    Interval of scores in [0, 1]: [Clopper]'s exact interval. With clusters, the effective number of rows replaces n
    [Korn]. Of scores between 0 and 1, it is the number of 0/1 rows with the same mean that would have the same stderr,
    times (z / t_{G-1})^2. Scores without spread count as G rows. tests/verdict/test_statistics.py simulates how often
    each end misses: at most 2.5 % for 0/1 scores. For scores that are skewed, such as many of 1 and a few of nearly 0,
    it may be more, but less than Student's t.
    Interval of other scores: Student's t with G-1 degrees of freedom.

    Raises:
        ValueError: a score is NaN or infinite, or the two lengths differ.
    """
    scores, codes = _checked(values, clusters)
    n = scores.size
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean, stderr = float(scores.mean()), _standard_error(scores, codes)
    rows, even = _effective_rows(scores, codes), bool(np.ptp(scores) == 0)
    return _estimate(n, mean, stderr, int(codes.max()) + 1, rows, _is_binary(scores), _in_unit(scores), even)


def paired_difference(
    candidate: Sequence[float], baseline: Sequence[float], clusters: Clusters | None = None
) -> Difference:
    """Mean of candidate - baseline over the same rows in the same order. `mean_estimate` has the standard error.

    Interval of 0/1 scores: the rate of better pairs minus the rate of worse pairs, each with [Clopper]'s interval, put
    together by [Newcombe]'s method with the correlation of two rates of one multinomial. Over all rates, each end
    misses in at most 2.5 % of samples (tests/verdict/test_statistics.py counts them). With clusters, the effective
    number of rows replaces n. If no pair differs, the interval is +- (1 - 0.025^(1/n)): about 3.7/n, a two-sided rule
    of three.
    Interval of other scores: Student's t, cut to [-1, 1] if all scores are in [0, 1]. A few differing pairs show little
    of the true spread. So for scores in [0, 1] with d < 10 differing pairs, the interval is widened. It then includes
    the interval of the signs, in units of the largest difference that may be possible: the largest one seen, times
    5^(1/d), and at most 1. If the sizes are even from 0 to some size, that size is below this bound in 80 % of samples.
    If no pair differs, the interval of the signs is used. tests/verdict/test_statistics.py simulates their coverage.

    p of 0/1 scores: exact [McNemar]. p of other scores: the signed-rank test with [Pratt]'s zeros. With clusters, p
    is that signed-rank test on the sums of the clusters. If nothing differs, p is 1.

    detectable = (z_0.975 + z_0.8) * stderr. If the interval of the signs is used, and half of it divided by z_0.975 is
    larger than stderr, this value replaces stderr. Without a differing pair, stderr is 0. For scores in [0, 1],
    detectable is at most 1.

    Raises:
        ValueError: a score is NaN or infinite, or the lengths differ.
    """
    new, codes = _checked(candidate, clusters)
    old, _ = _checked(baseline, None)
    if new.size != old.size:
        raise ValueError(f"{new.size} candidate and {old.size} baseline scores: pair them first")
    n, gaps = new.size, np.round(new - old, 12)  # else 0.3 - 0.1 and 0.2 - 0 would not be ties
    if n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    mean, stderr = float(gaps.mean()), _standard_error(gaps, codes)
    binary, unit = _is_binary(new) and _is_binary(old), _in_unit(new) and _in_unit(old)
    better, worse = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
    rows, p = _effective_rows(gaps, codes), _p_value(gaps, codes, binary)
    largest = float(np.max(np.abs(gaps)))
    return _difference(n, mean, stderr, int(codes.max()) + 1, rows, binary, unit, better, worse, largest, p)


@dataclass(frozen=True)
class Sums:
    """Sums over `n` scores (or differences) in `groups` clusters. They are enough for a mean and its interval.

    `total` is the sum of the values, and `squares` the sum of their squares. `low` and `high` are the extremes.
    Cluster g has n_g rows with the sum S_g. `group_squares` is the sum of S_g^2 over the clusters, `group_products` the
    sum of n_g S_g, and `group_sizes` the sum of n_g^2. A row without a cluster is a cluster of its own.
    `binary` means that all scores are 0 or 1, and `unit` that all scores lie from 0 to 1. For differences, both mean
    the scores of both models.
    """

    n: int
    total: float
    squares: float
    low: float
    high: float
    binary: bool
    unit: bool
    groups: int
    group_squares: float
    group_products: float
    group_sizes: float


def estimate_from_sums(sums: Sums) -> Estimate:
    """`mean_estimate` from sums, for scores that don't fit in memory. The results are equal except for rounding."""
    if sums.n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean, stderr, rows = _figures(sums)
    even = sums.low == sums.high
    return _estimate(sums.n, mean, stderr, sums.groups, rows, sums.binary, sums.unit, even)


def difference_from_sums(sums: Sums, better: int, worse: int, counts: Sequence[tuple[float, int]]) -> Difference:
    """`paired_difference` from sums, for pairs that don't fit in memory. The results are equal except for rounding.

    `sums` are over the differences, which are rounded to 12 decimals. `better` differences are above zero, and `worse`
    differences are below zero. `counts` has pairs (sum of a cluster's differences, number of clusters with this sum).
    Without clusters, each row counts as a cluster.
    """
    if sums.n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    mean, stderr, rows = _figures(sums)
    p = _p_from_counts(counts, sums.binary and sums.groups == sums.n)
    largest = max(abs(sums.low), abs(sums.high))
    return _difference(sums.n, mean, stderr, sums.groups, rows, sums.binary, sums.unit, better, worse, largest, p)


def prompts_needed(difference: Difference, margin: float) -> int | None:
    """The number of prompts that show that the candidate loses less than `margin` (one-sided 2.5 %, 80 % power).

    The number is n * ((z_0.975 + z_0.8) * stderr / margin)^2 if the two models are equally good. Here, stderr is
    `detectable` / (z_0.975 + z_0.8). The run may already have this number of prompts, or the formula may have no
    result. Then the observed difference counts as the true difference (`prompts_to_settle`). None means that no number
    below 10^9 is enough.
    """
    error = difference.detectable / (Z_95 + Z_80)
    needed = _prompts_to_tell(difference.n, error, margin)
    if needed is not None and needed > difference.n:
        return needed
    return prompts_to_settle(Estimate(difference.mean, error, math.nan, math.nan, difference.n), -margin)


def prompts_to_settle(estimate: Estimate, bound: float) -> int | None:
    """The number of prompts that put the 95 % interval on one side of `bound` with 80 % power, if the mean stays equal.

    The number is n * ((z_0.975 + z_0.8) * stderr / (mean - bound))^2, and at least n + 1. If half the interval's width
    divided by z_0.975 is larger than stderr, this value replaces stderr. The result is None if the mean equals the
    bound, if stderr is not finite, or if the number is 10^9 or more.
    """
    error = float(np.fmax(estimate.stderr, (estimate.ci95_high - estimate.ci95_low) / 2 / Z_95))
    needed = _prompts_to_tell(estimate.n, error, abs(estimate.mean - bound))
    return None if needed is None else max(needed, estimate.n + 1)


def ratio_estimate(
    sums: Sequence[float], sizes: Sequence[int], clusters: Clusters | None = None, kind: str = "signed"
) -> Estimate:
    """Mean of all values of prompts that have several values each: the sum of `sums` over the sum of `sizes`.

    The standard error is that of a ratio, linearised, over G clusters of prompts: sqrt(G/(G-1) * sum over clusters of
    (sum - mean * size)^2) / size of all. `n` is the number of prompts. The interval depends on `kind`:

    - "signed": Student's t with G-1 degrees of freedom.
    - "positive": the same on the logarithm of the mean, so no end is below 0. Values with a long tail have samples
      that miss the tail, and then both mean and stderr are small. So the upper end is at least that of the studentized
      bootstrap over 10 to 1000 clusters [Hall], at the level that [Hesterberg] gives for few. The draws are fixed.
    - "share", of values that are 0 or 1: Student's t, cut to [0, 1]. If all values are equal, the far end is
      0.025^(1/G): the share at which G clusters would all look alike in 2.5 % of samples.

    Equal values of another kind have an interval without a width. With one cluster, there is no interval: NaN.
    """
    totals, codes = _checked(sums, clusters)
    counts = np.asarray(sizes, dtype=np.float64)
    mean = float(totals.sum() / counts.sum())
    residuals = np.bincount(codes, weights=totals - mean * counts)
    groups = residuals.size
    if groups < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, totals.size)
    stderr = math.sqrt(groups / (groups - 1) * float(np.sum(residuals**2))) / float(counts.sum())
    if kind == "share" and mean in (0, 1):
        far = 0.025 ** (1 / groups)
        return Estimate(mean, 0.0, far if mean else 0.0, 1.0 if mean else 1 - far, totals.size)
    if stderr == 0 or (kind == "positive" and mean <= 0):
        return Estimate(mean, 0.0, mean, mean, totals.size)
    if kind == "positive":
        low, high = (math.exp(end) for end in _student(math.log(mean), stderr / mean, groups - 1))
        if groups in RESAMPLED:
            high = max(high, _resampled_high(np.bincount(codes, weights=totals), np.bincount(codes, weights=counts)))
    else:
        low, high = _student(mean, stderr, groups - 1)
        if kind == "share":
            low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, stderr, low, high, totals.size)


def _resampled_high(sums: np.ndarray, sizes: np.ndarray) -> float:
    """The upper end of a ratio's 95 % interval by the studentized bootstrap of its logarithm. One entry per cluster.

    0 if there is none: where one cluster has nearly all, resamples without this cluster have no spread to speak of.
    """
    groups = sums.size
    terms = np.column_stack([sums, sizes, sums**2, sums * sizes, sizes**2])
    drawn = np.random.default_rng(0).integers(0, groups, (RESAMPLES, groups)) + groups * np.arange(RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=RESAMPLES * groups).reshape(RESAMPLES, groups)
    means, spreads = _ratios(np.vstack([terms.sum(axis=0), times @ terms]), groups)
    level = special.ndtr(math.sqrt(groups / (groups - 1)) * special.stdtrit(groups - 1, 0.025))
    kept = spreads[1:] > 0  # clusters that are all alike have no spread
    low = np.quantile(np.log(means[1:][kept] / means[0]) / spreads[1:][kept], level)
    reach = float(-low * spreads[0])
    return float(means[0] * math.exp(reach)) if reach < MOST_REACH else 0.0


def _ratios(terms: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratios, and their standard errors relative to them, of samples of clusters: (samples,) each.

    `terms` is (samples, 5): the sums over a sample's clusters of s, n, s*s, s*n and n*n, for a cluster's sum s and size
    n.
    """
    s, n, ss, sn, nn = terms[terms[:, 0] > 0].T
    ratios = s / n
    squares = np.maximum(ss - 2 * ratios * sn + ratios**2 * nn, 0)
    return ratios, np.sqrt(groups / (groups - 1) * squares) / s


def holm(p_values: Sequence[float]) -> np.ndarray:
    """[Holm]'s adjusted p-values, in the given order. They limit the chance of one or more false alarms in the family.

    Raises:
        ValueError: a p-value is NaN, or is not between 0 and 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p-values lie between 0 and 1, and a missing one must be left out")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k answers is right, if c of n are right: 1 - C(n-c, k) / C(n, k) [Chen].

    k <= n.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """The chance that all of k answers are right, if c of n are right: C(c, k) / C(n, k) [Yao].

    k <= n.
    """
    return math.comb(c, k) / math.comb(n, k)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), with numpy's linear interpolation. NaN if there are no values.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    array, _ = _checked(values, None)
    return float(np.percentile(array, q)) if array.size else math.nan


def _checked(values: Sequence[float], clusters: Clusters | None) -> tuple[np.ndarray, np.ndarray]:
    """The values, and the number of each value's cluster. Clusters are counted from 0."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not np.all(np.isfinite(array)):
        raise ValueError("a flat list of finite numbers is needed: drop and count unscored answers first")
    if clusters is None:
        return array, np.arange(array.size)
    if len(clusters) != array.size:
        raise ValueError(f"{array.size} scores and {len(clusters)} clusters")
    numbers: dict[Hashable, int] = {}
    keys = [object() if cluster is None else cluster for cluster in clusters]
    return array, np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _estimate(
    n: int, mean: float, stderr: float, groups: int, rows: float, binary: bool, unit: bool, even: bool
) -> Estimate:
    """An estimate. `rows` is the effective number of rows, and `even` means that all scores are equal."""
    if unit:
        if not (binary or even):
            rows = _rows_of_spread(mean, stderr, groups)
        low, high = _clopper_pearson(mean * rows, rows)
    else:
        low, high = _student(mean, stderr, groups - 1)
    return Estimate(mean, stderr, low, high, n)


def _difference(
    n: int,
    mean: float,
    stderr: float,
    groups: int,
    rows: float,
    binary: bool,
    unit: bool,
    better: int,
    worse: int,
    largest: float,
    p_value: float,
) -> Difference:
    """A difference. `better` and `worse` count the pairs, and `largest` is the largest difference of a pair."""
    low, high = _student(mean, stderr, groups - 1)
    error, differing = stderr, better + worse
    if unit:
        low, high = max(low, -1.0), min(high, 1.0)
    even = differing > 0 and stderr == 0  # all pairs differ alike: Student's interval has no bounds
    if binary or (unit and (differing < FEW_PAIRS or even)):
        more, less = better / n * rows, worse / n * rows
        unit_size = 1.0 if binary or not differing else min(1.0, largest * 5 ** (1 / differing))
        signs = -unit_size * _gap_upper(less, more, rows), unit_size * _gap_upper(more, less, rows)
        low, high = signs if binary or not differing or even else (min(low, signs[0]), max(high, signs[1]))
        error = float(np.fmax(stderr, (high - low) / 2 / Z_95))
    detectable = (Z_95 + Z_80) * error
    return Difference(mean, stderr, low, high, p_value, n, min(detectable, 1.0) if unit else detectable)


def _figures(sums: Sums) -> tuple[float, float, float]:
    """Mean, standard error and effective number of rows. They equal the figures from single scores."""
    n, groups, mean = sums.n, sums.groups, sums.total / sums.n
    even = sums.low == sums.high
    plain = _spread(n, n, sums.squares - mean * sums.total, even)
    residuals = sums.group_squares - 2 * mean * sums.group_products + mean**2 * sums.group_sizes
    stderr = plain if groups == n else _spread(n, groups, residuals, even)
    return (sums.low if even else mean), stderr, _independent_rows(n, groups, plain, stderr)


def _spread(n: int, groups: int, squared_residuals: float, even: bool) -> float:
    if groups < 2:
        return math.nan
    return 0.0 if even else math.sqrt(groups / (groups - 1) * max(squared_residuals, 0.0)) / n


def _is_binary(scores: np.ndarray) -> bool:
    return bool(np.all((scores == 0) | (scores == 1)))


def _in_unit(scores: np.ndarray) -> bool:
    return bool(np.all((scores >= 0) & (scores <= 1)))


def _standard_error(values: np.ndarray, codes: np.ndarray) -> float:
    groups = codes.max() + 1
    if groups < 2:
        return math.nan
    if np.ptp(values) == 0:
        return 0.0  # rounding errors would give about 1e-17
    sums = np.bincount(codes, weights=values - values.mean())
    return float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / values.size)


def _effective_rows(values: np.ndarray, codes: np.ndarray) -> float:
    """The number of independent rows that would give the same standard error as the clusters.

    The number is n * (plain stderr / clustered stderr)^2 (Kish's design effect) * (t_{n-1} / t_{G-1})^2. The last
    factor is needed because G clusters estimate their spread badly [Korn]. The result lies between 1 and n. Without
    spread, the result is the number of clusters.
    """
    n, groups = values.size, int(codes.max()) + 1
    return _independent_rows(n, groups, _standard_error(values, np.arange(n)), _standard_error(values, codes))


def _independent_rows(n: int, groups: int, plain: float, clustered: float) -> float:
    if groups in (1, n) or plain == 0:
        return float(groups)
    t_ratio = special.stdtrit(n - 1, 0.975) / special.stdtrit(groups - 1, 0.975)
    return float(np.clip(n * (plain * t_ratio / max(clustered, 1e-12)) ** 2, 1, n))


def _rows_of_spread(mean: float, stderr: float, groups: int) -> float:
    """The number of 0/1 rows with this mean that would have this standard error, known from `groups` clusters."""
    if groups < 2:
        return 1.0
    t_ratio = Z_95 / float(special.stdtrit(groups - 1, 0.975))
    return max(mean * (1 - mean) * (t_ratio / stderr) ** 2, 1.0)


def _clopper_pearson(k: float, n: float) -> tuple[float, float]:
    """[Clopper]'s interval of k hits in n rows, by the beta distribution. Neither needs to be a whole number."""
    low = 0.0 if k <= 0 else float(special.betaincinv(k, n - k + 1, 0.025))
    high = 1.0 if k >= n else float(special.betaincinv(k + 1, n - k, 0.975))
    return low, high


def _student(mean: float, stderr: float, degrees: int) -> tuple[float, float]:
    """The interval mean -+ t * stderr. Without a known spread, the interval has no bounds."""
    if degrees < 1 or stderr == 0:
        return -math.inf, math.inf
    half = float(special.stdtrit(degrees, 0.975)) * stderr
    return mean - half, mean + half


def _gap_upper(better: float, worse: float, n: float) -> float:
    """The upper end of the rate of better pairs minus the rate of worse pairs, of `n` pairs [Newcombe]."""
    p, q = better / n, worse / n
    up, down = _clopper_pearson(better, n)[1] - p, q - _clopper_pearson(worse, n)[0]
    correlation = -math.sqrt(p * q / ((1 - p) * (1 - q))) if p < 1 and q < 1 else 0.0
    return min(p - q + math.sqrt(up * up + down * down - 2 * correlation * up * down), 1.0)


def _p_value(gaps: np.ndarray, codes: np.ndarray, binary: bool) -> float:
    from scipy import stats

    if codes.max() + 1 < gaps.size:  # the rows of a cluster are not independent, but the sums of clusters are
        gaps, binary = np.round(np.bincount(codes, weights=gaps), 12), False
    differing = np.count_nonzero(gaps)
    if differing == 0:
        return 1.0
    if binary:
        return float(stats.binomtest(int(np.sum(gaps > 0)), int(differing), 0.5).pvalue)
    if differing > EXACT_PAIRS:
        return float(stats.wilcoxon(gaps, zero_method="pratt").pvalue)
    # With ties or zeros, scipy uses the normal approximation. For a few pairs, its p-values are too small.
    ranks = stats.rankdata(np.abs(gaps))[gaps != 0]
    signs = 1 - 2 * (np.arange(2**differing)[:, None] >> np.arange(differing) & 1)
    return float(np.mean(np.abs(signs @ ranks) >= abs(np.sign(gaps[gaps != 0]) @ ranks) - 1e-9))


def _p_from_counts(counts: Sequence[tuple[float, int]], binary: bool) -> float:
    """`_p_value` of values that come with their counts.

    0/1 scores without clusters get the exact [McNemar] test. Up to FEW_VALUES other values are written out one by one.
    Above FEW_VALUES, the signed-rank test uses the counts. With EXACT_PAIRS or fewer differing values, the test counts
    all sign patterns. With more, the test uses the normal approximation in scipy's form: ranks with [Pratt]'s zeros, a
    variance corrected for ties, and no continuity correction.
    """
    from scipy import stats

    values = np.array([value for value, _ in counts], dtype=float)
    times = np.array([number for _, number in counts], dtype=float)
    differing = int(times[values != 0].sum())
    if differing == 0:
        return 1.0
    if binary:
        return float(stats.binomtest(int(times[values > 0].sum()), differing, 0.5).pvalue)
    n = float(times.sum())
    if n <= FEW_VALUES:
        written_out = np.repeat(values, times.astype(int))
        return _p_value(written_out, np.arange(written_out.size), False)
    sizes, places = np.unique(np.abs(values), return_inverse=True)
    ties = np.bincount(places, weights=times)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[places]
    zeros = n - differing
    if differing <= EXACT_PAIRS:
        kept = np.repeat(np.where(values > 0, 1, -1) * ranks, (times * (values != 0)).astype(int))
        signs = 1 - 2 * (np.arange(2**differing)[:, None] >> np.arange(differing) & 1)
        return float(np.mean(np.abs(signs @ np.abs(kept)) >= abs(kept.sum()) - 1e-9))
    positive = float(np.sum(ranks * times * (values > 0)))
    mean = (n * (n + 1) - zeros * (zeros + 1)) / 4
    variance = (n * (n + 1) * (2 * n + 1) - zeros * (zeros + 1) * (2 * zeros + 1)) / 24
    tied = ties[sizes > 0]
    variance -= float(np.sum(tied * (tied**2 - 1))) / 48
    return float(2 * special.ndtr(-abs(positive - mean) / math.sqrt(variance)))


def _prompts_to_tell(n: int, stderr: float, distance: float) -> int | None:
    if not (n > 0 and math.isfinite(stderr) and distance > 0):
        return None
    needed = n * ((Z_95 + Z_80) * stderr / distance) ** 2
    return math.ceil(needed) if needed < 1e9 else None
