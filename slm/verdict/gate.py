"""Checks measured metrics against the thresholds of a gate. The result is pass, regress or inconclusive.

The gate uses a score's 95 % interval, and not its mean. The score passes if the whole interval keeps the rule. The
score regresses if the whole interval breaks the rule. Otherwise, the result is inconclusive. A missing metric, a
missing baseline, or no scored answer is inconclusive too. So no pass is an accident.

A plain figure such as `rows_failed` is checked by its value. A ratio rule divides the value by the baseline's value
from the same run. Each rule is checked at 95 %, without a correction for several rules. All rules must pass, so more
rules make a false pass less likely.
This module reads no files, and logs and promotes nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from slm.base.errors import BadInput
from slm.base.strict_yaml import parse_yaml
from slm.base.wording import counted, did_you_mean, quoted
from slm.verdict import fidelity, perplexity, scored_model
from slm.verdict.scored_model import OVERALL
from slm.verdict.statistics import Difference, Estimate, prompts_needed, prompts_to_settle

GATE_CHARACTERS = 100_000
RELATIVE = ("max_drop", "min_ratio", "max_ratio")  # to a baseline
KEYWORDS = ("min", "max", *RELATIVE)

State = Literal["pass", "regress", "inconclusive", "none"]
FROM_BEST: tuple[State, ...] = ("pass", "inconclusive", "regress")


@dataclass(frozen=True)
class Threshold:
    """The rules for one metric. `max_drop` and the ratios (value / baseline's value) compare with the baseline."""

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None

    @property
    def rules(self) -> dict[str, float]:
        """The limit of each rule that there is, by keyword."""
        limits = {keyword: getattr(self, keyword) for keyword in KEYWORDS}
        return {keyword: limit for keyword, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Check:
    """One checked rule of a threshold, such as `min 0.6`, with its result and the reason."""

    metric: str
    rule: str
    state: State
    reason: str
    prompts_needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """The worst state of all checks. The state is `none` only if there are no rules, or none that applies."""

    state: State
    checks: tuple[Check, ...]


def read_thresholds(text: str, name: str) -> tuple[Threshold, ...]:
    """Thresholds from YAML such as `exact_match/mean: {min: 0.60}`. `name` is the file's name, for error messages.

    Raises:
        BadInput: the text is not a gate, or a rule is unknown or has an impossible limit.
    """
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


def check_names(
    thresholds: tuple[Threshold, ...],
    scorers: Iterable[str],
    open_names: Iterable[str],
    repeats: int,
    has_texts: bool = False,
) -> None:
    """Checks that an evaluation can give every metric that the gate names, in the form that its rules need.

    `scorers` are the names of all scores but the overall one. A scorer in `open_names` may give further scores, as
    `<scorer>/<name>`. With `has_texts`, there are the metrics of slm/verdict/perplexity.py too.

    Raises:
        BadInput: no scorer gives the metric, a limit is beyond 0 to 1 for a score, or a rule doesn't fit the metric.
    """
    names = [OVERALL, *sorted(scorers)]
    kinds = [f"pass_{how}_{k}" for how in ("at", "hat") for k in scored_model.ks(repeats)]
    means = {f"{name}/mean" for name in names} | {f"{name}/{kind}/mean" for name in names for kind in kinds}
    figures = {f"{name.removesuffix('mean')}{figure}" for name in means for figure in scored_model.FIGURES}
    pairs = {f"{name}/mean" for name in (*fidelity.NAMES, *fidelity.FLIPS)}
    plain = {*scored_model.PLAIN, *fidelity.PLAIN}
    of_texts = {f"{perplexity.NLL}/mean"} if has_texts else set()
    if has_texts:
        pairs |= {f"{name}/mean" for name in perplexity.PAIRS}
        plain |= {*perplexity.PLAIN, *perplexity.PLAIN_PAIRS}
    for threshold in thresholds:
        metric = threshold.metric
        is_open = any(metric.startswith(f"{name}/") for name in open_names)
        if metric not in {*figures, *pairs, *plain, *of_texts} and not is_open:
            known = sorted(means) + sorted(pairs) + sorted(of_texts | plain)
            hint = did_you_mean(metric, known)
            there = "" if hint else f"; there are {', '.join(known)}"
            raise BadInput(f"thresholds: {quoted(metric)} is no metric of these prompts and scorers{hint}{there}")
        is_mean = metric in means or (is_open and metric.endswith("/mean"))
        for keyword, limit in threshold.rules.items():
            if is_mean and keyword in ("min", "max") and not 0 <= limit <= 1:
                remedy = f"; write {limit / 100:g} for {limit:g} %" if 1 < limit <= 100 else ""
                raise BadInput(f"thresholds: {metric} goes from 0 to 1, and `{keyword}` is {limit:g}{remedy}")
            if metric in pairs and keyword not in ("min", "max"):
                raise BadInput(f"thresholds: {metric} compares with the baseline already; write `min` or `max`")
            if metric in of_texts and keyword not in ("min", "max"):
                raise BadInput(
                    f"thresholds: {metric} takes `min` or `max`; compare with perplexity: {{max_ratio: 1.05}}"
                )
            if is_mean and keyword.endswith("_ratio"):
                raise BadInput(f"thresholds: {metric} is a score, and `{keyword}` is for single figures; use max_drop")
            if keyword == "max_drop" and not is_mean:
                raise BadInput(
                    f"thresholds: {metric} is a single figure, and `max_drop` compares scores; use max_ratio"
                )


def check_baseline(thresholds: tuple[Threshold, ...], has_baseline: bool) -> None:
    """
    Raises:
        BadInput: a rule compares with a baseline, and there is none.
    """
    for threshold in () if has_baseline else thresholds:
        if _is_of_a_pair(threshold.metric):
            rule = f"{threshold.metric} compares with a baseline"
            raise BadInput(f"thresholds: {rule}; add baseline=models:/NAME@champion")
        for keyword in threshold.rules:
            if keyword in RELATIVE:
                rule = f"{threshold.metric} `{keyword}`"
                raise BadInput(f"thresholds: {rule} compares with a baseline; add baseline=models:/NAME@champion")


def decide(
    thresholds: tuple[Threshold, ...],
    metrics: Mapping[str, float | Estimate],
    differences: Mapping[str, Difference],
    baseline: Mapping[str, float] | None = None,
    is_first: bool = False,
    not_compared: str = "",
    no_texts: str = "",
) -> Verdict:
    """Checks every rule of every threshold.

    `metrics` has estimates by the scorer's name, and plain figures by the metric's name. A threshold names an estimate
    as `<scorer>/mean`. `differences` (candidate minus baseline) has the scorers' names too. Without a baseline,
    `differences` is empty. `baseline` has the baseline's plain figures. `is_first` means that there is nothing to
    compare with yet, so that the rules in RELATIVE and the metrics of a pair (fidelity.OF_A_PAIR) don't apply.
    `not_compared` says why there is no fidelity, and `no_texts` why a figure of the texts is missing.
    """
    named = {f"{name}/mean" if isinstance(value, Estimate) else name: value for name, value in metrics.items()}
    compared = {f"{name}/mean": difference for name, difference in differences.items()}
    checks = []
    for threshold in thresholds:
        missing = not_compared if threshold.metric.startswith("fidelity/") else ""
        missing = no_texts if perplexity.is_of_texts(threshold.metric) else missing
        for keyword, limit in threshold.rules.items():
            rule = f"{keyword} {limit:g}"
            if is_first and (keyword in RELATIVE or _is_of_a_pair(threshold.metric)):
                checks.append(Check(threshold.metric, rule, "none", "there is no champion yet"))
            else:
                outcome = _outcome(threshold.metric, keyword, limit, named, compared, baseline, missing)
                checks.append(Check(threshold.metric, rule, *outcome))
    return _verdict(tuple(checks))


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
        if not -1e300 < limit < 1e300:  # also refuses NaN, and integers that are too large for a float
            raise BadInput(f"{where}: `{keyword}` is {quoted(limit)}; write a finite number")
    drop = rules.get("max_drop", 0)
    if drop < 0:
        raise BadInput(f"{where}: `max_drop` is {drop}, below zero; write how much may be lost, such as 0.02")
    if drop >= 1:  # scores go from 0 to 1, so every candidate would pass
        raise BadInput(f"{where}: `max_drop` is {drop}, more than a score can fall; write 0.02 for two points in 100")
    for low, high in (("min", "max"), ("min_ratio", "max_ratio")):
        if low in rules and high in rules and rules[low] > rules[high]:
            raise BadInput(f"{where}: `{low}` {rules[low]} is above `{high}` {rules[high]}; swap them")
        if high == "max_ratio" and (ratio := min(rules.get(low, 1), rules.get(high, 1))) <= 0:
            raise BadInput(f"{where}: a ratio is {ratio}; write one above zero, such as 1.1 for a tenth more")
    return Threshold(metric, **{keyword: float(limit) for keyword, limit in rules.items()})


def _as_number(limit: object) -> str:
    """The remedy for a number that YAML reads as text: 1e-1 (YAML 1.1), or a number in quotes."""
    example = "write one such as 0.6"
    if not isinstance(limit, str) or len(limit) > 19:
        return example
    try:
        number = Decimal(limit)
    except InvalidOperation:
        return example
    return f"write {number:f}" if number.is_finite() and abs(number.adjusted()) < 20 else example


def _outcome(
    metric: str,
    keyword: str,
    limit: float,
    named: Mapping[str, float | Estimate],
    compared: Mapping[str, Difference],
    baseline: Mapping[str, float] | None,
    missing: str,
) -> tuple[State, str] | tuple[State, str, int | None]:
    """The state, the reason and, if known, the number of prompts that give a clear result."""
    if named.get("rows") == 0:
        return "inconclusive", "the prompt set is empty"
    if metric not in named and missing:
        return "inconclusive", f"not measured: {missing}"
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
    if estimate.n == 0 or math.isnan(estimate.mean):
        return "inconclusive", "no answer was scored", None
    if math.isnan(low) or math.isnan(high):
        return "inconclusive", f"{estimate.mean:.3f} has no interval: all prompts are of one cluster", None
    seen = f"{estimate.mean:.3f}, 95 % interval {low:.3f} to {high:.3f} from {counted(estimate.n, 'prompt')}"
    if (low >= limit) if keyword == "min" else (high <= limit):
        return "pass", seen, None
    if (high < limit) if keyword == "min" else (low > limit):
        return "regress", f"{seen}, is {_beyond(keyword)} {limit:g}", None
    needed = prompts_to_settle(estimate, limit)
    return "inconclusive", f"{seen}, includes the limit {limit:g}; {_it_takes(needed)}", needed


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
    seen = f"{difference.mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} from {counted(difference.n, 'pair')}"
    if low > -limit:
        return "pass", seen
    if high < -limit:
        return "regress", f"{seen}, is below {0 - limit:g}"
    needed = prompts_needed(difference, limit)
    return "inconclusive", f"{seen}, includes the limit {0 - limit:g}; {_it_takes(needed)}", needed


def _ratio(
    keyword: str, limit: float, value: float | Estimate | None, baseline: float | None
) -> tuple[State, str] | tuple[State, str, int | None]:
    if isinstance(value, Estimate):
        return "inconclusive", f"{keyword} is for single figures; for a score, use max_drop"
    if baseline is None or value is None or not (math.isfinite(value) and math.isfinite(baseline) and baseline > 0):
        return "inconclusive", f"the value is {value}, the baseline's {baseline}: there is no ratio"
    ratio = value / baseline
    seen = f"{value:g} is {ratio:.2f} of the baseline's {baseline:g}"
    kept = ratio >= limit if keyword == "min_ratio" else ratio <= limit
    return ("pass", seen) if kept else ("regress", f"{seen}, {_beyond(keyword)} {limit:g}")


def _is_of_a_pair(metric: str) -> bool:
    return metric.partition("/")[0] in fidelity.OF_A_PAIR


def _beyond(keyword: str) -> str:
    return "below" if keyword.startswith("min") else "above"


def _it_takes(prompts: int | None) -> str:
    return "no number of prompts would tell" if prompts is None else f"it takes about {counted(prompts, 'prompt')}"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several models: the worst state, and all checks."""
    checks = tuple(check for verdict in verdicts for check in verdict.checks)
    return _verdict(checks)


def _verdict(checks: tuple[Check, ...]) -> Verdict:
    states = {check.state for check in checks}
    worst: State = "none"
    for state in FROM_BEST:
        if state in states:
            worst = state
    return Verdict(worst, checks)
