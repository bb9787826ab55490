"""The evaluation view: every row and score there on each kind of store, and no store that fails fails the caller."""

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from slm.prompts.prompt_rows import Prompt
from slm.report import traces
from slm.verdict.scored_model import Sample

SAMPLE = Sample(
    id="capital",
    repeat=0,
    model="models:/capitals/3",
    messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "The capital of France?"}],
    expected=["Paris"],
    output="It is Paris.",
    finish_reason="stop",
    prompt_tokens=12,
    output_tokens=4,
    latency_seconds=1.5,
    scores={"contains": 1.0, "exact_match": 0.0},
    reasons={"contains": "contains 'Paris'", "exact_match": "expected 'Paris', got 'It is Paris.'"},
    error=None,
)
PROMPT = Prompt("capital", None, "The capital of France?", ("Paris",), (), "europe", ("easy", "geography"))


def many(count: int) -> list[Sample]:
    return [replace(SAMPLE, id=f"row-{number}", output=f"answer {number}") for number in range(count)]


def write(mlflow, samples, prompts=(), seconds=60, model_id=None):
    """Writes the samples for a run of their own; what was logged, and the traces read back, the oldest last."""
    known = mlflow.get_experiment_by_name("traces")
    experiment = known.experiment_id if known else mlflow.create_experiment("traces")
    run_id = mlflow.MlflowClient().create_run(experiment).info.run_id
    logged = traces.log(samples, prompts, run_id, experiment, model_id, time.time(), seconds)
    found = mlflow.search_traces(locations=[experiment], run_id=run_id, max_results=500, return_type="list")
    return logged, found


def complete(logged, found, count: int) -> bool:
    names = [sorted(assessment.name for assessment in trace.info.assessments) for trace in found]
    return (
        (logged.rows, logged.total, logged.reason) == (count, count, "")
        and [trace.info.tags["id"] for trace in found] == [f"row-{number}" for number in range(count)]
        and [trace.info.response_preview for trace in found] == [f"answer {number}" for number in range(count)]
        and all(len(trace.data.spans) == 1 for trace in found)
        and names == [["contains", "exact_match", "expected_response"]] * count
    )


def test_a_trace_holds_the_conversation_the_scores_and_what_it_belongs_to(tracking):
    logged, [trace] = write(tracking, [SAMPLE], [PROMPT], model_id="m-1")
    assert str(logged) == f"evaluation view: 1 of 1 row in {logged.seconds:.1f} s"
    info, [span] = trace.info, trace.data.spans
    assert (info.request_preview, info.response_preview) == ("The capital of France?", "It is Paris.")
    assert (info.state.value, info.execution_duration) == ("OK", 1500)
    assert info.token_usage == {"input_tokens": 12, "output_tokens": 4, "total_tokens": 16}
    assert info.trace_metadata["mlflow.modelId"] == "m-1"
    assert info.tags["mlflow.eval.requestId"] == "capital#0"
    asked = {"mlflow.traceName", "id", "repeat", "scorer", "finish_reason", "cluster", "tags"}
    assert {name: info.tags[name] for name in asked} == {
        "mlflow.traceName": "capital",
        "id": "capital",
        "repeat": "0",
        "scorer": "contains, exact_match",
        "finish_reason": "stop",
        "cluster": "europe",
        "tags": "easy, geography",
    }
    assert span.inputs == {"messages": SAMPLE.messages}
    message = {"role": "assistant", "content": "It is Paris."}
    assert span.outputs == {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    assert span.end_time_ns - span.start_time_ns == 1_500_000_000
    by_name = {assessment.name: assessment for assessment in info.assessments}
    assert by_name["expected_response"].value == "Paris"
    for name, value in SAMPLE.scores.items():
        feedback = by_name[name]
        assert (feedback.value, feedback.rationale, feedback.error) == (value, SAMPLE.reasons[name], None)
        assert feedback.source.source_type == "CODE"
        assert feedback.metadata["mlflow.assessment.sourceRunId"] == info.trace_metadata["mlflow.sourceRun"]


def test_all_rows_and_scores_are_there_on_sqlite_in_the_order_of_the_set(tracking):
    logged, found = write(tracking, many(70))
    assert complete(logged, found, 70)


def test_all_rows_and_scores_are_there_in_a_store_of_files(tracking, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking.set_tracking_uri(str(tmp_path / "files"))
    logged, found = write(tracking, many(60))
    assert complete(logged, found, 60)


@pytest.mark.slow
def test_300_rows_and_their_scores_are_there_through_a_server(tracking, tracking_server):
    tracking.set_tracking_uri(tracking_server)
    logged, found = write(tracking, many(300))
    assert complete(logged, found, 300)


def test_unscored_is_an_error_with_its_reason_and_not_zero(tracking):
    unscored = replace(SAMPLE, scores={"contains": None}, reasons={"contains": "nothing expected"}, expected=[])
    _, [trace] = write(tracking, [unscored])
    [feedback] = trace.info.assessments
    assert feedback.value is None
    assert (feedback.error.error_code, feedback.error.error_message) == ("UNSCORED", "nothing expected")


def test_an_answer_that_failed_is_shown_as_failed(tracking):
    failed = replace(
        SAMPLE,
        output="",
        finish_reason="error",
        prompt_tokens=None,
        output_tokens=None,
        error={"type": "refused", "message": "longer than the context"},
    )
    _, [trace] = write(tracking, [failed])
    assert trace.info.state.value == "ERROR"
    assert trace.info.response_preview == "refused: longer than the context"
    assert trace.info.token_usage is None


def test_text_that_databases_refuse_is_written_without_what_they_refuse(tracking):
    odd = replace(
        SAMPLE, output="a\0b \ud800 ä" + "x" * 2000, reasons={"contains": "got a\0b", "exact_match": "\ud800"}
    )
    logged, [trace] = write(tracking, [odd])
    assert logged.reason == ""
    assert trace.data.spans[0].outputs["choices"][0]["message"]["content"] == "a\ufffdb ? ä" + "x" * 2000
    assert len(trace.info.response_preview) == 1000


def test_the_time_that_is_given_ends_it_and_says_so(tracking):
    logged, found = write(tracking, many(3), seconds=0)
    assert found == []
    assert (
        str(logged) == f"evaluation view: 0 of 3 rows in {logged.seconds:.1f} s; 3 left out: the 0 s for it were over"
    )


def test_what_was_written_before_time_was_up_is_counted_and_there(tracking, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(traces, "time", SimpleNamespace(monotonic=lambda: next(ticks)))  # a second at every look
    logged, found = write(tracking, many(9), seconds=5)
    assert (logged.rows, len(found), logged.reason) == (4, 4, "the 5 s for it were over")


def test_a_server_that_is_gone_does_not_raise(tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.set_tracking_uri("http://127.0.0.1:9")
    logged = traces.log(many(3), [], "0" * 32, "1", None, time.time())
    assert (logged.rows, logged.total) == (0, 3)
    assert "127.0.0.1" in logged.reason and "\n" not in logged.reason
    assert logged.seconds < 20


def test_an_experiment_that_is_gone_does_not_raise(tracking):
    logged = traces.log(many(3), [], "0" * 32, "999", None, time.time())
    assert (logged.rows, "999" in logged.reason) == (0, True)


def test_the_patience_with_a_server_is_shortened_only_here_and_only_where_it_is_not_set(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with traces._patience():
        inside = {name: os.environ[name] for name in traces.PATIENCE}
    assert inside == {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
