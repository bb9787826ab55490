"""The report's page and figures: what they say, that no answer can do harm, and the page in a real browser."""

import base64
import hashlib
import html
import io
import json
import math
import re
import shutil
import time
from dataclasses import fields, replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from slm.answers import forms
from slm.answers.asking import ModelFacts
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.report import chart_data, html_page, plots, summary
from slm.report.summary import Report
from slm.tracking.earlier_runs import Point
from slm.verdict import estimation, fidelity, gate, scored_model
from slm.verdict.fidelity import Fidelity, LikelyTokens, TokenFidelity
from slm.verdict.statistics import Difference, Estimate

SCRIPT = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2><!--"
HOSTILE = f"{SCRIPT} '\" & \x00\x1b[31m \u202egnp.exe \ud800 {{{{ 7 * 7 }}}} {{% raw %}}"


def prompt(place: int, **changes) -> Prompt:
    content = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {place}?"})
    kept = Prompt(f"id-{place}", content, None, (f"yes {place}",), (ScorerCall("contains", {}),), None, ("easy",))
    return replace(kept, **changes)


def sample(asked: Prompt, model: str, scores: dict, **changes) -> scored_model.Sample:
    reasons = {name: f"{name} says {value}" for name, value in scores.items()}
    answer = scored_model.Sample(
        id=asked.id,
        repeat=0,
        model=model,
        messages=list(asked.messages),
        expected=list(asked.expected),
        output=f"Answer of {model} to {asked.id}",
        finish_reason="stop",
        prompt_tokens=12,
        output_tokens=3,
        latency_seconds=0.5,
        scores=scores,
        reasons=reasons,
        error=None,
    )
    return replace(answer, **changes)


def scored(label: str, samples: list, prompt_set: PromptSet, **metrics) -> scored_model.ScoredModel:
    model = ModelFacts(**dict.fromkeys(field.name for field in fields(ModelFacts)) | {"label": label, "uri": label})
    failed = sum(answer.error is not None for answer in samples)
    told = {"rows": float(len(samples)), "rows_failed": float(failed), "rows_unscored": 0.0} | metrics
    return scored_model.ScoredModel(model, tuple(samples), estimation.estimate(tuple(samples), prompt_set), told, 0)


def report(ours: list, theirs: list | None = None, thresholds: str = "", **changes) -> Report:
    """A candidate's scores, and a baseline's, each a list of {scorer: value} by prompt."""
    prompts = tuple(prompt(place) for place in range(len(ours)))
    prompt_set = PromptSet("smoke", "prompts/smoke.jsonl", prompts, "5ha" + "0" * 61)
    models = [
        scored(label, [sample(asked, label, scores) for asked, scores in zip(prompts, each, strict=True)], prompt_set)
        for label, each in (("new", ours), ("old", theirs))
        if each is not None
    ]
    baseline = None if theirs is None else 1
    compared = ({}, {}) if theirs is None else (estimation.differences(*models, prompt_set), {})
    rules = gate.read_thresholds(thresholds, "gate.yaml") if thresholds else ()
    verdict = gate.decide(rules, models[0].metrics | models[0].estimates, compared[0])
    verdicts = (verdict, gate.Verdict("none", ()))[: len(models)]
    history, facts = ({},) * len(models), {"date": "2026-01-02", "run": "abc123"}
    made = Report(
        "new on smoke", prompt_set, tuple(models), verdict, verdicts, baseline, compared[: len(models)], history, facts
    )
    return replace(made, **changes)


def values(*scores: float | None) -> list[dict]:
    return [{"contains": score} for score in scores]


RIGHT, WRONG = values(*[1.0] * 200), values(*[0.0] * 200)
FEW, FEW_WORSE = values(1, 1, 0, 1), values(1, 0, 0, 1)


