"""The part of OpenAI's chat API that this server accepts: requests, errors, keys and host names."""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import prometheus_client
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.base import model_uri, strict_json
from slm.base.errors import BadInput

PROMPT_TOKENS = 8  # prompt tokens that the model reads in the time of one generated token
SECONDS_PER_TOKEN = 0.02  # on a machine with one client, for the order of the queue
MOST_STOPS = 16
LOOPBACK = ("localhost",)  # in addition to loopback's addresses
WILDCARDS = ("0.0.0.0", "::")  # each stands for all addresses of a machine
METRICS_TYPE = prometheus_client.CONTENT_TYPE_LATEST
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # without the second, nginx buffers events
# OpenAI's fields that this model lacks, and the values that have no effect
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
    """The limits of one server. Beyond a limit, a request is refused."""

    waiting: int = 64  # texts that wait for a batch. Further texts get 429
    seconds: float = 300.0  # from a request's arrival to its last token. Later, the answer is 504
    max_tokens: int = 4096  # the most that one request may set
    body_bytes: int = 2**20
    body_seconds: float = 20.0  # for a request's whole body to arrive


class ApiError(Exception):
    """The error of a request without an answer, in the form of OpenAI's error object."""

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", param=None, code=None):
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        # the openai client repeats after 429 and 5xx. A repeat helps after a full queue, not after a timeout
        headers = {"Retry-After": "1"} if self.status == 429 else {"x-should-retry": "false"}
        return JSONResponse(self.content, self.status, headers)


# ---------------------------------------------------------------------------------------------------------------------
# What a request may contain


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict] | None = None

    def plain(self, place: int) -> dict:
        """The message as a role and one text."""
        where = f"messages.{place}"
        if self.role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where}.role: {self.role!r:.40} is none of system, user, assistant", param="messages")
        for name, value in (self.model_extra or {}).items():
            if value and name != "name":  # clients send back the fields that they got, including empty fields
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
    """The body of a request. The model itself checks the ranges."""

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

    def row(self, names: Sequence[str], limits: Limits) -> dict:
        """The request as a row of the model's input.

        Raises:
            ApiError: the request needs something that this server does not have.
        """
        if self.model:
            check_model(self.model, names)
        for field_name, value in (self.model_extra or {}).items():
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


def check_model(asked: str, names: Sequence[str]) -> None:
    """
    Raises:
        ApiError: the model that a client asks for has none of these names.
    """
    if asked not in names:
        text = f"model: {asked!r:.80} is not served here; {names[0]!r} is"
        raise ApiError(404, text, param="model", code="model_not_found")


def model_names(uri: str, resolved: str, checkpoint: str, chosen: str = "") -> tuple[str, ...]:
    """The names that clients may ask for. The first one is the name in answers and in /v1/models.

    A registered model has its name, alone and with the alias or version. Every model has the checkpoint's name too.
    """
    given, version = uri.removeprefix("models:/"), model_uri.registered_version(resolved)
    registered = [version[0], "/".join(version), given, uri, resolved] if version else []
    return tuple(dict.fromkeys(filter(None, [chosen, *registered, checkpoint])))


def read_request(body: bytes) -> ChatRequest:
    """
    Raises:
        ApiError: the body is no strict JSON, or a field has a wrong type.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
        strict_json.parse(body.decode())  # with two equal keys, the model above silently uses the last value
        return asked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        text = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, " ".join(text.split()), param=place.split(".")[0] or None) from None
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Who may send requests


def read_keys(api_key: str) -> list[str]:
    """The API keys in one text, separated by commas. An empty text holds no key.

    Raises:
        BadInput: the text has only commas and blanks, which would open the server to everybody.
    """
    keys = list(dict.fromkeys(filter(None, map(str.strip, api_key.split(",")))))
    if api_key and not keys:
        raise BadInput("PHI3_MLFLOW_API_KEY: holds no key; write one, or several with commas, or unset the variable")
    return keys


def is_served(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header names this server: a loopback address, or one of `names` in the form of `host_name`.

    If `names` has a wildcard address, every numeric address counts as the server's. DNS rebinding needs a name.
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
    """A host name or address without its port, in the form that comparisons use."""
    text = text.strip().lower()
    if text.count(":") == 1 or "]" in text:  # else the colons belong to an IPv6 address
        text = re.sub(r":\d*$", "", text)
    name = text.removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


class ServedNames:
    """ASGI middleware: any request under another host name gets 421."""

    def __init__(self, app, names: Iterable[str]):
        self.app = app
        self.names = {host_name(name) for name in (*LOOPBACK, *names) if name.strip()}

    async def __call__(self, scope, receive, send):
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] != "http" or is_served(host, self.names):
            return await self.app(scope, receive, send)
        text = f"Host: {host!r:.80} is not served here; the parameter allowed_hosts adds a name"
        await ApiError(421, text, code="misdirected_request").response()(scope, receive, send)
