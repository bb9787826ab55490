"""A model that is an endpoint: found, checked, and asked for many rows at once.

    http://127.0.0.1:5005/v1         OpenAI's API; the only model that GET /v1/models lists
    http://127.0.0.1:5005/v1#phi3    the model of this name
    endpoints:/chat                  MLflow's deployments API, at the server that MLFLOW_DEPLOYMENTS_TARGET names

The key of the first two is read from OPENAI_API_KEY alone, since MLflow logs parameters. Both clients try 429 and 5xx
again. Not covered: streams, the Responses API, addresses with a query (Azure's), embeddings.
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

THREADS = 8  # rows asked at the same time, where nobody says
SECONDS = 600.0  # that one request may take
RETRIES = 4  # of one request, half a second to eight apart
NEUTRAL = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}  # of the request that tries an endpoint
GATEWAY_TYPES = {"llm/v1/chat": "messages", "llm/v1/completions": "prompt"}


@dataclass(frozen=True)
class Endpoint:
    """A model at an address, which has answered."""

    uri: str  # with the model's name, without credentials
    column: str  # messages | prompt
    fields: dict[str, str]  # generation parameter -> the request's field; what isn't there isn't taken
    fixed: dict[str, str]  # what every request says beside
    ask: Callable[[dict], dict]  # one request's body -> the answer's
    look: Callable[[], object]  # raises where the server is gone


def is_endpoint(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "endpoints:/"))


def check(uri: str) -> None:
    """What can be seen without asking.

    Raises:
        BadInput: the address holds a key or a query, or no server is named.
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
    """Finds the model and asks it for one token: what would fail every row is known before the first.

    A generation parameter that the server refuses by name is left out of `fields`.

    Raises:
        BadInput: there is no such model, or it answers no chat or prompt.
        Unavailable: the server can't be reached, refuses the key, or fails.
    """
    check(uri)
    return _deployment(uri) if uri.startswith("endpoints:/") else _openai(uri)


def answers(
    endpoint: Endpoint, requests: list[dict], threads: int = 0, row_timeout: float = 0.0
) -> Iterator[tuple[int, dict | str, float]]:
    """Yields (place, the answer's body or why there is none, seconds) in the order they come.

    `threads` requests are under way at a time (0: THREADS). A row's seconds hold its tries and the server's queue, and
    `row_timeout` (0: none) limits them.

    Raises:
        Unavailable: the server is gone; what was not answered stays unanswered.
    """
    ask = partial(_timed, endpoint.ask)
    for place, found in side_by_side.answered(ask, requests, threads or THREADS, row_timeout):
        body, seconds = (str(found), row_timeout) if isinstance(found, side_by_side.TookTooLong) else found
        if isinstance(body, Exception):
            if _status(body) == 401:
                raise _failure(endpoint.uri, body)
            if _status(body) in (403, None):  # a moderated text, a broken connection: the row's, or the server's?
                try:
                    endpoint.look()
                except Exception as error:
                    failure = _failure(endpoint.uri, error)
                    if isinstance(failure, Unavailable):  # else it is there, and lists no models
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
            refused = {field: name for name, field in fields.items()}.get(error.param)
            if refused is None:
                raise _failure(endpoint.uri, error) from None
            if fields.pop(refused) == "max_tokens":  # OpenAI's own newer models
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
    kind = getattr(found, "task", None) or getattr(found, "endpoint_type", None)  # Databricks calls it task
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
        body = ask(request)
    except Exception as error:  # a row's, until the server is seen to be gone
        body = error
    return body, time.perf_counter() - start


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of either client carries; None where there was no answer."""
    return getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)


def _failure(uri: str, error: Exception) -> BadInput | Unavailable:
    """An error of either client as ours, in one line."""
    if isinstance(error, BadInput | Unavailable):
        return error
    status, reason = _status(error), _reason(error)
    if status in (401, 403):
        given = "refuses the key in OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else "wants OPENAI_API_KEY"
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
    """What the server said, in one line, else what the client says."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    cause = error.__cause__ if type(error).__name__ == "APIConnectionError" else None
    return one_line(said or cause or error, 300)
