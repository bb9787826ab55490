"""The access log: a line for each request that tells how it went, and nothing of what was said."""

import asyncio
import http.client
import json
import re
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from support.commands import free_port, in_process
from support.openai_servers import LONG, NAME, ask, here, serving, wait_for
from support.questions import PARIS

from slm.serving.access_log import AccessLog, Record
from slm.serving.batching import Metrics
from slm.serving.exchanges import Exchange
from slm.serving.protocol import ApiError

KEY = "the-key-of-a-client"
FIELDS = [
    "time", "request_id", "method", "path", "status", "seconds", "version", "prompt_tokens", "output_tokens",
    "finish_reason",
]  # fmt: skip


def lines(path: Path, number: int) -> list[dict]:
    """The lines of a log, when it has so many."""
    import time

    for _ in range(300):
        text = path.read_text() if path.exists() else ""
        if text.count("\n") >= number:
            break
        time.sleep(0.1)
    return [json.loads(line) for line in text.splitlines()]


def send(address: str, path: str, body: dict | None = None, **headers: str) -> tuple[int, str]:
    """The status of an answer, and its request id."""
    data = None if body is None else json.dumps(body).encode()
    known = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{address}{path}", data, known | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            return answer.status, answer.headers["x-request-id"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["x-request-id"]


@pytest.mark.slow
def test_each_request_is_one_line_without_prompt_answer_and_key(store, tmp_path):
    log = tmp_path / "access.jsonl"
    chat = {"messages": [{"role": "user", "content": "Write a very long story about a secretword."}], "max_tokens": 3}
    with serving(store, f"--access_log={log}", PHI3_MLFLOW_API_KEY=KEY) as (_, address):
        probes = len(lines(log, 1))
        sent = [
            send(address, "/v1/chat/completions", chat, **{"X-Request-Id": "id-of-a-proxy"}),
            send(address, "/v1/chat/completions", chat | {"stream": True}, **{"X-Request-Id": "no id\tat all"}),
            send(
                address,
                "/v1/completions",
                {"prompt": ["Once upon a secretword", "The old secretword"], "max_tokens": 2},
            ),
            send(
                address,
                "/v1/responses",
                {"input": "Write a very long story about a secretword.", "max_output_tokens": 4},
            ),
            send(address, "/tokenize", {"prompt": "secretword"}),
            send(address, f"/v1/models?key={KEY}"),
            send(address, "/v1/chat/completions", chat | {"temperature": 9}),
            send(address, "/v1/chat/completions", chat, Authorization="Bearer wrong"),
            send(address, "/nowhere" + "x" * 300),
            send(address, "/health", Host="evil.example"),
        ]
        found = lines(log, probes + len(sent))
    assert all(list(line) == FIELDS for line in found)
    assert {line["path"] for line in found[:probes]} == {"/health"}
    found = found[probes:]
    assert [(line["status"], line["request_id"]) for line in found] == sent
    assert [status for status, _ in sent] == [200] * 6 + [400, 401, 404, 421]
    assert sent[0][1] == "id-of-a-proxy"
    assert all(re.fullmatch("req_[0-9a-f]{32}", request_id) for _, request_id in sent[1:])
    assert len({request_id for _, request_id in sent}) == len(sent)
    assert [line["output_tokens"] for line in found] == [3, 3, 4, 4, *[None] * 6]
    assert [line["finish_reason"] for line in found] == [*["length"] * 4, *[None] * 6]
    assert found[0]["prompt_tokens"] == found[1]["prompt_tokens"] > 20
    assert [line["method"] for line in found[4:6]] == ["POST", "GET"] and found[5]["path"] == "/v1/models"
    assert len(found[8]["path"]) == 200
    assert all(re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in found)
    assert all(0 < line["seconds"] < 120 for line in found)
    text = log.read_text()
    assert "secretword" not in text and KEY not in text and "evil" not in text


def test_stderr_has_the_lines_and_every_end_is_named(wrapper, capfd):
    model = wrapper.unwrap_python_model()
    with here(model, seconds=0.3, watches={"access_log": AccessLog("stderr")}) as (_, client):
        with pytest.raises(openai.APIStatusError):
            ask(client, LONG, max_tokens=3000)
        with pytest.raises(openai.APIError):
            list(ask(client, LONG, max_tokens=3000, stream=True))
    with here(model, watches={"access_log": AccessLog("stderr")}) as (address, client):
        with pytest.raises(openai.APITimeoutError):
            ask(client, LONG, max_tokens=3000, timeout=0.3)
        assert wait_for(address, 'slm_requests_total{outcome="cancelled"}', 1)
        ask(client, PARIS, max_tokens=1)
        assert wait_for(address, 'slm_requests_total{outcome="ok"}', 1)
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    ends = [(line["status"], line["finish_reason"]) for line in found if line["path"].startswith("/v1")]
    assert ends == [(504, "timeout"), (200, "timeout"), (499, "cancelled"), (200, "length")]


