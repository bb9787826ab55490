"""OpenAI's chat API over one chat model that was logged here: what MLflow's own scoring server doesn't speak.

    POST /v1/chat/completions   whole, or as server-sent events
    GET  /v1/models  /health  /metrics (Prometheus)

One thread owns the model. Requests that wait are generated together; the texts that come go to each request's own
queue, and a request whose client has gone, or whose time is up, is dropped from its batch after the next token.

The running batches take turns, one step each, so no batch holds up another one. A further batch starts when:
- fewer than MOST_BATCHES run, and as many texts wait as are being generated, or one text has waited JOIN_SECONDS;
- a text is short: each running batch may need SHORT_FACTOR times its tokens or more;
- a client has nothing under way and has waited FAIR_SECONDS, and fewer than FAIR_BATCHES run.
The texts that wait are ordered by fair queueing between clients. A client is an API key where there are several, and
an address otherwise. All caches together take at most MOST_CACHES times what one batch may take; a single text that
takes more than one batch may counts as one batch.

Prompts' beginnings are computed once within one API key. With no key or one key, all clients share them.

A page in a browser can give its own name the address of this machine (DNS rebinding). So a request is answered only
under a host name that the server was told to serve.

Not covered: TLS, users and quotas (a proxy's work), tools, images, log probabilities, more than one model or process.
A text does not join a running batch. A long prompt is read in pieces where the model's runtime refills, and other
batches take their turn between two pieces. With any other runtime, a prompt is one step of its batch.
slm/connections.py guards the sockets.
"""

import asyncio
import hmac
import ipaddress
import json
import re
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from slm import strict_json, tracking, wrappers
from slm.errors import BadInput

MOST_BATCHES = 2  # started for throughput side by side
FAIR_BATCHES = 4  # up to which a client that has nothing under way gets a batch of its own
MOST_CACHES = 2.5  # that all batches may take together; one batch for throughput may take one cache
GATHER_SECONDS = 0.01  # in which those who ask together arrive, where nothing runs; small beside a prompt's time
JOIN_SECONDS = 5.0  # a text that has waited so long starts the second batch, however small
FAIR_SECONDS = 1.0  # in which the texts of such clients gather: each batch costs the others a turn
SHORT_FACTOR = 4  # so texts of 4096 tokens leave room for at most six levels of shorter batches
PROMPT_TOKENS = 8  # of a prompt, computed in the time of one generated token
SECONDS_PER_TOKEN = 0.02  # of a machine of one's own, for the order of the queue
MOST_STOPS = 16
LOOPBACK = ("localhost",)  # beside loopback's addresses
WILDCARDS = ("0.0.0.0", "::")  # addresses to listen at that stand for all of a machine's addresses
METRICS_TYPE = prometheus_client.CONTENT_TYPE_LATEST
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the events otherwise
# OpenAI's fields that this model doesn't have, and the values that ask for nothing
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (0,),
}


@dataclass(frozen=True)
class Limits:
    """What one server takes on; past these a request is refused."""

    waiting: int = 64  # texts that wait for a batch; more are answered 429
    seconds: float = 300.0  # from a request's arrival to its last token; then 504
    max_tokens: int = 4096  # that one request may ask for
    body_bytes: int = 2**20
    body_seconds: float = 20.0  # in which a request's body must have arrived


class ApiError(Exception):
    """A request that ends without its answer, in the shape of OpenAI's error object."""

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", param=None, code=None):
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        # the openai client tries 429 and 5xx again: worth it when the queue was full, not when time was up
        headers = {"Retry-After": "1"} if self.status == 429 else {"x-should-retry": "false"}
        return JSONResponse(self.content, self.status, headers)


