"""The result of an evaluation as console table, Markdown and JUnit XML. html_page.py makes the HTML page.

All forms use the same lines. This module measures and logs nothing. A score has its 95 % interval, as in
`0.58 [0.39, 0.76]`. A missing value is n/a.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from slm.base.wording import counted, part_of
from slm.prompts.prompt_sets import PromptSet
from slm.tracking.earlier_runs import Point
from slm.verdict import estimation, perplexity, reproduction
from slm.verdict.gate import Verdict
from slm.verdict.scored_model import OVERALL, ScoredModel, is_of_a_scorer
from slm.verdict.statistics import Difference, Estimate

MISSING = "n/a"
CANT_TELL, PERHAPS = "can't tell", "perhaps "  # words of `direction`
CUT_ALIKE = 0.05  # two shares of cut answers that differ by no more count as the same
COUNTS_AS = {"score": "count by their scores", "wrong": "count as wrong", "unscored": "do not count"}  # by `cut`
FLIPS = 6  # ids shown in a line
ID = 80  # characters of an id shown in a line
# Controls but tab and newline, marks that turn the direction of text, zero-width ones, and what UTF-8 can't hold.
UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]"
)
# What Markdown takes for more than text, as MLflow's page and GitHub read it: the signs of a tag, an entity, code,
# emphasis, a cell, a link, an escape, a mention, a heading and a list, and the address that becomes a link by itself.
MARKDOWN = re.compile(
    r"[<>`*|~]|&(?=#?\w+;)|\](?=\s*[(\[:])|^\[|(?<!\w)_|_(?!\w)|\\(?=[!-/:-@\[-`{-~])|(?<!\S)@|^[#+=-]"
    r"|:(?=//)|(?<=\bwww)\."
)


@dataclass(frozen=True)
class Report:
    """The results of a run. Every form of the report is made from them.

    `verdicts`, `differences` and `history` have one entry for each model. A baseline has no differences. Without a
    baseline, no model has differences. `history` has earlier runs by metric (a scorer, or `score`), the oldest first.
    """

    title: str
    prompt_set: PromptSet
    models: tuple[ScoredModel, ...]
    verdict: Verdict
    verdicts: tuple[Verdict, ...]
    baseline: int | None
    differences: tuple[dict[str, Difference], ...]
    history: tuple[dict[str, tuple[Point, ...]], ...]
    facts: dict[str, str]  # what is told of the run beside its figures: date, run id, commit, machine
    changes: tuple[dict[str, Estimate], ...] = ()  # flips and fidelity of each model, beside the baseline

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """The places of the models that are compared with the baseline. Without a baseline, of all models."""
        return tuple(place for place in range(len(self.models)) if place != self.baseline)

    @cached_property
    def remarks(self) -> list[str]:
        """Sentences on each comparison: the overall score, other differences beyond chance, and the flips.

        Each sentence is one line that a terminal shows as it is, whatever ids and labels hold.
        """
        return [_one_line(remark) for remark in _remarks(self)]


@dataclass(frozen=True)
class Line:
    """One row of the table: a label, and one cell for each model."""

    label: str
    cells: tuple[str, ...]
    section: bool = False  # a rule is drawn before it


def lines(models: Sequence[ScoredModel]) -> list[Line]:
    """The rows of the table: first the scores, then the costs."""
    named = {name for model in models for name in model.estimates}
    names = sorted(name for name in named - {OVERALL} if is_of_a_scorer(name, named))
    rows = [
        Line(f"{name} ({_count(models, name)})", tuple(estimate(model.estimates.get(name)) for model in models))
        for name in names
    ]
    overall = tuple(estimate(model.estimates.get(OVERALL)) for model in models)
    rows.append(Line(f"score, over all ({_count(models, OVERALL)})", overall, section=True))
    repeats = max((sample.repeat + 1 for model in models for sample in model.samples), default=1)
    for label, name in ((f"pass@{repeats}", f"pass_at_{repeats}"), (f"pass^{repeats}", f"pass_hat_{repeats}")):
        found = [model.estimates.get(f"{OVERALL}/{name}") for model in models]
        if any(found):
            rows.append(Line(f"{label}, over all ({_count(models, f'{OVERALL}/{name}')})", tuple(map(estimate, found))))

    def line(label, metric, form, section=False):
        cells = (model.metrics.get(metric) for model in models)
        return Line(label, tuple(MISSING if value is None else form(value) for value in cells), section)

    if any(model.texts for model in models):
        rows.append(Line("perplexity of the texts", tuple(map(perplexity_of, models))))
    figures = sorted({name for model in models for name in model.figures})
    runtimes = [model.record.get("model", {}).get("runtime") or MISSING for model in models]
    return [
        *rows,
        *(line(name, name, "{:.4g}".format) for name in figures),
        line("rows failed", "rows_failed", "{:.0f}".format),
        line("rows unscored", "rows_unscored", "{:.0f}".format),
        line("rows cut at max_tokens", "rows_cut", "{:.0f}".format),
        line("output tokens per second", "output_tokens_per_second", "{:.1f}".format, section=True),
        line("latency p50, s", "latency_seconds/p50", seconds_of),
        line("latency p95, s", "latency_seconds/p95", seconds_of),
        line("model load, s", "model_load_seconds", seconds_of),
        line("peak memory", "peak_memory_bytes", megabytes),
        line("model size", "model_bytes", megabytes),
        *([Line("runtime", tuple(runtimes))] if any(runtime != MISSING for runtime in runtimes) else []),
    ]


def _remarks(report: Report) -> list[str]:
    told = [
        f"{model.model.label} was not given {', '.join(model.model.ignored)}: not declared by it"
        for model in report.models
        if model.model.ignored
    ]
    told += figure_remarks(report)
    told += scorer_remarks(report)
    told += cut_remarks(report)
    for model in report.models:
        reproducible = model.record.get("reproducible", "")
        if reproducible.startswith(reproduction.COMPARABLE):
            told.append(f"{model.model.label}, done again: {reproducible}")
        if model.unmeasured:
            why = f"{model.unmeasured}; resume=false measures them"
            told.append(f"{model.model.label}: no speed, latency or memory, because {why}")
    for model in report.models:
        rows, shown = int(model.metrics.get("rows", 0)), len(model.samples)
        if shown < rows:
            told.append(
                f"{model.model.label}: {part_of(shown, rows, 'answer')} listed, flips, tags and fidelity are "
                "of these alone; all other figures are of all answers"
            )
    told += text_remarks(report)
    if report.baseline is None:
        return told
    baseline = report.models[report.baseline]
    for place, (scored, compared) in enumerate(zip(report.models, report.differences, strict=True)):
        if place == report.baseline:
            continue
        adjusted = estimation.holm_p_values(compared)
        pair = f"{scored.model.label} minus {baseline.model.label}"
        for name in sorted(compared, key=lambda name: (name != OVERALL, name)):
            gap = compared[name]
            if name == OVERALL or adjusted.get(name, 1) < 0.05:
                p = f"p {p_value(gap.p_value)}" if name == OVERALL else f"p {p_value(adjusted[name])} after Holm"
                seen = f"{gap.mean:+.2f} [{gap.ci95_low:+.2f}, {gap.ci95_high:+.2f}], {p}, {counted(gap.n, 'pair')}"
                word = direction(gap, None if name == OVERALL else adjusted[name])
                doubt = f": {word}, as interval and p-value disagree" if word.startswith(PERHAPS) else ""
                told.append(
                    f"{pair}, {name}: {seen}{doubt}; a difference under {gap.detectable:.2f} would not have been found"
                )
        told += fidelity_remark(report, place)
        flips = estimation.flips(scored, baseline).get(OVERALL)
        if flips:
            told.append(f"{scored.model.label}: {_ids('worse', flips.worse)}; {_ids('better', flips.better)}")
    return told


def figure_remarks(report: Report) -> list[str]:
    """Why a plain figure has no interval, and why one is missing."""
    told = []
    names = sorted({name for model in report.models for name in model.figures})
    for name in names:
        missing = [model for model in report.models if name in model.figures and name not in model.metrics]
        told += [f"{model.model.label}: {name} is not given: {model.figures[name]}" for model in missing]
        given = [model.figures[name] for model in report.models if name in model.figures and name in model.metrics]
        told += [f"{name} has no interval: {given[0]}"] if given else []
    return told


def scorer_remarks(report: Report) -> list[str]:
    """How many prompts ask for no score."""
    none = report.prompt_set.without_scorers
    if not none:
        return []
    has = "has" if none == 1 else "have"
    return [
        f"{counted(none, 'prompt')} of {len(report.prompt_set.prompts):,} {has} no scorer, and are part of no score"
    ]


def fidelity_remark(report: Report, place: int) -> list[str]:
    """How much of the baseline's distributions a model kept, in one sentence. Empty if that was not asked for."""
    scored = report.models[place]
    if report.baseline is None or scored.fidelity is None:
        return []
    label, baseline = scored.model.label, report.models[report.baseline].model.label
    found = report.changes[place] if report.changes else {}
    kl, top1 = found.get("fidelity/kl"), found.get("fidelity/top1")
    if kl is None or top1 is None:
        return [f"{label}: fidelity is not measured, because {scored.fidelity.reason}"]
    left = scored.fidelity.left_out
    of = f" ({counted(left, 'answer')} left out; {scored.fidelity.why_left_out})" if left else ""
    return [
        f"{label} beside {baseline}, token by token: KL {nats(kl)} nats, {percent(top1)} of the likeliest tokens kept, "
        f"{scored.fidelity.tokens:,} tokens of {counted(kl.n, 'answer')}{of}"
    ]