def page_data(page: str) -> dict:
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Text(HTMLParser):
    """The tags of a page, and its text without scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.silent = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.words.append(data)


def words(page: str) -> str:
    return " ".join(" ".join(Text(page).words).split())


# What it says --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (report(RIGHT, RIGHT, "score/mean: {min: 0.9}\nrows_failed: {max: 0}"), "Pass: 2 of 2 rules hold"),
        (report(RIGHT, None, "score/mean: {min: 0.9}"), "Pass: the one rule holds"),
        (
            report(WRONG, RIGHT, "score/mean: {max_drop: 0.02, min: 0.5}"),
            "Regress: score/mean is 0.00, below 0.5; 1 more rule is broken",
        ),
        (report(WRONG, RIGHT, "score/mean: {max_drop: 0.02}"), "Regress: score/mean fell by 1.00, and 0.02 is allowed"),
        (report(RIGHT, None, "rows: {max: 3}"), "Regress: rows: 200 is above 3"),
        (
            report(FEW, None, "contains/mean: {min: 0.5}"),
            "Inconclusive: it takes about 32 prompts, and 4 were asked",
        ),
        (
            report(FEW, None, "score/mean: {max_drop: 0.1}"),
            "Inconclusive: score/mean: there is no baseline; name one",
        ),
        (report(FEW_WORSE, FEW), "No gate. new scores 0.25 less than old, which 4 prompts can't tell from chance"),
        (report(FEW, FEW), "No gate. new scores the same as old on 4 prompts"),
        (
            report(RIGHT, WRONG),
            "No gate. new scores 1.00 more than old, and the 95 % interval, +0.97 to +1.00, leaves out 0 (p < 0.001)",
        ),
        (report(FEW), "No gate. new scores 0.75, 95 % interval 0.19 to 0.99, on 4 prompts"),
        (report(values(None)), "No gate. new: no answer was scored"),
        (report(values(1), values(None)), "No gate. new and old can't be compared: no prompt was scored for both"),
    ],
)
def test_the_verdict_is_told_in_words(made, said):
    assert html_page.headline(made) == said
    assert said in words(html_page.render(made))


def test_an_interval_and_a_p_value_that_disagree_are_told_with_the_same_word_everywhere():
    made = report(FEW_WORSE, FEW)
    gap = Difference(-0.05, 0.02, -0.10, -0.01, 0.061, 150, 0.06)
    made = replace(made, differences=tuple({name: gap for name in compared} for compared in made.differences))
    assert html_page.headline(made) == (
        "No gate. new scores 0.05 less than old: perhaps worse, as the 95 % interval, -0.10 to -0.01, and the p-value"
        " (p = 0.061) disagree"
    )
    assert "-0.05 [-0.10, -0.01] perhaps worse p = 0.061, 150 pairs" in words(html_page.render(made))


def test_a_rule_is_shown_with_its_state_its_model_and_its_reason():
    told = words(html_page.render(report(FEW_WORSE, FEW, "score/mean: {max_drop: 0.1}")))
    assert "? inconclusive score/mean max_drop 0.1 new -0.250, 95 % interval" in told


def test_a_broken_rule_names_its_model_where_several_were_judged():
    made = report(WRONG, RIGHT, "score/mean: {min: 0.5}")
    both = replace(made, baseline=None, differences=({}, {}), verdicts=(made.verdict, made.verdict))
    assert html_page.headline(both).startswith("Regress: new: score/mean is 0.00, below 0.5; 1 more")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (report(RIGHT, RIGHT), "No gate. new scores 1.00, 95 % interval 0.98 to 1.00, on 200 prompts"),
        (report(RIGHT, thresholds="contains/mean: {min: 0.9}"), "Pass. new scores 1.00, 95 % interval 0.98 to 1.00"),
        (report(WRONG, RIGHT, "contains/mean: {min: 0.9}"), "Regress. new scores 0.00, 95 % interval 0.00 to 0.02"),
        (report(values(None)), "No gate. new: no answer was scored"),
    ],
)
def test_a_model_alone_is_told_with_its_verdict_and_its_score(made, told):
    assert html_page.model_headline(made, 0).startswith(told)
    if made.baseline == 1:
        assert html_page.model_headline(made, 1).startswith("Baseline. old scores 1.00")
    cut = replace(made.models[0], metrics=made.models[0].metrics | {"rows_cut": 2.0, "rows": 9.0})
    cut_too = replace(made, models=(cut, *made.models[1:]))
    assert html_page.model_headline(cut_too, 0).endswith("; 2 of 9 answers are cut at max_tokens")


def test_the_top_tells_prompt_set_and_facts():
    told = words(html_page.render(report(FEW)))
    assert "new: new on smoke No gate." in told and "prompt set smoke, 4 prompts date 2026-01-02" in told
    # hashes and ids are at the end
    assert re.search(r"SHA-256 of the prompts 5ha0{61} run abc123$", told), told[-200:]


def test_the_title_names_the_models_and_the_baseline():
    assert "<h1>new against old: new on smoke</h1>" in html_page.render(report(FEW_WORSE, FEW))


def test_scores_and_differences_stand_as_numbers_beside_their_drawings():
    page = html_page.render(report(FEW_WORSE, FEW, "score/mean: {max_drop: 0.1}"))
    told = words(page)
    assert "0.50 [0.07, 0.93]" in told and "0.75 [0.19, 0.99]" in told
    assert "-0.25 [-0.81, +0.40] can't tell p = 1.00, 4 pairs, detectable 0.86, allowed -0.1" in told
    labels = [value for name, value in Text(page).attributes if name == "aria-label"]
    assert "score, over all, new: 0.50 [0.07, 0.93]" in labels
    assert any(label.startswith("score, over all, new: -0.25 [-0.81, +0.40], can't tell") for label in labels)
    assert page.count('class="limit"') == 1  # the margin, on the one row that has a rule


def test_the_overall_score_comes_first():
    rows = chart_data.score_rows(report([{"alpha": 1.0, "zeta": 0.0}] * 3))
    assert [row.name for row in rows] == ["score", "alpha", "zeta"]


def test_repeated_prompts_have_their_pass_at_k_under_the_overall_score():
    made = report(FEW)
    names = ("score", "contains", "score/pass_at_4", "score/pass_hat_4", "contains/pass_at_4")
    estimates = dict.fromkeys(names, Estimate(0.5, 0.1, 0.3, 0.7, 4))
    rows = chart_data.score_rows(replace(made, models=(replace(made.models[0], estimates=estimates),)))
    assert [row.label for row in rows] == ["score, over all", "pass@4, over all", "pass^4, over all", "contains"]


def test_of_several_scorers_p_is_also_told_after_holm():
    ours, theirs = [{"a": 1.0, "b": 1.0}] * 40, [{"a": 0.0, "b": 1.0}] * 40
    details = {row.name: row.marks[0].detail for row in chart_data.difference_rows(report(ours, theirs))}
    assert details["a"].startswith("p < 0.001 (< 0.001 after Holm), 40 pairs")
    assert details["score"].startswith("p < 0.001, 40 pairs")


def test_each_tag_has_the_score_of_its_prompts():
    made = report(FEW)
    prompts = (prompt(0, tags=("maths", "hard")), prompt(1, tags=("maths",)), prompt(2, tags=("hard",)), prompt(3))
    made = replace(made, prompt_set=replace(made.prompt_set, prompts=prompts))
    found = [(row.name, row.marks[0].mean, row.prompts) for row in chart_data.tag_rows(made)]
    assert found == [("easy", 1.0, "1 prompt"), ("hard", 0.5, "2 prompts"), ("maths", 1.0, "2 prompts")]
    assert "By tag" in words(html_page.render(made))
    assert "By tag" not in words(html_page.render(report(FEW)))  # a single tag says nothing new


@pytest.mark.parametrize(
    ("label", "short"),
    [
        ("onnx int4", "onnx int4"),
        ("models:/phi3@champion", "phi3@champion"),
        ("models:/phi-3-mini-4k-instruct-onnx-int4/17", "phi-3-mini\u2026-onnx-int4/17"),
    ],
)
def test_a_long_name_is_cut_in_the_middle(label, short):
    assert chart_data.short_label(label) == short and len(short) <= 24


def test_what_was_not_measured_is_told_and_not_drawn():
    made = report([{"a": 1.0}, {"a": 0.0}], [{"b": 1.0}, {"b": 0.5}])
    page = html_page.render(made)
    row = next(row for row in chart_data.score_rows(made) if row.name == "a")
    assert [mark.missing for mark in row.marks] == [False, True]
    drawing = re.search(r'aria-label="a, old: n/a">(.*?)</svg>\s*</td>', page, re.DOTALL)[1]
    assert 'class="shape"' not in drawing and 'class="interval"' not in drawing
    assert "model size lower is better new n/a old n/a" in words(page)
    assert 'class="bar' not in page


def test_a_cost_is_told_in_its_unit_and_against_the_baseline():
    made = report(FEW, FEW)
    costs = ({"output_tokens_per_second": 129.04, "model_bytes": 117.4e6}, {"output_tokens_per_second": 64.52})
    models = tuple(replace(m, metrics=m.metrics | cost) for m, cost in zip(made.models, costs, strict=True))
    rows = {row["label"]: row["cells"] for row in chart_data.cost_rows(replace(made, models=models))}
    assert rows["output tokens/s"] == [
        {"text": "129.0", "share": 100.0, "ratio": "2.00\u00d7"},
        {"text": "64.5", "share": 50.0, "ratio": ""},
    ]
    assert [cell["text"] for cell in rows["model size"]] == ["117 MB", "n/a"]
    assert [cell["share"] for cell in rows["model size"]] == [100.0, None]


def test_latency_is_drawn_from_answers_that_did_not_fail():
    made = report(FEW)
    samples = list(made.models[0].samples)
    samples[0] = replace(samples[0], latency_seconds=99.0, error={"type": "refused", "message": "no"})
    samples[1] = replace(samples[1], latency_seconds=2.0)
    made = replace(made, models=(scored("new", samples, made.prompt_set),))
    (curve,) = chart_data.latency_curves(made)
    assert curve.points == ((0.5, pytest.approx(100 / 3)), (0.5, pytest.approx(200 / 3)), (2.0, 100.0))
    assert chart_data.latency_axis([curve]).high == 2.0


def test_a_run_in_which_all_failed_has_a_page():
    made = report(values(None, None), values(None, None))
    failure = {"type": "refused", "message": "too long"}
    samples = [replace(answer, error=failure, output="") for answer in made.models[0].samples]
    made = replace(made, models=(scored("new", samples, made.prompt_set), made.models[1]))
    page = html_page.render(made)
    assert "No answer was scored." in words(page)
    assert [answer["error"] for answer in page_data(page)["answers"]].count(failure) == 2


def test_an_interval_without_bounds_is_drawn_to_the_edge():
    made = report(FEW)
    estimates = {"score": Estimate(0.5, math.nan, -math.inf, math.inf, 1)}
    page = html_page.render(replace(made, models=(replace(made.models[0], estimates=estimates),)))
    assert "0.50 [-\u221e, \u221e]" in words(page)
    assert 'class="interval" x1="0.0%" x2="100.0%"' in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.25, 0.5, 0.75, 1)),
        (0, 18.5, (0, 5, 10, 15, 20)),
        (-0.32, 0.32, (-0.4, -0.2, 0, 0.2, 0.4)),
        (0.2, 0.2, (0, 0.25)),
        (0, 0.004, (0, 0.001, 0.002, 0.003, 0.004)),
    ],
)
def test_an_axis_has_round_steps_that_take_in_its_ends(low, high, ticks):
    axis = chart_data._axis(low, high)
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.at(axis.low), axis.at(axis.high)) == (0, 100)


def test_flipped_prompts_come_with_the_largest_loss_first_and_name_their_scorers():
    ours = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    theirs = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}]
    page = html_page.render(report(ours, theirs))
    assert page_data(page)["flips"] == [
        {"id": "id-1", "gap": -1.0, "worse": ["a", "b"], "better": [], "model": 0, "prompt": 1},
        {"id": "id-2", "gap": 0.0, "worse": ["b"], "better": ["a"], "model": 0, "prompt": 2},
        {"id": "id-0", "gap": 0.5, "worse": [], "better": ["a"], "model": 0, "prompt": 0},
    ]
    assert "1 worse, 1 better, 1 both" in words(page)


def test_every_answer_is_in_the_page_with_its_conversation():
    data = page_data(html_page.render(report(FEW_WORSE, FEW)))
    assert [(answer["model"], answer["prompt"]) for answer in data["answers"][:3]] == [(0, 0), (1, 0), (0, 1)]
    assert len(data["answers"]) == 8 and data["left_out"] == 0
    assert data["prompts"][1] == {
        "id": "id-1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question 1?"}],
        "expected": ["yes 1"],
        "cluster": None,
        "tags": ["easy"],
    }
    assert data["answers"][2] == {
        "model": 0,
        "repeat": 0,
        "output": "Answer of new to id-1",
        "finish_reason": "stop",
        "prompt_tokens": 12,
        "output_tokens": 3,
        "latency_seconds": 0.5,
        "scores": {"contains": 0},
        "reasons": {"contains": "contains says 0"},
        "error": None,
        "prompt": 1,
    }


def test_where_answers_are_too_many_the_flipped_and_wrong_are_kept_and_the_rest_is_counted(monkeypatch):
    made = report(values(*[1] * 30, 0, 1, 0), values(*[1] * 30, 1, 1, 0))
    monkeypatch.setattr(html_page, "DATA_CHARACTERS", 2500)
    page = html_page.render(made)
    data = page_data(page)
    kept = {data["prompts"][answer["prompt"]]["id"] for answer in data["answers"]}
    assert {"id-30", "id-32"} <= kept and len(json.dumps(data["answers"])) < 2500
    assert data["left_out"] == 66 - len(data["answers"]) > 0
    assert f"{data['left_out']} answers are left out of this page" in words(page)
    assert "samples.jsonl has all" in words(page)


def compared_report(*answers: tuple[float, ...]) -> Report:
    """A candidate beside a baseline, with the divergence of each token of each answer."""
    made = report(FEW, FEW)
    likely = ((" Burk", 0.83), (" the", 0.04), (" Bur", 0.02))
    found = Fidelity(
        tuple(
            TokenFidelity(f"id-{place}", np.array(kl), np.ones(len(kl), bool), np.zeros(len(kl)))
            for place, kl in enumerate(answers)
        ),
        worst={
            f"id-{place}": tuple(LikelyTokens(f" returns{at}", value, likely, likely) for at, value in enumerate(kl))
            for place, kl in enumerate(answers)
        },
    )
    models = replace(made.models[0], fidelity=found), made.models[1]
    return replace(made, models=models, changes=(fidelity.estimates(found, {}), {}))


def test_the_answers_that_differ_the_most_have_the_likeliest_tokens_of_both_models():
    page = words(html_page.render(compared_report((0.49, 0.0), (0.0, 1.2, 0.001))))
    assert "id-0 KL" in page and "id-1 KL" in page
    assert "returns1 1.20 ' Burk' 83%, ' the' 4%, ' Bur' 2% ' Burk' 83%, ' the' 4%, ' Bur' 2%" in page


def test_an_answer_without_any_divergence_is_not_among_those_that_differ_the_most():
    page = words(html_page.render(compared_report((0.49, 0.0), (0.0, 0.0))))
    assert "id-0 KL" in page and "id-1 KL" not in page
    page = words(html_page.render(compared_report((0.0, 0.0), (0.0, 0.0))))
    assert "Both models have the same distribution at each token." in page
    assert " KL " not in page and "largest mean divergence" not in page


def test_each_link_to_a_section_has_the_name_of_its_heading():
    made = report(FEW_WORSE, FEW, history=({"score": history(0.4, 0.5)}, {}))
    page = html_page.render(replace(made, changes=compared_report((0.49, 0.0)).changes))
    links = dict(re.findall('<a href="#([a-z]+)">([^<]+)</a>', page))
    headings = dict(re.findall('<h2 id="([a-z]+)-title">([^<]+)</h2>', page))
    assert links == headings and len(links) >= 6


def history(*means: float) -> tuple[Point, ...]:
    states = ("pass", "regress", "inconclusive", "none")
    return tuple(
        Point(f"{place:032x}", 1.77e9 + place * 86400, str(place + 1), states[place % 4], mean, mean - 0.1, mean + 0.1)
        for place, mean in enumerate(means)
    )


def test_history_ends_with_this_run_and_is_there_only_if_there_is_any():
    made = report(FEW)
    assert 'id="history"' not in html_page.render(made)
    made = replace(made, history=({"contains": (), "score": history(0.5, 0.6, math.nan, 0.7)},))
    (trend,) = chart_data.trends(made)
    assert [moment.when for moment in trend.moments[:1]] == ["2026-02-02 02:40"]
    assert (trend.moments[-1].when, trend.moments[-1].mean) == ("this run", 0.75)
    assert trend.unbroken() == [[0, 1], [3, 4]]  # the line has a gap where a run has no value
    page = html_page.render(made)
    assert page.count('class="now"') == 1
    assert "version 2, gate regress: 0.60 [0.50, 0.70]" in page


# That it does no harm ------------------------------------------------------------------------------------------------


def test_a_baseline_with_the_name_of_the_candidate_has_no_trend_of_its_own():
    made = report(FEW_WORSE, FEW, history=({"score": history(0.5)}, {"score": history(0.5)}))

    def drawn(*names: str) -> list[int]:
        models = [replace(m, model=replace(m.model, name=name)) for m, name in zip(made.models, names, strict=True)]
        return [trend.model for trend in chart_data.trends(replace(made, models=tuple(models)))]

    assert drawn("supportbot", "supportbot") == [0]
    assert drawn("smollm2, onnx int4", "smollm2, pipeline") == [0, 1]


def hostile_report() -> Report:
    made = report(FEW_WORSE, FEW, "score/mean: {max_drop: 0.1}")
    messages = ({"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE})
    asked = (prompt(0, id=f"x{HOSTILE}", messages=messages, cluster=HOSTILE, tags=(HOSTILE,), expected=(HOSTILE,)),)
    prompt_set = PromptSet(HOSTILE, HOSTILE, asked + made.prompt_set.prompts[1:], "0" * 64)
    models = []
    for model in made.models:
        bad = sample(asked[0], HOSTILE, dict(model.samples[0].scores), output=HOSTILE)
        if model is made.models[1]:
            bad = replace(bad, error={"type": HOSTILE, "message": HOSTILE})
        rest = [replace(answer, output=HOSTILE, reasons={"contains": HOSTILE}) for answer in model.samples[1:]]
        models.append(scored(f"{model.model.label} {HOSTILE}", [bad, *rest], prompt_set))
    check = replace(made.verdict.checks[0], reason=HOSTILE, metric=f"score{HOSTILE}")
    verdict = gate.Verdict("inconclusive", (check,))
    return replace(
        made,
        title=HOSTILE,
        prompt_set=prompt_set,
        models=tuple(models),
        verdict=verdict,
        verdicts=(verdict, made.verdicts[1]),
        facts={HOSTILE: HOSTILE},
        history=({"score": (replace(history(0.5)[0], version=HOSTILE),)}, {}),
    )


@pytest.mark.fault("security: markup from models and prompts")
def test_nothing_that_a_model_or_a_prompt_says_becomes_markup():
    made = hostile_report()
    page = html_page.render(made)
    page.encode("utf-8")
    assert Text(page).tags.count("script") == 2 and "img" not in Text(page).tags
    assert not [name for name, _ in Text(page).attributes if name.startswith("on")]
    assert "49" not in re.search("<h1>(.*?)</h1>", page)[1]  # {{ 7 * 7 }} stays as it is
    data = page_data(page)
    assert data["answers"][0]["output"] == HOSTILE == data["prompts"][0]["messages"][0]["content"]
    assert data["answers"][1]["error"] == {"type": HOSTILE, "message": HOSTILE}
    assert data["answers"][2]["reasons"] == {"contains": HOSTILE}


def test_what_can_not_be_seen_is_written_out():
    page = html_page.render(hostile_report())
    heading = html.unescape(re.search("<h1>(.*?)</h1>", page)[1])
    assert "[U+0000][U+001B][31m [U+202E]gnp.exe [U+D800]" in heading
    body = page.split('<script type="application/json"')[0]
    assert not re.search("[\x00-\x08\x1b\u202e\ud800]", body)
    assert summary.visible("a\tb\r\nc \u05d0 \U0001f600") == "a\tb\r\nc \u05d0 \U0001f600"


def test_the_policy_lets_only_the_pages_own_script_run_and_nothing_be_fetched():
    page = html_page.render(report(FEW))
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('Content-Security-Policy" content="(.*?)"', page)[1]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colours", "page"), [(chart_data.COLOURS, "#ffffff"), (chart_data.DARK_COLOURS, "#14171b")])
def test_marks_stand_out_from_the_page_and_no_two_models_look_the_same(colours, page):
    for colour in colours:
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11
    styles = [chart_data.model_style(place) for place in range(42)]
    assert len({(style["colour"], style["path"]) for style in styles}) == 42


# The same as matplotlib's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [report(FEW_WORSE, FEW, "score/mean: {max_drop: 0.1}"), hostile_report()])
def test_the_figures_are_drawn_without_a_display(made):
    drawn = plots.figures(replace(made, title=f"{made.title} $x_{{$"))  # a dollar sign is no formula
    assert list(drawn) == ["scores", "differences", "latency"]
    for figure in drawn.values():
        image = io.BytesIO()
        figure.savefig(image, format="png")
        assert image.getvalue().startswith(b"\x89PNG")


def test_a_figure_shows_each_mean_and_leaves_out_what_is_missing():
    drawn = plots.figures(report([{"a": 1.0}, {"a": 0.0}], [{"b": 1.0}, {"b": 0.5}]))
    means = [line.get_xdata()[0] for line in drawn["scores"].axes[0].lines if line.get_linestyle() == "None"]
    assert means == [0.5, 0.75, 0.5, 0.75]  # score of both, a of one, b of the other
    assert list(plots.figures(report(values(None)))) == ["latency"]


# As Markdown and as XML -----------------------------------------------------------------------------------------------

MARKUP = {
    "an image with a handler": '<img src=x onerror="window.pwned=1">',
    "a link with a script": "[x](javascript:window.pwned=1)",
    "a link by reference": "[x] [y] ![z][y]",
    "an address": "see https://evil.example/a_b www.evil.example",
    "a table's cell": "a | b || c",
    "code and emphasis": "`a` **b** _c_ ~~d~~ *e*",
    "line breaks": "a\n\n# b\n\n- c\n\n[x]: https://evil.example",
    "entities and escapes": "&lt;b&gt; &#60; \\<b> \\_",
    "a mention": "ask @somebody",
    "a comment that never ends": "<!-- x",
}


def told_of(name: str, label: str = "new") -> Report:
    """A report whose only flip, title and label are these."""
    made = report(FEW, FEW_WORSE)
    ids = {"id-1": name}
    models = []
    for model in made.models:
        samples = tuple(replace(sample, id=ids.get(sample.id, sample.id)) for sample in model.samples)
        models.append(replace(model, samples=samples))
    form = SimpleNamespace(fields=forms.NAMES)
    models = [replace(model, model=replace(model.model, form=form)) for model in models]
    models[0] = replace(models[0], model=replace(models[0].model, label=label))
    return replace(made, models=tuple(models), title=name)


SHOWN_AS_MARKUP = {
    what: pytest.mark.fault(f"reports: {what} as id")
    for what in MARKUP
    if what
    not in ("a link by reference", "an address", "a table's cell", "a mention")  # MLflow's page alone makes links
}


@pytest.mark.parametrize(
    "name", [pytest.param(text, id=what, marks=SHOWN_AS_MARKUP.get(what, ())) for what, text in MARKUP.items()]
)
def test_an_id_shows_as_text_in_the_description(name):
    from markdown_it import MarkdownIt

    text = summary.markdown(told_of(name, name))
    plain = " ".join(name.split())
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    renderer.validateLink = lambda _: True
    page = renderer.render(text)
    seen = Text(page)
    assert set(seen.tags) <= {"h1", "table", "thead", "tbody", "tr", "th", "td", "p", "strong", "ul", "li"}
    assert f"1 better ({plain})" in words(page)
    assert words(page).count(plain) == 5  # title, table, two remarks that begin with the label, the flip
    assert len(re.findall("<tr>", page)) == len(text.split("\n\n")[1].splitlines()) - 1
    assert page.count("<th>") + page.count("<th ") == 3


@pytest.mark.fault("reports: control characters and half characters in JUnit's XML")
def test_no_text_breaks_the_xml():
    from xml.etree import ElementTree

    made = told_of(HOSTILE, HOSTILE)
    root = ElementTree.fromstring(summary.junit(made).encode())
    assert "[U+001B]" in root.get("name") or "window.pwned" in root.get("name")
    assert "window.pwned" in root[0].get("name")


@pytest.mark.fault("reports: a terminal's escape as id, and a very long one")
def test_a_remark_is_one_short_line_without_a_terminal_s_escapes():
    told = told_of("\x1b[2J\nerror: no" + "x" * 10_000).remarks
    assert "1 better ([U+001B][2J error: noxxx" in told[-1]
    assert all(len(line) < 400 and line.isprintable() for line in told)


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a screen, which finds no host but this one."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1200,900",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    driver.get("data:,")  # away from the browser's own first page, which fetches much
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Writes a report's page and opens it; afterwards, nothing was complained of and nothing fetched."""

    def open_page(made: Report):
        path = tmp_path / "report.html"
        path.write_text(html_page.render(made), encoding="utf-8")
        browser.get(path.as_uri())
        return browser

    browser.get_log("performance")
    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    fetched = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert fetched == {(tmp_path / "report.html").as_uri()}


