"""The report as one HTML page: verdict, figures, flipped prompts, and every answer with a search.

The page is one file that fetches nothing. This module makes the figures as SVG. The answers are JSON in the page, and
the page's own script lists them. Texts of prompts, models and scorers reach the page as text only. A figure leaves a
missing value out, and a table shows it as n/a. slm/report/plots.py draws the same rows. This module reads only its
template, and logs nothing.
"""

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm.base.wording import counted, part_of
from slm.report.chart_data import (
    DASHES,
    GATE_SHAPES,
    STATES,
    _amount,
    _end,
    _finite,
    _gap,
    _number,
    _rule,
    checks,
    cost_rows,
    difference_rows,
    gap_axis,
    latency_axis,
    latency_curves,
    model_style,
    score_axis,
    score_rows,
    scorer_names,
    short_label,
    tag_rows,
    trend_axis,
    trends,
)
from slm.report.summary import (
    CANT_TELL,
    MISSING,
    PERHAPS,
    Report,
    cut_remarks,
    direction,
    p_value,
    percent,
    perplexity_of,
    text_remarks,
    visible,
)
from slm.report.token_view import token_rows
from slm.verdict import estimation
from slm.verdict.gate import Check
from slm.verdict.scored_model import OVERALL, Sample, ScoredModel
from slm.verdict.statistics import Difference

DATA_CHARACTERS = 20_000_000  # of the answers' JSON; a page much larger than this is slow to open


def render(report: Report) -> str:
    """The page. Its text can be written as UTF-8."""
    template, script_hash = _template()
    scores, gaps, curves = score_rows(report), difference_rows(report), latency_curves(report)
    flipped = flips(report)
    answers = answer_data(report, flipped)
    return template.render(
        report=report,
        heading=heading(report),
        headline=headline(report),
        remarks=findings(report)[1 if report.verdict.state == "none" else 0 :],
        cut_remarks=cut_remarks(report),
        text_remarks=text_remarks(report),
        perplexities=[perplexity_of(model) for model in report.models],
        checks=sorted(checks(report), key=lambda entry: list(STATES).index(entry[1].state)),
        styles=[model_style(place) for place in range(len(report.models))],
        labels=[short_label(model.model.label) for model in report.models],
        states=STATES,
        gate_shapes=GATE_SHAPES,
        MISSING=MISSING,
        scores=scores,
        tagged=tag_rows(report),
        score_axis=score_axis(scores),
        gaps=gaps,
        gap_axis=gap_axis(gaps),
        costs=cost_rows(report),
        curves=curves,
        latency_axis=latency_axis(curves),
        dashes=DASHES,
        trends=[(trend, trend_axis(trend)) for trend in trends(report)],
        flipped=flipped,
        compared_tokens=token_rows(report),
        answers=answers,
        script_hash=script_hash,
    )


@functools.cache  # compiling takes longer than rendering
def _template() -> tuple[Any, str]:
    """The page's template, and the hash of its script."""
    import jinja2

    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalize)
    environment.filters |= {"number": _number, "end": _end, "gap": _gap, "p_value": p_value, "safe_json": _safe_json}
    return environment.from_string(source), _script_hash(source)


# What is said ---------------------------------------------------------------------------------------------------------


def heading(report: Report) -> str:
    """The models that were compared, and on which prompts: the run's title names them, and may name more."""
    labels = [model.model.label for model in report.models]
    told = ", ".join(labels)
    if report.baseline is not None and len(labels) > 1:
        told = f"{', '.join(labels[place] for place in report.candidates)} against {labels[report.baseline]}"
    return f"{told} on {report.title}" if report.title == report.prompt_set.name else f"{told}: {report.title}"


def headline(report: Report) -> str:
    """The verdict in words. Without a gate, the first finding. It says if answers are cut."""
    return _verdict(report) + _cut(report.models)


def model_headline(report: Report, place: int) -> str:
    """The verdict on one model and its score, in words. It says if its answers are cut."""
    model, state = report.models[place], report.verdicts[place].state
    first = "Baseline" if place == report.baseline else "No gate" if state == "none" else state.capitalize()
    return f"{first}. {_alone(model)}{_cut([model])}"


def _cut(models: Sequence[ScoredModel]) -> str:
    cut, rows = (sum(int(model.metrics.get(name, 0)) for model in models) for name in ("rows_cut", "rows"))
    return f"; {part_of(cut, rows, 'answer')} cut at max_tokens" if cut else ""


