"""The gate's verdicts, and the one line that each mistake in a thresholds file gets."""

import math

import numpy as np
import pytest

from slm.base.errors import BadInput
from slm.verdict import gate
from slm.verdict.gate import Check, Threshold, Verdict, decide, read_thresholds
from slm.verdict.statistics import Difference, Estimate, mean_estimate, paired_difference

NAN = math.nan


def estimate(low: float, high: float, n: int = 100) -> Estimate:
    return Estimate((low + high) / 2, (high - low) / 3.92, low, high, n)


def difference(low: float, high: float, n: int = 100) -> Difference:
    return Difference((low + high) / 2, (high - low) / 3.92, low, high, 0.5, n, (high - low) / 3.92 * 2.801585)


def only(verdict: Verdict) -> Check:
    (check,) = verdict.checks
    assert verdict.state == check.state
    return check


DESIGN = """
exact_match/mean: {min: 0.60}
rows_failed: {max: 0}
output_tokens_per_second: {min: 5}
contains/mean: {max_drop: 0.02}     # non-inferiority against the baseline at 95 %
"""


def test_the_designs_own_example_is_read():
    assert read_thresholds(DESIGN, "gate.yaml") == (
        Threshold("exact_match/mean", min=0.6),
        Threshold("rows_failed", max=0.0),
        Threshold("output_tokens_per_second", min=5.0),
        Threshold("contains/mean", max_drop=0.02),
    )


def test_the_designs_own_example_passes_regresses_or_waits():
    thresholds = read_thresholds(DESIGN, "gate.yaml")
    metrics = {
        "exact_match": estimate(0.62, 0.70),
        "contains": estimate(0.7, 0.8),
        "rows_failed": 0,
        "output_tokens_per_second": 84.2,
    }
    good = decide(thresholds, metrics, {"contains": difference(-0.01, 0.03)})
    assert (good.state, [check.state for check in good.checks]) == ("pass", ["pass"] * 4)
    unsure = decide(thresholds, metrics, {"contains": difference(-0.05, 0.03)})
    assert (unsure.state, unsure.checks[3].state) == ("inconclusive", "inconclusive")
    bad = decide(thresholds, metrics | {"rows_failed": 1}, {"contains": difference(-0.05, 0.03)})
    assert (bad.state, bad.checks[1].state, bad.checks[3].state) == ("regress", "regress", "inconclusive")


def test_several_rules_for_one_metric_are_several_checks():
    thresholds = read_thresholds("a/mean: {max_drop: 0.1, max: 0.9, min: 0.1}", "gate.yaml")
    verdict = decide(thresholds, {"a": estimate(0.4, 0.5)}, {"a": difference(-0.01, 0.01)})
    assert [(check.rule, check.state) for check in verdict.checks] == [
        ("min 0.1", "pass"),
        ("max 0.9", "pass"),
        ("max_drop 0.1", "pass"),
    ]


def test_only_a_run_without_thresholds_has_no_verdict():
    assert decide((), {"a": estimate(0.4, 0.5)}, {}) == Verdict("none", ())


@pytest.mark.parametrize(
    ("rule", "low", "high", "state"),
    [
        ({"min": 0.6}, 0.60, 0.70, "pass"),
        ({"min": 0.6}, 0.61, 0.70, "pass"),
        ({"min": 0.6}, 0.59, 0.70, "inconclusive"),
        ({"min": 0.6}, 0.50, 0.60, "inconclusive"),
        ({"min": 0.6}, 0.50, 0.59, "regress"),
        ({"max": 0.1}, 0.02, 0.10, "pass"),
        ({"max": 0.1}, 0.02, 0.11, "inconclusive"),
        ({"max": 0.1}, 0.10, 0.20, "inconclusive"),
        ({"max": 0.1}, 0.11, 0.20, "regress"),
        ({"min": 0.0}, 0.00, 0.00, "pass"),
        ({"min": 0.6}, -math.inf, math.inf, "inconclusive"),
    ],
)
def test_a_score_is_judged_on_its_interval_and_not_on_its_mean(rule, low, high, state):
    assert only(decide((Threshold("a/mean", **rule),), {"a": estimate(low, high)}, {})).state == state


