"""The figures of report.html as plain data: rows, axes, marks and curves. This module draws nothing."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from slm.report.summary import MISSING, Report, direction, megabytes, p_value, seconds_of
from slm.verdict import estimation
from slm.verdict.gate import Check
from slm.verdict.scored_model import OVERALL, ScoredModel
from slm.verdict.statistics import Difference, mean_estimate, percentile

REPEATED = re.compile(r"(.+)/pass_(at|hat)_(\d+)", re.DOTALL)
LABEL = 24  # characters of a model's name in a figure
CURVE_POINTS = 200  # per latency curve
COST = (
    # label, metric, which way is better
    ("output tokens/s", "output_tokens_per_second", "higher"),
    ("latency p50", "latency_seconds/p50", "lower"),
    ("latency p95", "latency_seconds/p95", "lower"),
    ("model load", "model_load_seconds", "lower"),
    ("peak memory", "peak_memory_bytes", "lower"),
    ("model size", "model_bytes", "lower"),
)
# Okabe and Ito's colours, which the colour-blind tell apart; on a dark page, lighter ones of the same hue.
COLOURS = ("#0072b2", "#c04a00", "#00805d", "#a8457f", "#946800", "#2b7fa8")
DARK_COLOURS = ("#5ab4f0", "#ff9a5c", "#35d0a0", "#ee9fcb", "#f0c040", "#9bd7ff")
# One more than the colours, so that the pair repeats only after 42 models. SVG paths around (0, 0).
SHAPES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M-4.5-4.5h9v9h-9z",
    "^": "M0-6L5.8 4.5H-5.8z",
    "D": "M0-6.2L6.2 0 0 6.2-6.2 0z",
    "v": "M0 6L5.8-4.5H-5.8z",
    "P": "M-1.9-5.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z",
    "h": "M0-6L5.2-3V3L0 6-5.2 3V-3z",
}
DASHES = ("none", "7 4", "2 3", "9 3 2 3")
STATES = {"regress": "\u2717", "inconclusive": "?", "pass": "\u2713", "none": "\u2013"}  # the worst first
GATE_SHAPES = {
    "pass": SHAPES["o"],
    "regress": "M-5-5L5 5M-5 5L5-5",
    "inconclusive": SHAPES["D"],
    "none": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
}


@dataclass(frozen=True)
class Mark:
    """One model's value in one row of a figure, with its 95 % interval. A missing value is NaN and is not drawn."""

    model: int
    mean: float
    low: float
    high: float
    n: int
    told: str = ""  # of a difference, in a word or two
    detail: str = ""

    @property
    def missing(self) -> bool:
        return math.isnan(self.mean)