def text_remarks(report: Report) -> list[str]:
    """For each model that was to read texts: what it thinks of the texts, or why that is unknown."""
    told = []
    for place, model in enumerate(report.models):
        texts, label = model.texts, model.model.label
        if texts is None:
            continue
        nll = perplexity.estimates(texts).get(perplexity.NLL)
        if nll is None:
            told.append(f"{label}: perplexity is not measured, because {texts.reason}")
            continue
        alone = "; texts of one cluster have no interval" if math.isnan(nll.ci95_low) else ""
        seen = f"{sum(texts.tokens):,} tokens of {counted(len(texts.tokens), 'text')} in {texts.name}"
        told.append(f"{label}: -log p {_with_interval(nll)} nats per token, {seen}{alone}")
        found = report.changes[place] if report.changes else {}
        kl, top1, gap = (found.get(name) for name in perplexity.PAIRS)
        if kl and top1 and gap and texts.compared:
            left = texts.compared.left_out
            of = f" ({counted(left, 'window')} left out; {texts.compared.why_left_out})" if left else ""
            told.append(
                f"{label}, on the texts: KL {nats(kl)} nats, {percent(top1)} of the likeliest tokens kept, "
                f"{texts.compared.tokens:,} tokens{of}"
            )
        elif texts.compared:
            told.append(f"{label}: fidelity on the texts is not measured, because {texts.compared.reason}")
    return told