def _verdict(report: Report) -> str:
    state, judged = report.verdict.state, checks(report)
    concerned = [(place, check) for place, check in judged if check.state == state]
    if state == "none":
        return f"No gate. {findings(report)[0]}"
    if state == "pass":
        held = f"{len(concerned)} of {len(concerned)} rules hold" if len(concerned) > 1 else "the one rule holds"
        return f"Pass: {held}" + ("" if len(judged) == len(concerned) else ", of those that apply to a first champion")
    if state == "regress":
        more = len(concerned) - 1
        rest = f"; {more} more {'rule is' if more == 1 else 'rules are'} broken" if more else ""
        return f"Regress: {_broken(report, *concerned[0])}{rest}"
    unknown = [(place, check) for place, check in concerned if check.prompts_needed is None]
    if unknown:
        place, check = unknown[0]
        return f"Inconclusive: {_whose(report, place)}{check.metric}: {check.reason}"
    needed = max(check.prompts_needed or 0 for _, check in concerned)
    return f"Inconclusive: it takes about {counted(needed, 'prompt')}, and {report.prompt_set.count:,} were asked"


def findings(report: Report) -> list[str]:
    """One sentence for each compared model. Without a baseline, one sentence for each model."""
    if report.baseline is None or len(report.models) == 1:
        return [_alone(model) for model in report.models] or ["No model was scored"]
    baseline = report.models[report.baseline].model.label
    if report.prompt_set.scorer_names == frozenset():
        return [
            f"{report.models[place].model.label} and {baseline} have no scores: no prompt has a scorer"
            + _kept_words(report, place)
            for place in report.candidates
        ]
    return [
        _compared(report.models[place].model.label, baseline, report.differences[place].get(OVERALL))
        + _kept_words(report, place)
        for place in report.candidates
    ]


def _kept_words(report: Report, place: int) -> str:
    """How much of the baseline's choices a model kept: the other half of the verdict."""
    kept = report.changes[place].get("fidelity/top1") if report.changes else None
    return "" if kept is None else f"; it keeps {percent(kept)} of the likeliest tokens"


def _alone(model: ScoredModel) -> str:
    found = model.estimates.get(OVERALL)
    if found is None or math.isnan(found.mean):
        return f"{model.model.label}: no answer was scored"
    interval = f"95 % interval {_end(found.ci95_low)} to {_end(found.ci95_high)}"
    return f"{model.model.label} scores {_number(found.mean)}, {interval}, on {counted(found.n, 'prompt')}"


def _compared(candidate: str, baseline: str, gap: Difference | None) -> str:
    if gap is None or gap.n == 0:
        return f"{candidate} and {baseline} can't be compared: no prompt was scored for both"
    if gap.mean == 0:
        return f"{candidate} scores the same as {baseline} on {counted(gap.n, 'prompt')}"
    seen = f"{candidate} scores {_amount(gap.mean)} {'less' if gap.mean < 0 else 'more'} than {baseline}"
    word = direction(gap)
    if word == CANT_TELL:
        return f"{seen}, which {counted(gap.n, 'prompt')} can't tell from chance"
    interval, p = f"{_gap(gap.ci95_low)} to {_gap(gap.ci95_high)}", f"p {p_value(gap.p_value)}"
    if word.startswith(PERHAPS):
        return f"{seen}: {word}, as the 95 % interval, {interval}, and the p-value ({p}) disagree"
    return f"{seen}, and the 95 % interval, {interval}, leaves out 0 ({p})"


def _broken(report: Report, place: int, check: Check) -> str:
    name, keyword, limit = check.metric.removesuffix("/mean"), *_rule(check)
    whose = _whose(report, place)
    if keyword == "max_drop":
        fall = -report.differences[place][name].mean
        return f"{whose}{check.metric} fell by {_amount(fall)}, and {limit:g} is allowed"
    if name in report.models[place].estimates and name != check.metric:
        mean = report.models[place].estimates[name].mean
        return f"{whose}{check.metric} is {_number(mean)}, {'below' if keyword == 'min' else 'above'} {limit:g}"
    return f"{whose}{check.metric}: {check.reason}"


def _whose(report: Report, place: int) -> str:
    """The model's name if the gate was applied to several models, else ""."""
    several = sum(bool(verdict.checks) for verdict in report.verdicts) > 1
    return f"{report.models[place].model.label}: " if several else ""


# Flipped prompts and answers ------------------------------------------------------------------------------------------


