"""Means, paired differences and how sure one may be of them, on arrays of scores.

Every figure comes with a 95 % interval, because a handful of prompts proves little: none is ever of zero width just
because no answer differed. Unscored answers are the caller's to drop and count; NaN is refused. Rows that share a
cluster (variants of one question) are not independent and are not counted as if they were. Scores that are too many
to hold come as sums. Nothing here knows of prompts, models, files or MLflow. No Bayesian models, no bootstrap, no
comparison of more than two models at once beyond Holm's correction.

[Miller] Adding Error Bars to Evals, 2024, arXiv:2411.00640. [Wilson] JASA 22:209, 1927. [Tango] Statistics in
Medicine 17:891, 1998. [McNemar] Psychometrika 12:153, 1947. [Pratt] JASA 54:655, 1959. [Korn] Korn and Graubard,
Survey Methodology 24:193, 1998. [Holm] Scandinavian Journal of Statistics 6:65, 1979. [Chen] Evaluating Large
Language Models Trained on Code, 2021, arXiv:2107.03374. [Yao] tau-bench, 2024, arXiv:2406.12045.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

Z_95 = float(special.ndtri(0.975))  # two-sided 5 %, or one-sided 2.5 %
Z_80 = float(special.ndtri(0.80))  # 80 % power
FEW_PAIRS = 10  # below this many differing pairs the central limit theorem is no guide
EXACT_PAIRS = 16  # up to here all 2**16 sign patterns are counted
FEW_VALUES = 1000  # up to here counted values are written out

Clusters = Sequence[Hashable | None]


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` scores. All fields but n are NaN where nothing was scored; stderr is NaN for a single cluster."""

    mean: float
    stderr: float
    ci95_low: float
    ci95_high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean of `n` paired differences, candidate minus baseline, so that a drop is negative.

    `detectable` is the smallest true difference that this many pairs find with 80 % power at a two-sided 5 %.
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

    stderr = sqrt(G/(G-1) * sum over clusters of (sum of residuals)^2) / n, over G clusters: [Miller] eq. 4 with the
    finite-sample factor of Stata and statsmodels; without clusters G = n, and it is the usual sd/sqrt(n). A cluster
    of None stands for itself.
    Interval: for 0/1 scores [Wilson], under clusters with the effective number of rows; otherwise Student's t with
    G-1 degrees of freedom, cut to [0, 1] if all scores lie there. Scores in [0, 1] that are all equal show no spread
    to reckon with and are given Wilson's interval too, the widest that their mean allows.
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
    """Mean of candidate - baseline over the same rows in the same order, with standard error as in `mean_estimate`.

    Interval: for 0/1 scores [Tango]'s, under clusters with the effective number of rows; where no pair differs it is
    +- z^2/(n + z^2), Wilson's upper bound on the rate of differing pairs (about 3.7/n, a two-sided rule of three).
    Other scores in [0, 1]: Student's t, cut to [-1, 1]; with fewer than 10 differing pairs widened to take in
    Tango's interval, in which each of them counts in full, since a few pairs show little of the spread there is.
    p: exact [McNemar] for 0/1 scores; otherwise the signed-rank test with [Pratt]'s zeros, and under clusters the
    same test on the clusters' sums. 1 where nothing differs.
    detectable = (z_0.975 + z_0.8) * stderr; where Tango's interval is used, its half width / z_0.975 stands in for a
    smaller stderr, which is 0 where no pair differs.
    """
    new, codes = _checked(candidate, clusters)
    old, _ = _checked(baseline, clusters)
    if new.size != old.size:
        raise ValueError(f"{new.size} candidate and {old.size} baseline scores: pair them first")
    n, gaps = new.size, np.round(new - old, 12)  # so that 0.3 - 0.1 and 0.2 - 0 are ties
    if n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    mean, stderr = float(gaps.mean()), _standard_error(gaps, codes)
    binary, unit = _is_binary(new) and _is_binary(old), _in_unit(new) and _in_unit(old)
    better, worse = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
    rows, p = _effective_rows(gaps, codes), _p_value(gaps, codes, binary)
    return _difference(n, mean, stderr, int(codes.max()) + 1, rows, binary, unit, better, worse, p)


