"""Serves one chat model of this project over OpenAI's chat API, which MLflow's scoring server lacks.

    POST /v1/chat/completions   whole, or as server-sent events
    GET  /v1/models  /health  /metrics (Prometheus)

One thread owns the model, and generates waiting requests together. New text goes into the queue of its request. If a
client disconnects or its time is up, its request leaves the batch after the next token.

If the model's runtime refills, a text joins a running batch before the next step, while the batch has room. Long
prompts are read in pieces between the steps. With any other runtime, a batch takes no further texts.

The running batches take turns, one step each, so no batch delays another batch for long. A further batch starts when:
- fewer than MOST_BATCHES run, and the running batch has no room;
- fewer than MOST_BATCHES run, texts can't join, and as many texts wait as are being generated, or one text has waited
  PATIENT_SECONDS;
- a waiting text is short: each running batch may still need SHORT_FACTOR times the text's tokens or more;
- a client has no running text and has waited FAIR_SECONDS, and fewer than FAIR_BATCHES run.
Fair queueing between clients orders the waiting texts. A client is an address. With several API keys, a client is a
key. All caches together take at most MOST_CACHES times the limit of one batch. A single text above that limit counts
as one batch.

The common beginning of prompts is computed once for each API key. With no key or one key, all clients share the
beginnings.

A page in a browser can give its own name the address of this machine (DNS rebinding). So the server answers only
requests that name one of the server's host names.

Not covered: TLS, users and quotas (use a proxy), tools, images, more than one model or process.
With a runtime that does not refill, a prompt is one step of its batch.
slm/serving/connections.py guards the sockets.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from slm.answers import endpoints
from slm.base.errors import BadInput
from slm.models import wrappers
from slm.serving.batching import Worker
from slm.serving.protocol import (
    METRICS_TYPE,
    OLD_FIELDS,
    STREAM_HEADERS,
    ApiError,
    Limits,
    ServedNames,
    check_model,
    model_names,
    read_keys,
    read_request,
    refused_as_error,
)
from slm.tracking import mlflow_client, registry

# ---------------------------------------------------------------------------------------------------------------------
# The application


def build(
    model,
    defaults: dict,
    limits: Limits | None = None,
    api_key: str = "",
    host_names: Iterable[str] = (),
    names: Sequence[str] = (),
) -> FastAPI:
    """The application for a loaded chat model. `defaults` are the parameters that a request does not give.

    `names` are the names that clients may ask for (`protocol.model_names`); with none, it is the checkpoint's.
    `api_key` may hold several keys, separated by commas. The server answers to loopback's names and to `host_names`.

    Raises:
        BadInput: the model can't keep several keys' prompts apart, or `api_key` holds no key.
    """
    keys = read_keys(api_key)
    if len(keys) > 1 and not getattr(model, "separates_tenants", False):
        raise BadInput("model_uri: the model was logged by a version that serves one key alone; log the model again")
    limits = limits or Limits()
    worker = Worker(model, limits)
    started = int(time.time())
    names = names or (model.name,)
    model.name = names[0]  # in every answer

    @asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield
        await asyncio.to_thread(worker.stop, 3.0)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(ServedNames, names=host_names)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception):
        return ApiError(500, "the server failed; its log says more", "server_error").response()

    async def authorized(request: Request):
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if keys and not (scheme.lower() == "bearer" and any(right)):
            worker.metrics.requests.labels("unauthorized").inc()
            raise ApiError(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")
        request.state.tenant = f"key {right.index(True) + 1}" if keys else ""

    protected = [Depends(authorized)]

    @app.get("/health")
    async def health():
        if not worker.is_alive():
            raise ApiError(503, "the generating thread has ended", "server_error")
        return {"status": "ok", "model": model.name}

    @app.get("/metrics", dependencies=protected)
    async def metrics():
        return Response(prometheus_client.generate_latest(worker.metrics.registry), media_type=METRICS_TYPE)

    def card():
        return {"id": model.name, "object": "model", "created": started, "owned_by": "phi3-mlflow"}

    @app.get("/v1/models", dependencies=protected)
    async def models():
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", dependencies=protected)
    async def one_model(name: str):
        check_model(name, names)
        return card()

    def client_of(request: Request) -> str:
        return request.state.tenant if len(keys) > 1 or not request.client else request.client.host

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat_completions(request: Request):
        exchange = Exchange(worker, request)
        try:
            asked = read_request(await read_body(request, limits))
            with_usage = asked.includes_usage()
            row = asked.row(names, limits, getattr(model, "fields", OLD_FIELDS))
            exchange.rows = await asyncio.to_thread(refused_as_error, model.prepare, row, defaults)
            for prepared in exchange.rows:
                prepared.tenant = request.state.tenant
            exchange.begin(asked.stream, client_of(request))
        except ApiError as error:
            worker.metrics.requests.labels("full" if error.status == 429 else "refused").inc()
            raise
        if asked.stream:
            events = server_sent_events(model, exchange, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        async for _ in exchange.news():
            pass
        if reason := exchange.error():
            raise ApiError(400, reason)
        return JSONResponse(model.completion(model.choices(exchange.rows)))

    return app


class Exchange:
    """One request from its arrival to its end. After any end, it is counted once and leaves the batch."""

    def __init__(self, worker: Worker, request: Request):
        self.worker, self.request = worker, request
        self.rows: list = []
        self.start = time.perf_counter()

    def error(self) -> str:
        """The reason why a text can't be finished, such as a grammar that is too complex. Usually ""."""
        return next((row.error for row in self.rows if getattr(row, "error", "")), "")

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
            ApiError: the time is up, the client disconnected, the model failed or the server stops.
        """
        outcome, metrics = "cancelled", self.worker.metrics
        places = {id(row): place for place, row in enumerate(self.rows)}
        going = len(self.rows)
        first = True
        try:
            while going:
                event = await self.ticket.events.get()
                if isinstance(event, ApiError):
                    outcome = {504: "timeout", 499: "cancelled"}.get(event.status, "error")
                    raise event
                row, text, finish_reason = event
                if first and self.ticket.streamed:
                    metrics.first_seconds.observe(time.perf_counter() - self.start)
                    first = False
                going -= bool(finish_reason)
                yield places[id(row)], text, finish_reason
            outcome = "ok"
        finally:
            self._timer.cancel()
            self._watch.cancel()
            self.worker.drop(self.ticket)
            metrics.requests.labels(outcome).inc()
            metrics.seconds.observe(time.perf_counter() - self.start)
            metrics.prompt_tokens.inc(len(self.rows[0].prompt))
            metrics.output_tokens.inc(sum(len(row.output) for row in self.rows))


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
    return bytes(body)


async def server_sent_events(model, exchange: Exchange, with_usage: bool) -> AsyncIterator[str]:
    """The chunks of a stream. Each of the n choices gets chunks, even if one text serves several choices."""
    head = model.head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
    n = exchange.rows[0].sampling.n
    copies = n // len(exchange.rows)

    def event(choice, delta, finish_reason=None, logprobs=None):
        told = {"index": choice, "delta": delta, "finish_reason": finish_reason}
        return _event(head | {"choices": [told | ({"logprobs": logprobs} if logprobs else {})]})

    has_pieces = hasattr(model, "log_probability_pieces")  # not in models of older versions
    pieces = [model.log_probability_pieces(row) for row in exchange.rows] if has_pieces else []

    try:
        for choice in range(n):
            yield event(choice, {"role": "assistant", "content": ""})
        async for place, text, finish_reason in exchange.news():
            logprobs = pieces[place].sent_with(text, finish_reason) if pieces else None
            for choice in range(place, n, n // copies):
                if text or (logprobs and not finish_reason):
                    yield event(choice, {"content": text}, None, logprobs)
                if finish_reason:
                    yield event(choice, {}, finish_reason, None if text else logprobs)
        if reason := exchange.error():
            raise ApiError(400, reason)
    except ApiError as error:
        yield _event(error.content)
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": model.completion(model.choices(exchange.rows))["usage"]})
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load(
    uri: str, trust_code: bool = False, served_model_name: str = ""
) -> tuple[wrappers.Wrapper, dict[str, Any], tuple[str, ...]]:
    """The wrapper of the model that `uri` names, the parameters that were logged with it, and its `model_names`.

    Raises:
        BadInput: this project did not log it as a chat model, its files were changed, or its code isn't trusted.
    """
    mlflow = mlflow_client.quiet_mlflow()
    if endpoints.is_endpoint(uri):
        raise BadInput(f"model_uri: {uri} is an endpoint, which serves already; name a logged model")
    given, uri = uri, registry.resolve(uri, trust_code)
    with registry.local_copy(uri) as folder:
        try:
            description = mlflow.models.Model.load(str(folder))
            if not wrappers.is_ours(description) or "schema" not in description.metadata:
                raise BadInput(f"model_uri: {uri} was not logged by this project")
            if description.metadata["schema"] != "chat":
                schema = description.metadata["schema"]
                raise BadInput(f"model_uri: {uri} has the {schema} schema; log it with schema=chat to serve it")
            opened = wrappers.opened(uri, folder, registry.recorded_manifests(uri), trust_code, {})
        except (mlflow.exceptions.MlflowException, ValueError) as error:
            raise BadInput(f"model_uri: {uri}: {' '.join(str(error).split())}") from None
    if not hasattr(opened.wrapper, "stream"):
        raise BadInput(f"model_uri: {uri} was logged by an older version of this project; log it again")
    names = model_names(given, uri, opened.wrapper.name, served_model_name)
    return opened.wrapper, {param.name: param.default for param in opened.description.signature.params}, names
