"""A scored prompt set as something to look at: console table, Markdown, one HTML page, JUnit XML.

All of it comes from the same lines, built once. Nothing is logged or measured here. A score is shown with its 95 %
interval, `0.58 [0.39, 0.76]`, and what was not measured as n/a.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from slm.gate import Verdict
from slm.scoring import OVERALL, ScoredModel
from slm.statistics import Difference, Estimate

MISSING = "n/a"


@dataclass(frozen=True)
class Line:
    """One row of the table: what it says, and a cell per model."""

    label: str
    cells: tuple[str, ...]
    section: bool = False  # a rule is drawn before it


def lines(models: Sequence[ScoredModel]) -> list[Line]:
    """The table's rows: scores, then what they cost."""
    names = sorted({name for model in models for name in model.estimates} - {OVERALL})
    rows = [
        Line(f"{name} ({_count(models, name)})", tuple(_estimate(model.estimates.get(name)) for model in models))
        for name in names
    ]
    overall = tuple(_estimate(model.estimates.get(OVERALL)) for model in models)
    rows.append(Line(f"score, over all ({_count(models, OVERALL)})", overall, section=True))

    def line(label, metric, form, section=False):
        cells = (model.metrics.get(metric) for model in models)
        return Line(label, tuple(MISSING if value is None else form(value) for value in cells), section)

    return [
        *rows,
        line("rows failed", "rows_failed", "{:.0f}".format),
        line("rows unscored", "rows_unscored", "{:.0f}".format),
        line("output tokens per second", "output_tokens_per_second", "{:.1f}".format, section=True),
        line("latency p50, s", "latency_seconds/p50", "{:.2f}".format),
        line("latency p95, s", "latency_seconds/p95", "{:.2f}".format),
        line("model load, s", "model_load_seconds", "{:.1f}".format),
        line("peak memory", "peak_memory_bytes", _megabytes),
        line("model size", "model_bytes", _megabytes),
    ]


def difference_lines(candidate: str, baseline: str, compared: dict[str, Difference]) -> list[str]:
    """One sentence per scorer that has a difference to tell, the overall score first."""
    order = sorted(compared, key=lambda name: (name != OVERALL, name))
    return [
        f"{candidate} minus {baseline}, {name}: {gap.mean:+.2f} [{gap.ci95_low:+.2f}, {gap.ci95_high:+.2f}], "
        f"p = {gap.p_value:.2f}, {gap.n} pairs; a difference under {gap.detectable:.2f} would not have been found"
        for name in order
        for gap in [compared[name]]
    ]


def table(title: str, models: Sequence[ScoredModel]) -> Table:
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    drawn.add_column("")
    for model in models:
        drawn.add_column(model.model.label, justify="right")
    for line in lines(models):
        if line.section:
            drawn.add_section()
        drawn.add_row(line.label, *map(Text, line.cells))
    return drawn


def markdown(title: str, models: Sequence[ScoredModel], remarks: Sequence[str], verdict: Verdict) -> str:
    head = ["", *(model.model.label for model in models)]
    rows = [head, ["---", *("---:" for _ in models)], *([line.label, *line.cells] for line in lines(models))]
    body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    told = [
        f"gate: **{verdict.state}**",
        *(f"- {check.metric} {check.rule}: {check.reason}" for check in verdict.checks),
    ]
    return "\n\n".join([f"# {title}", body, *remarks, "\n".join(told)]) + "\n"


def html(title: str, models: Sequence[ScoredModel], remarks: Sequence[str], verdict: Verdict) -> str:
    """One page with nothing to fetch; what models and prompts say is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    answers = [
        {
            "label": model.model.label,
            "id": sample.id,
            "question": sample.messages[-1]["content"],
            "expected": " | ".join(sample.expected),
            "output": sample.output if sample.error is None else sample.error["message"],
            "scores": [
                {"name": name, "value": MISSING if value is None else f"{value:.2f}", "reason": sample.reasons[name]}
                for name, value in sample.scores.items()
            ],
        }
        for rows in zip(*(model.samples for model in models), strict=True)
        for model, sample in zip(models, rows, strict=True)
    ]
    return environment.from_string(PAGE).render(
        title=title, models=models, lines=lines(models), remarks=remarks, verdict=verdict, answers=answers
    )


def junit(title: str, models: Sequence[ScoredModel], verdicts: Sequence[Verdict]) -> str:
    """One suite per model: a case per gate rule, and one that holds the rows that failed."""
    root = ElementTree.Element("testsuites", name=title)
    for model, verdict in zip(models, verdicts, strict=True):
        suite = ElementTree.SubElement(root, "testsuite", name=model.model.label)
        for check in verdict.checks:
            case = ElementTree.SubElement(suite, "testcase", classname="gate", name=f"{check.metric} {check.rule}")
            if check.state != "pass":
                ElementTree.SubElement(case, "failure", type=check.state, message=_plain(check.reason))
        case = ElementTree.SubElement(suite, "testcase", classname="rows", name="every row is answered")
        failed = [sample for sample in model.samples if sample.error]
        if failed:
            text = "; ".join(f"{sample.id}: {sample.error['message']}" for sample in failed[:20])
            ElementTree.SubElement(case, "error", type="rows_failed", message=_plain(f"{len(failed)} rows: {text}"))
        suite.set("tests", str(len(verdict.checks) + 1))
        suite.set("failures", str(sum(check.state != "pass" for check in verdict.checks)))
        suite.set("errors", str(int(bool(failed))))
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    """Without the control characters that XML can't hold."""
    return "".join(letter if letter >= " " and letter not in "\ufffe\uffff" else " " for letter in text)


def _estimate(entry: Estimate | None) -> str:
    if entry is None or math.isnan(entry.mean):
        return MISSING
    return f"{entry.mean:.2f} [{entry.ci95_low:.2f}, {entry.ci95_high:.2f}]"


def _count(models: Sequence[ScoredModel], name: str) -> str:
    counts = sorted({model.estimates[name].n for model in models if name in model.estimates})
    return "/".join(map(str, counts)) or "0"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
.figures td + td, .figures th + th { text-align: right; font-variant-numeric: tabular-nums }
.section td { border-top: 2px solid var(--line) }
.answers { width: 100%; table-layout: fixed }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere }
small { opacity: .7 }
</style>
<h1>{{ title }}</h1>
<p><strong>Gate: {{ verdict.state }}</strong></p>
{% if verdict.checks %}
<ul>
{% for check in verdict.checks %}
<li>{{ check.metric }} {{ check.rule }}: <strong>{{ check.state }}</strong>, {{ check.reason }}</li>
{% endfor %}
</ul>
{% endif %}
<table class="figures">
<tr><th></th>{% for model in models %}<th>{{ model.model.label }}</th>{% endfor %}</tr>
{% for line in lines %}
<tr{% if line.section %} class="section"{% endif %}>
<td>{{ line.label }}</td>{% for cell in line.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for remark in remarks %}<p>{{ remark }}</p>
{% endfor %}
<h2>Answers</h2>
<table class="answers">
<tr><th style="width:32%">prompt</th><th style="width:9%">model</th><th style="width:36%">answer</th>
<th style="width:23%">scores</th></tr>
{% for answer in answers %}
<tr><td><small>{{ answer.id }}</small>
{{ answer.question }}</td><td>{{ answer.label }}</td><td>{{ answer.output }}</td>
<td>{% for score in answer.scores %}<strong>{{ score.value }}</strong> {{ score.name }}
<small>{{ score.reason }}</small>
{% endfor %}</td></tr>
{% endfor %}
</table>
</html>
"""