@pytest.mark.parametrize(
    ("low", "high", "state"),
    [
        (-0.019, 0.05, "pass"),
        (0.01, 0.05, "pass"),
        (-0.02, 0.05, "inconclusive"),
        (-0.05, -0.02, "inconclusive"),
        (-0.05, -0.021, "regress"),
        (-math.inf, math.inf, "inconclusive"),
    ],
)
def test_a_drop_is_judged_on_the_interval_of_the_paired_difference(low, high, state):
    gate = (Threshold("a/mean", max_drop=0.02),)
    assert only(decide(gate, {"a": estimate(0.1, 0.2)}, {"a": difference(low, high)})).state == state


@pytest.mark.parametrize(
    ("rule", "value", "state"),
    [
        ({"max": 0.0}, 0, "pass"),
        ({"max": 0.0}, 1, "regress"),
        ({"min": 5.0}, 5.0, "pass"),
        ({"min": 5.0}, 4.99, "regress"),
        ({"min": 5.0}, NAN, "inconclusive"),
        ({"min": 5.0}, math.inf, "inconclusive"),
        ({"min": 5.0}, None, "inconclusive"),
    ],
)
def test_a_plain_figure_is_judged_on_its_value(rule, value, state):
    assert only(decide((Threshold("latency_seconds/p95", **rule),), {"latency_seconds/p95": value}, {})).state == state


KNOWN = {"exact_match": estimate(0.6, 0.7), "rows_failed": 0}
EMPTY_DIFFERENCE = Difference(NAN, NAN, NAN, NAN, NAN, 0, NAN)


@pytest.mark.parametrize(
    ("threshold", "metrics", "differences", "reason"),
    [
        (
            Threshold("exat_match/mean", min=0.1),
            KNOWN,
            {},
            "no such metric (did you mean 'exact_match/mean'?); there are exact_match/mean, rows_failed",
        ),
        (
            Threshold("exact_match", min=0.1),
            KNOWN,
            {},
            "no such metric (did you mean 'exact_match/mean'?); there are exact_match/mean, rows_failed",
        ),
        (Threshold("zzz", max_drop=0.1), {}, {}, "no such metric; there are none"),
        (Threshold("a/mean", min=0.0), {"a": mean_estimate([])}, {}, "no answer was scored"),
        (
            Threshold("a/mean", min=0.0),
            {"a": Estimate(0.5, NAN, NAN, NAN, 1)},
            {},
            "0.500 has no interval: all prompts are of one cluster",
        ),
        (Threshold("rows_failed", max=0.0), {"rows_failed": 0, "rows": 0}, {}, "the prompt set is empty"),
        (Threshold("exact_match/mean", max_drop=0.1), KNOWN, {}, "there is no baseline; name one"),
        (
            Threshold("exact_match/mean", max_drop=0.1),
            KNOWN,
            {"contains": difference(0, 0.1)},
            "the baseline has no such score",
        ),
        (
            Threshold("exact_match/mean", max_drop=0.1),
            KNOWN,
            {"exact_match": EMPTY_DIFFERENCE},
            "no row was scored for both candidate and baseline",
        ),
        (
            Threshold("exact_match/mean", max_drop=0.1),
            KNOWN,
            {"exact_match": Difference(0.1, NAN, NAN, NAN, NAN, 1, NAN)},
            "no row was scored for both candidate and baseline",
        ),
        (
            Threshold("rows_failed", max_drop=0.1),
            KNOWN,
            {"exact_match": difference(0, 0.1)},
            "max_drop compares scores row by row, and this is a single figure",
        ),
        (Threshold("rows_failed", max=0.0), {"rows_failed": NAN}, {}, "the value is nan"),
    ],
)
@pytest.mark.fault("gates: unknown metric")
def test_what_is_missing_never_passes_and_never_counts_as_a_regression(threshold, metrics, differences, reason):
    check = only(decide((threshold,), metrics, differences))
    assert (check.state, check.reason, check.prompts_needed) == ("inconclusive", reason, None)


