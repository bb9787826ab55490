"""Writes traces of one span to MLflow: what a model was asked, and what it answered.

MLflow's own functions that write traces send every span by itself, in threads with a queue of their own, and say of
what fails no more than a line in the log. Here, the caller's thread writes, and an error reaches the caller.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm.base.errors import BadInput
from slm.tracking import mlflow_client
from slm.tracking.mlflow_client import quiet_mlflow

PREVIEW = 1000  # characters that a store keeps of a preview
TAG = 250  # characters that every store keeps of a tag


@dataclass(frozen=True)
class Written:
    """A trace to write. Times are nanoseconds since 1970. Empty tags and metadata are left out."""

    name: str  # of the span
    span_type: str  # as mlflow.entities.SpanType has it
    inputs: Any
    outputs: Any
    start: int
    seconds: float
    request_preview: str
    response_preview: str
    model: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    problem: str = ""  # why there is no answer
    tags: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    assessments: Sequence[Any] = ()
    trace_id: str = field(default_factory=lambda: f"tr-{secrets.token_hex(16)}")


def experiment_id(name: str = "") -> str:
    """The id of the experiment with this name, which is made if it does not exist.

    Without a name, it is the experiment of the active run, or else of MLflow's environment variables.

    Raises:
        BadInput: the experiment was deleted.
    """
    mlflow = quiet_mlflow()
    if not name:
        from mlflow.tracking.fluent import _get_experiment_id

        active = mlflow.active_run()
        return str(active.info.experiment_id if active else _get_experiment_id())
    found = mlflow.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise BadInput(f"trace_experiment: {name!r} was deleted; restore it, or name another one")
    if found is None:
        mlflow_client._or_found(  # another server may make it at the same time
            lambda: mlflow.get_experiment_by_name(name) or mlflow.create_experiment(name), "RESOURCE_ALREADY_EXISTS"
        )
    return str(mlflow.get_experiment_by_name(name).experiment_id)


def write(experiment_id: str, traces: Iterable[Written]) -> int:
    """Writes traces one after another, and their spans in one call if the store supports that. Returns the number.

    Raises:
        Exception: whatever MLflow raises. Then nobody knows which of the traces are stored.
    """
    quiet_mlflow()
    # Internal in mlflow 3.17.2, and used because start_span and log_feedback take 2 to 9 times the time
    from mlflow.entities import TraceData
    from mlflow.tracing.client import TracingClient

    client = TracingClient()
    begun = []
    for trace in traces:
        info, span = _entities(trace, experiment_id)
        begun.append((client.start_trace(info), span))
    if not begun:
        return 0
    try:
        client.log_spans(experiment_id, [span for _, span in begun])
    except NotImplementedError:  # a store of files keeps each as an artifact of its trace
        ask_again = getattr(getattr(client.store, "_get_server_version", None), "cache_clear", lambda: None)
        ask_again()  # a server that was slow to tell its version counts as one without spans
        for info, span in begun:
            client._upload_trace_data(info, TraceData([span]))
    return len(begun)


def _entities(trace: Written, experiment_id: str) -> tuple[Any, Any]:
    """MLflow's description of a trace, and its only span."""
    from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState

    usage = {}
    if trace.prompt_tokens is not None and trace.output_tokens is not None:
        usage = {"input_tokens": trace.prompt_tokens, "output_tokens": trace.output_tokens}
        usage["total_tokens"] = sum(usage.values())
    attributes = {
        "mlflow.traceRequestId": trace.trace_id,
        "mlflow.spanType": trace.span_type,
        "mlflow.message.format": "openai",
        "mlflow.spanInputs": trace.inputs,
        "mlflow.spanOutputs": trace.outputs,
        "mlflow.chat.tokenUsage": usage,
        "mlflow.llm.model": trace.model,
    }
    span = Span.from_dict(
        {
            "trace_id": trace.trace_id,
            "span_id": secrets.token_hex(8),
            "parent_span_id": None,
            "name": trace.name,
            "start_time_unix_nano": trace.start,
            "end_time_unix_nano": trace.start + int(trace.seconds * 10**9),
            "status": {"code": "STATUS_CODE_ERROR" if trace.problem else "STATUS_CODE_OK", "message": trace.problem},
            "attributes": {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items() if value},
        }
    )
    metadata = dict(trace.metadata) | {"mlflow.trace_schema.version": "3"}
    metadata |= {"mlflow.trace.tokenUsage": json.dumps(usage) if usage else ""}
    info = TraceInfo(
        trace_id=trace.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=trace.start // 10**6,
        execution_duration=int(trace.seconds * 1000),
        state=TraceState.ERROR if trace.problem else TraceState.OK,
        request_preview=trace.request_preview[:PREVIEW],
        response_preview=trace.response_preview[:PREVIEW],
        trace_metadata={name: value[:TAG] for name, value in metadata.items() if value},
        tags={name: value[:TAG] for name, value in trace.tags.items() if value},
        assessments=list(trace.assessments),
    )
    return info, span


def storable(text: str) -> str:
    """A text without NUL and half characters. A model may answer with them, and some databases refuse them."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
