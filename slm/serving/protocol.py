"""The part of OpenAI's chat API that this server accepts: requests, errors and host names.

slm/models/chat_parts/fields.py checks a request field by field. slm/serving/keys.py has the keys.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import prometheus_client
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.base import model_uri, strict_json
from slm.models.chat_parts.fields import BY_NAME, FIELDS, checked, did_you_mean, includes_usage
from slm.models.chat_parts.templates import messages_of

PROMPT_TOKENS = 8  # prompt tokens that the model reads in the time of one generated token
SECONDS_PER_TOKEN = 0.02  # on a machine with one client, for the order of the queue
MOST_STOPS = 16
LOOPBACK = ("localhost",)  # in addition to loopback's addresses
WILDCARDS = ("0.0.0.0", "::")  # each stands for all addresses of a machine
METRICS_TYPE = prometheus_client.CONTENT_TYPE_LATEST
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # without the second, nginx buffers events
# What the wrappers of 0.1.0 honour. They ignore other fields, so such a request is refused here
OLD_FIELDS = frozenset(("messages", "max_tokens", "temperature", "top_p", "seed", "stop", "n"))


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

    @property
    def outcome(self) -> str:
        """As slm_requests_total counts the request."""
        return {504: "timeout", 499: "cancelled"}.get(self.status, "error")

    def response(self) -> JSONResponse:
        # the openai client repeats after 429 and 5xx. A repeat helps after a full queue, not after a timeout
        headers = {"Retry-After": "1"} if self.status == 429 else {"x-should-retry": "false"}
        return JSONResponse(self.content, self.status, headers)


# ---------------------------------------------------------------------------------------------------------------------
# What a request may contain


class ChatRequest(BaseModel):
    """The body of a request. The model itself checks the fields, by the table of slm/models/chat_parts/fields.py."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    messages: list[dict]
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict | None = None

    def row(self, names: Sequence[str], limits: Limits, fields: frozenset[str]) -> dict:
        """The request as a row of the model's input. `fields` are those that the model's wrapper knows.

        Raises:
            ApiError: the request needs something that this server does not have.
        """
        if self.model:
            check_model(self.model, names)
        given = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise ApiError(400, f"stop: {len(self.stop)} texts; at most {MOST_STOPS}", param="stop")
        for name in ("max_tokens", "max_completion_tokens"):
            most = given.get(name)
            if isinstance(most, int | float) and most > limits.max_tokens:
                text = f"max_tokens: {most} is more than the {limits.max_tokens} allowed here"
                raise ApiError(400, text, param=name)
        row = {"messages": self.messages, "stop": self.stop} | given
        return row if fields >= KNOWN else _old_row(row, fields)

    def includes_usage(self) -> bool:
        """Whether the stream ends with the counts of its tokens.

        Raises:
            ApiError: stream_options has something else, or the request is no stream.
        """
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        return refused_as_error(includes_usage, self.stream_options)


KNOWN = frozenset(field.name for field in FIELDS)


def refused_as_error(function: Callable, *arguments):
    """Calls a function of a wrapper. Its refusal becomes an error object with the field's name.

    Raises:
        ApiError: the wrapper refuses the request.
    """
    try:
        return function(*arguments)
    except ValueError as refusal:  # Refused, perhaps from a copy of the wrapper in a logged model
        raise ApiError(400, str(refusal), param=getattr(refusal, "field", "") or None) from None


def _old_row(row: dict, fields: frozenset[str]) -> dict:
    """A row for a wrapper that does not know all fields. Fields that it lacks must ask for nothing.

    Raises:
        ApiError: the wrapper would ignore a field.
    """
    refused_as_error(checked, row)
    row = dict(row)
    row["max_tokens"] = row.pop("max_completion_tokens", row.get("max_tokens"))
    row["messages"] = refused_as_error(messages_of, row["messages"])
    for name in [name for name in row if name not in fields]:
        entry = BY_NAME[name]
        if entry.effect and row[name] not in (entry.default, *entry.neutral, {"type": "text"}):
            text = f"{name}: {row[name]!r:.60} is not supported by this model; log it again with this version"
            raise ApiError(400, text, param=name)
        del row[name]
    for message in row["messages"]:
        if set(message) - {"role", "content", "name"} or message["role"] == "tool":
            raise ApiError(400, "messages: tool calls are not supported by this model; log it again", param="messages")
    return row


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


Kind = TypeVar("Kind", bound=BaseModel)


def read_request(body: bytes, kind: type[Kind]) -> Kind:
    """
    Raises:
        ApiError: the body is no strict JSON, or a field is unknown or has a wrong type.
    """
    try:
        asked = kind.model_validate_json(body)
        strict_json.parse(body.decode())  # with two equal keys, the model above silently uses the last value
        return asked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            text = f"{place:.60}: there is no such field{did_you_mean(place, kind.model_fields)}"
            raise ApiError(400, text, param=place.split(".")[0][:60]) from None
        text = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, " ".join(text.split()), param=place.split(".")[0] or None) from None
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Who may send requests


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