@pytest.mark.parametrize(
    ("threshold", "value", "check"),
    [
        (
            Threshold("a/mean", min=0.55),
            mean_estimate([1.0] * 62 + [0.0] * 38),
            Check(
                "a/mean",
                "min 0.55",
                "inconclusive",
                "0.620, 95 % interval 0.517 to 0.715 from 100 prompts, includes the limit 0.55; "
                "it takes about 408 prompts",
                408,
            ),
        ),
        (
            Threshold("a/mean", min=0.8),
            mean_estimate([1.0] * 62 + [0.0] * 38),
            Check(
                "a/mean",
                "min 0.8",
                "regress",
                "0.620, 95 % interval 0.517 to 0.715 from 100 prompts, is below 0.8",
            ),
        ),
        (
            Threshold("a/mean", max=0.62),
            mean_estimate([1.0] * 62 + [0.0] * 38),
            Check(
                "a/mean",
                "max 0.62",
                "inconclusive",
                "0.620, 95 % interval 0.517 to 0.715 from 100 prompts, includes the limit 0.62; "
                "no number of prompts would tell",
            ),
        ),
        (Threshold("a", min=5.0), 4.2, Check("a", "min 5", "regress", "4.2 is below 5")),
        (Threshold("a", max=0.0), 3, Check("a", "max 0", "regress", "3 is above 0")),
        (Threshold("a", max=0.0), 0, Check("a", "max 0", "pass", "0")),
    ],
)
def test_a_check_says_what_was_seen_and_how_many_prompts_it_takes(threshold, value, check):
    assert only(decide((threshold,), {"a": value}, {})) == check


def test_a_drop_says_what_was_seen_and_how_many_prompts_it_takes():
    same = paired_difference([1.0] * 100, [1.0] * 100)
    gate = (Threshold("a/mean", max_drop=0.02),)
    assert only(decide(gate, {"a": mean_estimate([1.0] * 100)}, {"a": same})) == Check(
        "a/mean",
        "max_drop 0.02",
        "inconclusive",
        "+0.000, 95 % interval -0.036 to +0.036 from 100 pairs, includes the limit -0.02; it takes about 670 prompts",
        670,
    )


