"""Writes a share of the requests to MLflow as traces, so that traffic can become a prompt set.

A request puts its trace into a queue, after its answer has been sent. One thread takes traces from the queue, lets the
user's function redact them, and writes them. If the tracking server is slow or away, the queue fills up. A trace that
does not fit, can't be redacted or can't be written is dropped and counted. So no answer waits for MLflow.

Every sampled trace is counted once as logged or dropped, or it waits: /metrics has the numbers.

Not covered: requests without a whole answer. They are neither sampled nor written.
"""

import inspect
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prometheus_client

from slm.base import console, credentials, user_files
from slm.base.errors import BadInput
from slm.base.wording import counted, one_line, quoted
from slm.serving.batching import Metrics
from slm.tracking import mlflow_client, trace_store

MOST_WAITING = 256  # traces in the queue
MOST_BYTES = 32 * 2**20  # of their requests and answers
BATCH = 20  # traces whose spans are sent together. A trace alone takes twice the processor's time
GATHER_SECONDS = 1.0  # from a trace to its batch, if the batch isn't full before
LINE_SECONDS = 60.0  # between two lines about dropped traces
STOP_SECONDS = 5.0  # for the traces that wait when the server stops
RETRIES = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # with MLflow's own number, a call takes minutes to fail
STOPPED = "the server has stopped"
SPAN_TYPES = {"chat": "CHAT_MODEL", "response": "CHAT_MODEL", "completion": "LLM"}  # by the name of the span

Redact = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Answered:
    """A request with its whole answer."""

    name: str  # of the span, see SPAN_TYPES
    request: bytes  # the body, as the client sent it
    answer: bytes  # JSON
    start: float  # seconds since 1970
    seconds: float
    prompt_tokens: int
    output_tokens: int
    request_id: str
    model: str
    model_uri: str
    model_id: str
    version: str

    def size(self) -> int:
        return len(self.request) + len(self.answer)


def read_redact(spec: str) -> Redact | None:
    """The function that `file.py:function` names. None if nothing is named.

    Raises:
        BadInput: there is no such function, or the function can't be called with one argument.
    """
    if not spec:
        return None
    function, _, _ = user_files.function_of("redact", spec)
    if not callable(function) or isinstance(function, type) or inspect.iscoroutinefunction(function):
        raise BadInput(f"redact: {spec} is {quoted(function)}; name a function, and none that is async")
    try:
        inspect.signature(function).bind({})
    except (TypeError, ValueError):
        raise BadInput(f"redact: {spec} must take one argument, the request or the answer as a dict") from None
    return function


def opened(share: float, experiment: str, redact: Redact | None) -> "Tracer | None":
    """What traces a share of the requests, into the experiment of this name. None if the share is 0.

    Raises:
        BadInput: the experiment was deleted.
    """
    if not share:
        return None
    active = mlflow_client.quiet_mlflow().active_run()
    return Tracer(share, trace_store.experiment_id(experiment), redact, active.info.run_id if active else "")


class Unredacted(Exception):
    """The user's function has failed. The message doesn't have the text of its error, which may hold a prompt."""


