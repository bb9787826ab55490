"""Serves one chat model of this project over OpenAI's API, which MLflow's scoring server lacks.

    POST /v1/chat/completions  /v1/completions  /v1/responses   whole, or as server-sent events
    POST /tokenize  /detokenize
    GET  /v1/models  /openapi.json  /health  /ready  /metrics (Prometheus)

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

slm/serving/versions.py says how one version of the model replaces another, and slm/serving/traces.py how a share of
the requests is written to MLflow.

slm/serving/processes.py has several processes, each with an application of its own.

Not covered: TLS, users and quotas (use a proxy), images, more than one model.
With a runtime that does not refill, a prompt is one step of its batch.
slm/serving/connections.py guards the sockets.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slm.models.chat_parts.tools import ChoiceStream
from slm.serving import completions, openapi_page, responses, tokens
from slm.serving.access_log import ID_HEADER, AccessLog, Observed
from slm.serving.exchanges import Exchange, Present, Service, read_body, server_sent_events, stream_of
from slm.serving.keys import Keys
from slm.serving.protocol import (
    METRICS_TYPE,
    OLD_FIELDS,
    ApiError,
    ChatRequest,
    Limits,
    ServedNames,
    check_model,
    read_request,
    refused_as_error,
)
from slm.serving.traces import Tracer
from slm.serving.versions import Alias, Follower, Loaded, Served, check_tenants

# ---------------------------------------------------------------------------------------------------------------------
# The application


def build(
    loaded: Loaded,
    limits: Limits | None = None,
    keys: Keys | None = None,
    host_names: Iterable[str] = (),
    follows: Alias | None = None,
    tracer: Tracer | None = None,
    access_log: AccessLog | None = None,
    follower_type: type[Follower] = Follower,
) -> FastAPI:
    """The application for a loaded chat model, or for the version that has the alias.

    Without keys, the server is open. The server answers to loopback's names and to `host_names`.

    Raises:
        BadInput: the model can't keep several keys' prompts apart.
    """
    keys = keys or Keys()
    check_tenants(loaded, keys.several)
    served = Served(loaded, limits or Limits(), keys.several, tracer)
    if tracer:
        tracer.show(served.metrics)
    follower = follower_type(served, follows) if follows else None
    description = openapi_page.page(served.limits, bool(keys))

    @asynccontextmanager
    async def lifespan(app):
        served.start()
        if follower:
            follower.start()
        if tracer:
            tracer.start()
        yield
        if follower:
            follower.stop()
        if tracer:
            await asyncio.to_thread(tracer.stop)
        await asyncio.to_thread(served.stop, 3.0)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served, app.state.follower = served, follower
    app.add_middleware(ServedNames, names=host_names)
    app.add_middleware(Observed, log=access_log)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception):
        answer = ApiError(500, "the server failed; its log says more", "server_error").response()
        answer.headers[ID_HEADER] = request.state.record.id  # this answer does not pass `Observed`
        return answer

    async def authorized(request: Request):
        tenant = keys.tenant(request.headers.get("authorization", ""))
        if tenant is None:
            served.metrics.requests.labels("unauthorized").inc()
            raise ApiError(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")
        request.state.tenant = tenant

    protected = [Depends(authorized)]

    @app.get("/health")
    async def health():
        if not served.is_alive():
            raise ApiError(503, "the generating thread has ended", "server_error")
        return {"status": "ok"} | card()

    @app.get("/ready")
    async def ready():
        if not (served.is_ready() and served.is_alive()):
            raise ApiError(503, "the next version of the model is being loaded", "server_error")
        return {"status": "ok"} | card()

    @app.get("/metrics", dependencies=protected)
    async def metrics():
        return Response(served.metrics.text(), media_type=METRICS_TYPE)

    def card():
        told = {"version": served.version} if served.version else {}
        return {"model": served.names[0]} | told

    def model_card():
        made = {"object": "model", "created": served.started, "owned_by": "phi3-mlflow"}
        told = card()
        return {"id": told.pop("model")} | made | told

    @app.get("/v1/models", dependencies=protected)
    async def models():
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}", dependencies=protected)
    async def one_model(name: str):
        check_model(name, served.names)
        return model_card()

    if follower and follower.alias.secret:

        @app.post("/webhooks/mlflow")
        async def webhook(request: Request):
            body = await read_body(request, served.limits)
            if not follower.is_signed(body, request.headers):
                raise ApiError(401, "the webhook's signature is missing, wrong or too old", "authentication_error")
            follower.wake()
            return {"status": "ok"}

    present = served.present
    app.add_api_route("/v1/chat/completions", chat_endpoint(present), methods=["POST"], dependencies=protected)
    app.add_api_route("/v1/completions", completions.endpoint(present), methods=["POST"], dependencies=protected)
    app.add_api_route("/v1/responses", responses.endpoint(present), methods=["POST"], dependencies=protected)
    app.add_api_route("/tokenize", tokens.tokenize_endpoint(present), methods=["POST"], dependencies=protected)
    app.add_api_route("/detokenize", tokens.detokenize_endpoint(present), methods=["POST"], dependencies=protected)

    @app.get("/openapi.json")
    async def openapi():
        return description

    return app


def chat_endpoint(present: Present):
    """What answers /v1/chat/completions."""

    async def chat_completions(request: Request):
        service = await present()
        model, limits = service.model, service.limits
        exchange = Exchange(service.worker, request)
        with service.counted():
            asked = read_request(await read_body(request, limits), ChatRequest)
            with_usage = asked.includes_usage()
            row = asked.row(service.names, limits, getattr(model, "fields", OLD_FIELDS))
            rows = await asyncio.to_thread(refused_as_error, model.prepare, row, service.defaults)
            service.begin(exchange, rows, asked.stream)
        if asked.stream:
            head = model.head("chat.completion.chunk") | service.fingerprint

            def whole() -> dict:
                same = {name: head[name] for name in ("id", "created")}
                return model.completion(model.choices(exchange.rows)) | same | service.fingerprint

            events = server_sent_events(chunks(service, exchange, head, with_usage))
            return stream_of(service, events, service.traced("chat", exchange, whole))
        await exchange.finished()
        content = model.completion(model.choices(exchange.rows)) | service.fingerprint
        exchange.record.finish_reasons = [choice["finish_reason"] for choice in content["choices"]]
        background = service.traced("chat", exchange, lambda: content)
        return JSONResponse(content, headers=service.headers, background=background)

    return chat_completions


async def chunks(service: Service, exchange: Exchange, head: dict, with_usage: bool) -> AsyncIterator[dict]:
    """The chunks of a stream. Each of the n choices gets chunks, even if one text serves several choices."""
    model = service.model
    head = head | ({"usage": None} if with_usage else {})
    has_pieces = hasattr(model, "log_probability_pieces")  # not in models of older versions
    pieces = [model.log_probability_pieces(row) for row in exchange.rows] if has_pieces else []
    stream = ChoiceStream(exchange.rows, getattr(model, "end_tokens", ()), pieces)
    for entry in stream.begin():
        yield head | {"choices": [entry]}
    async for place, text, finish_reason in exchange.news():
        for entry in stream.of(place, text, finish_reason):
            exchange.record.finish_reasons += filter(None, [entry["finish_reason"]])
            yield head | {"choices": [entry]}
    if with_usage:
        yield head | {"choices": [], "usage": model.completion(model.choices(exchange.rows))["usage"]}