@dataclass(frozen=True)
class Sums:
    """What `n` scores (or differences) in `groups` clusters add up to: enough for a mean and how sure it is.

    Where cluster g has n_g rows that add up to S_g, `group_squares` is the sum of S_g^2, `group_products` of n_g S_g
    and `group_sizes` of n_g^2; a row without a cluster is a cluster. `low` and `high` are the extremes. `binary` says
    that all scores (of differences, both sides') are 0 or 1, `unit` that they lie from 0 to 1.
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
    """`mean_estimate` of scores that are too many to hold; equal to it but for rounding."""
    if sums.n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    mean, stderr, rows = _figures(sums)
    even = sums.low == sums.high
    return _estimate(sums.n, mean, stderr, sums.groups, rows, sums.binary, sums.unit, even)


def difference_from_sums(sums: Sums, better: int, worse: int, counts: Sequence[tuple[float, int]]) -> Difference:
    """`paired_difference` of pairs that are too many to hold; equal to it but for rounding.

    `sums` are over the differences, rounded to 12 decimals as there: `better` are above and `worse` below zero.
    `counts` says how many clusters (without clusters, how many rows) have each sum of differences.
    """
    if sums.n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    mean, stderr, rows = _figures(sums)
    p = _p_from_counts(counts, sums.binary and sums.groups == sums.n)
    return _difference(sums.n, mean, stderr, sums.groups, rows, sums.binary, sums.unit, better, worse, p)


def prompts_needed(difference: Difference, margin: float) -> int | None:
    """How many prompts show that the candidate loses less than `margin`, at a one-sided 2.5 % with 80 % power.

    n * ((z_0.975 + z_0.8) * stderr / margin)^2, if in truth the two are equally good. Where that many were already
    asked, the true difference is taken to be the one seen instead. None where no number of prompts would tell.
    """
    error = difference.detectable / (Z_95 + Z_80)
    needed = _prompts_to_tell(difference.n, error, margin)
    if needed is not None and needed > difference.n:
        return needed
    return prompts_to_settle(Estimate(difference.mean, error, math.nan, math.nan, difference.n), -margin)


def prompts_to_settle(estimate: Estimate, bound: float) -> int | None:
    """How many prompts put the 95 % interval on one side of `bound` with 80 % power, if the mean stays as it is.

    n * ((z_0.975 + z_0.8) * stderr / (mean - bound))^2, and more than were asked; None where the mean is the bound.
    """
    error = float(np.fmax(estimate.stderr, (estimate.ci95_high - estimate.ci95_low) / 2 / Z_95))
    needed = _prompts_to_tell(estimate.n, error, abs(estimate.mean - bound))
    return None if needed is None else max(needed, estimate.n + 1)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """[Holm]'s adjusted p-values, in the order given: they hold the chance of any false alarm among them."""
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p-values lie between 0 and 1, and a missing one must be left out")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k answers is right, when c of n were: 1 - C(n-c, k) / C(n, k) [Chen]."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """The chance that all of k answers are right, when c of n were: C(c, k) / C(n, k) [Yao]."""
    return math.comb(c, k) / math.comb(n, k)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated linearly as numpy does; NaN where there are no values."""
    array, _ = _checked(values, None)
    return float(np.percentile(array, q)) if array.size else math.nan


def _checked(values: Sequence[float], clusters: Clusters | None) -> tuple[np.ndarray, np.ndarray]:
    """The values, and for each the number of its cluster, counted from 0."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not np.all(np.isfinite(array)):
        raise ValueError("a flat list of finite numbers is needed: drop and count unscored answers first")
    if clusters is None:
        return array, np.arange(array.size)
    if len(clusters) != array.size:
        raise ValueError(f"{array.size} scores and {len(clusters)} clusters")
    numbers: dict[Hashable, int] = {}
    keys = [("row", i) if cluster is None else ("cluster", cluster) for i, cluster in enumerate(clusters)]
    return array, np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)


def _estimate(
    n: int, mean: float, stderr: float, groups: int, rows: float, binary: bool, unit: bool, even: bool
) -> Estimate:
    """`rows` is the effective number of rows; `even` says that all scores are equal."""
    if binary or (unit and even):
        low, high = _wilson(mean, rows)
    else:
        low, high = _student(mean, stderr, groups - 1)
        if unit:
            low, high = max(low, 0.0), min(high, 1.0)
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
    p_value: float,
) -> Difference:
    low, high = _student(mean, stderr, groups - 1)
    error, differing = stderr, better + worse
    if unit:
        low, high = max(low, -1.0), min(high, 1.0)
    if binary or (unit and differing < FEW_PAIRS):
        more, less = better / n * rows, worse / n * rows
        tango = -_tango_upper(less, more, rows), _tango_upper(more, less, rows)
        low, high = tango if binary or not differing else (min(low, tango[0]), max(high, tango[1]))
        error = float(np.fmax(stderr, (high - low) / 2 / Z_95))
    return Difference(mean, stderr, low, high, p_value, n, (Z_95 + Z_80) * error)


