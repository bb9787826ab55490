"""Small faults that once could be put into the code unseen: each test fails when its guard is taken out."""

import json
import threading
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import pytest

from slm.answers import kept_answers
from slm.answers.forms import Form
from slm.answers.loading import LoadedModel
from slm.engines import answering
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.report import chart_data, summary
from slm.scorers.built_in import json_schema
from slm.verdict import estimation, gate, scored_model, statistics

GENERATION = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}


def prompts(count: int, clusters: int = 0) -> PromptSet:
    """Prompts of the tag `even` or `odd`; with `clusters`, in that many groups of neighbours."""
    made = tuple(
        Prompt(
            id=f"p{place}",
            messages=None,
            prompt=f"Question {place}",
            expected=("yes",),
            scorers=(ScorerCall("contains", {}),),
            cluster=f"c{place * clusters // count}" if clusters else None,
            tags=("all",),
        )
        for place in range(count)
    )
    return PromptSet("set", "set.jsonl", made, "0" * 64)


def model(ask=None, **changes) -> LoadedModel:
    told = dict.fromkeys(field.name for field in fields(LoadedModel)) | {"label": "m", "uri": "http://host/v1"}
    form = Form("prompt", False)
    return LoadedModel(**told | {"form": form, "ask": ask, "sha256": "", "identity": "", "load_seconds": 0.0} | changes)


def scored(values: list[dict], prompt_set: PromptSet, **changes) -> scored_model.ScoredModel:
    samples = tuple(
        scored_model.Sample(
            id=prompt.id,
            repeat=0,
            model="m",
            messages=[{"role": "user", "content": prompt.prompt}],
            expected=list(prompt.expected),
            output="text",
            finish_reason="stop",
            prompt_tokens=1,
            output_tokens=1,
            latency_seconds=0.1,
            scores=scores,
            reasons=dict.fromkeys(scores, ""),
            error=None,
        )
        for prompt, scores in zip(prompt_set.prompts, values, strict=True)
    )
    estimates = estimation.estimate(samples, prompt_set)
    metrics = scored_model.metrics_of(model(), samples, estimates)
    return replace(scored_model.ScoredModel(model(), samples, estimates, metrics, 0), **changes)