@dataclass(frozen=True)
class Row:
    """Each model's value for one scorer. `limits` has the gate's limits for the scorer, by keyword."""

    name: str
    marks: tuple[Mark, ...]
    limits: dict[str, float]

    @property
    def label(self) -> str:
        return scorer_label(self.name)

    @property
    def prompts(self) -> str:
        counts = [mark.n for mark in self.marks if not mark.missing] or [0]
        fewest, most = min(counts), max(counts)
        told = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        return f"{told} prompt{'' if told == '1' else 's'}"


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`. `at` gives the position of a value on the scale, in percent."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(100 * share, 2)


@dataclass(frozen=True)
class Curve:
    """The distribution of one model's latencies: rising pairs of (seconds, percent of answers that took no longer)."""

    model: int
    points: tuple[tuple[float, float], ...]
    p50: float
    p95: float


@dataclass(frozen=True)
class Moment:
    """One run in a history: its date, its figures and its gate."""

    when: str
    run_id: str
    version: str
    gate: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """One metric of one model over several runs. The last run is this run."""

    model: int
    name: str
    moments: tuple[Moment, ...]
    limits: dict[str, float]

    @property
    def label(self) -> str:
        return scorer_label(self.name)

    def at(self, place: int) -> float:
        """The position of a moment, in percent of the width. The runs have equal distances, whatever their dates."""
        return round(100 * (place + 0.5) / len(self.moments), 2)

    def unbroken(self) -> list[list[int]]:
        """The positions of successive moments that have a value, as parts. Each part gets one line."""
        parts: list[list[Any]] = [[]]
        for place, moment in enumerate(self.moments):
            if math.isnan(moment.mean):
                parts.append([])
            else:
                parts[-1].append(place)
        return [part for part in parts if part]


# What is drawn --------------------------------------------------------------------------------------------------------


def scorer_label(name: str) -> str:
    scorer, repeated = _parted(name)
    if repeated:
        return f"{repeated}, {'over all' if scorer == OVERALL else scorer}"
    return "score, over all" if name == OVERALL else name


def scorer_names(models: Sequence[ScoredModel]) -> list[str]:
    """The overall score first, then its pass@k and pass^k if prompts were repeated. Other scorers get no pass@k."""
    named = {name for model in models for name in model.estimates}
    return sorted((name for name in named if not _parted(name)[1] or _parted(name)[0] == OVERALL), key=_overall_first)


def _overall_first(name: str) -> tuple:
    return name != OVERALL, _parted(name)[0] != OVERALL, name


def _parted(name: str) -> tuple[str, str]:
    """The scorer of a metric, and its kind of repeat: `score/pass_at_4` gives score and pass@4."""
    match = REPEATED.fullmatch(name)
    if match is None:
        return name, ""
    return match[1], f"pass{'@' if match[2] == 'at' else '^'}{match[3]}"


def score_rows(report: Report) -> list[Row]:
    """For each scorer, the mean of each model."""
    return [
        Row(
            name,
            tuple(
                Mark(place, math.nan, math.nan, math.nan, 0)
                if found is None
                else Mark(place, found.mean, found.ci95_low, found.ci95_high, found.n)
                for place, model in enumerate(report.models)
                for found in [model.estimates.get(name)]
            ),
            _limits(report, name, ("min", "max")),
        )
        for name in scorer_names(report.models)
    ]


def tag_rows(report: Report) -> list[Row]:
    """For each tag, each model's overall score over the prompts with this tag. A prompt counts under all its tags."""
    clusters = {prompt.id: prompt.cluster for prompt in report.prompt_set.prompts}
    overall = [model.values.get(OVERALL, {}) for model in report.models]
    rows, with_tag = [], defaultdict(list)
    for prompt in report.prompt_set.prompts:
        for tag in dict.fromkeys(prompt.tags):
            with_tag[tag].append(prompt.id)
    for tag, tagged in sorted(with_tag.items()):
        found = [{id: values[id] for id in tagged if id in values} for values in overall]
        estimates = [mean_estimate(list(values.values()), [clusters[id] for id in values]) for values in found]
        marks = tuple(
            Mark(place, each.mean, each.ci95_low, each.ci95_high, each.n) for place, each in enumerate(estimates)
        )
        rows.append(Row(tag, marks, {}))
    return rows


def difference_rows(report: Report) -> list[Row]:
    """For each scorer, each candidate minus the baseline."""
    rows = []
    adjusted = [estimation.holm_p_values(compared) for compared in report.differences]
    for name in scorer_names(report.models):
        marks = tuple(
            Mark(place, gap.mean, gap.ci95_low, gap.ci95_high, gap.n, direction(gap, p), _detail(gap, p))
            for place, compared in enumerate(report.differences)
            if name in compared
            for gap, p in [(compared[name], adjusted[place].get(name))]
        )
        if marks:
            rows.append(Row(name, marks, _limits(report, name, ("max_drop",))))
    return rows


def cost_rows(report: Report) -> list[dict]:
    """For each cost, each model's value, its share of the largest value, and its ratio to the baseline's value."""
    rows = []
    for label, metric, better in COST:
        values = [model.metrics.get(metric) for model in report.models]
        largest = max((value for value in values if value is not None), default=0)
        against = None if report.baseline is None else values[report.baseline]
        cells = [
            {
                "text": MISSING if value is None else _cost(metric, value),
                "share": None if value is None or not largest else round(100 * value / largest, 2),
                "ratio": f"{_ratio(value / against)}\u00d7" if value and against and place != report.baseline else "",
            }
            for place, value in enumerate(values)
        ]
        rows.append({"label": label, "better": better, "cells": cells})
    return rows


def latency_curves(report: Report) -> list[Curve]:
    """The curve of each model with at least one answer. Failed answers are left out."""
    curves = []
    for place, model in enumerate(report.models):
        measured = [] if model.unmeasured else model.samples
        seconds = sorted(sample.latency_seconds for sample in measured if sample.error is None)
        count = len(seconds)
        if count:
            ranks = sorted({round((count - 1) * step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS)})
            points = tuple((seconds[rank], 100 * (rank + 1) / count) for rank in ranks)
            curves.append(Curve(place, points, percentile(seconds, 50), percentile(seconds, 95)))
    return curves


def trends(report: Report) -> list[Trend]:
    """A trend for each model and each metric of earlier runs. The overall score comes first.

    The history of a registered model has all of its versions. So a baseline with the name of a candidate has the
    candidate's history, and gets no trend of its own.
    """
    found = []
    drawn = {report.models[place].model.name for place in report.candidates}
    for place, earlier in enumerate(report.history):
        name = report.models[place].model.name
        if place == report.baseline and name and name in drawn:
            continue
        for name in sorted((name for name in earlier if earlier[name]), key=_overall_first):
            moments = [
                Moment(_date(point.start), point.run_id, point.version, _state(point.gate), *_interval(point))
                for point in earlier[name]
            ]
            now = report.models[place].estimates.get(name)
            if now is not None:
                moments.append(Moment("this run", "", "", report.verdicts[place].state, *_interval(now)))
            found.append(Trend(place, name, tuple(moments), _limits(report, name, ("min", "max"))))
    return found


def score_axis(rows: Sequence[Row]) -> Axis:
    """An axis from 0 to 1, or longer if a score lies outside."""
    values = [value for row in rows for mark in row.marks for value in (mark.mean, mark.low, mark.high)]
    return _axis(*_span([0.0, 1.0, *values]))


def gap_axis(rows: Sequence[Row]) -> Axis:
    """An axis with 0 in the middle."""
    values = [value for row in rows for mark in row.marks for value in (mark.mean, mark.low, mark.high)]
    drops = [limit for row in rows for limit in row.limits.values()]
    reach = max(abs(value) for value in _span([0.05, *values, *drops]))
    return _axis(-reach, reach)


def latency_axis(curves: Sequence[Curve]) -> Axis:
    return _axis(0.0, max((curve.points[-1][0] for curve in curves), default=1.0))


def trend_axis(trend: Trend) -> Axis:
    values = [value for moment in trend.moments for value in (moment.mean, moment.low, moment.high)]
    low, high = _span([*values, *trend.limits.values()])
    return _axis(low, high if high > low else low + 0.1)


def model_style(place: int) -> dict:
    """The colour and shape of the model at this position. All figures use the same."""
    marker = list(SHAPES)[place % len(SHAPES)]
    colour = place % len(COLOURS)
    return {"colour": COLOURS[colour], "dark": DARK_COLOURS[colour], "marker": marker, "path": SHAPES[marker]}


def short_label(label: str) -> str:
    """A model's name for a figure."""
    return shortened(label.removeprefix("models:/"), LABEL)


def shortened(text: str, characters: int) -> str:
    """A label in one line, cut in the middle, since URIs and scorers differ at their start or end."""
    line = " ".join(text.split())
    head, tail = characters // 2 - 2, characters - characters // 2 + 1
    return line if len(line) <= characters else f"{line[:head]}\u2026{line[-tail:]}"


def _limits(report: Report, name: str, keywords: Iterable[str]) -> dict[str, float]:
    rules = [_rule(check) for _, check in checks(report) if check.metric == f"{name}/mean"]
    return {keyword: limit for keyword, limit in rules if keyword in keywords}


def _detail(gap: Difference, adjusted: float | None) -> str:
    pairs = f"{gap.n:,} pair{'' if gap.n == 1 else 's'}"
    corrected = "" if adjusted is None or adjusted == gap.p_value else f" ({p_value(adjusted).lstrip('= ')} after Holm)"
    return f"p {p_value(gap.p_value)}{corrected}, {pairs}, detectable {_number(gap.detectable)}"


def _state(gate: str) -> str:
    """The state of a run's gate. A run without a gate has no state."""
    return gate if gate in STATES else "none"


def _interval(entry) -> tuple[float, float, float]:
    return entry.mean, entry.ci95_low, entry.ci95_high


def _span(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return min(finite), max(finite)


def _axis(low: float, high: float) -> Axis:
    """Four or five round steps that include `low` and `high`."""
    rough = (high - low) / 4 or 0.25
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(step * place, 12) for place in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _number(value: float, sign: str = "") -> str:
    """Two decimals. If two decimals would show 0 for another value, one significant digit."""
    if math.isnan(value):
        return MISSING
    form = ".1g" if 0 < abs(value) < 0.005 else ".2f"
    return f"{value:{sign}{form}}".replace("inf", "\u221e")


def _end(value: float) -> str:
    """An end of a score's interval, with two decimals."""
    return MISSING if math.isnan(value) else f"{value:.2f}".replace("inf", "\u221e")


def _gap(value: float) -> str:
    return _number(value, "+")


def _amount(value: float) -> str:
    return _number(abs(value))


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _cost(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return megabytes(value)
    return f"{value:,.1f}" if metric.endswith("per_second") else f"{seconds_of(value)} s"


def _date(start: float) -> str:
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:%M")


def checks(report: Report) -> list[tuple[int, Check]]:
    """Every rule of the gate with the place of the model that it was put to."""
    return [(place, check) for place, verdict in enumerate(report.verdicts) for check in verdict.checks]


def _rule(check: Check) -> tuple[str, float]:
    keyword, limit = check.rule.split()
    return keyword, float(limit)