def perplexity_of(model: ScoredModel) -> str:
    """`24.8 [21.1, 29.2]`: the interval's ends are those of the mean -log p."""
    nll = perplexity.estimates(model.texts).get(perplexity.NLL) if model.texts else None
    if nll is None:
        return MISSING
    mean, low, high = (math.exp(min(figure, 700.0)) for figure in (nll.mean, nll.ci95_low, nll.ci95_high))
    return f"{mean:.4g}" if math.isnan(nll.ci95_low) else f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _with_interval(entry: Estimate) -> str:
    if math.isnan(entry.ci95_low):
        return f"{entry.mean:.3f}"
    return f"{entry.mean:.3f} [{entry.ci95_low:.3f}, {entry.ci95_high:.3f}]"


def nats(entry: Estimate) -> str:
    """`0.0843 [0.0610, 0.118]`, or `0` of equal models."""
    if entry.mean == 0 == entry.ci95_high:
        return "0"
    return f"{entry.mean:.3g} [{entry.ci95_low:.3g}, {entry.ci95_high:.3g}]"


def percent(entry: Estimate) -> str:
    """`91.4 % [89.0, 93.2]`."""
    mean, low, high = (100 * figure for figure in (entry.mean, entry.ci95_low, entry.ci95_high))
    return f"{mean:.1f} %" if math.isnan(low) else f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def cut_remarks(report: Report) -> list[str]:
    """For each model with answers that max_tokens ended: how many, how they count, and the remedy."""
    told = []
    shares: dict[int, float] = {}
    for place, model in enumerate(report.models):
        cut, rows = int(model.metrics.get("rows_cut", 0)), int(model.metrics.get("rows", 0))
        shares[place] = cut / rows if rows else 0.0
        if not cut:
            continue
        asked = model.record.get("parameters", {})
        limit = f"max_tokens={asked['max_tokens']}" if "max_tokens" in asked else "max_tokens"
        remedy = "set max_tokens higher"
        if asked.get("tasks"):
            limit, remedy = "the task's max_gen_toks", "set it higher in the task's file"
        counts = f", and {COUNTS_AS[asked.get('cut', 'score')]}" if OVERALL in model.estimates else ""
        cut_off = f"{part_of(cut, rows, 'answer')} cut at {limit}"
        told.append(f"warning: {model.model.label}: {cut_off}{counts}; {remedy}")
    if report.baseline is not None:
        theirs = shares[report.baseline]
        for place in report.candidates:
            if abs(shares[place] - theirs) > CUT_ALIKE:
                ours, other = report.models[place].model.label, report.models[report.baseline].model.label
                told.append(
                    f"warning: {shares[place]:.0%} of {ours}'s answers are cut, and {theirs:.0%} of {other}'s: "
                    "a part of the difference may come from that"
                )
    return told


