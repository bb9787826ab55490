"""Writes a model's answers to MLflow's evaluation view: one trace per answer, with the scores as assessments.

The view is written after samples.jsonl is stored. Nothing reads it back, and a failure here does not fail the
evaluation. Rows are written one after another, because parallel writers lose rows on sqlite. Not covered: the time of
each question, which samples do not have. The rows begin one millisecond apart. The first row begins last, so that it
is on top.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slm.base.wording import counted, one_line
from slm.prompts.prompt_rows import Prompt
from slm.tracking.mlflow_client import quiet_mlflow
from slm.verdict import fidelity
from slm.verdict.fidelity import Fidelity, TokenFidelity
from slm.verdict.scored_model import Sample

BATCH = 50  # rows whose spans are sent together
PREVIEW = 1000  # characters that a store keeps of a preview
TAG = 250  # characters that every store keeps of a tag
# With mlflow's own patience, a call to a server that doesn't answer takes minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class Logged:
    """`rows` of `total` were written in `seconds`. `reason` says why rows are missing, and is empty otherwise."""

    rows: int
    total: int
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        left_out = f"; {self.total - self.rows} left out: {self.reason}" if self.reason else ""
        return f"evaluation view: {self.rows} of {self.total} rows in {self.seconds:.1f} s{left_out}"


def log(
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    run_id: str,
    experiment_id: str,
    model_id: str | None,
    start_time: float,
    seconds: float = 60,
    compared: Fidelity | None = None,
) -> Logged:
    """Writes a trace for each sample, linked to the run and the model. A failing store ends the writing quietly.

    The first answer of a prompt also gets the prompt's means of `compared`.

    `start_time` is when scoring began, in seconds since the epoch. When `seconds` are over, the rows not yet written
    are left out (a call that is under way may wait half a minute more for a server that doesn't answer).
    """
    begun = time.monotonic()
    rows, reason = 0, ""
    by_id = {prompt.id: prompt for prompt in prompts}
    beside = {prompt.id: prompt for prompt in compared.prompts} if compared else {}
    try:
        with _patience():
            quiet_mlflow()
            # Internal in mlflow 3.17.2, and used because start_span and log_feedback send every span by itself, at
            # 2 to 9 times the time, and say of what fails no more than a line in the log.
            from mlflow.tracing.client import TracingClient

            client = TracingClient()
            for first in range(0, len(samples), BATCH):
                written = []
                for place, sample in enumerate(samples[first : first + BATCH], first):
                    if time.monotonic() - begun >= seconds:
                        reason = f"the {seconds:g} s for it were over"
                        break
                    at = int(start_time * 1000) + len(samples) - 1 - place
                    tokens = None if sample.repeat else beside.get(sample.id)
                    info, span = _trace(sample, by_id.get(sample.id), run_id, experiment_id, model_id, at, tokens)
                    written.append((client.start_trace(info), span))
                _send_spans(client, experiment_id, written)
                rows += len(written)
                if reason:
                    break
    except Exception as error:  # whatever it is, the answers are safe
        reason = one_line(error, 300)
    return Logged(rows, len(samples), time.monotonic() - begun, reason)


def _send_spans(client, experiment_id: str, written: list[tuple]) -> None:
    """Writes the conversations of a batch of traces, in one call if the store supports that."""
    from mlflow.entities import TraceData

    try:
        client.log_spans(experiment_id, [span for _, span in written])
    except NotImplementedError:  # a store of files keeps each as an artifact of its trace
        for info, span in written:
            client._upload_trace_data(info, TraceData([span]))


def _trace(
    sample: Sample,
    prompt: Prompt | None,
    run_id: str,
    experiment_id: str,
    model_id: str | None,
    at: int,
    compared: TokenFidelity | None,
) -> tuple:
    """The trace's description with its assessments, and its only span. `at` is the start in milliseconds."""
    from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState

    trace_id = f"tr-{secrets.token_hex(16)}"
    usage = {}
    if sample.prompt_tokens is not None and sample.output_tokens is not None:
        usage = {"input_tokens": sample.prompt_tokens, "output_tokens": sample.output_tokens}
        usage["total_tokens"] = sum(usage.values())
    output = _storable(sample.output)
    message = {"role": "assistant", "content": output}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": sample.finish_reason}]}
    problem = _storable(f"{sample.error['type']}: {sample.error['message']}") if sample.error else ""
    attributes = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "CHAT_MODEL",
        "mlflow.message.format": "openai",
        "mlflow.spanInputs": {"messages": sample.messages},
        "mlflow.spanOutputs": {"error": problem} if problem else answer,
        "mlflow.chat.tokenUsage": usage,
        "mlflow.llm.model": sample.model,
    }
    span = Span.from_dict(
        {
            "trace_id": trace_id,
            "span_id": secrets.token_hex(8),
            "parent_span_id": None,
            "name": "answer",
            "start_time_unix_nano": at * 10**6,
            "end_time_unix_nano": at * 10**6 + int(sample.latency_seconds * 10**9),
            "status": {"code": "STATUS_CODE_ERROR" if problem else "STATUS_CODE_OK", "message": problem},
            "attributes": {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items() if value},
        }
    )
    tags = {"mlflow.traceName": sample.id, "id": sample.id, "repeat": str(sample.repeat)}
    tags |= {"mlflow.eval.requestId": f"{sample.id}#{sample.repeat}"}  # by which MLflow pairs the rows of two runs
    tags |= {"scorer": ", ".join(sample.scores), "finish_reason": sample.finish_reason}
    if prompt is not None:
        tags |= {"cluster": prompt.cluster or "", "tags": ", ".join(prompt.tags)}
    metadata = {"mlflow.sourceRun": run_id, "mlflow.modelId": model_id or "", "mlflow.trace_schema.version": "3"}
    metadata |= {"mlflow.trace.tokenUsage": json.dumps(usage) if usage else ""}
    info = TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=at,
        execution_duration=int(sample.latency_seconds * 1000),
        state=TraceState.ERROR if problem else TraceState.OK,
        request_preview=sample.messages[-1]["content"][:PREVIEW],
        response_preview=(problem or output)[:PREVIEW],
        trace_metadata={name: value for name, value in metadata.items() if value},
        tags={name: value[:TAG] for name, value in tags.items() if value},
        assessments=_assessments(sample, trace_id, run_id, compared),
    )
    return info, span