# ---------------------------------------------------------------------------------------------------------------------
# What a request may say


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict] | None = None

    def plain(self, place: int) -> dict:
        """The message as a role and one text."""
        where = f"messages.{place}"
        if self.role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where}.role: {self.role!r:.40} is none of system, user, assistant", param="messages")
        for name, value in self.model_extra.items():
            if value and name != "name":  # clients send back what they got, empty fields included
                raise ApiError(400, f"{where}.{name} is not supported by this model", param="messages")
        parts = [{"type": "text", "text": self.content}] if isinstance(self.content, str) else self.content or []
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise ApiError(400, f"{where}.content: only parts of text, not {kind!r:.40}", param="messages")
        if not parts:
            raise ApiError(400, f"{where}.content is missing", param="messages")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part["text"] for part in parts)}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of a request; ranges are checked by the model itself."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def row(self, name: str, limits: Limits) -> dict:
        """The request as a row of the model's input.

        Raises:
            ApiError: it asks for what isn't served here.
        """
        if self.model and self.model != name:
            text = f"model: {self.model!r:.80} is not served here; {name!r} is"
            raise ApiError(404, text, param="model", code="model_not_found")
        for field_name, value in self.model_extra.items():
            if value is None or field_name in IGNORED or value in NEUTRAL.get(field_name, ()):
                continue
            known = field_name in NEUTRAL
            text = f"{field_name:.60}: {value!r:.60} is not supported by this model"
            raise ApiError(400, text if known else f"{field_name:.60}: there is no such field", param=field_name)
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise ApiError(400, f"stop: {len(self.stop)} texts; at most {MOST_STOPS}", param="stop")
        max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if max_tokens is not None and max_tokens > limits.max_tokens:
            text = f"max_tokens: {max_tokens} is more than the {limits.max_tokens} allowed here"
            raise ApiError(400, text, param="max_tokens")
        messages = [message.plain(place) for place, message in enumerate(self.messages)]
        own = {name: getattr(self, name) for name in ("temperature", "top_p", "seed", "stop", "n")}
        return {"messages": messages, "max_tokens": max_tokens} | own


def read_request(body: bytes) -> ChatRequest:
    """
    Raises:
        ApiError: it is no JSON, or a field has a wrong type.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
        strict_json.parse(body.decode())  # of two equal keys the model above takes the last one without a word
        return asked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        text = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, " ".join(text.split()), param=place.split(".")[0] or None) from None
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask


def read_keys(api_key: str) -> list[str]:
    """The API keys in one text, separated by commas; an empty text holds none.

    Raises:
        BadInput: the text has commas and blanks alone, which would open the server to everybody.
    """
    keys = list(dict.fromkeys(filter(None, map(str.strip, api_key.split(",")))))
    if api_key and not keys:
        raise BadInput("PHI3_MLFLOW_API_KEY: holds no key; write one, or several with commas, or unset the variable")
    return keys


def is_served(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header names this server: a loopback address, or one of `names`, as `host_name` writes them.

    Where `names` has a wildcard address, every numeric address is one of the server's own: rebinding needs a name.
    """
    name = host_name(host)
    if name in names:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or any(wildcard in names for wildcard in WILDCARDS)


def host_name(text: str) -> str:
    """A host name or address without its port, in the one form in which hosts are compared."""
    text = text.strip().lower()
    if text.count(":") == 1 or "]" in text:  # else the colons are those of an IPv6 address
        text = re.sub(r":\d*$", "", text)
    name = text.removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


class ServedNames:
    """ASGI middleware: a request under another host name is answered 421, whatever it asks for."""

    def __init__(self, app, names: Iterable[str]):
        self.app = app
        self.names = {host_name(name) for name in (*LOOPBACK, *names) if name.strip()}

    async def __call__(self, scope, receive, send):
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] != "http" or is_served(host, self.names):
            return await self.app(scope, receive, send)
        text = f"Host: {host!r:.80} is not served here; the parameter allowed_hosts adds a name"
        await ApiError(421, text, code="misdirected_request").response()(scope, receive, send)


# ---------------------------------------------------------------------------------------------------------------------
# The thread that generates


@dataclass(eq=False)
class Ticket:
    """A request on its way, and the queue in which its texts come to it."""

    streamed: bool
    loop: asyncio.AbstractEventLoop
    client: str  # among whom the model's time is shared
    events: asyncio.Queue = field(default_factory=asyncio.Queue)  # (row, new text, finish reason or ""), or an ApiError
    dropped: bool = False
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Place:
    """One text of a request, waiting or in a batch."""

    row: object  # of slm.chat_model.Row, as the logged model's own copy of that module has it
    ticket: Ticket

    def tokens(self) -> float:
        """The steps that the text takes at most from its start, its prompt's computation included."""
        return self.row.room + len(self.row.prompt) / PROMPT_TOKENS

    def left(self) -> int:
        """The tokens that may still be generated for the text."""
        return 0 if self.row.finish_reason else self.row.room - len(self.row.output)


