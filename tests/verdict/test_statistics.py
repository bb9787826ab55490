"""Means, differences and intervals against published figures, scipy and statsmodels."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from slm.verdict import statistics
from slm.verdict.statistics import (
    Difference,
    Estimate,
    holm,
    mean_estimate,
    paired_difference,
    pass_at_k,
    pass_hat_k,
    percentile,
    prompts_needed,
    prompts_to_settle,
)


def yes_no(yes: int, n: int) -> list[float]:
    return [1.0] * yes + [0.0] * (n - yes)


def pairs(only_new: int, only_old: int, n: int, both: int = 0) -> tuple[list[float], list[float]]:
    """Candidate and baseline with so many discordant pairs each way."""
    neither = n - only_new - only_old - both
    new = [1.0] * only_new + [0.0] * only_old + [1.0] * both + [0.0] * neither
    old = [0.0] * only_new + [1.0] * only_old + [1.0] * both + [0.0] * neither
    return new, old


def interval(result: Estimate | Difference) -> tuple[float, float]:
    return result.ci95_low, result.ci95_high


# Means


@pytest.mark.parametrize(
    ("yes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, method 5
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_yes_no_scores_get_clopper_and_pearsons_interval_as_published(yes, n, low, high):
    estimate = mean_estimate(yes_no(yes, n))
    assert interval(estimate) == pytest.approx((low, high), abs=5e-5)
    assert (estimate.mean, estimate.n) == (pytest.approx(yes / n), n)


@pytest.mark.parametrize(("yes", "n"), [(0, 1), (1, 1), (0, 20), (5, 5), (1, 29), (50, 120), (999, 1000)])
def test_yes_no_scores_get_clopper_and_pearsons_interval_as_scipy_has_it(yes, n):
    exact = stats.binomtest(yes, n).proportion_ci(0.95, method="exact")
    assert interval(mean_estimate(yes_no(yes, n))) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize("n", [24, 150])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
def test_each_end_of_a_yes_no_interval_misses_the_truth_at_most_25_times_in_1000(p, n):
    """All outcomes, each with its chance. Wilson's interval misses 8.3 times in 100 with 24 prompts at 0.98."""
    found = [interval(mean_estimate(yes_no(yes, n))) for yes in range(n + 1)]
    chances = stats.binom.pmf(range(n + 1), n, p)
    assert sum(chance for chance, (low, _) in zip(chances, found, strict=True) if low > p) <= 0.025
    assert sum(chance for chance, (_, high) in zip(chances, found, strict=True) if high < p) <= 0.025


def test_graded_scores_count_as_the_yes_no_rows_that_would_have_their_standard_error():
    scores = [0.2, 0.5, 0.9, 0.4, 0.35, 0.71]
    estimate, mean = mean_estimate(scores), np.mean(scores)
    assert estimate.stderr == pytest.approx(stats.sem(scores))
    rows = mean * (1 - mean) / stats.sem(scores) ** 2 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 5)) ** 2
    assert interval(estimate) == pytest.approx(proportion_confint(mean * rows, rows, method="beta"))
    students = stats.t.interval(0.95, 5, mean, stats.sem(scores))
    assert interval(estimate) == pytest.approx(students, abs=0.03)


@pytest.mark.parametrize("n", [24, 150])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda random, size: random.binomial(3, 0.98, size) / 3, 0.98),  # the mean of three yes/no scores
        (lambda random, size: np.where(random.random(size) < 0.04, 0.5, 1.0), 0.98),
        (lambda random, size: random.binomial(3, 0.5, size) / 3, 0.5),
        (lambda random, size: random.random(size), 0.5),
        (lambda random, size: random.beta(0.1, 0.1, size), 0.5),
    ],
)
def test_each_end_of_a_graded_interval_misses_the_truth_about_25_times_in_1000_at_most(draw, truth, n):
    random, times = np.random.default_rng(7), 1500
    found = [interval(mean_estimate(draw(random, n))) for _ in range(times)]
    allowed = 0.025 + 2.6 * math.sqrt(0.025 * 0.975 / times)  # 0.0355: 2.6 standard errors of chance
    assert np.mean([low > truth + 1e-12 for low, _ in found]) <= allowed
    assert np.mean([high < truth - 1e-12 for _, high in found]) <= allowed


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([0.9, 1.0, 0.2], 0.0038, 1.0),  # t alone would give -0.38 to 1.78
        ([9.0, 10.0, 2.0], -3.8281, 17.8281),  # not on a 0 to 1 scale: left as it is
    ],
)
def test_an_interval_stays_on_the_scale_only_where_all_scores_lie_on_it(scores, low, high):
    assert interval(mean_estimate(scores)) == pytest.approx((low, high), abs=1e-4)


