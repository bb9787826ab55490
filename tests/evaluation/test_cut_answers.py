"""An evaluation of two logged wrappers whose answers are cut, and which are compared token by token."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import REPOSITORY
from support.scored import facts, prompts, report, scored

from entrypoints import evaluate
from slm.base.errors import BadInput
from slm.engines import answering
from slm.evaluation import scoring
from slm.report import summary
from slm.scorers.built_in import Score
from slm.verdict import gate

WORD_PROBLEMS = [
    "Ben has 3 bags with 12 nuts each and eats 7 nuts. How many are left? Think step by step.",
    "A tram has 40 seats. 26 are taken, and 9 more people sit down. How many seats are free? Explain every step.",
    "Mia reads 15 pages a day. How many pages does she read in two weeks? Explain every step.",
    "A rope of 50 m is cut into pieces of 4 m. How many whole pieces are there? Think step by step.",
]
EXPECTED = ["29", "5", "210", "12"]


@pytest.fixture(scope="module")
def evaluated(wrappers, tmp_path_factory):
    """(exit code, what was printed, the runs by name, the folder of the parent's artifacts)"""
    import contextlib
    import io

    import mlflow

    folder = tmp_path_factory.mktemp("cut")
    rows = zip(WORD_PROBLEMS, EXPECTED, strict=True)
    lines = [json.dumps({"prompt": asked, "expected": expected, "scorers": ["number"]}) for asked, expected in rows]
    (folder / "problems.jsonl").write_text("\n".join(lines), encoding="utf-8")
    uri, uris = wrappers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "cut answers")
        patch.setenv("PHI3_MLFLOW_CACHE", str(folder / "cache"))
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.create_experiment("cut answers", artifact_location=str(folder / "artifacts"))
        options = {
            "model_uris": uris["onnx int4"],
            "baseline": uris["onnx int8"],
            "prompts": str(folder / "problems.jsonl"),
            "max_tokens": 12,
            "thresholds": "gates/default.yaml",
        }
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = evaluate.main([f"--{name}={value}" for name, value in options.items()])
        client = mlflow.MlflowClient()
        runs = client.search_runs([experiment])
        [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        [child] = [run for run in runs if run.info.run_name == uris["onnx int4"]]
        traces = client.search_traces([experiment], max_results=50)
        place = client.download_artifacts(parent.info.run_id, "evaluation", str(folder))
        mlflow.set_tracking_uri(None)
    return code, printed.getvalue(), parent, child, traces, place


def test_the_time_to_generate_does_not_count_answers_that_are_reused(
    evaluated, wrappers, tmp_path, monkeypatch, capsys
):
    """Each check is of models whose answers to these prompts, but for one, are kept."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", wrappers[0])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cut answers")
    cache = Path(evaluated[-1]).parent
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(cache / "cache"))
    mlflow.set_tracking_uri(wrappers[0])

    def takes(**options):
        options = {
            "model_uris": wrappers[1]["onnx int4"],
            "baseline": wrappers[1]["onnx int8"],
            "prompts": str(cache / "problems.jsonl"),
            "max_tokens": 12,
            "check": "true",
        } | options
        assert evaluate.main([f"--{name}={value}" for name, value in options.items()]) == 0
        return next(line[10:] for line in capsys.readouterr().out.splitlines() if line.startswith("takes"))

    assert takes() == "0 s: 8 of 8 answers are reused"
    some = re.fullmatch(r"about \d+ s, as in earlier runs; 8 of 16 answers are reused", takes(repeats=2))
    assert some
    assert re.fullmatch(r"about \d+ s, as in earlier runs", takes(resume="false"))
    assert re.fullmatch(r"about \d+ s, as in earlier runs", takes(thresholds="gates/default.yaml"))  # measures all
    assert re.fullmatch(
        r"about \d+ s, as in earlier runs; 4 of 8 answers are reused", takes(model_uris=wrappers[1]["onnx fp32"])
    )
    mlflow.set_tracking_uri(None)


def test_cut_answers_are_a_metric_of_each_model_and_of_the_run(evaluated):
    _, _, parent, child, _, _ = evaluated
    assert child.data.metrics["rows_cut"] == 4 and child.data.metrics["rows_cut/share"] == 1
    assert parent.data.metrics["rows_cut/share"] == 1


def test_cut_answers_are_told_on_the_console_with_the_remedy(evaluated):
    _, printed, _, child, _, _ = evaluated
    label = child.info.run_name
    assert (
        f"warning: {label}: 4 of 4 answers are cut at max_tokens=12, and count by their scores; set max_tokens higher"
        in printed.splitlines()
    )


def test_cut_answers_are_a_part_of_the_verdict_and_a_filter_of_the_report(evaluated):
    *_, place = evaluated
    page = (Path(place) / "report.html").read_text(encoding="utf-8")
    assert "8 of 8 answers are cut at max_tokens" in page
    assert '<select id="ending">' in page and '["length", "cut at max_tokens"]' in page


def test_the_ready_made_gate_does_not_pass_cut_answers(evaluated):
    code, printed, parent, _, _, place = evaluated
    assert code == 3 and parent.data.tags["gate"] == "regress"
    assert "regress      rows_cut/share max 0.05: 1 is above 0.05" in printed
    assert 'name="rows_cut/share max 0.05"' in (Path(place) / "junit.xml").read_text(encoding="utf-8")


def test_fidelity_is_measured_where_both_models_can_be_read(evaluated):
    _, printed, parent, child, _, place = evaluated
    metrics = child.data.metrics
    names = {f"fidelity/{name}/{figure}" for name in ("kl", "top1") for figure in ("mean", "ci95_low", "ci95_high")}
    assert names <= parent.data.metrics.keys() and names <= metrics.keys()
    assert metrics["fidelity/tokens"] == 48  # 12 of each answer of the baseline
    assert 0 < metrics["fidelity/kl/ci95_low"] < metrics["fidelity/kl/mean"] < metrics["fidelity/kl/ci95_high"]
    assert metrics["fidelity/kl/mean"] < metrics["fidelity/kl/p99"]
    assert 0.5 < metrics["fidelity/top1/mean"] < 1 and "fidelity/nll_difference/mean" in metrics
    assert {"flips/worse/mean", "flips/better/ci95_low", "answers_changed/mean"} <= metrics.keys()
    assert "token by token: KL " in printed and "of the likeliest tokens kept, 48 tokens of 4 answers" in printed
    page = (Path(place) / "report.html").read_text(encoding="utf-8")
    assert "Token by token" in page and page.count('<details class="card"') == 4


def test_the_trace_of_an_answer_has_its_prompts_fidelity(evaluated):
    *_, child, traces, _ = evaluated
    found = [
        {one.name: one.feedback.value for one in trace.info.assessments if one.feedback}
        for trace in traces
        if trace.info.trace_metadata["mlflow.sourceRun"] == child.info.run_id
    ]
    assert len(found) == 4 and all({"fidelity/kl", "fidelity/top1", "number"} <= names.keys() for names in found)
    mean = child.data.metrics["fidelity/kl/mean"]  # all answers have 12 tokens
    assert sum(names["fidelity/kl"] for names in found) / 4 == pytest.approx(mean)


# ---------------------------------------------------------------------------------------------------------------------
# How a cut answer counts


@pytest.mark.parametrize(("cut", "value"), [("score", 1.0), ("wrong", 0.0), ("unscored", None)])
def test_a_cut_answer_counts_as_asked_and_a_whole_one_by_its_score(cut, value):
    prompt = prompts(1).prompts[0]
    question = answering.Question(prompt, 0, {}, "key", "text", None)

    def right(call, prompt, text):
        return {call.name: Score(1.0, "right")}

    for reason, expected in (("length", value), ("stop", 1.0)):
        answer = {"text": "yes", "finish_reason": reason, "prompt_tokens": 1, "output_tokens": 1, "error": ""}
        sample = answering._sample(facts(), question, answer, right, cut)
        assert sample.scores == {"contains": expected}
        if expected != 1.0:
            assert sample.reasons == {"contains": f"cut at max_tokens, and cut={cut}"}


def with_cut(share: int, label: str, **parameters):
    model = scored([{"contains": 1.0}] * 4, prompts(4))
    metrics = model.metrics | {"rows_cut": float(share), "rows_cut/share": share / 4}
    return replace(model, model=facts(label=label), metrics=metrics, record={"parameters": parameters})


def test_the_warning_says_how_cut_answers_count():
    none = gate.Verdict("none", ())
    for cut, words in (("wrong", "count as wrong"), ("unscored", "do not count")):
        made = report([with_cut(1, "a", max_tokens=64, cut=cut)], prompts(4), none)
        assert summary.cut_remarks(made) == [
            f"warning: a: 1 of 4 answers is cut at max_tokens=64, and {words}; set max_tokens higher"
        ]
    assert summary.cut_remarks(report([with_cut(0, "a")], prompts(4), none)) == []


def test_a_difference_says_that_the_models_are_cut_at_different_rates():
    none = gate.Verdict("none", ())
    made = report([with_cut(3, "a"), with_cut(1, "b")], prompts(4), none)
    assert summary.cut_remarks(made)[-1] == (
        "warning: 75% of a's answers are cut, and 25% of b's: a part of the difference may come from that"
    )
    alike = report([with_cut(1, "a"), with_cut(1, "b")], prompts(4), none)
    assert not [line for line in summary.cut_remarks(alike) if "difference" in line]


# ---------------------------------------------------------------------------------------------------------------------
# The gate


@pytest.mark.parametrize("metric", ["fidelity/kl/mean", "fidelity/kl/p99", "fidelity/tokens", "flips/worse/mean"])
def test_a_gate_may_name_what_a_comparison_measures_and_needs_a_baseline_for_it(metric):
    rules = gate.read_thresholds(f"{metric}: {{max: 3}}", "gate.yaml")
    gate.check_names(rules, {"contains"}, (), 1)
    gate.check_baseline(rules, True)
    with pytest.raises(BadInput, match=f"thresholds: {metric} compares with a baseline; add baseline="):
        gate.check_baseline(rules, False)
    [check] = gate.decide(rules, {}, {}, is_first=True).checks
    assert (check.state, check.reason) == ("none", "there is no champion yet")


def test_fidelity_that_was_not_measured_is_inconclusive_with_the_reason():
    rules = gate.read_thresholds("fidelity/top1/mean: {min: 0.9}", "gate.yaml")
    [check] = gate.decide(rules, {"rows": 4.0}, {}, not_compared="it is an endpoint").checks
    assert (check.state, check.reason) == ("inconclusive", "not measured: it is an endpoint")


@pytest.mark.parametrize(("word", "is_sample"), [("auto", True), ("all", False), ("off", None)])
def test_the_word_says_how_much_is_compared_and_texts_are_compared_whole(monkeypatch, word, is_sample):
    given = []
    monkeypatch.setattr(scoring, "score_model", lambda *words: given.append(words[5]))
    texts = SimpleNamespace(texts=("a text",))
    scoring.score_models([("a", "a"), ("b", "b")], texts, SimpleNamespace(fidelity=word), (), baseline=1)
    assert len(given) == 2 and given[0] is given[1]
    if is_sample is None:
        assert given[0] is None
    else:
        assert (given[0].is_sample, given[0].on_texts.is_sample) == (is_sample, False)


def test_a_relative_rule_on_fidelity_is_refused():
    rules = gate.read_thresholds("fidelity/kl/mean: {max_drop: 0.1}", "gate.yaml")
    with pytest.raises(BadInput, match="compares with the baseline already; write `min` or `max`"):
        gate.check_names(rules, {"contains"}, (), 1)


@pytest.mark.parametrize("name", ["default", "small-model"])
def test_the_ready_made_gates_name_metrics_of_an_evaluation(name):
    rules = gate.read_thresholds((REPOSITORY / "gates" / f"{name}.yaml").read_text("utf-8"), f"{name}.yaml")
    gate.check_names(rules, {"contains"}, (), 1)
    assert {"rows_cut/share", "rows_unscored"} <= {rule.metric for rule in rules}