def _ids(how: str, ids: tuple[str, ...]) -> str:
    short = (name if len(name) <= ID else f"{name[: ID - 1]}…" for name in ids[:FLIPS])
    shown = ", ".join(short) + (", …" if len(ids) > FLIPS else "")
    return f"{len(ids)} {how}" + (f" ({shown})" if ids else "")


def table(report: Report) -> Table:
    drawn = Table(title=report.title, title_justify="left", title_style="bold", header_style="bold")
    drawn.add_column("", overflow="fold")
    for model in report.models:
        drawn.add_column(model.model.label.removeprefix("models:/"), justify="right", overflow="fold")
    for line in lines(report.models):
        if line.section:
            drawn.add_section()
        drawn.add_row(line.label, *map(Text, line.cells))
    return drawn


def markdown(report: Report) -> str:
    """The table and the remarks. Ids, labels and other texts are escaped, so that they show as text."""
    head = ["", *(model.model.label for model in report.models)]
    rows = [[line.label, *line.cells] for line in lines(report.models)]
    cells = [map(escaped, head), ["---", *("---:" for _ in report.models)], *(map(escaped, row) for row in rows)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    told = [
        f"gate: **{report.verdict.state}**",
        *(
            f"- {escaped(f'{check.metric} {check.rule}: {check.state}, {check.reason}')}"
            for check in report.verdict.checks
        ),
    ]
    said = map(escaped, report.remarks)
    return "\n\n".join([f"# {escaped(report.title)}", body, *said, "\n".join(told)]) + "\n"


def escaped(text: str) -> str:
    """A text in one line, escaped for Markdown."""
    return MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", _one_line(text))


def visible(text: str) -> str:
    """A text with control characters, direction marks and lone surrogates written out, as in [U+0000]."""
    return UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def junit(report: Report) -> str:
    """JUnit XML with a suite for each model. A suite has a case for each rule of the gate, and one for failed rows."""
    root = ElementTree.Element("testsuites", name=_plain(report.title))
    for model, verdict in zip(report.models, report.verdicts, strict=True):
        suite = ElementTree.SubElement(root, "testsuite", name=_plain(model.model.label))
        for check in verdict.checks:
            name = _plain(f"{check.metric} {check.rule}")
            case = ElementTree.SubElement(suite, "testcase", classname="gate", name=name)
            if check.state == "none":  # it doesn't apply
                ElementTree.SubElement(case, "skipped", message=_plain(check.reason))
            elif check.state != "pass":
                ElementTree.SubElement(case, "failure", type=check.state, message=_plain(check.reason))
        case = ElementTree.SubElement(suite, "testcase", classname="rows", name="every row is answered")
        listed = [sample for sample in model.samples if sample.error]
        failed = max(len(listed), int(model.metrics.get("rows_failed", 0)))  # a sample may list none
        if failed:
            text = "; ".join(f"{sample.id}: {(sample.error or {}).get('message')}" for sample in listed[:20])
            message = _plain(f"{counted(failed, 'row')}: {text}")
            ElementTree.SubElement(case, "error", type="rows_failed", message=message)
        suite.set("tests", str(len(verdict.checks) + 1))
        suite.set("failures", str(sum(check.state not in ("pass", "none") for check in verdict.checks)))
        suite.set("errors", str(int(bool(failed))))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    """A text without the control characters that XML forbids. Other control characters are written out."""
    return visible("".join(letter if letter >= " " else " " for letter in text))


def estimate(entry: Estimate | None) -> str:
    """`0.58 [0.39, 0.76]`: a mean with its 95 % interval."""
    if entry is None or math.isnan(entry.mean):
        return MISSING
    return f"{entry.mean:.2f} [{entry.ci95_low:.2f}, {entry.ci95_high:.2f}]"


def direction(gap: Difference, adjusted: float | None = None) -> str:
    """Worse or better if interval and p-value agree. Perhaps, if one of the two alone shows a change."""
    apart, p = not gap.ci95_low <= 0 <= gap.ci95_high, gap.p_value if adjusted is None else adjusted
    if not apart and not p < 0.05:
        return CANT_TELL
    return f"{'' if apart and p < 0.05 else PERHAPS}{'worse' if gap.mean < 0 else 'better'}"


def p_value(p: float) -> str:
    """`< 0.001`, `= 0.023`, `= 0.41`, or n/a."""
    if math.isnan(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def run_name(report: Report) -> str:
    """What a run did and how it ended, the end first: `regress, score 0.31: phi3/3 vs phi3@champion on general`."""
    labels = [model.model.label.removeprefix("models:/") for model in report.models]
    first, *others = report.candidates
    told = f"{len(report.candidates)} models" if others else labels[first]
    against = "" if report.baseline is None else f" vs {labels[report.baseline]}"
    found = None if others else report.models[first].estimates.get(OVERALL)
    gated = [] if report.verdict.state == "none" else [report.verdict.state]
    scored = [] if found is None or math.isnan(found.mean) else [f"score {found.mean:.2f}"]
    ending = ", ".join(gated + scored) or "evaluated"
    return _one_line(f"{ending}: {told}{against} on {report.prompt_set.name}")


def _count(models: Sequence[ScoredModel], name: str) -> str:
    counts = sorted({model.estimates[name].n for model in models if name in model.estimates})
    return "/".join(map(str, counts)) or "0"


def megabytes(value: float) -> str:
    """`270 MB`, `0.4 MB`, or `3 kB`: a small value isn't 0."""
    if value < 1e5:
        return f"{value / 1e3:,.0f} kB"
    return f"{value / 1e6:,.0f} MB" if value >= 1e6 else f"{value / 1e6:.1f} MB"


def seconds_of(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