class Tracer:
    """The queue of traces, and the thread that writes them."""

    def __init__(self, share: float, experiment_id: str, redact: Redact | None = None, run_id: str = ""):
        self.share, self.experiment_id, self.redact, self.run_id = share, experiment_id, redact, run_id
        self._queue: deque[Answered] = deque()
        self._bytes = 0
        self._writing = 0  # traces that the thread has taken from the queue
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._unsaid, self._why, self._said_at = 0, "", -LINE_SECONDS
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)

    def show(self, metrics: Metrics) -> None:
        """Registers the counters for /metrics."""
        registry = metrics.registry
        self._sampled = prometheus_client.Counter(
            "slm_sampled_traces", "Answered requests that were drawn for a trace", registry=registry
        )
        self._logged = prometheus_client.Counter("slm_logged_traces", "Traces that MLflow has taken", registry=registry)
        self._dropped = prometheus_client.Counter(
            "slm_dropped_traces", "Traces that were dropped, by the reason", ["reason"], registry=registry
        )
        for reason in ("queue", "redact", "store", "stop"):
            self._dropped.labels(reason)
        metrics.show("slm_waiting_traces", "Traces that wait to be written", lambda: len(self._queue) + self._writing)

    def start(self) -> None:
        os.environ.setdefault(*RETRIES)
        self._thread.start()

    def draws(self) -> bool:
        """Whether a request is one of the share."""
        return random.random() < self.share

    def put(self, answered: Answered) -> None:
        """Queues a trace. Never waits for MLflow."""
        with self._wake:
            self._sampled.inc()
            full = len(self._queue) >= MOST_WAITING or self._bytes + answered.size() > MOST_BYTES
            if self._stopping or full:
                stopped, slow = ("stop", STOPPED), ("queue", "the tracking server is too slow")
                self._drop(1, *(stopped if self._stopping else slow))
                return
            self._queue.append(answered)
            self._bytes += answered.size()
            self._wake.notify()

    def stop(self) -> None:
        """Writes what waits, for STOP_SECONDS, and drops the rest."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(STOP_SECONDS)
        with self._wake:
            self._ended = True
            if left := len(self._queue) + self._writing:
                self._drop(left, "stop", STOPPED)
            self._queue.clear()
            self._writing = 0
            self._tell(time.monotonic() + LINE_SECONDS)

    def _work(self) -> None:
        while batch := self._next():
            written = []
            for answered in batch:
                try:
                    written.append(self._written(answered))
                except Exception as error:
                    told = ("redact", str(error)) if isinstance(error, Unredacted) else ("store", type(error).__name__)
                    with self._wake:
                        if self._ended:  # `stop` has counted this trace
                            return
                        self._writing -= 1
                        self._drop(1, *told)
            reason = ""
            try:
                trace_store.write(self.experiment_id, written)
            except Exception as error:  # whatever it is, the server goes on
                reason = credentials.scrubbed(one_line(error, 200))
            with self._wake:
                if self._ended:  # `stop` has counted them
                    return
                self._writing = 0
                if reason:
                    self._drop(len(written), "store", reason)
                else:
                    self._logged.inc(len(written))
                self._tell(time.monotonic())

    def _next(self) -> list[Answered]:
        """The traces to write next. No traces: the server stops."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._stopping)
            self._wake.wait_for(lambda: len(self._queue) >= BATCH or self._stopping, GATHER_SECONDS)
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._bytes -= sum(answered.size() for answered in batch)
            self._writing = len(batch)
            return batch

    def _drop(self, number: int, reason: str, why: str) -> None:
        self._dropped.labels(reason).inc(number)
        self._unsaid, self._why = self._unsaid + number, why

    def _tell(self, now: float) -> None:
        """Prints a line about dropped traces, at most every LINE_SECONDS."""
        if self._unsaid and now - self._said_at >= LINE_SECONDS:
            traces = counted(self._unsaid, "trace")
            console.err.print(f"warning: {traces} dropped; the last one: {self._why}", markup=False)
            self._unsaid, self._said_at = 0, now

    def _written(self, answered: Answered) -> trace_store.Written:
        """
        Raises:
            Unredacted: the user's function has failed, or gives something that is no JSON object.
        """
        asked, answer = (self._redacted(json.loads(text)) for text in (answered.request, answered.answer))
        session = _session(asked)
        return trace_store.Written(
            name=answered.name,
            span_type=SPAN_TYPES[answered.name],
            inputs=asked,
            outputs=answer,
            start=int(answered.start * 10**9),
            seconds=answered.seconds,
            request_preview=trace_store.storable(_last_text(asked)),
            response_preview=trace_store.storable(_last_text(answer)),
            model=answered.model,
            prompt_tokens=answered.prompt_tokens,
            output_tokens=answered.output_tokens,
            tags={
                "mlflow.traceName": answered.name,
                "model.uri": answered.model_uri,
                "model.version": answered.version,
                "request.id": answered.request_id,
            },
            metadata={
                "mlflow.sourceRun": self.run_id,
                "mlflow.modelId": answered.model_id,
                "mlflow.trace.session": trace_store.storable(session),
            },
        )

    def _redacted(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.redact is None:
            return content
        try:
            redacted = json.loads(json.dumps(self.redact(content)))
        except (Exception, SystemExit) as error:
            raise Unredacted(f"redact raised {type(error).__name__}") from None
        if not isinstance(redacted, dict):
            raise Unredacted("redact returned no dict")
        return redacted


def _session(asked: dict[str, Any]) -> str:
    """What the client calls its conversation: metadata.session_id, or else user."""
    labels = asked.get("metadata")
    found = (labels.get("session_id") if isinstance(labels, dict) else None) or asked.get("user")
    return found if isinstance(found, str) else ""


def _last_text(content: Any) -> str:
    """The last text of a request or an answer, for MLflow's list of traces. "" if there is none."""
    for name in ("messages", "choices", "output", "message", "input", "prompt", "content", "text"):
        if isinstance(content, dict) and content.get(name):
            return _last_text(content[name])
    if isinstance(content, list) and content:
        return _last_text(content[-1])
    return content if isinstance(content, str) else ""