def test_two_equal_models_pass_once_enough_prompts_were_asked():
    def state(n):
        scores = [1.0] * n
        gate = (Threshold("a/mean", max_drop=0.02),)
        return decide(gate, {"a": mean_estimate(scores)}, {"a": paired_difference(scores, scores)}).state

    assert [state(n) for n in (1, 20, 100, 700)] == ["inconclusive", "inconclusive", "inconclusive", "pass"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gate.yaml: no thresholds; write at least one, such as exact_match/mean: {min: 0.6}"),
        ("# nothing\n", "gate.yaml: no thresholds;"),
        ("{}", "gate.yaml: no thresholds;"),
        ("- a", "gate.yaml: is ['a']; write lines such as exact_match/mean: {min: 0.6}"),
        pytest.param(
            "a: {min: 1",
            "gate.yaml: not YAML: line 1: expected ',' or '}', but got '<stream end>'",
            marks=pytest.mark.fault("gates: bad YAML"),
        ),
        pytest.param(
            "a: {min: 1}\na: {min: 2}",
            "gate.yaml: not YAML: line 2: the key 'a' is given twice",
            marks=pytest.mark.fault("gates: duplicate key"),
        ),
        ("a: {min: 1, min: 2}", "gate.yaml: not YAML: line 1: the key 'min' is given twice"),
        ("a: &x {min: 1}\nb: *x", "gate.yaml: not YAML: line 2: the alias *x is not accepted: write the value out"),
        ("a: 0.6", "gate.yaml: 'a' is 0.6; write {min: ...}, {max: ...} or {max_drop: ...}"),
        ("a: {}", "gate.yaml: 'a' is {}; write {min: ...}"),
        ("a:", "gate.yaml: 'a' is null; write {min: ...}"),
        ("3: {min: 1}", "gate.yaml: a metric is called 3; write a name such as exact_match/mean"),
        (
            "a: {maxdrop: 1}",
            "gate.yaml: 'a': unknown keyword 'maxdrop' (did you mean 'max_drop'?); "
            "there are min, max, max_drop, min_ratio, max_ratio",
        ),
        ("a: {1: 1}", "gate.yaml: 'a': unknown keyword 1; there are min, max, max_drop, min_ratio, max_ratio"),
        ("a: {min: 1e-1}", "gate.yaml: 'a': `min` is '1e-1', not a number; write 0.1"),
        ("a: {min: 2E-7}", "gate.yaml: 'a': `min` is '2E-7', not a number; write 0.0000002"),
        pytest.param(
            "a: {min: '0.6'}",
            "gate.yaml: 'a': `min` is '0.6', not a number; write 0.6",
            marks=pytest.mark.fault('gates: "0.6" as text'),
        ),
        ("a: {min: 60%}", "gate.yaml: 'a': `min` is '60%', not a number; write one such as 0.6"),
        ("a: {min: 1e999999999}", "gate.yaml: 'a': `min` is '1e999999999', not a number; write one such as 0.6"),
        ("a: {min: 1e19}", "gate.yaml: 'a': `min` is '1e19', not a number; write 10000000000000000000"),
        ("a: {min: 1e20}", "gate.yaml: 'a': `min` is '1e20', not a number; write one such as 0.6"),
        (
            "a: {min: '0.12345678901234567'}",
            "gate.yaml: 'a': `min` is '0.12345678901234567', not a number; write 0.12345678901234567",
        ),
        (
            "a: {min: '0.123456789012345678'}",
            "gate.yaml: 'a': `min` is '0.123456789012345678', not a number; write one such as 0.6",
        ),
        ("a: {min: nan}", "gate.yaml: 'a': `min` is 'nan', not a number; write one such as 0.6"),
        pytest.param(
            "a: {min: .nan}",
            "gate.yaml: 'a': `min` is nan; write a finite number",
            marks=pytest.mark.fault("gates: NaN"),
        ),
        ("a: {max: -.inf}", "gate.yaml: 'a': `max` is -inf; write a finite number"),
        ("a: {max: 1.0e+300}", "gate.yaml: 'a': `max` is 1e+300; write a finite number"),
        ("a: {max: -1.0e+300}", "gate.yaml: 'a': `max` is -1e+300; write a finite number"),
        ("a: {max: 1" + "0" * 400 + "}", "gate.yaml: 'a': `max` is 1000000000"),
        ("a: {max: 0x1" + "0" * 9000 + "}", "gate.yaml: 'a': `max` is a number of thousands of digits; write a finite"),
        ("a: {min: true}", "gate.yaml: 'a': `min` is true, not a number; write one such as 0.6"),
        ("a: {min: null}", "gate.yaml: 'a': `min` is null, not a number"),
        ("a: {max_drop: -0.1}", "gate.yaml: 'a': `max_drop` is -0.1, below zero; write how much may be lost, such as"),
        ("a: {max_drop: 2}", "gate.yaml: 'a': `max_drop` is 2, more than a score can fall; write 0.02 for two points"),
        ("a: {min: 2, max: 1}", "gate.yaml: 'a': `min` 2 is above `max` 1; swap them"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_thresholds_file_gets_one_line_with_the_value_and_the_remedy(text, message):
    with pytest.raises(BadInput) as caught:
        read_thresholds(text, "gate.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


RATIOS = """
output_tokens_per_second: {min_ratio: 0.9}
latency_seconds/p95: {max_ratio: 1.1}
"""


@pytest.mark.parametrize(
    ("speed", "latency", "baseline", "states"),
    [
        (95.0, 1.0, {"output_tokens_per_second": 100.0, "latency_seconds/p95": 1.0}, ("pass", "pass")),
        (89.0, 1.2, {"output_tokens_per_second": 100.0, "latency_seconds/p95": 1.0}, ("regress", "regress")),
        (89.0, 1.2, {"latency_seconds/p95": 0.0}, ("inconclusive", "inconclusive")),
        (89.0, 1.2, None, ("inconclusive", "inconclusive")),
    ],
)
def test_a_cost_is_held_against_the_baselines_by_its_ratio(speed, latency, baseline, states):
    metrics = {"rows": 24.0, "output_tokens_per_second": speed, "latency_seconds/p95": latency}
    verdict = decide(read_thresholds(RATIOS, "gate.yaml"), metrics, {}, baseline)
    assert tuple(check.state for check in verdict.checks) == states


def test_a_score_has_no_ratio():
    metrics = {"rows": 24.0, "contains": estimate(0.4, 0.6)}
    check = only(decide((Threshold("contains/mean", min_ratio=0.9),), metrics, {}, {"contains/mean": 0.5}))
    assert (check.state, check.reason) == (
        "inconclusive",
        "min_ratio is for single figures; for a score, use max_drop",
    )


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ("{min_ratio: 0}", "a ratio is 0; write one above zero, such as 1.1 for a tenth more"),
        ("{max_ratio: -1}", "a ratio is -1; write one above zero, such as 1.1 for a tenth more"),
        ("{min_ratio: 2, max_ratio: 1}", "`min_ratio` 2 is above `max_ratio` 1; swap them"),
    ],
)
def test_a_ratio_that_means_nothing_is_refused(rules, line):
    with pytest.raises(BadInput, match="") as refused:
        read_thresholds(f"a: {rules}", "gate.yaml")
    assert str(refused.value) == f"gate.yaml: 'a': {line}"


def simulated(drop: float, n: int, evaluations: int = 500) -> dict[str, float]:
    """Rates of the verdicts on max_drop 0.05, where 60 % of answers are right and the candidate truly loses `drop`.

    One prompt in eight changes sides by chance, as between two precisions of one model.
    """
    generator = np.random.default_rng(20261122)
    states = []
    for _ in range(evaluations):
        baseline = generator.random(n) < 0.6
        worse, better = (0.0625 + drop / 2) / 0.6, (0.0625 - drop / 2) / 0.4
        chance = generator.random(n)
        candidate = np.where(baseline, chance >= worse, chance < better)
        gap = paired_difference(candidate.astype(float), baseline.astype(float))
        metrics = {"rows": float(n), "contains": mean_estimate(candidate.astype(float))}
        threshold = Threshold("contains/mean", max_drop=0.05)
        states.append(decide((threshold,), metrics, {"contains": gap}).state)
    return {state: states.count(state) / evaluations for state in ("pass", "regress", "inconclusive")}


# 500 evaluations: a rate of 2.5 % is seen within 0.4 % and 5 %, one of 80 % within 75 % and 85 % (binomial, 99.9 %).
def test_of_500_evaluations_without_a_difference_8_in_10_pass_at_the_size_that_is_advised():
    seen = simulated(0.0, n=393)  # ((1.96 + 0.84) * sqrt(1/8) / 0.05)^2: what prompts_needed says
    assert seen["pass"] >= 0.75
    assert seen["regress"] <= 0.005


def test_of_500_evaluations_with_a_drop_of_the_whole_margin_1_in_40_passes_and_1_in_40_regresses():
    seen = simulated(0.05, n=393)
    assert seen["pass"] <= 0.05
    assert seen["regress"] <= 0.05


def test_of_500_evaluations_with_twice_the_margin_lost_8_in_10_regress_and_none_passes():
    seen = simulated(0.10, n=393)
    assert seen["regress"] >= 0.75
    assert seen["pass"] == 0


def test_few_prompts_are_inconclusive_and_not_wrong():
    seen = simulated(0.0, n=24)
    assert seen["inconclusive"] >= 0.95 and seen["regress"] <= 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Rules that no evaluation could decide


def rule(metric: str, **limits: float) -> tuple[gate.Threshold, ...]:
    return (gate.Threshold(metric, **limits),)


@pytest.mark.parametrize(
    "thresholds",
    [
        rule("score/mean", min=0, max=1),
        rule("contains/ci95_low", min=0.2),
        rule("contains/ci95_high", max=0.9),
        rule("score/stderr", max=0.1),
        rule("mine/latency", max=60),
        rule("number/pass_at_3/mean", min=0.5),
        rule("score/pass_hat_2/mean", max_drop=0.1),
        rule("mine/anything/mean", min=0.5),
        rule("latency_seconds/p95", max_ratio=2),
        rule("rows_failed", max=0),
    ],
)
def test_metrics_that_the_scorers_can_give_may_be_named(thresholds):
    gate.check_names(thresholds, {"contains", "number", "mine"}, {"mine"}, 3)


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        (rule("contans/mean", min=0.5), "'contans/mean' is no metric of these prompts and scorers (did you mean 'con"),
        (rule("contains", min=0.5), "'contains' is no metric of these prompts and scorers (did you mean 'contains"),
        (rule("number/pass_at_5/mean", min=0.5), "'number/pass_at_5/mean' is no metric"),
        (rule("accuracy", min=0.5), "'accuracy' is no metric of these prompts and scorers; there are contains/mean, "),
        (rule("score/mean", min=60), "score/mean goes from 0 to 1, and `min` is 60; write 0.6 for 60 %"),
        (rule("score/mean", min=1.5), "`min` is 1.5; write 0.015 for 1.5 %"),
        (rule("score/mean", min=100), "`min` is 100; write 1 for 100 %"),
        (rule("mine/a/mean", min=2), "mine/a/mean goes from 0 to 1, and `min` is 2"),
        (rule("score/mean", min_ratio=0.9), "`min_ratio` is for single figures; use max_drop"),
        (rule("rows_failed", max_drop=0.1), "rows_failed is a single figure, and `max_drop` compares scores"),
    ],
)  # fmt: skip
def test_a_rule_that_no_evaluation_could_decide_is_refused(thresholds, told):
    with pytest.raises(BadInput) as refused:
        gate.check_names(thresholds, {"contains", "number", "mine"}, {"mine"}, 3)
    assert str(refused.value).startswith("thresholds: ") and told in str(refused.value)