def until(browser, said: str) -> None:
    """Waits for the count to say so."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, 0.05).until(lambda _: browser.find_element("id", "count").text == said)


def search(browser, query: str) -> None:
    box = browser.find_element("id", "query")
    box.clear()
    box.send_keys(query)


def choose(browser, name: str, option: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_visible_text(option)


def clear(browser) -> None:
    browser.find_element("css selector", "button[type=reset]").click()


def emulate(browser, **media) -> None:
    features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})


@pytest.mark.slow
def test_answers_are_listed_in_the_order_that_is_chosen(opened):
    made = report([{"contains": 1.0}, {"contains": 0.0}, {"contains": 0.4}, {"contains": None}])
    model = made.models[0]
    seconds = (1.0, 3.0, 2.0, 4.0)
    samples = tuple(replace(one, latency_seconds=at) for one, at in zip(model.samples, seconds, strict=True))
    page = opened(replace(made, models=(replace(model, samples=samples),)))

    def listed() -> str:
        return " ".join(found.text for found in page.find_elements("css selector", "#rows summary .id"))

    for order, expected in (
        ("lowest score first", "id-1 id-2 id-0 id-3"),  # the unscored one last
        ("highest score first", "id-0 id-2 id-1 id-3"),
        ("slowest first", "id-3 id-1 id-2 id-0"),
        ("as listed", "id-0 id-1 id-2 id-3"),
    ):
        choose(page, "order", order)
        assert listed() == expected, order


@pytest.mark.slow
def test_answers_are_searched_filtered_and_opened(opened):
    from selenium.webdriver.common.keys import Keys

    made = report([{"contains": 1.0}, {"contains": 0.0}, {"f1": 0.4}, {"f1": None}], [{"contains": 1.0}] * 4)
    prompts = (prompt(0, tags=("hard",)), *(prompt(place, cluster="geo") for place in (1, 2, 3)))
    page = opened(replace(made, prompt_set=replace(made.prompt_set, prompts=prompts)))
    until(page, "8 of 8 answers")
    for query, said in (("QUESTION 1", 2), ("answer of old", 4), ("f1 says", 2), ("id-3", 2), ("nowhere", 0)):
        search(page, query)
        until(page, f"{said} of 8 answers")
    assert page.find_element("id", "rows").text == "No answer matches."
    clear(page)
    until(page, "8 of 8 answers")
    for name, option, said in (
        ("model", "new", 4),
        ("scorer", "f1", 2),
        ("state", "partial", 1),
        ("state", "wrong", 1),
        ("state", "unscored", 1),
        ("group", "tag: hard", 2),
        ("group", "cluster: geo", 6),
    ):
        choose(page, name, option)
        until(page, f"{said} of 8 answers")
        clear(page)
        until(page, "8 of 8 answers")
    page.find_element("id", "flips-only").click()
    until(page, "2 of 8 answers")
    clear(page)
    until(page, "8 of 8 answers")
    summary = page.find_elements("css selector", ".answer > summary")[2]
    summary.send_keys(Keys.ENTER)
    page.implicitly_wait(20)  # the body is made when it is opened
    body = page.find_element("css selector", ".answer[open] .body").text
    for part in ("system\nBe brief.", "user\nQuestion 1?", "expected\nyes 1", "Answer of new to id-1", "cluster geo"):
        assert part in body
    assert "0.00 wrong contains contains says 0.0" in body
    page.find_element("css selector", ".answer[open] .body button").click()
    until(page, "2 of 8 answers to the prompt id-1")
    page.find_element("tag name", "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "query"


@pytest.mark.slow
def test_flipped_prompts_stand_side_by_side_with_the_worse_first(opened):
    page = opened(report(values(*[1, 0] * 15), values(*[0, 1] * 15)))
    cards = page.find_elements("css selector", ".flips .card")
    assert len(cards) == 10
    first = cards[0].text
    for part in ("-1.00", "worse by contains", "Answer of new to id-1", "Answer of old to id-1", "contains says 1"):
        assert part in first
    assert len({side.rect["y"] for side in cards[0].find_elements("css selector", ".pair > div")}) == 1
    page.find_element("css selector", ".flips > button").click()
    assert len(page.find_elements("css selector", ".flips .card")) == 20


@pytest.mark.slow
@pytest.mark.fault("security: script tags in the report, in a browser")
def test_what_a_model_says_is_shown_and_never_run(opened):
    page = opened(hostile_report())
    until(page, "8 of 8 answers")
    search(page, "nowhere")
    until(page, "0 of 8 answers")
    search(page, "<img src=x onerror")
    until(page, "8 of 8 answers")
    page.execute_script("document.querySelectorAll('.answer > summary').forEach((summary) => summary.click())")
    time.sleep(0.3)
    assert page.execute_script("return [typeof window.pwned, document.images.length]") == ["undefined", 0]
    shown = page.find_element("css selector", ".answer[open] .said.output").text
    assert SCRIPT in shown and "[U+0000][U+001B][31m [U+202E]gnp.exe [U+D800]" in shown


@pytest.mark.slow
def test_five_thousand_answers_filter_at_once(opened):
    scores = [1.0, 0.0, 0.5, None, 1.0]
    page = opened(report(values(*scores * 500), values(*[1.0] * 2500)))
    until(page, "5,000 of 5,000 answers")
    assert len(page.find_elements("css selector", "#rows .answer")) == 50
    search(page, "id-249")
    until(page, "22 of 5,000 answers")  # 249 and 2490 to 2499, twice
    seconds = page.execute_script(
        "const start = performance.now(); refresh(); return (performance.now() - start) / 1000"
    )
    assert seconds < 0.5
    clear(page)
    until(page, "5,000 of 5,000 answers")
    choose(page, "state", "wrong")
    until(page, "500 of 5,000 answers")
    page.find_element("id", "next").click()
    assert page.find_element("id", "page").text == "51 to 100 of 500"
    assert page.find_element("css selector", "#rows .id").text == "id-251"


@pytest.mark.slow
def test_the_page_is_dark_where_that_is_preferred_fits_a_phone_and_prints(opened):
    made = report(FEW_WORSE, FEW, "score/mean: {max_drop: 0.1}", history=({"score": history(0.4, 0.5)}, {}))
    page = opened(made)
    background = "return getComputedStyle(document.body).backgroundColor"
    try:
        emulate(page, scheme="dark")
        assert page.execute_script(background) == "rgb(20, 23, 27)"
        emulate(page)
        assert page.execute_script(background) == "rgb(255, 255, 255)"
        size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        emulate(page, media="print", scheme="dark")
        assert page.execute_script(background) == "rgb(255, 255, 255)"
        assert not page.find_element("css selector", ".filters").is_displayed()
        assert page.find_element("css selector", "#scores .plot").is_displayed()
    finally:
        emulate(page)
    printed = page.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


@pytest.fixture
def sized(browser):
    """Sets the width of the page; afterwards, it is the window's again."""

    def set_width(width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield set_width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


AMOUNT_ENDS = """
const end = (cell) => {
  const range = document.createRange();
  range.selectNode(cell.firstChild);
  return Math.round(range.getBoundingClientRect().right);
};
const rows = [...document.querySelectorAll(".costs tbody")];
return rows.map((row) => [...row.querySelectorAll(".numbers")].map(end));
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 500, 800, 1200])
def test_the_costs_of_the_models_end_under_one_another(opened, sized, width):
    made = report(FEW, FEW)
    speeds = ({"output_tokens_per_second": 1453.1, "model_bytes": 104e6}, {"output_tokens_per_second": 9.4})
    costs = [speed | {"peak_memory_bytes": memory} for speed, memory in zip(speeds, (11_179e6, 11_528e6), strict=True)]
    models = [
        replace(m, metrics=m.metrics | cost, model=replace(m.model, label=f"models:/supportbot/{place}"))
        for place, (m, cost) in enumerate(zip(made.models, costs, strict=True))
    ]
    sized(width)
    page = opened(replace(made, models=tuple(models)))
    ends = page.execute_script(AMOUNT_ENDS)
    assert ends and all(len(set(row)) == 1 for row in ends), ends
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_the_table_of_tokens_breaks_no_word_and_no_number_on_a_narrow_page(opened, sized):
    sized(500)
    page = opened(compared_report((0.49, 0.001, 0.02)))
    rows = """
    const range = document.createRange(), heights = (cell) => {
      range.selectNodeContents(cell);
      return new Set([...range.getClientRects()].map((box) => Math.round(box.bottom))).size;
    };
    return [...document.querySelectorAll(arguments[0])].map(heights);
    """
    for cells in (".farthest .number", ".farthest .token", ".farthest .whole"):
        found = page.execute_script(rows, cells)
        assert found and set(found) == {1}, cells
    assert page.execute_script("return document.documentElement.scrollWidth") <= 500


@pytest.mark.slow
def test_a_closed_answer_of_the_tokens_shows_that_it_opens(opened):
    page = opened(compared_report((0.49, 0.0), (0.2, 0.1)))
    signs = (
        "return [...document.querySelectorAll('#tokens summary')].map((s) => getComputedStyle(s, '::before').content)"
    )
    assert page.execute_script(signs) == ['"\u25be"', '"\u25b8"']


@pytest.mark.slow
def test_pages_of_answers_are_turned_only_where_there_are_several(opened):
    page = opened(report(values(*[1, 0] * 30)))
    until(page, "60 of 60 answers")
    assert page.find_element("id", "next").is_displayed()
    choose(page, "state", "wrong")
    until(page, "30 of 60 answers")
    assert not page.find_element("id", "next").is_displayed()


@pytest.mark.slow
def test_without_scripts_the_page_still_has_its_verdict_and_figures(opened, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = opened(report(FEW_WORSE, FEW))
        # the driver's own questions are scripts as well: the page is read as a document
        root = page.execute_cdp_cmd("DOM.getDocument", {"depth": -1})["root"]["nodeId"]
        shown = page.execute_cdp_cmd("DOM.getOuterHTML", {"nodeId": root})["outerHTML"]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert 'id="browser" class="hidden"' in shown
    assert "The answers are listed by a script, which is off here." in words(shown)
    assert "No gate. new scores 0.25 less than old" in words(shown) and 'class="shape"' in shown


@pytest.mark.slow
@pytest.mark.fault("reports: ids with markup in MLflow's own page")
def test_mlflow_s_page_shows_the_ids_as_text(browser, tracking_server):
    import mlflow
    from selenium.webdriver.support.ui import WebDriverWait

    client = mlflow.MlflowClient(tracking_server)
    run = client.create_run("0")
    told = "\n\n".join(summary.escaped(name) for name in MARKUP.values())
    client.set_tag(run.info.run_id, "mlflow.note.content", summary.markdown(told_of(HOSTILE)) + told + "\n\nend.")
    client.set_terminated(run.info.run_id)
    browser.get(f"{tracking_server}/#/experiments/0/runs/{run.info.run_id}")
    said = "return document.body.textContent"  # also of what is below the fold
    WebDriverWait(browser, 60, 0.2).until(lambda _: "end." in browser.execute_script(said))
    text = " ".join(browser.execute_script(said).split())
    assert [name for name in MARKUP.values() if " ".join(name.split()) not in text] == []
    assert browser.execute_script("return window.pwned") is None
    assert (
        browser.find_elements("css selector", "img[src='x'], a[href*='evil'], a[href*='pwned'], a[href*='somebody']")
        == []
    )
    browser.get("data:,")
    browser.get_log("browser"), browser.get_log("performance")