def test_the_version_is_that_of_the_registry(wrapper, tmp_path):
    from dataclasses import replace

    from fastapi.testclient import TestClient

    from slm.serving import http_app, versions

    model = wrapper.unwrap_python_model()
    loaded = replace(versions.Loaded(model, {}, (NAME,), ""), version="phi3/7")
    app = http_app.build(loaded, access_log=AccessLog(str(tmp_path / "log")))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.post("/v1/chat/completions", json={"messages": PARIS, "max_tokens": 1}).status_code == 200
    assert lines(tmp_path / "log", 1)[0]["version"] == "phi3/7"


def test_a_file_that_was_moved_away_is_opened_anew(wrapper, tmp_path):
    log = tmp_path / "log"
    with here(wrapper.unwrap_python_model(), watches={"access_log": AccessLog(str(log))}) as (address, _):
        send(address, "/health")
        assert len(lines(log, 1)) == 1
        log.rename(tmp_path / "log.1")
        send(address, "/ready")
        assert [line["path"] for line in lines(log, 1)] == ["/ready"]


@pytest.mark.fault("serving: the disk of the access log is full")
def test_a_log_that_cannot_be_written_costs_no_request(wrapper, capfd):
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    with here(wrapper.unwrap_python_model(), watches={"access_log": AccessLog("/dev/full")}) as (address, client):
        for _ in range(2):
            assert ask(client, max_tokens=1).choices
        assert send(address, "/health")[0] == 200
    told = "warning: access_log: [Errno 28] No space left on device; its lines are lost\n"
    assert capfd.readouterr().err.count(told) == 1


def test_an_answer_that_its_grammar_breaks_off_is_counted_as_an_error():
    metrics = Metrics()

    async def outcome() -> str:
        worker = SimpleNamespace(metrics=metrics, drop=lambda ticket: None)
        record = Record("id")
        exchange = Exchange(worker, SimpleNamespace(state=SimpleNamespace(record=record)))
        row = SimpleNamespace(error="the grammar is stuck", finish_reason="error", prompt=[1], output=[])
        exchange.rows, exchange.ticket = [row], SimpleNamespace(events=asyncio.Queue(), streamed=False)
        exchange._timer = exchange._watch = SimpleNamespace(cancel=lambda: None)
        exchange.ticket.events.put_nowait((row, "", "error"))
        with pytest.raises(ApiError, match="the grammar is stuck"):
            await exchange.finished()
        return record.outcome

    assert asyncio.run(outcome()) == "error"
    assert metrics.registry.get_sample_value("slm_requests_total", {"outcome": "error"}) == 1


def test_a_second_full_disk_is_told_too(capfd, tmp_path):
    log = AccessLog(str(tmp_path / "log"))
    for full in (True, True, False, True):
        log._handler.emit = (lambda record: log._fail()) if full else (lambda record: None)
        log.write({"method": "GET", "path": "/"}, Record("id"), 0.1)
    assert capfd.readouterr().err.count("warning: access_log: ") == 2


def test_a_bug_is_logged_as_500(wrapper, tmp_path, monkeypatch):
    from slm.serving import http_app

    monkeypatch.setattr(http_app, "check_model", lambda *_: 1 / 0)
    log = tmp_path / "log"
    with here(wrapper.unwrap_python_model(), watches={"access_log": AccessLog(str(log))}) as (address, _):
        with suppress(http.client.HTTPException):
            assert send(address, "/v1/models/x", **{"X-Request-Id": "mine"}) == (500, "mine")
        assert lines(log, 1)[-1]["status"] == 500


def test_a_place_that_cannot_be_written_is_one_line_before_the_model_is_loaded(tmp_path):
    options = "--model_uri=models:/x/1", f"--port={free_port()}", f"--access_log={tmp_path}"
    done = in_process("serve", *options)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: access_log: {tmp_path} can't be written: Is a directory\n"