@pytest.mark.parametrize("limit", [-1, 101])
def test_a_limit_that_is_no_percentage_gets_no_remedy(limit):
    with pytest.raises(BadInput) as refused:
        gate.check_names(rule("score/mean", max=limit), {"contains"}, (), 1)
    assert str(refused.value) == f"thresholds: score/mean goes from 0 to 1, and `max` is {limit}"


def test_a_near_name_is_told_without_the_list_of_all():
    with pytest.raises(BadInput) as refused:
        gate.check_names(rule("contans/mean", max=1), {"contains"}, (), 1)
    assert str(refused.value).endswith("(did you mean 'contains/mean'?)")


@pytest.mark.parametrize("keyword", gate.RELATIVE)
def test_a_rule_against_a_baseline_needs_one(keyword):
    thresholds = rule("score/mean", **{keyword: 0.5})
    gate.check_baseline(thresholds, True)
    with pytest.raises(BadInput, match=f"score/mean `{keyword}` compares with a baseline; add baseline=models:/NAME@"):
        gate.check_baseline(thresholds, False)


@pytest.mark.parametrize("keyword", gate.RELATIVE)
def test_of_a_first_champion_rules_against_a_baseline_do_not_count(keyword):
    metrics = {"score": mean_estimate([1.0] * 300), "rows": 300.0, "rows_failed": 0.0}
    thresholds = (*rule("score/mean", min=0.5), *rule("score/mean", **{keyword: 0.5}))
    verdict = gate.decide(thresholds, metrics, {}, None, is_first=True)
    assert verdict.state == "pass"
    assert [check.state for check in verdict.checks] == ["pass", "none"]
    assert verdict.checks[1] == Check("score/mean", f"{keyword} 0.5", "none", "there is no champion yet")
    assert gate.decide(thresholds[1:], metrics, {}, None, is_first=True).state == "none"
    assert gate.decide(thresholds, metrics, {}, None).state == "inconclusive"


