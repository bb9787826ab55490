"""Writes a model's answers to MLflow's evaluation view: one trace per answer, with the scores as assessments.

The view is written after samples.jsonl is stored. Nothing reads it back, and a failure here does not fail the
evaluation. Rows are written one after another, because parallel writers lose rows on sqlite. Not covered: the time of
each question, which samples do not have. The rows begin one millisecond apart. The first row begins last, so that it
is on top.
"""

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slm.base.wording import counted, one_line
from slm.prompts.prompt_rows import Prompt
from slm.tracking import trace_store
from slm.tracking.trace_store import storable
from slm.verdict import fidelity
from slm.verdict.fidelity import Fidelity, TokenFidelity
from slm.verdict.scored_model import Sample

BATCH = 50  # rows whose spans are sent together
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
        return f"evaluation view: {self.rows:,} of {counted(self.total, 'row')} in {self.seconds:.1f} s{left_out}"


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

    def batch(first: int) -> Iterator[trace_store.Written]:
        for place, sample in enumerate(samples[first : first + BATCH], first):
            if time.monotonic() - begun >= seconds:
                return
            at = int(start_time * 1000) + len(samples) - 1 - place
            tokens = None if sample.repeat else beside.get(sample.id)
            yield _written(sample, by_id.get(sample.id), run_id, model_id, at, tokens)

    try:
        with _patience():
            for first in range(0, len(samples), BATCH):
                rows += trace_store.write(experiment_id, batch(first))
                if time.monotonic() - begun >= seconds and rows < len(samples):
                    reason = f"the {seconds:g} s for it were over"
                    break
    except Exception as error:  # whatever it is, the answers are safe
        reason = one_line(error, 300)
    return Logged(rows, len(samples), time.monotonic() - begun, reason)


def _written(
    sample: Sample,
    prompt: Prompt | None,
    run_id: str,
    model_id: str | None,
    at: int,
    compared: TokenFidelity | None,
) -> trace_store.Written:
    """The trace of a sample with its assessments. `at` is the start in milliseconds."""
    trace_id = f"tr-{secrets.token_hex(16)}"
    output = storable(sample.output)
    message = {"role": "assistant", "content": output}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": sample.finish_reason}]}
    problem = storable(f"{sample.error['type']}: {sample.error['message']}") if sample.error else ""
    tags = {"mlflow.traceName": sample.id, "id": sample.id, "repeat": str(sample.repeat)}
    tags |= {"mlflow.eval.requestId": f"{sample.id}#{sample.repeat}"}  # by which MLflow pairs the rows of two runs
    tags |= {"scorer": ", ".join(sample.scores), "finish_reason": sample.finish_reason}
    if prompt is not None:
        tags |= {"cluster": prompt.cluster or "", "tags": ", ".join(prompt.tags)}
    return trace_store.Written(
        name="answer",
        span_type="CHAT_MODEL",
        inputs={"messages": sample.messages},
        outputs={"error": problem} if problem else answer,
        start=at * 10**6,
        seconds=sample.latency_seconds,
        request_preview=sample.messages[-1]["content"],
        response_preview=problem or output,
        model=sample.model,
        prompt_tokens=sample.prompt_tokens,
        output_tokens=sample.output_tokens,
        problem=problem,
        tags=tags,
        metadata={"mlflow.sourceRun": run_id, "mlflow.modelId": model_id or ""},
        assessments=_assessments(sample, trace_id, run_id, compared),
        trace_id=trace_id,
    )


def _assessments(sample: Sample, trace_id: str, run_id: str, compared: TokenFidelity | None) -> list:
    """A feedback for each scorer and for the fidelity, and the expected text.

    Unscored is an error of the feedback, and not a value.
    """
    from mlflow.entities import AssessmentError, AssessmentSource, Expectation, Feedback

    assessments: list[Any] = []
    for name, value in sample.scores.items():
        reason = storable(sample.reasons.get(name, ""))
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