def test_a_single_score_says_next_to_nothing():
    assert interval(mean_estimate([1.0])) == pytest.approx((0.025, 1.0), abs=1e-4)
    assert interval(mean_estimate([0.5])) == pytest.approx(proportion_confint(0.5, 1, method="beta"), abs=1e-4)
    assert interval(mean_estimate([7.0])) == (-math.inf, math.inf)
    assert math.isnan(mean_estimate([0.5]).stderr)


def test_equal_scores_are_not_certainty():
    assert interval(mean_estimate([0.5] * 10)) == pytest.approx(proportion_confint(5, 10, method="beta"))
    assert mean_estimate([0.1 + 0.2] * 10).stderr == 0.0
    assert interval(mean_estimate([7.0] * 10)) == (-math.inf, math.inf)


@pytest.mark.parametrize("n", range(1, 120))
def test_none_right_is_bounded_by_exactly_0_and_all_right_by_exactly_1(n):
    assert mean_estimate([0.0] * n).ci95_low == 0.0
    assert mean_estimate([1.0] * n).ci95_high == 1.0


def test_two_scores_have_students_interval_with_one_degree_of_freedom():
    assert interval(mean_estimate([7.0, 9.0])) == pytest.approx(stats.t.interval(0.95, 1, 8.0, 1.0))


def test_no_scores_give_nan_and_not_zero():
    estimate = mean_estimate([])
    assert estimate.n == 0
    assert all(map(math.isnan, (estimate.mean, estimate.stderr, *interval(estimate))))


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], [[1.0, 0.0]], [None, 1.0]])
def test_what_is_not_a_finite_score_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"^a flat list of finite numbers is needed: drop and count unscored answers first$"
    ):
        mean_estimate(bad)


def test_a_cluster_for_each_score_is_a_score_for_each_cluster():
    with pytest.raises(ValueError, match="3 scores and 2 clusters"):
        mean_estimate([0.0, 1.0, 1.0], ["a", "b"])


# Clusters


@pytest.fixture
def clustered():
    random = np.random.default_rng(7)
    clusters = random.integers(0, 12, 80)
    chance = random.beta(2, 2, 12)[clusters]
    return (random.random(80) < chance).astype(float), chance, [f"c{number}" for number in clusters]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_clustered_standard_error_is_the_cluster_robust_one_of_statsmodels(clustered, kind):
    scores, clusters = clustered[kind], clustered[2]
    groups = np.unique(clusters, return_inverse=True)[1]
    fit = OLS(scores, np.ones(80)).fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True})
    assert mean_estimate(scores, clusters).stderr == pytest.approx(fit.bse[0], rel=1e-12)


def test_a_clustered_standard_error_worked_by_hand():
    # residuals 0.25 0.25 | -0.75 0.25: cluster sums 0.5 and -0.5, sqrt(2/1 * 0.5) / 4
    assert mean_estimate([1, 1, 0, 1], ["a", "a", "b", "b"]).stderr == pytest.approx(0.25)


def test_a_clustered_interval_uses_the_clusters_degrees_of_freedom(clustered):
    _, scores, clusters = clustered
    estimate = mean_estimate(scores, clusters)
    half = stats.t.ppf(0.975, len(set(clusters)) - 1) * estimate.stderr
    assert interval(estimate) == pytest.approx((estimate.mean - half, estimate.mean + half), abs=0.01)
    rows = estimate.mean * (1 - estimate.mean) * (stats.norm.ppf(0.975) / half) ** 2
    assert interval(estimate) == pytest.approx(proportion_confint(estimate.mean * rows, rows, method="beta"))


