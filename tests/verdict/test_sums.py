"""Sums over scores give the figures that the scores themselves give."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import stats

from slm.verdict import statistics


def grouped(values, clusters) -> list[list[float]]:
    """The values of each cluster. None is a cluster of its own."""
    groups: dict = defaultdict(list)
    for place, (value, cluster) in enumerate(zip(values, clusters, strict=True)):
        groups[("row", place) if cluster is None else cluster].append(value)
    return list(groups.values())


def sums_of(values, clusters, binary, unit) -> statistics.Sums:
    groups = grouped(values, clusters)
    return statistics.Sums(
        n=len(values),
        total=sum(values),
        squares=sum(value**2 for value in values),
        low=min(values),
        high=max(values),
        binary=binary,
        unit=unit,
        groups=len(groups),
        group_squares=sum(sum(group) ** 2 for group in groups),
        group_products=sum(len(group) * sum(group) for group in groups),
        group_sizes=sum(len(group) ** 2 for group in groups),
    )


def difference_by_sums(new, old, clusters) -> statistics.Difference:
    gaps = np.round(np.subtract(new, old), 12)
    binary = bool(np.isin([new, old], (0, 1)).all())
    unit = bool(np.all((np.array([new, old]) >= 0) & (np.array([new, old]) <= 1)))
    counts = Counter(round(sum(group), 12) for group in grouped(gaps, clusters))
    sums = sums_of(gaps, clusters, binary, unit)
    return statistics.difference_from_sums(sums, int(sum(gaps > 0)), int(sum(gaps < 0)), list(counts.items()))


KINDS = {
    "yes or no": lambda random, n: random.integers(0, 2, n).astype(float),
    "shares": lambda random, n: np.round(random.random(n), 2),
    "all equal": lambda random, n: np.full(n, 0.3),
    "beyond one": lambda random, n: random.normal(0, 3, n),
    "mostly equal": lambda random, n: np.where(random.random(n) < 3 / n, 0.5, 1.0),
}


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("n", [1, 2, 40, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_give_the_estimate_and_the_difference_that_the_scores_give(kind, n, clustered):
    random = np.random.default_rng(n)
    new, old = KINDS[kind](random, n), KINDS[kind](random, n)
    clusters = [f"c{place % (n // 4 + 1)}" if clustered and place % 3 else None for place in range(n)]
    binary, unit = kind == "yes or no", kind != "beyond one"
    expected = statistics.mean_estimate(new, clusters)
    found = statistics.estimate_from_sums(sums_of(new, clusters, binary, unit))
    assert vars(found) == pytest.approx(vars(expected), rel=1e-9, abs=1e-9, nan_ok=True)
    expected = statistics.paired_difference(new, old, clusters)
    assert vars(difference_by_sums(new, old, clusters)) == pytest.approx(
        vars(expected), rel=1e-9, abs=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("clusters", [[None] * 1100, [place // 3 for place in range(1100)]])
@pytest.mark.parametrize("score", [0.1, 0.3, 0.7])
def test_equal_scores_have_exactly_their_mean_and_no_standard_error(score, clusters):
    found = statistics.estimate_from_sums(sums_of([score] * 1100, clusters, False, True))
    assert (found.mean, found.stderr) == (score, 0.0)
    assert vars(found) == pytest.approx(vars(statistics.mean_estimate([score] * 1100, clusters)))


@pytest.mark.parametrize("differing", [16, 17])
def test_a_few_differing_pairs_among_many_are_tested_as_the_scores_are(differing):
    """Two sizes are equal: sums of ranks may lie half a rank apart. 16 are counted out, and 17 are approximated."""
    old, new = np.zeros(1500), np.zeros(1500)
    sizes = np.array([1, 2, 2, *range(3, differing)]) / 32
    new[:differing] = sizes
    old[3:9], new[3:9] = new[3:9], old[3:9].copy()
    expected = statistics.paired_difference(new, old).p_value
    assert difference_by_sums(new, old, [None] * 1500).p_value == pytest.approx(expected, abs=1e-12)
    gaps = new - old
    if differing > 16:
        assert expected == pytest.approx(stats.wilcoxon(gaps, zero_method="pratt").pvalue)


def test_sums_of_no_scores_give_nan_and_not_zero():
    none = statistics.Sums(0, 0.0, 0.0, np.inf, -np.inf, True, True, 0, 0.0, 0.0, 0.0)
    nan = float("nan")
    estimate, difference = statistics.estimate_from_sums(none), statistics.difference_from_sums(none, 0, 0, [])
    assert vars(estimate) == pytest.approx(vars(statistics.Estimate(nan, nan, nan, nan, 0)), nan_ok=True)
    empty = statistics.Difference(nan, nan, nan, nan, nan, 0, nan)
    assert vars(difference) == pytest.approx(vars(empty), nan_ok=True)
