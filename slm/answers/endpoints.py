"""Connects to an endpoint, checks it, and sends several requests at a time.

    http://127.0.0.1:5005/v1         OpenAI's API; the only model that GET /v1/models lists
    http://127.0.0.1:5005/v1#phi3    OpenAI's API; the model with this name
    endpoints:/chat                  MLflow's deployments API, at the server that MLFLOW_DEPLOYMENTS_TARGET names

OpenAI's API takes the key only from OPENAI_API_KEY, because MLflow logs parameters. Both clients repeat a request after
status 429 or 5xx. Not covered: streams, the Responses API, addresses with a query (Azure), embeddings.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from slm.answers import side_by_side
from slm.base.errors import BadInput, Unavailable
from slm.base.wording import one_line

THREADS = 8  # requests at a time, if the caller gives no number
SECONDS = 600.0  # time limit of one request
RETRIES = 4  # of one request, with pauses of 0.5 s to 8 s
NEUTRAL = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}  # values of the trial request
GATEWAY_TYPES = {"llm/v1/chat": "messages", "llm/v1/completions": "prompt"}


@dataclass(frozen=True)
class Endpoint:
    """A model at an address. `connect` returns an Endpoint only after the model has answered."""

    uri: str  # has the model's name, but no credentials
    column: str  # messages | prompt
    fields: dict[str, str]  # generation parameter -> the request's field; other parameters are not sent
    fixed: dict[str, str]  # other fields of every request
    ask: Callable[[dict], dict]  # the body of a request -> the body of the reply
    look: Callable[[], object]  # raises an error if the server can't be reached


def is_endpoint(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "endpoints:/"))


def check(uri: str) -> None:
    """Checks an endpoint's URI without a request.

    Raises:
        BadInput: the address has credentials or a query, or the endpoint or its server is not named.
    """
    if uri.startswith("endpoints:/"):
        if not uri.removeprefix("endpoints:/").strip("/"):
            raise BadInput(f"{uri} names no endpoint; write endpoints:/name")
        if not os.environ.get("MLFLOW_DEPLOYMENTS_TARGET"):
            raise BadInput(f"{uri}: set MLFLOW_DEPLOYMENTS_TARGET to the server's address")
        return
    try:
        parts = urlsplit(uri)
        named = parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        named = False
    if not named:
        raise BadInput(f"{uri} is no address; write http://host:port/v1")
    if parts.username or parts.password or parts.query:
        shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise BadInput(f"{shown} was given with credentials or a query; the key belongs in OPENAI_API_KEY, alone")


def connect(uri: str) -> Endpoint:
    """Finds the model and requests one token. So a fault that fails every row is found before the first row.

    If a server with OpenAI's API refuses a generation parameter by name, `fields` lacks the parameter. `max_tokens` is
    first tried again as `max_completion_tokens`.

    Raises:
        BadInput: the URI is wrong, the model doesn't exist, or the reply is not in OpenAI's form.
        Unavailable: the server can't be reached, refuses the key, or fails.
    """
    check(uri)
    return _deployment(uri) if uri.startswith("endpoints:/") else _openai(uri)


def answers(
    endpoint: Endpoint, requests: list[dict], threads: int = 0, row_timeout: float = 0.0
) -> Iterator[tuple[int, dict | str, float]]:
    """Yields (place, reply's body, seconds) in the order of the replies. A failed request has its reason for a body.

    At most `threads` requests run at a time (0: THREADS). A row's seconds include its retries and the server's queue.
    `row_timeout` limits these seconds (0: no limit).

    Raises:
        Unavailable: the server can't be reached any more, or refuses the key. The remaining rows stay unanswered.
    """
    ask = partial(_timed, endpoint.ask)
    for place, found in side_by_side.answered(ask, requests, threads or THREADS, row_timeout):
        body, seconds = (str(found), row_timeout) if isinstance(found, side_by_side.TookTooLong) else found
        if isinstance(body, Exception):
            if _status(body) == 401:
                raise _failure(endpoint.uri, body)
            if _status(body) in (403, None):  # a moderated text or a lost connection may concern one row
                try:
                    endpoint.look()
                except Exception as error:
                    failure = _failure(endpoint.uri, error)
                    if isinstance(failure, Unavailable):  # else the server replies, but lists no models
                        raise failure from None
            body = _reason(body)
        yield place, body, seconds


# ---------------------------------------------------------------------------------------------------------------------


def _openai(uri: str) -> Endpoint:
    import openai

    address, _, name = uri.partition("#")
    address = address.rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=address, api_key=key, max_retries=RETRIES, timeout=SECONDS)
    if not name:
        try:
            names = [model.id for model in client.models.list()]
        except Exception as error:
            raise _failure(address, error) from None
        if len(names) != 1:
            raise BadInput(f"{address} lists {', '.join(names) or 'no model'}; name one, as {address}#name")
        [name] = names

    def ask(body: dict) -> dict:
        return client.chat.completions.with_raw_response.create(**body).http_response.json()

    fields = {name: name for name in ("max_tokens", "temperature", "top_p", "stop", "seed")}
    endpoint = Endpoint(f"{address}#{name}", "messages", fields, {"model": name}, ask, client.models.list)
    while True:
        try:
            _try(endpoint)
            return endpoint
        except openai.BadRequestError as error:
            refused = {field: name for name, field in fields.items()}.get(error.param or "")
            if refused is None:
                raise _failure(endpoint.uri, error) from None
            if fields.pop(refused) == "max_tokens":  # newer models of OpenAI take this name
                fields["max_tokens"] = "max_completion_tokens"
        except Exception as error:
            raise _failure(endpoint.uri, error) from None


def _deployment(uri: str) -> Endpoint:
    from mlflow.deployments import get_deploy_client

    name = uri.removeprefix("endpoints:/").strip("/")
    try:
        client = get_deploy_client()
        found = client.get_endpoint(name)
    except Exception as error:
        if _status(error) == 404:
            names = ", ".join(endpoint.name for endpoint in client.list_endpoints()) or "none"
            raise BadInput(f"{uri}: there is no such endpoint; there are: {names}") from None
        raise _failure(uri, error) from None
    kind = getattr(found, "task", None) or getattr(found, "endpoint_type", None)  # Databricks has the name task
    if kind not in GATEWAY_TYPES:
        raise BadInput(f"{uri} is of type {kind}; one of {', '.join(GATEWAY_TYPES)} is needed")
    endpoint = Endpoint(
        f"endpoints:/{name}",
        GATEWAY_TYPES[kind],
        {name: name for name in ("max_tokens", "temperature", "top_p", "stop", "seed")},
        {},
        lambda body: client.predict(endpoint=name, inputs=body),
        lambda: client.get_endpoint(name),
    )
    try:
        _try(endpoint)
    except Exception as error:
        raise _failure(uri, error) from None
    return endpoint


def _try(endpoint: Endpoint) -> None:
    content = [{"role": "user", "content": "Hello"}] if endpoint.column == "messages" else "Hello"
    neutral = {endpoint.fields[name]: value for name, value in NEUTRAL.items() if name in endpoint.fields}
    body = endpoint.ask({endpoint.column: content} | endpoint.fixed | neutral)
    if not isinstance(body, dict) or not body.get("choices"):
        raise BadInput(f"{endpoint.uri} does not answer in OpenAI's form, but {str(body)!r:.80}")


def _timed(ask: Callable[[dict], dict], request: dict) -> tuple[dict | Exception, float]:
    start = time.perf_counter()
    try:
        return ask(request), time.perf_counter() - start
    except Exception as error:  # the error fails one row, unless the server can't be reached
        return error, time.perf_counter() - start


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of either client. None if the server sent no reply."""
    return getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)


def _failure(uri: str, error: Exception) -> BadInput | Unavailable:
    """Converts an error of either client to BadInput or Unavailable, with a message of one line."""
    if isinstance(error, BadInput | Unavailable):
        return error
    status, reason = _status(error), _reason(error)
    if status in (401, 403):
        given = (
            "refuses the key in OPENAI_API_KEY"
            if os.environ.get("OPENAI_API_KEY")
            else "needs a key: set OPENAI_API_KEY"
        )
        return Unavailable(f"{uri} {given} ({status}): {reason}")
    if isinstance(error, ValueError) and status is None:
        return BadInput(f"{uri} does not answer in OpenAI's form: {reason}")
    if status is None:
        return Unavailable(f"{uri} can't be reached: {reason}")
    if status == 429 or status >= 500:
        return Unavailable(f"{uri} fails ({status}): {reason}")
    hint = "; is the address whole, as http://host/v1?" if status == 404 and uri.startswith("http") else ""
    return BadInput(f"{uri} refuses a request ({status}): {reason}{hint}")


def _reason(error: Exception) -> str:
    """The server's message in one line. Without a server's message, the client's message."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    cause = error.__cause__ if type(error).__name__ == "APIConnectionError" else None
    return one_line(said or cause or error, 300)
