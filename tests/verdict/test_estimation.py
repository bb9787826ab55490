"""From scores to figures: clusters, rows that count as unscored, and Holm's family."""

import math
from dataclasses import fields

import pytest
from support.scored import prompts, report, scored

from slm.report import chart_data
from slm.verdict import estimation, gate, statistics


def by_cluster(count: int, clusters: int) -> list[dict]:
    """Scores that are alike within a cluster, so that a cluster counts little more than one prompt."""
    return [{"contains": float(place * clusters // count % 2)} for place in range(count)]


def width(figure) -> float:
    return figure.ci95_high - figure.ci95_low


def test_estimates_differences_and_tags_know_the_clusters_of_the_prompt_set():
    related, single = prompts(40, clusters=8), prompts(40)
    values = by_cluster(40, 8)
    ours, alone = scored(values, related), scored(values, single)
    assert width(ours.estimates["contains"]) > 1.5 * width(alone.estimates["contains"])
    assert ours.estimates["contains"] == statistics.mean_estimate(
        [each["contains"] for each in values], [prompt.cluster for prompt in related.prompts]
    )
    zeros = [{"contains": 0.0}] * 40
    gap = estimation.differences(ours, scored(zeros, related), related)["contains"]
    assert width(gap) > 1.5 * width(estimation.differences(alone, scored(zeros, single), single)["contains"])
    none = gate.Verdict("none", ())
    [row] = chart_data.tag_rows(report([ours], related, none))
    [mark] = row.marks
    overall = ours.estimates["score"]
    assert (mark.low, mark.high) == (overall.ci95_low, overall.ci95_high)


def test_a_row_counts_as_unscored_only_where_no_scorer_could_score_it():
    values = [{"contains": 1.0, "regex": None}, {"contains": None, "regex": None}, {"contains": None, "regex": 0.0}]
    assert scored(values, prompts(3)).metrics["rows_unscored"] == 1


def gap(p_value: float, **figures: float) -> statistics.Difference:
    told = dict.fromkeys((field.name for field in fields(statistics.Difference)), 0)
    return statistics.Difference(**told | {"p_value": p_value} | figures)


def test_holms_family_is_the_scorers_without_the_overall_score_made_of_them():
    found = estimation.holm_p_values({"a": gap(0.01), "b": gap(0.03), "none": gap(math.nan), "score": gap(0.02)})
    assert found == {"a": pytest.approx(0.02), "b": pytest.approx(0.03), "score": 0.02}  # statsmodels: 0.02, 0.03
    assert estimation.holm_p_values({"a": gap(0.01)}) == {"a": 0.01}


def test_a_difference_has_its_figures_as_metrics_if_they_are_finite():
    compared = {
        "a": gap(0.01, mean=0.1, ci95_low=-0.1, ci95_high=0.3, detectable=0.2),
        "b": gap(0.03, mean=7.0, ci95_low=-math.inf, ci95_high=math.inf, detectable=math.nan),
    }
    assert estimation.difference_metrics(compared) == {
        "difference/a/mean": 0.1,
        "difference/a/ci95_low": -0.1,
        "difference/a/ci95_high": 0.3,
        "difference/a/p_value": 0.01,
        "difference/a/detectable": 0.2,
        "difference/a/p_value_holm": 0.02,
        "difference/b/mean": 7.0,
        "difference/b/p_value": 0.03,
        "difference/b/p_value_holm": 0.03,
    }


def test_a_scorer_that_only_one_model_has_is_not_compared():
    two = prompts(2)
    ours, theirs = scored([{"a": 1.0, "b": 1.0}] * 2, two), scored([{"b": 0.0, "c": 0.0}] * 2, two)
    assert set(estimation.differences(ours, theirs, two)) == set(estimation.flips(ours, theirs)) == {"b", "score"}


@pytest.mark.parametrize(
    ("rows", "graded"),
    [
        ([{"a": 1.0, "b": 0.0}], {"score"}),  # each answer's overall score is 0.5
        ([{"a": 1.0, "b": 1.0}, {"a": 0.0, "b": None}], set()),
        ([{"a": 1.0}, {"a": 0.5, "b": None}], {"a", "score"}),
        ([{"a": 0.25, "b": 1.75}, {"c": None}], {"a", "b"}),
        ([], set()),
    ],
)
def test_scores_between_0_and_1_are_graded(rows, graded):
    assert estimation.graded(scored(rows, prompts(len(rows))).samples) == graded


def test_a_flip_is_a_change_of_the_score_and_no_rounding_error():
    three = prompts(3)
    old = scored([{"contains": 0.3}, {"contains": 0.5}, {"contains": 0.2}], three)
    new = scored([{"contains": 0.3 + 3e-13}, {"contains": 0.4}, {"contains": 0.25}], three)
    assert estimation.flips(new, old)["contains"] == estimation.Flips(worse=("p1",), better=("p2",))