def report(models: list, prompt_set: PromptSet, verdict: gate.Verdict, compared: dict | None = None) -> summary.Report:
    count, none = len(models), gate.Verdict("none", ())
    return summary.Report(
        title="t",
        prompt_set=prompt_set,
        models=tuple(models),
        verdict=verdict,
        verdicts=(verdict, none)[:count],
        baseline=1 if count > 1 else None,
        differences=(compared or {}, {})[:count],
        history=({},) * count,
        facts={"run": "r"},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Clusters, from the prompt set to the figures


def by_cluster(count: int, clusters: int) -> list[dict]:
    """Scores that are alike within a cluster, so that a cluster counts little more than one prompt."""
    return [{"contains": float(place * clusters // count % 2)} for place in range(count)]


def width(figure) -> float:
    return figure.ci95_high - figure.ci95_low


def test_estimates_differences_and_tags_know_the_clusters_of_the_prompt_set():
    related, single = prompts(40, clusters=8), prompts(40)
    values = by_cluster(40, 8)
    ours, alone = scored(values, related), scored(values, single)
    assert width(ours.estimates["contains"]) > 1.5 * width(alone.estimates["contains"])
    assert ours.estimates["contains"] == statistics.mean_estimate(
        [each["contains"] for each in values], [prompt.cluster for prompt in related.prompts]
    )
    zeros = [{"contains": 0.0}] * 40
    gap = estimation.differences(ours, scored(zeros, related), related)["contains"]
    assert width(gap) > 1.5 * width(estimation.differences(alone, scored(zeros, single), single)["contains"])
    none = gate.Verdict("none", ())
    [row] = chart_data.tag_rows(report([ours], related, none))
    [mark] = row.marks
    overall = ours.estimates["score"]
    assert (mark.low, mark.high) == (overall.ci95_low, overall.ci95_high)


# ---------------------------------------------------------------------------------------------------------------------
# What is counted, and what is said


def test_a_row_counts_as_unscored_only_where_no_scorer_could_score_it():
    values = [{"contains": 1.0, "regex": None}, {"contains": None, "regex": None}, {"contains": None, "regex": 0.0}]
    assert scored(values, prompts(3)).metrics["rows_unscored"] == 1


def test_holms_family_is_the_scorers_without_the_overall_score_made_of_them():
    def gap(p_value: float) -> statistics.Difference:
        told = dict.fromkeys(field.name for field in fields(statistics.Difference))
        return statistics.Difference(**told | {"p_value": p_value})

    found = estimation.holm_p_values({"a": gap(0.01), "b": gap(0.03), "score": gap(0.001)})
    assert found == {"a": pytest.approx(0.02), "b": pytest.approx(0.03), "score": 0.001}  # statsmodels: 0.02, 0.03


def test_a_single_scorer_is_told_by_its_corrected_p_and_not_by_its_own():
    """Two scorers with p = 0.031 each: 0.063 after Holm's correction, beyond chance only without the correction."""
    prompt_set = prompts(60)
    ours = [{"contains": 1.0, "regex": 1.0}] * 6 + [{"contains": 0.0, "regex": 0.0}] * 54
    theirs = [{"contains": 0.0, "regex": 0.0}] * 60
    pair = [scored(values, prompt_set) for values in (ours, theirs)]
    compared = estimation.differences(*pair, prompt_set)
    assert compared["contains"].p_value < 0.05 < estimation.holm_p_values(compared)["contains"]
    said = summary.remarks(report(pair, prompt_set, gate.Verdict("none", ()), compared))
    assert not any(", contains:" in line or ", regex:" in line for line in said)
    alone = {name: compared[name] for name in ("contains", "score")}
    said = summary.remarks(report(pair, prompt_set, gate.Verdict("none", ()), alone))
    assert any(", contains:" in line and "after Holm" in line for line in said)


@pytest.mark.parametrize("state", ["inconclusive", "regress"])
def test_junit_shows_a_rule_that_did_not_pass_as_a_failure(state):
    check = gate.Check("score/mean", "min 0.6", state, "the answer \x1b[31m\x00 holds controls \ud800")
    answered = scored([{"contains": 1.0}], prompts(1))
    failed = replace(answered.samples[0], error={"type": "refused", "message": "a\x00\x1b\x0bb"})
    text = summary.junit(report([replace(answered, samples=(failed,))], prompts(1), gate.Verdict(state, (check,))))
    [suite] = ElementTree.fromstring(text.encode())
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    [failure] = suite.iter("failure")
    assert failure.get("type") == state


def test_a_pipe_in_a_cell_ends_no_cell_of_the_markdown_table():
    answered = scored([{"a|b": 1.0}], prompts(1))
    text = summary.markdown(
        report([replace(answered, model=replace(answered.model, label="x|y"))], prompts(1), gate.Verdict("none", ()))
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3}  # two columns: no cell was cut in two


# ---------------------------------------------------------------------------------------------------------------------
# Kept answers


def counting(asked: list):
    def ask(model, rows, batch_size):
        for place, row in enumerate(rows):
            asked.append(row["row"]["prompt"])
            answer = {"text": "yes", "finish_reason": "stop", "prompt_tokens": 1, "output_tokens": 1}
            yield place, answer | {"seconds": 0.1, "error": ""}

    return ask


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))


def test_answers_of_an_endpoint_are_not_taken_by_a_later_run(cache):
    asked: list[str] = []
    for _ in range(2):
        found = answering.score(model(counting(asked)), prompts(3), GENERATION)
        assert found.reused == 0
    assert len(asked) == 6


def test_answers_of_a_model_whose_files_are_known_are_taken_by_a_later_run(cache):
    asked: list[str] = []
    for reused in (0, 3):
        found = answering.score(model(counting(asked), sha256="a" * 64), prompts(3), GENERATION)
        assert found.reused == reused
    assert len(asked) == 3


def test_each_repeat_of_a_prompt_is_an_answer_of_its_own(cache):
    asked: list[str] = []
    found = answering.score(model(counting(asked), sha256="b" * 64), prompts(2), GENERATION, repeats=3)
    assert len(asked) == 6 and [sample.repeat for sample in found.samples] == [0, 1, 2] * 2
    again = answering.score(model(counting(asked), sha256="b" * 64), prompts(2), GENERATION, repeats=4)
    assert again.reused == 6 and len(asked) == 8


def test_an_interrupted_run_is_what_came_after_the_last_end(cache):
    """Of three runs, two ended; only the answers of the third, which broke off, may be used again."""
    for key, ends in (("first", True), ("second", True), ("third", False)):
        with kept_answers.opened("model", "all") as kept:
            kept.add(key, {"text": key}, 0.1)
            if ends:
                kept.finish(100)
    with kept_answers.opened("model", "interrupted") as kept:
        assert set(kept.kept) == {"third"}


# ---------------------------------------------------------------------------------------------------------------------
# The network, and earlier runs


def test_a_schema_that_refers_to_an_address_fetches_nothing():
    hits: list[str] = []

    class Counted(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"type": "object"}).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Counted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/schema.json"
    try:
        with pytest.raises(Exception, match="Unresolvable"):
            json_schema("{}", (), {"$ref": address})
    finally:
        server.shutdown()
    assert hits == []


def test_the_trend_has_finished_runs_only(tracking):
    from slm.tracking import earlier_runs

    client = tracking.MlflowClient()
    experiment = tracking.create_experiment("trend")
    for status, mean in (("FINISHED", 0.5), ("FAILED", 0.1), ("KILLED", 0.2)):
        run = client.create_run(experiment, tags={"prompts.sha256": "abc", "model.name": "m"}).info.run_id
        for field in ("mean", "ci95_low", "ci95_high"):
            client.log_metric(run, f"score/{field}", mean)
        client.set_terminated(run, status)
    with tracking.start_run(experiment_id=experiment):
        found = earlier_runs.history("abc", "m", ["score"])
    assert [point.mean for point in found["score"]] == [0.5]
