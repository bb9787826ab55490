"""The report's figures as matplotlib figures, made without a display: scores, differences, latency.

slm/report/chart_data.py gives the rows, axes, colours and marks. This module logs and writes nothing. It does not use
pyplot, because pyplot keeps every figure in memory.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from slm.report import chart_data, summary
from slm.report.chart_data import DASHES, Axis, Curve, Row
from slm.report.summary import Report

WIDTH = 8.0  # inches
LINE = 0.28  # inches per mark


def figures(report: Report) -> dict[str, Figure]:
    """The figures by name: `scores`, `differences` and `latency`. A figure without data is left out."""
    scores, gaps = chart_data.score_rows(report), chart_data.difference_rows(report)
    curves = chart_data.latency_curves(report)
    drawn = {}
    if scores:
        axis = chart_data.score_axis(scores)
        drawn["scores"] = _intervals(report, scores, axis, "mean score and its 95 % interval")
    if gaps and report.baseline is not None:
        baseline = summary.visible(chart_data.short_label(report.models[report.baseline].model.label))
        axis = chart_data.gap_axis(gaps)
        drawn["differences"] = _intervals(report, gaps, axis, f"difference to {baseline} and its 95 % interval")
    if curves:
        drawn["latency"] = _latency(report, curves, chart_data.latency_axis(curves))
    return drawn


def _intervals(report: Report, rows: Sequence[Row], axis: Axis, label: str) -> Figure:
    """Draws a group of lines for each row, from the top. A missing value leaves its line empty."""
    lines = sum(len(row.marks) + 1 for row in rows)
    figure, axes = _figure(report, 1.1 + LINE * lines)
    height, names, places = 0.0, [], []
    for row in rows:
        top = height
        for mark in row.marks:
            if not mark.missing:
                ends = [min(max(end, axis.low), axis.high) for end in (mark.low, mark.high)]
                style = chart_data.model_style(mark.model)
                axes.plot(ends, [height, height], color=style["colour"], linewidth=2, marker="|", clip_on=False)
                axes.plot([mark.mean], [height], **_mark(report, mark.model))
            height += 1
        for keyword, limit in row.limits.items():
            bound = -limit if keyword == "max_drop" else limit
            end = axis.high if keyword == "max" else axis.low
            axes.fill_betweenx([top - 0.5, height - 0.5], min(bound, end), max(bound, end), color="#a8321c", alpha=0.13)
            axes.plot([bound, bound], [top - 0.5, height - 0.5], color="#a8321c", linestyle="--", linewidth=1.3)
        names.append(f"{summary.visible(chart_data.shortened(row.label, 40))}\n{row.prompts}")
        places.append((top + height - 1) / 2)
        height += 1
    if axis.low < 0:
        axes.axvline(0, color="#59626d", linewidth=1)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(height - 0.5, -1)
    axes.set_xlim(axis.low, axis.high)
    axes.set_xticks(axis.ticks, [f"{tick:g}" for tick in axis.ticks])
    axes.set_xlabel(label, parse_math=False)
    _legend(report, axes, sorted({mark.model for row in rows for mark in row.marks}))
    return figure


def _latency(report: Report, curves: Sequence[Curve], axis: Axis) -> Figure:
    """Draws the share of answers that took no longer, with marks at the median and the 95th percentile."""
    figure, axes = _figure(report, 4.0)
    for curve in curves:
        seconds, shares = zip(*curve.points, strict=True)
        colour = chart_data.model_style(curve.model)["colour"]
        dashes = _dashes(curve.model)
        axes.step([seconds[0], *seconds], [0, *shares], where="post", color=colour, linewidth=1.8, linestyle=dashes)
        axes.plot([curve.p50, curve.p95], [50, 95], **_mark(report, curve.model))
    axes.set_xlim(axis.low, axis.high)
    axes.set_ylim(0, 103)
    axes.set_xlabel("seconds per answer")
    axes.set_ylabel("answers that took no longer, %")
    _legend(report, axes, [curve.model for curve in curves])
    return figure


def _figure(report: Report, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(summary.visible(chart_data.shortened(report.title, 90)), loc="left", fontsize=11, parse_math=False)
    axes.grid(axis="x", color="#d9dde3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _mark(report: Report, place: int) -> dict:
    """The style of a model's marks: its shape and colour, hollow for the baseline, without a line."""
    style = chart_data.model_style(place)
    face = "white" if place == report.baseline else style["colour"]
    return {
        "color": style["colour"],
        "marker": style["marker"],
        "markersize": 7,
        "markerfacecolor": face,
        "linestyle": "none",
        "zorder": 3,
        "clip_on": False,  # a mark at the end of the scale is drawn whole
    }


def _dashes(place: int) -> str | tuple:
    dashes = DASHES[place % len(DASHES)]
    return "solid" if dashes == "none" else (0, tuple(float(length) / 2 for length in dashes.split()))


def _legend(report: Report, axes: Axes, places: Sequence[int]) -> None:
    handles = [Line2D([], [], **_mark(report, place)) for place in places]
    labels = [
        summary.visible(chart_data.short_label(report.models[place].model.label))
        + (" (baseline)" if place == report.baseline else "")
        for place in places
    ]
    legend = axes.figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False)
    for words in legend.get_texts():
        words.set_parse_math(False)