# ---------------------------------------------------------------------------------------------------------------------
# At the limits


@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_a_drop_of_the_whole_score_is_refused(limit):
    with pytest.raises(BadInput, match="more than a score can fall"):
        read_thresholds(f"a: {{max_drop: {limit}}}", "gate.yaml")


def test_equal_bounds_are_a_rule():
    assert read_thresholds("rows: {min: 5, max: 5}", "gate.yaml") == (Threshold("rows", min=5.0, max=5.0),)
    [ratio] = read_thresholds("rows: {max_ratio: 1.5}", "gate.yaml")
    assert ratio == Threshold("rows", max_ratio=1.5)


def test_a_single_scored_row_is_judged_too():
    one = mean_estimate([1.0])
    assert decide(rule("s/mean", min=0.02), {"s": one, "rows": 1.0}, {}).state == "pass"
    gap = paired_difference([1.0], [1.0])
    verdict = decide(rule("s/mean", max_drop=0.98), {"s": one, "rows": 1.0}, {"s": gap}, {})
    assert verdict.state == "pass", verdict.checks
    assert verdict.checks[0].reason.endswith(" from 1 pair")
    [check] = decide(rule("s/mean", min=0.02), {"s": one, "rows": 1.0}, {}).checks
    assert check.reason.endswith(" from 1 prompt")