@dataclass(eq=False)
class Batch:
    places: list[Place]
    steps: Iterator[list[tuple]]
    share: float  # of what the cache of one batch may take

    def live(self) -> int:
        return sum(not place.row.finish_reason for place in self.places)

    def left(self) -> int:
        return max(place.left() for place in self.places)


def fair_order(waiting: Iterable[Place], running: Iterable[Place]) -> list[Place]:
    """The waiting texts in the order in which they would end if each client had a machine of its own.

    This is fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989). Each client's short texts go first, a client with
    much under way goes behind the others, and no text waits for ever, since its arrival counts.
    """

    def alone(place: Place) -> float:
        return place.ticket.arrived + SECONDS_PER_TOKEN * place.tokens()

    ahead: Counter = Counter()  # by client: the tokens before a text of that client
    for place in running:
        ahead[place.ticket.client] += place.left()
    ends = {}
    for place in sorted(waiting, key=alone):
        ends[place] = alone(place) + SECONDS_PER_TOKEN * ahead[place.ticket.client]
        ahead[place.ticket.client] += place.tokens()
    return sorted(ends, key=ends.get)


class Metrics:
    def __init__(self, worker: "Worker"):
        self.registry = registry = prometheus_client.CollectorRegistry()
        buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.requests = prometheus_client.Counter(
            "slm_requests", "Requests for a completion, by how they ended", ["outcome"], registry=registry
        )
        self.prompt_tokens = prometheus_client.Counter("slm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.output_tokens = prometheus_client.Counter("slm_output_tokens", "Tokens generated", registry=registry)
        self.seconds = prometheus_client.Histogram(
            "slm_request_seconds", "From arrival to the last token", registry=registry, buckets=buckets
        )
        self.first_seconds = prometheus_client.Histogram(
            "slm_first_token_seconds", "From arrival to a stream's first token", registry=registry, buckets=buckets
        )
        self.batch_texts = prometheus_client.Histogram(
            "slm_batch_texts", "Texts a batch began with", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        waiting = prometheus_client.Gauge("slm_waiting", "Texts that wait for a batch", registry=registry)
        waiting.set_function(lambda: len(worker.waiting))
        generating = prometheus_client.Gauge("slm_generating", "Texts that are being generated", registry=registry)
        generating.set_function(lambda: sum(batch.live() for batch in list(worker.running)))


class Worker:
    """The thread that owns the model. `submit` and `drop` are called from the event loop."""

    def __init__(self, model, limits: Limits):
        self.model, self.limits = model, limits
        self.waiting: deque[Place] = deque()
        self.running: list[Batch] = []
        self.metrics = Metrics(self)
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self.start, self.is_alive = self._thread.start, self._thread.is_alive

    def stop(self, seconds: float) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)

    def submit(self, rows: list, streamed: bool, client: str) -> Ticket:
        """Queues a request's texts. In a full queue there is still room for a client that has no text in it.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        ticket = Ticket(streamed, asyncio.get_running_loop(), client)
        with self._wake:
            if self._stopping:
                raise _stopping()
            waits = any(place.ticket.client == client for place in self.waiting)
            most = self.limits.waiting if waits else 2 * self.limits.waiting
            if self.waiting and len(self.waiting) + len(rows) > most:
                text = f"{len(self.waiting)} texts wait already; try again later"
                raise ApiError(429, text, "rate_limit_error", code="queue_full")
            self.waiting.extend(Place(row, ticket) for row in rows)
            self._wake.notify()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Takes a request's texts out of the queue and, after the next token, out of their batches."""
        ticket.dropped = True
        with self._wake:
            self.waiting = deque(place for place in self.waiting if place.ticket is not ticket)

    def _work(self) -> None:
        while self._admit():
            for batch in list(self.running):
                try:
                    events = self._step(batch)
                except Exception as error:  # this batch has failed; the server goes on
                    traceback.print_exception(error)
                    text = f"the model failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
                    _deliver((place.ticket, ApiError(500, text, "server_error")) for place in batch.places)
                    self.running.remove(batch)
                else:
                    _deliver(events)
                    if not batch.live():
                        batch.steps.close()
                        self.running.remove(batch)
        for batch in self.running:
            batch.steps.close()
        left = [place for batch in self.running for place in batch.places if not place.row.finish_reason]
        _deliver((place.ticket, _stopping()) for place in [*left, *self.waiting])

    def _admit(self) -> bool:
        """Starts a batch of what waits, if it is time; sleeps while there is nothing to do. False: stop."""
        with self._wake:
            while not (self.waiting or self.running or self._stopping):
                self._wake.wait()
            if self._stopping:
                return False
            seen = 0
            while not self.running and seen < len(self.waiting) < self.model.batch_size:
                seen = len(self.waiting)
                self._wake.wait(GATHER_SECONDS)  # ends early when one more has come
            places = self._next_places()
            if not places:
                return True
            self.waiting = deque(place for place in self.waiting if place not in places)
            rows = [place.row for place in places]
            self.running.append(Batch(places, self.model.stream(rows), self._share(rows)))
        self.metrics.batch_texts.observe(len(places))
        return True

    def _next_places(self) -> list[Place]:
        """The waiting texts that are generated together from now on; none where all go on waiting."""
        if not self.waiting:
            return []
        now = time.monotonic()
        under_way = [place for batch in self.running for place in batch.places if not place.row.finish_reason]
        ordered = fair_order(self.waiting, under_way)
        if len(self.running) < MOST_BATCHES:
            patient = now - min(place.ticket.arrived for place in ordered) < JOIN_SECONDS
            if len(ordered) >= len(under_way) or not patient:
                return self._together(ordered)
        left = min(batch.left() for batch in self.running)
        busy = {place.ticket.client for place in under_way}
        short = [place for place in ordered if SHORT_FACTOR * place.tokens() <= left]
        others = [place for place in ordered if place.ticket.client not in busy]
        late = len(self.running) < FAIR_BATCHES and any(now - place.ticket.arrived >= FAIR_SECONDS for place in others)
        # half of what is left leaves room for shorter texts; a text larger than a whole cache counts as one
        share = (MOST_CACHES - sum(min(batch.share, 1.0) for batch in self.running)) / 2
        return self._together(short, share) or self._together(others if late else [], share)

    def _together(self, ordered: list[Place], share: float = float("inf")) -> list[Place]:
        """The texts that fit into one batch and into a share of its cache. Without a share, the first text fits."""
        places: list[Place] = []
        for place in ordered:
            rows = [chosen.row for chosen in places]
            if self.model.fits(rows, place.row) and self._share([*rows, place.row]) <= share:
                places.append(place)
        return places

    def _share(self, rows: list) -> float:
        """A model that was logged before there was `cache_share` gets no batches beyond MOST_BATCHES."""
        return self.model.cache_share(rows) if hasattr(self.model, "cache_share") else 1.0

    def _step(self, batch: Batch) -> list[tuple[Ticket, object]]:
        """One token more for a batch, and what its requests are told of it."""
        for place in batch.places:
            if place.ticket.dropped and not place.row.finish_reason:
                place.row.finish_reason = "cancelled"
        if not batch.live():
            return []
        step = next(batch.steps, None)
        if step is None:
            raise RuntimeError("the runtime ended before its texts")
        tickets = {id(place.row): place.ticket for place in batch.places}
        news = ((tickets[id(row)], row, text) for row, text in step)
        return [
            (ticket, (row, text, row.finish_reason))
            for ticket, row, text in news
            if not ticket.dropped and (row.finish_reason or (ticket.streamed and text))
        ]


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", "server_error")


def _deliver(events: Iterable[tuple[Ticket, object]]) -> None:
    """Puts events into their requests' queues, waking the event loop once."""
    events = list(events)

    def put():
        for ticket, event in events:
            ticket.events.put_nowait(event)

    if events:
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            events[0][0].loop.call_soon_threadsafe(put)


# ---------------------------------------------------------------------------------------------------------------------
# The application


def build(
    model, defaults: dict, limits: Limits | None = None, api_key: str = "", host_names: Iterable[str] = ()
) -> FastAPI:
    """The application over a loaded chat model; `defaults` are the parameters for requests that don't give theirs.

    `api_key` may hold several keys, separated by commas. `host_names` are served beside those of loopback.

    Raises:
        BadInput: the model can't keep several keys' prompts apart, or `api_key` holds no key.
    """
    keys = read_keys(api_key)
    if len(keys) > 1 and not getattr(model, "separates_tenants", False):
        raise BadInput("model_uri: the model was logged by a version that serves one key alone; log the model again")
    limits = limits or Limits()
    worker = Worker(model, limits)
    started = int(time.time())

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
        if name != model.name:
            raise ApiError(404, f"model: {name!r:.80} is not served here; {model.name!r} is", code="model_not_found")
        return card()

    def client_of(request: Request) -> str:
        return request.state.tenant if len(keys) > 1 or not request.client else request.client.host

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat_completions(request: Request):
        exchange = Exchange(worker, request)
        try:
            asked = read_request(await read_body(request, limits))
            row = asked.row(model.name, limits)
            try:
                exchange.rows = await asyncio.to_thread(model.prepare, row, defaults)
            except ValueError as refusal:  # Refused, of the logged model's own copy of slm.chat_model
                raise ApiError(400, str(refusal)) from None
            for prepared in exchange.rows:
                prepared.tenant = request.state.tenant
            exchange.begin(asked.stream, client_of(request))
        except ApiError as error:
            worker.metrics.requests.labels("full" if error.status == 429 else "refused").inc()
            raise
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = server_sent_events(model, exchange, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        async for _ in exchange.news():
            pass
        return JSONResponse(model.completion(model.choices(exchange.rows)))

    return app


class Exchange:
    """One request from its arrival to its end, however it ends: counted once, and its place freed."""

    def __init__(self, worker: Worker, request: Request):
        self.worker, self.request = worker, request
        self.rows: list = []
        self.start = time.perf_counter()

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
        self.worker.drop(self.ticket)  # at once: a stream that waits to send would notice late
        self.ticket.events.put_nowait(ApiError(499, "the client has gone", "client_gone"))

    async def news(self) -> AsyncIterator[tuple[int, str, str]]:
        """(choice, new text, finish reason or "") as they come, until all texts have ended.

        Raises:
            ApiError: time was up, the client went, the model failed or the server stops.
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
        ApiError: the body is no JSON by its type, too long or too slow.
    """
    # a page in a browser may send text/plain to any address without being asked first, but not this
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
    """A stream's chunks. All n choices get theirs, also where one text serves them all."""
    head = model.head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
    n = exchange.rows[0].sampling.n
    copies = n // len(exchange.rows)

    def event(choice, delta, finish_reason=None):
        return _event(head | {"choices": [{"index": choice, "delta": delta, "finish_reason": finish_reason}]})

    try:
        for choice in range(n):
            yield event(choice, {"role": "assistant", "content": ""})
        async for place, text, finish_reason in exchange.news():
            for choice in range(place, n, n // copies):
                if text:
                    yield event(choice, {"content": text})
                if finish_reason:
                    yield event(choice, {}, finish_reason)
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


def load(uri: str, trust_code: bool = False) -> tuple[object, dict]:
    """The wrapper that `uri` names, and the parameters it was logged with.

    Raises:
        BadInput: it is none of this project's chat models, its files were changed, or its code isn't trusted.
    """
    mlflow = tracking.quiet_mlflow()
    uri = tracking.resolve(uri, trust_code)
    with tracking.local_copy(uri) as folder:
        try:
            description = mlflow.models.Model.load(str(folder))
            if not wrappers.is_ours(description) or "schema" not in description.metadata:
                raise BadInput(f"model_uri: {uri} was not logged by this project")
            if description.metadata["schema"] != "chat":
                schema = description.metadata["schema"]
                raise BadInput(f"model_uri: {uri} has the {schema} schema; log it with schema=chat to serve it")
            opened = wrappers.opened(uri, folder, tracking.recorded_manifests(uri), trust_code, {})
        except (mlflow.exceptions.MlflowException, ValueError) as error:
            raise BadInput(f"model_uri: {uri}: {' '.join(str(error).split())}") from None
    if not hasattr(opened.wrapper, "stream"):
        raise BadInput(f"model_uri: {uri} was logged by an older version of this project; log it again")
    return opened.wrapper, {param.name: param.default for param in opened.description.signature.params}