def _figures(sums: Sums) -> tuple[float, float, float]:
    """Mean, standard error and effective number of rows, as from the scores themselves."""
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
        return 0.0  # rounding would leave 1e-17
    sums = np.bincount(codes, weights=values - values.mean())
    return float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / values.size)


def _effective_rows(values: np.ndarray, codes: np.ndarray) -> float:
    """The number of independent rows that would leave the standard error as large as the clusters do.

    n * (plain stderr / clustered stderr)^2 (Kish's design effect), times (t_{n-1} / t_{G-1})^2 because G clusters
    tell their own spread badly [Korn]; between 1 and n. Without any spread, the number of clusters.
    """
    n, groups = values.size, int(codes.max()) + 1
    return _independent_rows(n, groups, _standard_error(values, np.arange(n)), _standard_error(values, codes))


def _independent_rows(n: int, groups: int, plain: float, clustered: float) -> float:
    if groups in (1, n) or plain == 0:
        return float(groups)
    t_ratio = special.stdtrit(n - 1, 0.975) / special.stdtrit(groups - 1, 0.975)
    return float(np.clip(n * (plain * t_ratio / max(clustered, 1e-12)) ** 2, 1, n))


def _wilson(p: float, n: float) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) [Wilson]."""
    z2 = Z_95**2
    centre, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if p == 0 else low), (1.0 if p == 1 else high)


def _student(mean: float, stderr: float, degrees: int) -> tuple[float, float]:
    """mean -+ t * stderr; unbounded where there is no spread to learn from."""
    if degrees < 1 or stderr == 0:
        return -math.inf, math.inf
    half = float(special.stdtrit(degrees, 0.975)) * stderr
    return mean - half, mean + half


def _tango_upper(better: float, worse: float, n: float) -> float:
    """The upper limit of [Tango]'s score interval: the gap g at which (better - worse - n g) / sqrt(v(g)) = -z.

    v(g) = n (2q + g (1-g)); q, the rate of worse pairs under g, is the root of 2n q^2 + B q - worse g (1-g) = 0 with
    B = (2n - better + worse) g - better - worse.
    """

    def excess(gap: float) -> float:
        b = (2 * n - better + worse) * gap - better - worse
        q = (math.sqrt(b * b + 8 * n * worse * gap * (1 - gap)) - b) / (4 * n)
        return better - worse - n * gap + Z_95 * math.sqrt(max(n * (2 * q + gap * (1 - gap)), 0.0))

    seen = (better - worse) / n
    return 1.0 if seen >= 1 else float(optimize.brentq(excess, seen + 1e-9, 1.0))


def _p_value(gaps: np.ndarray, codes: np.ndarray, binary: bool) -> float:
    from scipy import stats

    if codes.max() + 1 < gaps.size:  # rows of a cluster are not independent; their sums are
        gaps, binary = np.round(np.bincount(codes, weights=gaps), 12), False
    differing = np.count_nonzero(gaps)
    if differing == 0:
        return 1.0
    if binary:
        return float(stats.binomtest(int(np.sum(gaps > 0)), int(differing), 0.5).pvalue)
    if differing > EXACT_PAIRS:
        return float(stats.wilcoxon(gaps, zero_method="pratt").pvalue)
    # scipy goes over to the normal curve as soon as there are ties or zeros, which is too bold for a few pairs.
    ranks = stats.rankdata(np.abs(gaps))[gaps != 0]
    signs = 1 - 2 * (np.arange(2**differing)[:, None] >> np.arange(differing) & 1)
    return float(np.mean(np.abs(signs @ ranks) >= abs(np.sign(gaps[gaps != 0]) @ ranks) - 1e-9))


def _p_from_counts(counts: Sequence[tuple[float, int]], binary: bool) -> float:
    """`_p_value` of values that are given with how often each is there.

    Up to FEW_VALUES they are written out. Beyond, the signed-rank test's normal curve is reckoned from the counts, as
    scipy has it: ranks with [Pratt]'s zeros, a variance corrected for ties, no correction for continuity.
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
