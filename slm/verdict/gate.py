"""The gate: thresholds against measured metrics give pass, regress or inconclusive, and never a pass by accident.

A score is judged on its 95 % interval and not on its mean: it passes where the whole interval keeps the rule,
regresses where the whole interval breaks it, and is inconclusive in between. What is missing (a metric, a baseline,
any scored answer) is inconclusive as well. Plain figures such as `rows_failed` are judged on their value, and may be
held against the baseline's, measured in the same run, by their ratio. Several thresholds are each held at 95 %,
uncorrected: all of them must pass, so more of them make a false pass rarer.
Nothing is read, logged or promoted here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from slm.base.errors import BadInput
from slm.base.strict_yaml import parse_yaml
from slm.base.wording import did_you_mean, quoted
from slm.verdict.statistics import Difference, Estimate, prompts_needed, prompts_to_settle

GATE_CHARACTERS = 100_000
KEYWORDS = ("min", "max", "max_drop", "min_ratio", "max_ratio")

State = Literal["pass", "regress", "inconclusive", "none"]


@dataclass(frozen=True)
class Threshold:
    """What one metric must keep to; `max_drop` and the ratios (value / baseline's value) are against the baseline."""

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None


@dataclass(frozen=True)
class Check:
    """One rule of one threshold, such as `min 0.6`, and what came of it."""

    metric: str
    rule: str
    state: State
    reason: str
    prompts_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The worst state among the checks; `none` only where there was no threshold."""

    state: State
    checks: tuple[Check, ...]


def read_thresholds(text: str, name: str) -> tuple[Threshold, ...]:
    """Thresholds from YAML such as `exact_match/mean: {min: 0.60}`. `name` is the file's, for BadInput's one line."""
    if len(text) > GATE_CHARACTERS:
        raise BadInput(f"{name}: is longer than {GATE_CHARACTERS:,} characters; is it a gate?")
    try:
        metrics = parse_yaml(text)
    except ValueError as error:
        raise BadInput(f"{name}: not YAML: {error}") from None
    if not metrics:
        raise BadInput(f"{name}: no thresholds; write at least one, such as exact_match/mean: {{min: 0.6}}")
    if not isinstance(metrics, dict):
        raise BadInput(f"{name}: is {quoted(metrics)}; write lines such as exact_match/mean: {{min: 0.6}}")
    return tuple(_threshold(metric, rules, name) for metric, rules in metrics.items())


def decide(
    thresholds: tuple[Threshold, ...],
    metrics: Mapping[str, float | Estimate],
    differences: Mapping[str, Difference],
    baseline: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge every rule of every threshold.

    `metrics` holds an Estimate under a scorer's name, which a threshold calls `<scorer>/mean`, and plain numbers under
    their own names. `differences`, candidate minus baseline, go by the scorer's name, and are empty without a baseline;
    `baseline` holds its plain figures.
    """
    named = {f"{name}/mean" if isinstance(value, Estimate) else name: value for name, value in metrics.items()}
    compared = {f"{name}/mean": difference for name, difference in differences.items()}
    checks = []
    for threshold in thresholds:
        for keyword in KEYWORDS:
            limit = getattr(threshold, keyword)
            if limit is not None:
                outcome = _outcome(threshold.metric, keyword, limit, named, compared, baseline)
                checks.append(Check(threshold.metric, f"{keyword} {limit:g}", *outcome))
    states = {check.state for check in checks}
    worst = next((state for state in ("regress", "inconclusive", "pass") if state in states), "none")
    return Verdict(worst, tuple(checks))


def _threshold(metric: object, rules: object, name: str) -> Threshold:
    if not isinstance(metric, str) or not metric.strip():
        raise BadInput(f"{name}: a metric is called {quoted(metric)}; write a name such as exact_match/mean")
    where = f"{name}: {quoted(metric)}"
    if not isinstance(rules, dict) or not rules:
        raise BadInput(f"{where} is {quoted(rules)}; write {{min: ...}}, {{max: ...}} or {{max_drop: ...}}")
    for keyword, limit in rules.items():
        if keyword not in KEYWORDS:
            guess = did_you_mean(keyword, KEYWORDS)
            raise BadInput(f"{where}: unknown keyword {quoted(keyword)}{guess}; there are {', '.join(KEYWORDS)}")
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise BadInput(f"{where}: `{keyword}` is {quoted(limit)}, not a number; {_as_number(limit)}")
        if not -1e300 < limit < 1e300:  # nor NaN, nor an integer too long for a float
            raise BadInput(f"{where}: `{keyword}` is {quoted(limit)}; write a finite number")
    drop = rules.get("max_drop", 0)
    if drop < 0:
        raise BadInput(f"{where}: `max_drop` is {drop}, below zero; write how much may be lost, such as 0.02")
    if drop >= 1:  # a drop of 2 on a scale of 0 to 1 would let everything pass
        raise BadInput(f"{where}: `max_drop` is {drop}, more than a score can fall; write 0.02 for two points in 100")
    for low, high in (("min", "max"), ("min_ratio", "max_ratio")):
        if low in rules and high in rules and rules[low] > rules[high]:
            raise BadInput(f"{where}: `{low}` {rules[low]} is above `{high}` {rules[high]}; swap them")
        if high == "max_ratio" and (ratio := min(rules.get(low, 1), rules.get(high, 1))) <= 0:
            raise BadInput(f"{where}: a ratio is {ratio}; write one above zero, such as 1.1 for a tenth more")
    return Threshold(metric, **{keyword: float(limit) for keyword, limit in rules.items()})


def _as_number(limit: object) -> str:
    """The remedy for YAML 1.1's habit of reading 1e-1 as text, and for numbers in quotes."""
    try:
        number = Decimal(limit) if isinstance(limit, str) and len(limit) < 20 else Decimal("NaN")
    except InvalidOperation:
        number = Decimal("NaN")
    return f"write {number:f}" if number.is_finite() and abs(number.adjusted()) < 20 else "write one such as 0.6"


def _outcome(
    metric: str,
    keyword: str,
    limit: float,
    named: Mapping[str, float | Estimate],
    compared: Mapping[str, Difference],
    baseline: Mapping[str, float] | None,
) -> tuple[State, str] | tuple[State, str, int | None]:
    """The state, the reason and, where known, the number of prompts that it would take."""
    if named.get("rows") == 0:
        return "inconclusive", "the prompt set is empty"
    if metric not in named and metric not in compared:
        names = ", ".join(sorted(named.keys() | compared.keys())) or "none"
        return "inconclusive", f"no such metric{did_you_mean(metric, named)}; there are {names}"
    if keyword == "max_drop":
        return _against_baseline(metric, limit, named, compared)
    value = named.get(metric)
    if keyword.endswith("_ratio"):
        return _ratio(keyword, limit, value, None if baseline is None else baseline.get(metric))
    if isinstance(value, Estimate):
        return _on_interval(keyword, limit, value)
    if value is None or not math.isfinite(value):
        return "inconclusive", f"the value is {value}"
    kept = value >= limit if keyword == "min" else value <= limit
    return ("pass", f"{value:g}") if kept else ("regress", f"{value:g} is {_beyond(keyword)} {limit:g}")


def _on_interval(keyword: str, limit: float, estimate: Estimate) -> tuple[State, str, int | None]:
    low, high = estimate.ci95_low, estimate.ci95_high
    if estimate.n == 0 or any(map(math.isnan, (estimate.mean, low, high))):
        return "inconclusive", "no answer was scored", None
    seen = f"{estimate.mean:.3f}, 95 % interval {low:.3f} to {high:.3f} from {estimate.n} prompts"
    if (low >= limit) if keyword == "min" else (high <= limit):
        return "pass", seen, None
    if (high < limit) if keyword == "min" else (low > limit):
        return "regress", f"{seen}, is {_beyond(keyword)} {limit:g}", None
    needed = prompts_to_settle(estimate, limit)
    return "inconclusive", f"{seen}, holds {limit:g}; {_it_takes(needed)}", needed


def _against_baseline(
    metric: str, limit: float, named: Mapping[str, float | Estimate], compared: Mapping[str, Difference]
) -> tuple[State, str] | tuple[State, str, int | None]:
    if metric not in compared:
        if not isinstance(named[metric], Estimate):
            return "inconclusive", "max_drop compares scores row by row, and this is a single figure"
        return "inconclusive", "the baseline has no such score" if compared else "there is no baseline; name one"
    difference = compared[metric]
    low, high = difference.ci95_low, difference.ci95_high
    if difference.n == 0 or any(map(math.isnan, (difference.mean, low, high))):
        return "inconclusive", "no row was scored for both candidate and baseline"
    seen = f"{difference.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} from {difference.n} pairs"
    if low > -limit:
        return "pass", seen
    if high < -limit:
        return "regress", f"{seen}, is below {0 - limit:g}"
    needed = prompts_needed(difference, limit)
    return "inconclusive", f"{seen}, holds {0 - limit:g}; {_it_takes(needed)}", needed


def _ratio(
    keyword: str, limit: float, value: float | Estimate | None, baseline: float | None
) -> tuple[State, str] | tuple[State, str, int | None]:
    if isinstance(value, Estimate):
        return "inconclusive", f"{keyword} is for single figures; a score is held by max_drop"
    if baseline is None or value is None or not (math.isfinite(value) and math.isfinite(baseline) and baseline > 0):
        return "inconclusive", f"the value is {value}, the baseline's {baseline}: there is no ratio"
    ratio = value / baseline
    seen = f"{value:g} is {ratio:.2f} of the baseline's {baseline:g}"
    kept = ratio >= limit if keyword == "min_ratio" else ratio <= limit
    return ("pass", seen) if kept else ("regress", f"{seen}, {_beyond(keyword)} {limit:g}")


def _beyond(keyword: str) -> str:
    return "below" if keyword.startswith("min") else "above"


def _it_takes(prompts: int | None) -> str:
    return "no number of prompts would tell" if prompts is None else f"it takes about {prompts:,} prompts"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over several models: the worst state, and every check."""
    checks = tuple(check for verdict in verdicts for check in verdict.checks)
    states = {check.state for check in checks}
    return Verdict(next((s for s in ("regress", "inconclusive", "pass") if s in states), "none"), checks)
