"""One request from its arrival to its end, for all endpoints that generate."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from slm.serving.access_log import Record
from slm.serving.batching import Worker
from slm.serving.protocol import STREAM_HEADERS, ApiError, Kind, Limits, check_model, read_request
from slm.serving.traces import Answered, Tracer

VERSION_HEADER = "x-model-version"


@dataclass(frozen=True)
class Service:
    """One version of a model as it answers. A request keeps the version that it began with."""

    model: Any  # wrappers.Wrapper
    worker: Worker
    limits: Limits
    names: tuple[str, ...]  # under which clients may ask for the model
    defaults: dict[str, Any]  # parameters that a request does not give
    several_keys: bool
    version: str = ""  # name/version of a registered model
    uri: str = ""  # of the model, without an alias
    model_id: str = ""  # of MLflow's LoggedModel
    tracer: Tracer | None = None

    @property
    def fingerprint(self) -> dict[str, str]:
        """The field of an answer that names the version."""
        return {"system_fingerprint": self.version} if self.version else {}

    @property
    def headers(self) -> dict[str, str]:
        """The header of an answer that names the version."""
        return {VERSION_HEADER: quote(self.version)} if self.version else {}

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """A request of an endpoint that wrappers of older versions lack.

        Raises:
            ApiError: the body can't be read, it asks for another model, or the model's wrapper is older.
        """
        asked = read_request(await read_body(request, self.limits), kind)
        if name := getattr(asked, "model", None):
            check_model(name, self.names)
        if not hasattr(self.model, "token_ids"):
            raise ApiError(400, "the model was logged by a version that serves chat alone; log it again")
        return asked

    def client_of(self, request: Request) -> str:
        return request.state.tenant if self.several_keys or not request.client else request.client.host

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request that is refused before anything is generated."""
        try:
            yield
        except ApiError as error:
            self.worker.metrics.requests.labels("full" if error.status == 429 else "refused").inc()
            raise

    def begin(self, exchange: "Exchange", rows: list, streamed: bool | None) -> None:
        """Puts the texts of a request into the queue.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        for row in rows:
            row.tenant = exchange.request.state.tenant
        exchange.rows = exchange.record.rows = rows
        exchange.record.version = self.version
        exchange.begin(streamed, self.client_of(exchange.request))

    def traced(self, name: str, exchange: "Exchange", answer: Callable[[], dict]) -> BackgroundTask | None:
        """What makes the trace of a request after its answer has been sent. None: the request gets no trace.

        `name` is the trace's, and `answer` gives the whole answer, of a stream too.
        """
        if self.tracer is None or not self.tracer.draws():
            return None
        return BackgroundTask(self._trace, self.tracer, name, exchange, answer)

    def _trace(self, tracer: Tracer, name: str, exchange: "Exchange", answer: Callable[[], dict]) -> None:
        record = exchange.record
        if record.outcome != "ok":
            return
        content = answer()
        usage = content["usage"]
        tracer.put(
            Answered(
                name=name,
                request=record.body,
                answer=json.dumps(content).encode(),
                start=record.began,
                seconds=exchange.seconds,
                prompt_tokens=usage.get("prompt_tokens", usage.get("input_tokens")),
                output_tokens=usage.get("completion_tokens", usage.get("output_tokens")),
                request_id=record.id,
                model=self.names[0],
                model_uri=self.uri,
                model_id=self.model_id,
                version=self.version,
            )
        )


Present = Callable[[], Awaitable[Service]]  # gives the version that answers now


class Exchange:
    """One request from its arrival to its end. After any end, it is counted once and leaves the batch."""

    def __init__(self, worker: Worker, request: Request):
        self.worker, self.request = worker, request
        self.record: Record = request.state.record
        self.rows: list = []
        self.start = self.record.started
        self.seconds = 0.0  # from the arrival to the end

    def begin(self, streamed: bool | None, client: str) -> None:
        self.ticket = self.worker.submit(self.rows, bool(streamed), client)
        self._watch = asyncio.create_task(self._until_the_client_goes())
        left = self.worker.limits.seconds - (time.perf_counter() - self.start)
        text = f"not answered within {self.worker.limits.seconds:g} seconds"
        late = ApiError(504, text, "timeout_error", code="timeout")
        self._timer = self.ticket.loop.call_later(max(left, 0), self.ticket.events.put_nowait, late)

    async def _until_the_client_goes(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.worker.drop(self.ticket)  # at once, because a stream that waits to send would notice late
        self.ticket.events.put_nowait(ApiError(499, "the client has gone", "client_gone"))

    async def news(self) -> AsyncIterator[tuple[int, str, str]]:
        """Yields (choice, new text, finish reason or "") until all texts have ended.

        Raises:
            ApiError: the time is up, the client disconnected, the model failed, the server stops, or a text can't be
                finished, because its grammar is too complex, for example.
        """
        outcome, metrics = "cancelled", self.worker.metrics
        places = {id(row): place for place, row in enumerate(self.rows)}
        going = len(self.rows)
        first = True
        try:
            while going:
                event = await self.ticket.events.get()
                if isinstance(event, ApiError):
                    outcome = event.outcome
                    raise event
                row, text, finish_reason = event
                if first and self.ticket.streamed:
                    metrics.first_seconds.observe(time.perf_counter() - self.start)
                    first = False
                going -= bool(finish_reason)
                yield places[id(row)], text, finish_reason
            reason = next((row.error for row in self.rows if getattr(row, "error", "")), "")
            outcome = "error" if reason else "ok"
            if reason:
                raise ApiError(400, reason)
        finally:
            self._timer.cancel()
            self._watch.cancel()
            self.worker.drop(self.ticket)
            self.record.outcome, self.seconds = outcome, time.perf_counter() - self.start
            metrics.requests.labels(outcome).inc()
            metrics.seconds.observe(self.seconds)
            metrics.prompt_tokens.inc(self.record.prompt_tokens())
            metrics.output_tokens.inc(self.record.output_tokens())

    async def finished(self) -> None:
        """Waits until all texts have ended. Raises what `news` raises."""
        async for _ in self.news():
            pass


async def read_body(request: Request, limits: Limits) -> bytes:
    """
    Raises:
        ApiError: the Content-Type is not JSON, or the body is too long or too slow.
    """
    # a browser lets a page send text/plain to any address without a preflight request, but not JSON
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise ApiError(413, f"the request has more than {limits.body_bytes} bytes")
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {limits.body_seconds:g} seconds") from None
    request.state.record.body = bytes(body)
    return request.state.record.body


async def server_sent_events(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """A stream of chunks as OpenAI sends it: the end is marked, and an error is the last event."""
    try:
        async for chunk in chunks:
            yield server_sent_event(chunk)
    except ApiError as error:
        yield server_sent_event(error.content)
        return
    yield "data: [DONE]\n\n"


def stream_of(
    service: Service, events: AsyncIterator[str], background: BackgroundTask | None = None
) -> StreamingResponse:
    headers = STREAM_HEADERS | service.headers
    return StreamingResponse(events, media_type="text/event-stream", headers=headers, background=background)


def server_sent_event(content: dict, name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