def flips(report: Report) -> dict[int, list[dict]]:
    """For each candidate, the prompts with a changed score by any scorer. The largest loss comes first."""
    if report.baseline is None:
        return {}
    baseline, found = report.models[report.baseline], {}
    for place, model in enumerate(report.models):
        if place == report.baseline:
            continue
        ours, theirs = (each.values.get(OVERALL, {}) for each in (model, baseline))
        changed: dict[str, dict] = {}
        asked_for = {name for sample in model.samples for name in sample.scores}
        for name, flipped in estimation.flips(model, baseline).items():
            if name not in asked_for:
                continue  # over all, or over repeats
            for change in ("worse", "better"):
                for key in getattr(flipped, change):
                    gap = round(ours[key] - theirs[key], 12)
                    entry = changed.setdefault(key, {"id": key, "gap": gap, "worse": [], "better": []})
                    entry[change].append(name)
        found[place] = sorted(changed.values(), key=lambda entry: entry["gap"])
    return found


def answer_data(report: Report, flipped: dict[int, list[dict]]) -> dict:
    """The data of the page's script: each prompt once, and answers with the positions of their prompt and model.

    Where it would be more than DATA_CHARACTERS, the failed answers and the flipped prompts' are kept first, then the
    wrong ones; `left_out` counts those that aren't there.
    """
    asked = [
        (turn, place, sample) for place, model in enumerate(report.models) for turn, sample in enumerate(model.samples)
    ]
    samples = [entry[1:] for entry in sorted(asked, key=lambda entry: entry[:2])]  # a prompt's answers side by side
    answers, rows = _kept(report, samples, {entry["id"] for entries in flipped.values() for entry in entries})
    prompts = {id: place for place, id in enumerate(dict.fromkeys(samples[turn][1].id for turn in sorted(answers)))}
    return {
        "models": [
            {
                "label": model.model.label,
                "short": short_label(model.model.label),
                "baseline": place == report.baseline,
                "path": model_style(place)["path"],
            }
            for place, model in enumerate(report.models)
        ],
        "scorers": [name for name in scorer_names(report.models) if name in _asked_for(report)],
        "prompts": [rows[id] for id in prompts],
        "answers": [answers[turn] | {"prompt": prompts[samples[turn][1].id]} for turn in sorted(answers)],
        "flips": [
            {**entry, "model": place, "prompt": prompts[entry["id"]]}
            for place, entries in flipped.items()
            for entry in entries
            if entry["id"] in prompts
        ],
        "left_out": len(samples) - len(answers),
    }


def _kept(report: Report, samples: list[tuple[int, Sample]], changed: set[str]) -> tuple[dict[int, dict], dict]:
    """The answers that fit into DATA_CHARACTERS, the most important first, and their prompts by id."""
    known = {prompt.id: prompt for prompt in report.prompt_set.prompts}
    answers, prompts, size = {}, {}, 0
    for turn in sorted(range(len(samples)), key=lambda turn: _urgency(samples[turn][1], changed)):
        place, sample = samples[turn]
        answer, prompt = _answer_row(place, sample), _prompt_row(sample, known.get(sample.id))
        new = [answer] if sample.id in prompts else [answer, prompt]
        size += sum(len(json.dumps(row, ensure_ascii=False)) for row in new)
        if size > DATA_CHARACTERS:
            break
        answers[turn], prompts[sample.id] = answer, prompt
    return answers, prompts


def _asked_for(report: Report) -> set[str]:
    return {name for model in report.models for sample in model.samples for name in sample.scores}


def _answer_row(place: int, sample: Sample) -> dict:
    return {
        "model": place,
        "repeat": sample.repeat,
        "output": sample.output,
        "finish_reason": sample.finish_reason,
        "prompt_tokens": sample.prompt_tokens,
        "output_tokens": sample.output_tokens,
        "latency_seconds": round(sample.latency_seconds, 3),
        "scores": {name: _finite(value) for name, value in sample.scores.items()},
        "reasons": sample.reasons,
        "error": sample.error,
    }


def _prompt_row(sample: Sample, prompt) -> dict:
    return {
        "id": sample.id,
        "messages": sample.messages,
        "expected": sample.expected,
        "cluster": None if prompt is None else prompt.cluster,
        "tags": [] if prompt is None else list(prompt.tags),
    }


def _urgency(sample: Sample, changed: set[str]) -> int:
    if sample.error is not None or sample.id in changed:
        return 0
    return 1 if any(value is None or value < 1 for value in sample.scores.values()) else 2


# As text --------------------------------------------------------------------------------------------------------------


def _finalize(value: object) -> object:
    """A value of the template with all characters visible. Macros return Markup, which is visible already."""
    return visible(value) if type(value) is str else value


def _safe_json(data: object):
    """JSON for a script element. `<` and lone surrogates are escaped, so that no text can end the element."""
    from markupsafe import Markup

    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(re.sub("[<\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _script_hash(source: str) -> str:
    """The hash of the page's script for the content security policy. No other script runs, whatever an answer has."""
    [script] = re.findall("<script>(.*?)</script>", source, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