@pytest.mark.parametrize("clusters", [list(range(7)), [None] * 7, ["a", None, "b", None, None, "c", None]])
def test_clusters_of_one_change_nothing(clusters):
    for scores in (yes_no(3, 7), [0.1, 0.4, 0.2, 0.9, 0.8, 0.3, 0.3]):
        assert mean_estimate(scores, clusters) == mean_estimate(scores)
        assert paired_difference(scores, scores[::-1], clusters) == paired_difference(scores, scores[::-1])


def test_copies_of_a_row_in_its_cluster_add_no_certainty():
    scores, clusters = yes_no(30, 50), list(range(50))
    alone, fivefold = mean_estimate(scores), mean_estimate(np.repeat(scores, 5), list(np.repeat(clusters, 5)))
    assert fivefold.stderr == pytest.approx(alone.stderr)
    assert interval(fivefold) == pytest.approx(interval(alone), abs=0.005)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_without_any_spread_a_cluster_counts_as_one_row(right):
    assert interval(mean_estimate([right] * 40, [i // 8 for i in range(40)])) == interval(mean_estimate([right] * 5))


def test_a_single_cluster_counts_as_one_row():
    estimate = mean_estimate([1, 0, 1, 1], ["a"] * 4)
    assert math.isnan(estimate.stderr)
    assert interval(estimate) == pytest.approx(proportion_confint(0.75, 1, method="beta"))
    graded = mean_estimate([0.2, 0.4], ["a", "a"])
    assert interval(graded) == pytest.approx(proportion_confint(0.3, 1, method="beta"))


def test_clustered_yes_no_scores_get_the_interval_of_the_effective_rows_of_korn_and_graubard(clustered):
    scores, _, clusters = clustered
    ratio = stats.sem(scores) / mean_estimate(scores, clusters).stderr
    degrees = len(scores) - 1, len(set(clusters)) - 1
    rows = len(scores) * (ratio * stats.t.ppf(0.975, degrees[0]) / stats.t.ppf(0.975, degrees[1])) ** 2
    expected = proportion_confint(scores.mean() * rows, rows, method="beta")
    assert interval(mean_estimate(scores, clusters)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "rows"),
    [
        ([1.0] * 9 + [0.0] * 11, 1),  # two clusters that are nearly all right and all wrong
        ([1.0, 0.0] * 10, 20),  # each cluster has one right and one wrong: no spread between clusters
    ],
)
def test_clusters_count_as_one_row_at_least_and_as_their_rows_at_most(scores, rows):
    clusters = [place // (10 if rows == 1 else 2) for place in range(20)]
    expected = proportion_confint(np.mean(scores) * rows, rows, method="beta")
    assert interval(mean_estimate(scores, clusters)) == pytest.approx(expected)


@pytest.mark.parametrize(("p", "clusters", "likeness"), [(0.6, 10, 0.3), (0.6, 40, 0.3), (0.9, 10, 0.1), (0.6, 4, 0.3)])
def test_the_clustered_interval_holds_the_truth_about_95_times_in_100(p, clusters, likeness):
    random = np.random.default_rng(3)
    codes = list(np.repeat(np.arange(clusters), 5))
    size = 1 / likeness - 1
    estimates = [
        mean_estimate(np.less(random.random(len(codes)), random.beta(p * size, (1 - p) * size, clusters)[codes]), codes)
        for _ in range(400)
    ]
    assert np.mean([e.ci95_low <= p <= e.ci95_high for e in estimates]) > 0.925


# Paired differences


@pytest.mark.parametrize(
    ("only_new", "only_old", "n", "p_value"),
    [
        (6, 16, 161, 0.052479),  # Cavo et al. 2012, as published with the R package contingencytables 3.0
        (1, 7, 21, 9 / 2**7),  # Bentur et al. 2009: 2 * (1 + 8) / 2^8
        (59, 121, 1000, None),
        (0, 6, 30, 0.03125),  # 2 / 2^6
        (0, 0, 30, 1.0),
    ],
)
def test_yes_no_pairs_get_the_exact_mcnemar_test(only_new, only_old, n, p_value):
    found = paired_difference(*pairs(only_new, only_old, n)).p_value
    assert found == pytest.approx(mcnemar([[0, only_new], [only_old, 0]], exact=True).pvalue)
    if p_value is not None:
        assert found == pytest.approx(p_value, abs=5e-7)


@pytest.mark.parametrize(
    ("only_new", "only_old", "n", "low", "high"),
    [
        # Tango's score interval, as published: Cavo et al. 2012, with the R package contingencytables 3.0, and Bentur
        # et al. 2009, in Fagerland et al. 2014, Statistics in Medicine 33:2850. Its ends miss up to 4.8 times in 100
        (6, 16, 161, -0.1240, -0.0054),
        (1, 7, 21, -0.517, -0.026),
    ],
)
def test_yes_no_pairs_get_an_interval_that_is_little_wider_than_tangos(only_new, only_old, n, low, high):
    difference = paired_difference(*pairs(only_new, only_old, n))
    ours = interval(difference)
    assert ours[0] < low and high < ours[1]
    assert ours[1] - ours[0] < 1.2 * (high - low)
    assert difference.mean == pytest.approx((only_new - only_old) / n)


@pytest.mark.parametrize(("only_new", "only_old", "n"), [(40, 20, 160), (3, 0, 44), (0, 1, 44), (2, 2, 9), (1, 0, 500)])
def test_yes_no_pairs_get_newcombes_sum_of_two_exact_intervals(only_new, only_old, n):
    found = paired_difference(*pairs(only_new, only_old, n))
    p, q = only_new / n, only_old / n
    (low_p, high_p), (low_q, high_q) = (proportion_confint(count, n, method="beta") for count in (only_new, only_old))
    cells = np.array([p, q])
    covariance = np.diag(cells) - np.outer(cells, cells)  # of one draw from a multinomial
    both = math.sqrt(covariance[0, 0] * covariance[1, 1])
    r = covariance[0, 1] / both if both else 0.0
    up = np.array([high_p - p, -(q - low_q)])
    down = np.array([p - low_p, -(high_q - q)])
    spread = np.array([[1, r], [r, 1]])
    assert interval(found) == pytest.approx(
        (p - q - math.sqrt(down @ spread @ down), p - q + math.sqrt(up @ spread @ up))
    )


@pytest.mark.parametrize("n", [12, 24, 60, 150])
def test_each_end_of_an_interval_of_yes_no_pairs_misses_the_truth_at_most_25_times_in_1000(n):
    """All outcomes, each with its chance, at many rates of better and worse pairs."""
    better, worse = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    better, worse = better[better + worse <= n], worse[better + worse <= n]
    high = np.array([statistics._gap_upper(*pair, n) for pair in zip(better.tolist(), worse.tolist(), strict=True)])
    assert interval(paired_difference(*pairs(3, 1, n))) == (
        pytest.approx(-statistics._gap_upper(1, 3, n)), pytest.approx(statistics._gap_upper(3, 1, n))
    )  # fmt: skip
    rates = (0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.075, 0.1, 0.2, 0.3, 0.5)
    outcomes = np.stack([better, worse, n - better - worse], axis=1)
    for up, down in [(up, down) for up in rates for down in rates]:
        chances = stats.multinomial.pmf(outcomes, n, [up, down, 1 - up - down])
        assert chances[high < up - down - 1e-12].sum() <= 0.025, (up, down)


def test_an_interval_of_pairs_ends_at_the_end_of_the_scale():
    assert paired_difference(*pairs(5, 0, 5)).ci95_high == 1.0
    assert paired_difference(*pairs(0, 5, 5)).ci95_low == -1.0


def test_the_standard_error_is_that_of_the_differences_and_not_of_two_means():
    new, old = pairs(8, 6, 120, both=60)
    difference = paired_difference(new, old)
    assert difference.stderr == pytest.approx(stats.sem(np.subtract(new, old)))
    assert difference.stderr < math.hypot(stats.sem(new), stats.sem(old)) / 1.9


@pytest.mark.parametrize("scores", [[1.0] * 50, [0.0] * 50, [0.5] * 50, [0.25, 0.75] * 25])
def test_pairs_that_never_differ_do_not_prove_that_they_never_will(scores):
    difference = paired_difference(scores, scores)
    bound = proportion_confint(0, 50, method="beta")[1]  # 0.0711: the upper bound on the rate of worse pairs
    assert (difference.mean, difference.stderr, difference.p_value) == (0.0, 0.0, 1.0)
    assert interval(difference) == pytest.approx((-bound, bound))
    assert difference.detectable == pytest.approx(bound / 1.959964 * 2.801585, rel=1e-6)


def test_identical_figures_on_an_unknown_scale_bound_nothing():
    assert interval(paired_difference([7.0, 8.0], [7.0, 8.0])) == (-math.inf, math.inf)


def test_one_differing_pair_proves_no_more_than_none():
    none, one = paired_difference([0.5] * 50, [0.5] * 50), paired_difference([0.8] + [0.5] * 49, [0.5] * 50)
    assert one.mean == pytest.approx(0.006)
    assert one.ci95_low < -0.05  # Student's t alone: -0.006
    assert one.detectable > none.detectable


def test_scores_between_0_and_1_get_students_interval_on_their_differences():
    random = np.random.default_rng(5)
    new, old = random.random(40), random.random(40)
    difference = paired_difference(new, old)
    gaps = new - old
    assert interval(difference) == pytest.approx(stats.t.interval(0.95, 39, gaps.mean(), stats.sem(gaps)))
    assert difference.detectable == pytest.approx((1.959964 + 0.841621) * stats.sem(gaps), rel=1e-6)
    assert difference.p_value == pytest.approx(stats.wilcoxon(gaps, zero_method="pratt").pvalue)


def test_a_few_graded_pairs_are_as_wide_as_their_sizes_allow():
    new, old = [0.95, 0.90, 0.97, 0.85, 0.98, 0.93], [0.94, 0.92, 0.91, 0.84, 0.95, 0.90]
    difference = paired_difference(new, old)
    assert difference.ci95_low < stats.t.interval(0.95, 5, *gaps_of(new, old))[0]
    assert difference.ci95_high - difference.ci95_low < 0.15  # 1.2 where each differing pair counts in full
    assert difference.detectable < 0.15


@pytest.mark.parametrize("sizes", [(0.1, 0.2, 0.05, 0.3), (0.9,)])
def test_a_few_graded_pairs_get_the_bound_of_signs_in_units_of_the_largest_possible_difference(sizes):
    """The docstring's rule: the largest difference seen, times 5^(1/d), and at most 1. Student's bound lies within."""
    equal = [0.05] * (30 - len(sizes))
    found = paired_difference([*sizes, *equal], [0.0] * len(sizes) + equal)
    unit = min(1.0, max(sizes) * 5 ** (1 / len(sizes)))
    assert found.ci95_high == pytest.approx(unit * paired_difference(*pairs(len(sizes), 0, 30)).ci95_high)


def test_a_few_graded_pairs_keep_students_bound_where_it_is_wider_than_that_of_signs():
    new, old = [0.9, 0.05, 0.05], [0.0, 0.0, 0.0]
    low, high = stats.t.interval(0.95, 2, *gaps_of(new, old))
    assert low < -0.8 and high > 1
    assert interval(paired_difference(new, old)) == pytest.approx((low, 1.0))


@pytest.mark.parametrize(("differing", "wider"), [(9, True), (10, False)])
def test_ten_differing_pairs_are_enough_for_students_interval_alone(differing, wider):
    new = [0.5 + 0.01 * place for place in range(1, differing + 1)] + [0.5] * 5
    students = stats.t.interval(0.95, len(new) - 1, *gaps_of(new, [0.5] * len(new)))
    found = interval(paired_difference(new, [0.5] * len(new)))
    assert (found != pytest.approx(students)) == wider


def test_an_interval_of_differences_is_cut_to_the_scale_only_where_all_scores_lie_on_it():
    new, old, clusters = [0.9] * 6 + [0.1] * 6, [0.1] * 6 + [0.8] * 6, [0] * 6 + [1] * 6
    assert interval(paired_difference(new, old, clusters)) == (-1.0, 1.0)
    assert interval(paired_difference([9, 1, 2], [3, 4, 5])) == pytest.approx(stats.t.interval(0.95, 2, 0, 3))
    assert paired_difference([9, 1, 2], [3, 4, 5]).detectable == pytest.approx(2.801585 * 3, rel=1e-6)


@pytest.mark.parametrize(("new", "old"), [([1, 0, 1, 1], [0.5, 0.25, 0, 0.75]), ([0.5, 0.25, 0, 0.75], [1, 0, 1, 1])])
def test_a_yes_no_score_beside_a_graded_one_is_compared_as_a_graded_one(new, old):
    found = paired_difference(new, old)
    assert found.p_value == pytest.approx(stats.wilcoxon(np.subtract(new, old), method="exact").pvalue)
    assert found.p_value != pytest.approx(stats.binomtest(int(np.sum(np.greater(new, old))), 4).pvalue)


@pytest.mark.parametrize(("new", "old"), [([1.5, 0.2], [0.5, 0.4]), ([0.5, 0.4], [1.5, 0.2])])
def test_scores_beyond_1_of_one_model_leave_the_scale_open(new, old):
    assert interval(paired_difference(new, old)) == pytest.approx(stats.t.interval(0.95, 1, *gaps_of(new, old)))


def test_a_difference_below_the_12th_decimal_is_a_rounding_error():
    found = paired_difference([0.5 + 3e-13, 0.7, 0.9], [0.5, 0.7, 0.9])
    assert (found.mean, found.p_value) == (0.0, 1.0)


def gaps_of(new, old) -> tuple[float, float]:
    gaps = np.subtract(new, old)
    return float(gaps.mean()), float(stats.sem(gaps))


def test_pairs_that_all_differ_alike_are_bounded_by_their_size():
    difference = paired_difference([0.52] * 12, [0.5] * 12)
    assert (difference.mean, difference.stderr) == (pytest.approx(0.02), 0.0)
    assert -0.02 < difference.ci95_low < 0.02 <= difference.ci95_high < 0.03


@pytest.mark.parametrize("n", [2, 5, 40])
def test_no_detectable_difference_is_above_the_range_of_the_score(n):
    assert paired_difference([1.0] + [0.0] * (n - 1), [0.0] * n).detectable <= 1.0
    assert paired_difference([0.9] + [0.0] * (n - 1), [0.0] * n).detectable <= 1.0


@pytest.mark.parametrize("n", [6, 12, 24, 60])
@pytest.mark.parametrize(
    ("rate", "sizes", "lean"),
    [
        (1.0, (0.0, 0.1), 0.0),  # all differ a little
        (0.3, (0.0, 0.5), 0.3),  # some differ, more of them up
        (0.1, (0.0, 1.0), 0.0),  # a few differ by anything
        (0.2, (0.25, 0.25), -0.4),  # a few differ by a quarter, more of them down
        (0.1, (0.0, 1.0), 1.0),  # a few differ by anything, all up: Student's interval misses 8 to 10 times in 100
        (0.2, (0.0, 1.0), 1.0),
    ],
)
def test_the_interval_of_graded_pairs_holds_the_truth_about_95_times_in_100(n, rate, sizes, lean):
    random, times = np.random.default_rng(n), 400
    differs = random.random((times, n)) < rate
    up = random.random((times, n)) < (1 + lean) / 2
    gaps = differs * np.where(up, 1, -1) * random.uniform(*sizes, (times, n))
    truth = rate * lean * sum(sizes) / 2
    found = [paired_difference(np.maximum(row, 0), np.maximum(-row, 0)) for row in gaps]
    missed = sum(not one.ci95_low - 1e-12 <= truth <= one.ci95_high + 1e-12 for one in found)
    assert missed / times < 0.075  # 5 % and chance: 2.3 standard errors


def test_equal_pairs_among_many_graded_ones_are_ranked_as_pratt_ranks_them():
    new = np.concatenate([np.random.default_rng(2).random(30), np.full(20, 0.5)])
    gaps = new - 0.45 - np.where(np.arange(50) < 30, 0, 0.05)
    old = np.where(np.arange(50) < 30, 0.45, 0.5)
    expected = stats.wilcoxon(np.round(gaps, 12), zero_method="pratt").pvalue
    assert paired_difference(new, old).p_value == pytest.approx(expected)
    assert expected != pytest.approx(stats.wilcoxon(np.round(gaps, 12), zero_method="wilcox").pvalue)


def test_a_few_graded_pairs_get_the_exact_signed_rank_test_of_scipy():
    gaps = np.array([0.1, -0.2, 0.3, 0.45, 0.5, -0.05, 0.61, 0.7])
    found = paired_difference(0.1 + np.maximum(gaps, 0), 0.1 + np.maximum(-gaps, 0)).p_value
    assert found == pytest.approx(stats.wilcoxon(gaps, method="exact").pvalue)


@pytest.mark.parametrize("signs", itertools.product((1, -1), repeat=4))
def test_a_few_tied_pairs_get_all_their_sign_patterns_as_scipy_counts_them(signs):
    """Ranks 1, 2.5, 2.5 and 4: sums of ranks may lie half a rank apart."""
    gaps = np.array([0.125, 0.25, 0.25, 0.5]) * signs
    expected = stats.wilcoxon(gaps, method=stats.PermutationMethod()).pvalue
    assert paired_difference(np.maximum(gaps, 0), np.maximum(-gaps, 0)).p_value == pytest.approx(expected)


def test_up_to_16_tied_pairs_get_the_exact_test_and_more_the_normal_approximation():
    def found(better: int, worse: int) -> float:
        return paired_difference([0.25] * better + [0.5] * worse, [0.0] * better + [0.75] * worse).p_value

    assert found(12, 4) == pytest.approx(stats.binomtest(12, 16).pvalue)  # with equal ranks, it is the sign test
    assert found(13, 4) == pytest.approx(stats.wilcoxon([0.25] * 13 + [-0.25] * 4, method="approx").pvalue)


@pytest.mark.parametrize("equal", [0, 5, 500])
def test_pairs_that_are_equal_do_not_make_three_changed_ones_significant(equal):
    new, old = [0.9, 0.8, 0.7] + [0.5] * equal, [0.1, 0.2, 0.3] + [0.5] * equal
    assert paired_difference(new, old).p_value == pytest.approx(2 / 2**3)


def test_under_clusters_the_test_runs_on_the_clusters_sums():
    new, old = pairs(10, 0, 40)
    clusters = [i // 10 for i in range(40)]  # all ten gains are in one cluster
    assert paired_difference(new, old).p_value == pytest.approx(2 / 2**10)
    assert paired_difference(new, old, clusters).p_value == 1.0
    assert paired_difference(new, old, clusters).ci95_low < 0 < paired_difference(new, old).ci95_low


def test_two_rows_of_one_cluster_are_one_pair_of_the_test():
    clusters = ["a", "a", None, None, None, None]
    assert paired_difference([1.0] * 6, [0.0] * 6).p_value == pytest.approx(2 / 2**6)
    assert paired_difference([1.0] * 6, [0.0] * 6, clusters).p_value == pytest.approx(2 / 2**5)


def test_unpaired_scores_are_refused_and_none_at_all_give_nan():
    with pytest.raises(ValueError, match="2 candidate and 1 baseline scores"):
        paired_difference([0.0, 1.0], [1.0])
    empty = paired_difference([], [])
    assert empty.n == 0
    assert all(map(math.isnan, (empty.mean, empty.stderr, *interval(empty), empty.p_value, empty.detectable)))


@pytest.mark.parametrize(("n", "better", "worse"), [(60, 0.05, 0.10), (100, 0.0, 0.03), (200, 0.03, 0.08)])
def test_a_true_drop_of_the_whole_margin_passes_at_most_1_time_in_25(n, better, worse):
    random = np.random.default_rng(11)
    passes = 0
    for _ in range(400):
        only_new, only_old, _ = random.multinomial(n, [better, worse, 1 - better - worse])
        passes += paired_difference(*pairs(only_new, only_old, n)).ci95_low > better - worse
    assert passes / 400 <= 0.04  # nominally 0.025


# How many prompts


def test_a_change_of_3_points_takes_about_880_prompts():
    # one try with 120 yes/no items and 12 % flips had a standard error of 0.029
    tried = Difference(0.0, 0.029, -0.057, 0.057, 1.0, 120, (1.959964 + 0.841621) * 0.029)
    assert prompts_needed(tried, 0.03) == 881


def test_before_enough_were_asked_the_number_takes_two_equal_models_and_not_the_difference_seen():
    tried = Difference(0.01, 0.029, -0.047, 0.067, 1.0, 120, (1.959964 + 0.841621) * 0.029)
    assert prompts_needed(tried, 0.03) == 881


def test_a_run_that_had_just_enough_prompts_is_told_a_larger_number():
    tried = Difference(0.0, 0.01, -0.0196, 0.0196, 1.0, 100, 0.03 * math.sqrt(0.995))  # 99.5 prompts
    assert prompts_needed(tried, 0.03) == 101


def test_where_enough_were_asked_the_difference_seen_says_how_many_more():
    tried = Difference(-0.02, 0.009, -0.0376, -0.0024, 0.03, 1000, (1.959964 + 0.841621) * 0.009)
    assert prompts_needed(tried, 0.03) == math.ceil(1000 * (2.801585 * 0.009 / 0.01) ** 2)


@pytest.mark.parametrize(
    "difference",
    [
        paired_difference([], []),
        paired_difference([3.0], [2.0]),
        Difference(-0.02, 0.001, -0.022, -0.018, 0.0, 1000, 0.0028),  # exactly the margin
    ],
)
def test_where_no_number_of_prompts_would_tell_there_is_none(difference):
    assert prompts_needed(difference, 0.02) is None


def test_a_margin_of_zero_is_only_shown_by_a_candidate_that_is_better():
    assert prompts_needed(paired_difference([0.0] * 50, [0.0] * 50), 0.0) is None
    assert prompts_needed(paired_difference(*pairs(5, 2, 50)), 0.0) > 50


def test_a_mean_is_told_from_a_bound_by_so_many_prompts_that_are_then_enough():
    seen = mean_estimate(yes_no(62, 100))
    needed = prompts_to_settle(seen, 0.55)
    assert needed == pytest.approx(0.62 * 0.38 * (2.801585 / 0.07) ** 2, rel=0.1)  # an exact interval is wider
    assert mean_estimate(yes_no(round(0.62 * needed), needed)).ci95_low > 0.55
    assert prompts_to_settle(seen, 0.62) is None
    assert prompts_to_settle(mean_estimate([]), 0.5) is None


def test_without_spread_half_the_interval_stands_for_the_standard_error():
    low, high = proportion_confint(30, 30, method="beta")
    error = (high - low) / 2 / 1.959964
    assert prompts_to_settle(mean_estimate([1.0] * 30), 0.95) == math.ceil(30 * (2.801585 * error / 0.05) ** 2)
    assert prompts_to_settle(mean_estimate([1.0]), 0.5) == 2  # (2.8 * 0.2487 / 0.5)^2 = 1.9


def test_a_number_of_a_thousand_million_prompts_is_none():
    seen = mean_estimate(yes_no(62, 100))
    assert prompts_to_settle(seen, 0.62 + 5e-5) < 10**9
    assert prompts_to_settle(seen, 0.62 + 1e-5) is None


def test_more_prompts_are_always_asked_for_than_were_asked():
    assert prompts_to_settle(mean_estimate([1.0] * 5), 0.6) == 6


# Many comparisons, percentiles


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [1.0, 1.0], [0.2, 0.2, 0.01], [0.0, 0.5], []])
def test_holms_correction_is_that_of_statsmodels(p_values):
    adjusted = multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize("bad", [[math.nan], [-0.1], [1.1]])
def test_what_is_not_a_p_value_is_refused(bad):
    with pytest.raises(ValueError, match=r"^p-values lie between 0 and 1, and a missing one must be left out$"):
        holm(bad)


def test_percentiles_are_numpys_and_missing_ones_are_nan():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 95) == pytest.approx(np.percentile([1, 2, 3, 4], 95))
    assert percentile([2.0], 95) == 2.0
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_and_pass_hat_k_count_the_draws_of_k_answers(right, k):
    draws = list(itertools.combinations([1] * right + [0] * (5 - right), k))
    assert pass_at_k(5, right, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
    assert pass_hat_k(5, right, k) == pytest.approx(np.mean([all(draw) for draw in draws]))


@pytest.mark.parametrize(("n", "right", "k"), [(200, 57, 10), (200, 3, 100), (20, 19, 5)])
def test_pass_at_k_is_the_published_product(n, right, k):
    """Chen et al. 2021, figure 3: 1 - prod(1 - k / i) over i from n - c + 1 to n."""
    assert pass_at_k(n, right, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - right + 1, n + 1)))