def _assessments(sample: Sample, trace_id: str, run_id: str, compared: TokenFidelity | None) -> list:
    """A feedback for each scorer and for the fidelity, and the expected text.

    Unscored is an error of the feedback, and not a value.
    """
    from mlflow.entities import AssessmentError, AssessmentSource, Expectation, Feedback

    assessments: list[Any] = []
    for name, value in sample.scores.items():
        reason = _storable(sample.reasons.get(name, ""))
        assessments.append(
            Feedback(
                name=name,
                trace_id=trace_id,
                value=value,
                error=AssessmentError("UNSCORED", reason) if value is None else None,
                rationale=reason,
                source=AssessmentSource("CODE", name),
                metadata={"mlflow.assessment.sourceRunId": run_id},
            )
        )
    for name in () if compared is None else fidelity.MEASURES:
        assert compared is not None
        assessments.append(
            Feedback(
                name=f"fidelity/{name}",
                trace_id=trace_id,
                value=float(getattr(compared, name).mean()),
                rationale=f"the mean over {counted(compared.kl.size, 'token')} of the baseline's answer",
                source=AssessmentSource("CODE", f"fidelity/{name}"),
                metadata={"mlflow.assessment.sourceRunId": run_id},
            )
        )
    if sample.expected:
        expected = sample.expected[0] if len(sample.expected) == 1 else list(sample.expected)
        assessments.append(Expectation("expected_response", expected, trace_id=trace_id))
    return assessments


def _storable(text: str) -> str:
    """A text without NUL and half characters. A model may answer with them, and some databases refuse them."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _patience() -> Iterator[None]:
    """Shorter waits for a server, unless the user's environment sets them."""
    ours = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