def test_a_regress_against_the_baseline_names_the_limit():
    gap = paired_difference([0.0] * 100, [1.0] * 100)
    [check] = decide(rule("s/mean", max_drop=0.05), {"s": mean_estimate([0.0] * 100)}, {"s": gap}, {}).checks
    assert check.state == "regress" and check.reason.endswith(" from 100 pairs, is below -0.05")


@pytest.mark.parametrize("keyword", ["min_ratio", "max_ratio"])
def test_a_ratio_at_its_limit_keeps_the_rule(keyword):
    [check] = decide(rule("rows", **{keyword: 1.5}), {"rows": 3.0}, {}, {"rows": 2.0}).checks
    assert (check.state, check.reason) == ("pass", "3 is 1.50 of the baseline's 2")


def test_a_gate_has_100_000_characters_at_most():
    text = "rows: {max: 5}".ljust(100_000)
    assert read_thresholds(text, "gate.yaml") == rule("rows", max=5.0)
    with pytest.raises(BadInput) as refused:
        read_thresholds(text + " ", "gate.yaml")
    assert str(refused.value) == "gate.yaml: is longer than 100,000 characters; is it a gate?"


def test_of_several_models_the_worst_verdict_counts_and_all_checks_are_kept():
    passed, unsure, failed = (Check("a", "min 1", state, "") for state in ("pass", "inconclusive", "regress"))
    verdicts = [Verdict("regress", (passed, failed)), Verdict("inconclusive", (unsure,))]
    assert gate.worst(verdicts) == Verdict("regress", (passed, failed, unsure))
    assert gate.worst(verdicts[1:]) == Verdict("inconclusive", (unsure,))
    assert gate.worst([]) == Verdict("none", ())
