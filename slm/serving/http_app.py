"""Serves one chat model of this project over OpenAI's API, which MLflow's scoring server lacks.

    POST /v1/chat/completions  /v1/completions  /v1/responses   whole, or as server-sent events
    POST /tokenize  /detokenize
    GET  /v1/models  /openapi.json  /health  /metrics (Prometheus)

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

Not covered: TLS, users and quotas (use a proxy), images, more than one model or process.
With a runtime that does not refill, a prompt is one step of its batch.
slm/serving/connections.py guards the sockets.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slm.answers import endpoints
from slm.base.errors import BadInput
from slm.models import wrappers
from slm.models.chat_parts.tools import ChoiceStream
from slm.serving import completions, openapi_page, responses, tokens
from slm.serving.batching import Worker
from slm.serving.exchanges import Exchange, Service, read_body, server_sent_events, stream_of
from slm.serving.protocol import (
    METRICS_TYPE,
    OLD_FIELDS,
    ApiError,
    ChatRequest,
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
    description = openapi_page.page(limits, bool(keys))
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

    service = Service(model, worker, limits, tuple(names), defaults, len(keys) > 1)
    app.add_api_route("/v1/chat/completions", chat_endpoint(service), methods=["POST"], dependencies=protected)
    app.add_api_route("/v1/completions", completions.endpoint(service), methods=["POST"], dependencies=protected)
    app.add_api_route("/v1/responses", responses.endpoint(service), methods=["POST"], dependencies=protected)
    app.add_api_route("/tokenize", tokens.tokenize_endpoint(service), methods=["POST"], dependencies=protected)
    app.add_api_route("/detokenize", tokens.detokenize_endpoint(service), methods=["POST"], dependencies=protected)

    @app.get("/openapi.json")
    async def openapi():
        return description

    return app


def chat_endpoint(service: Service):
    """What answers /v1/chat/completions."""
    model, limits = service.model, service.limits

    async def chat_completions(request: Request):
        exchange = Exchange(service.worker, request)
        with service.counted():
            asked = read_request(await read_body(request, limits), ChatRequest)
            with_usage = asked.includes_usage()
            row = asked.row(service.names, limits, getattr(model, "fields", OLD_FIELDS))
            rows = await asyncio.to_thread(refused_as_error, model.prepare, row, service.defaults)
            service.begin(exchange, rows, asked.stream)
        if asked.stream:
            return stream_of(server_sent_events(chunks(model, exchange, with_usage)))
        await exchange.finished()
        return JSONResponse(model.completion(model.choices(exchange.rows)))

    return chat_completions


async def chunks(model, exchange: Exchange, with_usage: bool) -> AsyncIterator[dict]:
    """The chunks of a stream. Each of the n choices gets chunks, even if one text serves several choices."""
    head = model.head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
    has_pieces = hasattr(model, "log_probability_pieces")  # not in models of older versions
    pieces = [model.log_probability_pieces(row) for row in exchange.rows] if has_pieces else []
    stream = ChoiceStream(exchange.rows, getattr(model, "end_tokens", ()), pieces)
    for entry in stream.begin():
        yield head | {"choices": [entry]}
    async for place, text, finish_reason in exchange.news():
        for entry in stream.of(place, text, finish_reason):
            yield head | {"choices": [entry]}
    if with_usage:
        yield head | {"choices": [], "usage": model.completion(model.choices(exchange.rows))["usage"]}


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
