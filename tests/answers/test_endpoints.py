"""Addresses of endpoints, and the one line that each failure of a server becomes."""

from types import SimpleNamespace

import openai
import pytest

from slm.answers import endpoints
from slm.answers.endpoints import Endpoint
from slm.base.errors import BadInput, Unavailable

URI = "http://host/v1#m"
BODY = {"choices": [{"message": {"content": "x"}}]}


@pytest.mark.parametrize(
    ("uri", "known"),
    [("http://h", True), ("https://h", True), ("endpoints:/x", True), ("models:/x/1", False), ("httpx://h", False)],
)
def test_an_endpoint_is_known_by_its_beginning(uri, known):
    assert endpoints.is_endpoint(uri) == known


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("endpoints:/", "endpoints:/ names no endpoint; write endpoints:/name"),
        ("endpoints://", "endpoints:// names no endpoint; write endpoints:/name"),
        ("endpoints:/chat", "endpoints:/chat: set MLFLOW_DEPLOYMENTS_TARGET to the server's address"),
        ("http://", "http:// is no address; write http://host:port/v1"),
        ("http://h:0/v1", "http://h:0/v1 is no address; write http://host:port/v1"),
        ("http://h:x/v1", "http://h:x/v1 is no address; write http://host:port/v1"),
        ("http://h:99999/v1", "http://h:99999/v1 is no address; write http://host:port/v1"),
    ],
)
def test_an_address_without_a_name_or_a_server_is_refused(monkeypatch, uri, told):
    monkeypatch.delenv("MLFLOW_DEPLOYMENTS_TARGET", raising=False)
    with pytest.raises(BadInput) as refused:
        endpoints.check(uri)
    assert str(refused.value) == told


@pytest.mark.parametrize("uri", ["http://me@h:80/v1", "http://:sesame@h:80/v1", "http://h:80/v1?key=sesame"])
def test_credentials_and_a_query_are_refused_without_showing_them(uri):
    with pytest.raises(BadInput) as refused:
        endpoints.check(uri)
    assert str(refused.value) == (
        "http://h/v1 was given with credentials or a query; the key belongs in OPENAI_API_KEY, alone"
    )


@pytest.mark.parametrize("uri", ["http://h", "https://h:8080/v1", "http://h/v1#name", "endpoints:/chat"])
def test_a_whole_address_is_accepted(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_DEPLOYMENTS_TARGET", "http://host")
    endpoints.check(uri)


def status(code: int, message: str | None = "it was\n told to") -> openai.APIStatusError:
    """The error of OpenAI's client for a reply with this status."""
    response = SimpleNamespace(status_code=code, request=None, headers={})
    body = None if message is None else {"message": message}
    return openai.APIStatusError(f"status {code}", response=response, body=body)


def lost() -> openai.APIConnectionError:
    error = openai.APIConnectionError(request=None)
    error.__cause__ = OSError("Connection refused")
    return error


class Refused(Exception):
    """An error of requests, which MLflow's client raises: the status is that of its response."""

    def __init__(self, code: int):
        super().__init__(f"{code} Client Error")
        self.response = SimpleNamespace(status_code=code)


def asked(*replies, look=None, rows=None, uri=URI, **options) -> list[tuple]:
    """The answers of an endpoint that gives or raises one reply after the other."""
    left = list(replies)

    def ask(body):
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def looked():
        if look:
            raise look

    endpoint = Endpoint(uri, "messages", {}, {}, ask, looked)
    found = endpoints.answers(endpoint, rows or [{} for _ in replies], 1, **options)
    return [(place, body) for place, body, seconds in found if 0 <= seconds < 60]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (status(400), "it was told to"),
        (status(403), "it was told to"),
        (status(429, None), "status 429"),
        (status(500, "x" * 400), "x" * 300),
        (lost(), "Connection refused"),
        (Refused(400), "400 Client Error"),
        (ValueError("no JSON"), "no JSON"),
    ],
)
def test_a_row_that_fails_has_its_reason_and_the_others_are_answered(error, reason):
    found = asked(BODY, error, BODY)
    assert found[0] == (0, BODY) and found[2] == (2, BODY)
    assert found[1][0] == 1 and found[1][1] == reason


@pytest.mark.parametrize("error", [status(403), lost(), ValueError("no JSON")])
@pytest.mark.parametrize(
    ("look", "told"),
    [
        (lost(), f"{URI} can't be reached: Connection refused"),
        (status(503), f"{URI} fails (503): it was told to"),
        (status(429), f"{URI} fails (429): it was told to"),
    ],
)
def test_a_server_that_is_gone_ends_the_run(monkeypatch, error, look, told):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Unavailable) as gone:
        asked(error, BODY, look=look)
    assert str(gone.value) == told


def test_a_server_that_lists_no_models_is_there():
    assert asked(lost(), BODY, look=status(404)) == [(0, "Connection refused"), (1, BODY)]


@pytest.mark.parametrize(
    ("key", "told"), [("", "needs a key: set OPENAI_API_KEY"), ("sesame", "refuses the key in OPENAI_API_KEY")]
)
def test_a_refused_key_ends_the_run(monkeypatch, key, told):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Unavailable) as refused:
        asked(status(401), BODY)
    assert str(refused.value) == f"{URI} {told} (401): it was told to"


@pytest.mark.parametrize("code", [400, 500])
def test_a_status_of_one_row_is_not_looked_into(code):
    assert asked(status(code), look=lost()) == [(0, "it was told to")]
