"""`serve` writes a share of its traffic to MLflow as traces, and no answer waits for MLflow."""

import json
import random
import re
import signal
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import mlflow
import openai
import pytest
from support.commands import free_port, in_process, running_warm, serving
from support.databases import sqlite_store
from support.faulty_proxy import in_front_of
from support.openai_servers import ask, here, metric, wait_for
from support.questions import GENERATION, PARIS

from slm.base.errors import BadInput
from slm.serving import traces
from slm.serving.batching import Metrics

SAMPLED, LOGGED = "slm_sampled_traces_total", "slm_logged_traces_total"
REASONS = ("queue", "redact", "store", "stop")
KEY = "the-key-of-a-client"
REDACT = """
import json

def redacted(content):
    content.pop("user", None)
    return json.loads(json.dumps(content).replace("Alice", "NAME"))

def broken(content):
    raise ValueError(f"can't redact {content}")

def nothing(content):
    content.clear()

def unwritable(content):
    return {"set": {1}}

async def later(content):
    return content

def two(content, more):
    return content
"""


@contextmanager
def tracked(uri: str):
    """MLflow's tracking URI for a block."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return folder, sqlite_store(folder)


@pytest.fixture(scope="module")
def tracking(database):
    """A real MLflow server."""
    folder, uri = database
    with serving(folder, f"--backend-store-uri={uri}", f"--artifacts-destination={folder / 'store'}") as address:
        yield address


def file(tmp_path, name: str) -> str:
    (tmp_path / "mine.py").write_text(REDACT)
    return f"{tmp_path / 'mine.py'}:{name}"


def found(experiment: str, uri: str) -> list:
    """The traces of an experiment, the oldest first."""
    with tracked(uri):
        known = mlflow.get_experiment_by_name(experiment)
        listed = mlflow.search_traces(locations=[known.experiment_id], max_results=500, return_type="list")
    return sorted(listed, key=lambda trace: trace.data.spans[0].start_time_ns)


def counts(tracer: traces.Tracer) -> tuple[int, int, dict[str, int]]:
    """(sampled, logged, dropped by reason)"""
    dropped = {reason: int(tracer._dropped.labels(reason)._value.get()) for reason in REASONS}
    return int(tracer._sampled._value.get()), int(tracer._logged._value.get()), dropped


def post(address: str, path: str, body: dict, **headers: str) -> tuple[str, str]:
    """A request by hand: the body of the answer, and its id."""
    known = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode(), known | headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode(), answer.headers["x-request-id"]


def events(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


# ---------------------------------------------------------------------------------------------------------------------
# What a trace holds


@pytest.mark.slow
def test_a_trace_has_the_request_the_whole_answer_and_the_version(tracking, database, int4_export, tmp_path):
    from slm.models import model_logging
    from slm.tracking import registry

    with tracked(tracking), mlflow.start_run():
        model_logging.log_onnx(int4_export, "chat", GENERATION, "int4", registered_model_name="traced")
    with tracked(tracking):
        registry.set_alias("traced", "champion", "1")
        model_id = registry.version_source("models:/traced/1").removeprefix("models:/")
    address = f"http://127.0.0.1:{free_port()}"
    command = ["entrypoints.serve", "--model_uri=models:/traced@champion", f"--port={address.rpartition(':')[2]}"]
    command += ["--traces=1", "--trace_experiment=whole", f"--redact={file(tmp_path, 'redacted')}"]
    chat = {"messages": [{"role": "user", "content": "I am Alice. Who are you?"}], "max_tokens": 5, "user": "Alice"}
    session = {"metadata": {"session_id": "talk-7"}, "user": "someone", "messages": PARIS, "max_tokens": 5}
    text, spoken = (
        {"prompt": ["One, two,", "A, b,"], "max_tokens": 4, "n": 2},
        {"input": "Hello", "max_output_tokens": 3},
    )
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        running_warm(
            command, f"{address}/health", output=output, MLFLOW_TRACKING_URI=tracking, PHI3_MLFLOW_API_KEY=KEY
        ) as process,
    ):
        whole, first = post(address, "/v1/chat/completions", chat, **{"X-Request-Id": "id-of-a-proxy"})
        streamed, _ = post(address, "/v1/chat/completions", session | {"stream": True})
        with pytest.raises(urllib.error.HTTPError):  # refused: there is no answer to trace
            post(address, "/v1/chat/completions", chat | {"temperature": 9})
        completed, _ = post(address, "/v1/completions", text)
        completed_in_pieces, _ = post(address, "/v1/completions", text | {"stream": True})
        responded, _ = post(address, "/v1/responses", spoken)
        responded_in_pieces, _ = post(address, "/v1/responses", spoken | {"stream": True})
        assert wait_for(address, LOGGED, 6, key=KEY), log.read_text()
        assert metric(address, SAMPLED, KEY) == 6
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    one, two, *others = found("whole", tracking)
    [span] = one.data.spans
    asked = {"messages": [{"role": "user", "content": "I am NAME. Who are you?"}], "max_tokens": 5}
    assert (span.name, span.span_type, span.parent_id) == ("chat", "CHAT_MODEL", None)
    assert span.inputs == asked and span.outputs == json.loads(whole.replace("Alice", "NAME"))
    usage = json.loads(whole)["usage"]
    expected = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    expected["total_tokens"] = usage["total_tokens"]
    assert span.get_attribute("mlflow.chat.tokenUsage") == one.info.token_usage == expected
    assert 0 < span.end_time_ns - span.start_time_ns < 120e9
    names = ("mlflow.traceName", "model.uri", "model.version", "request.id")
    assert first == "id-of-a-proxy"
    assert [one.info.tags[name] for name in names] == ["chat", "models:/traced/1", "traced/1", "id-of-a-proxy"]
    assert one.info.trace_metadata["mlflow.modelId"] == model_id
    assert "mlflow.trace.session" not in one.info.trace_metadata  # redacted, as the request itself
    assert (one.info.state.value, one.info.request_preview) == ("OK", "I am NAME. Who are you?")

    chunks = events(streamed)
    answer = two.data.spans[0].outputs
    assert two.info.trace_metadata["mlflow.trace.session"] == "talk-7"
    assert two.data.spans[0].inputs == {name: value for name, value in session.items() if name != "user"} | {
        "stream": True
    }
    assert answer["id"] == chunks[0]["id"] and answer["object"] == "chat.completion"
    content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": content}
    assert two.info.response_preview == content

    spans = [trace.data.spans[0] for trace in others]
    assert [span.name for span in spans] == ["completion", "completion", "response", "response"]
    assert spans[0].outputs == json.loads(completed)
    assert spans[2].outputs | {"user": None} == json.loads(responded)  # `redacted` takes the field out
    usage = json.loads(completed)["usage"]
    counted = {name: others[0].info.token_usage[name] for name in ("output_tokens", "total_tokens")}
    assert counted == {"output_tokens": usage["completion_tokens"], "total_tokens": usage["total_tokens"]}
    pieces = [""] * 4
    for chunk in events(completed_in_pieces):
        pieces[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert [choice["text"] for choice in spans[1].outputs["choices"]] == pieces
    assert spans[3].outputs | {"user": None} == events(responded_in_pieces)[-1]["response"]
    for path in [log, *database[0].glob("*.db*")]:
        assert KEY.encode() not in path.read_bytes() and b"Alice" not in path.read_bytes(), path


# ---------------------------------------------------------------------------------------------------------------------
# What is dropped


@pytest.fixture
def tracer(database):
    """A tracer of every request, into an experiment of the database."""
    with tracked(database[1]):
        return traces.Tracer(1.0, traces.trace_store.experiment_id(f"experiment {random.random()}"))


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("serving: the tracking server is killed while traces are written")
def test_no_request_fails_when_the_tracking_server_is_killed(wrapper, tmp_path, capfd):
    uri = sqlite_store(tmp_path)
    with ExitStack() as running:
        options = f"--backend-store-uri={uri}", f"--artifacts-destination={tmp_path / 'store'}"
        address = running.enter_context(serving(tmp_path, *options, end=9))
        with tracked(address):
            tracer = traces.Tracer(1.0, traces.trace_store.experiment_id("killed"))
            with here(wrapper.unwrap_python_model(), watches={"tracer": tracer}) as (served, client):
                answered = threading.Semaphore(0)

                def asked(_) -> str:
                    finish = ask(client, max_tokens=4).choices[0].finish_reason
                    answered.release()
                    return finish

                with ThreadPoolExecutor(8) as pool:
                    ends = [pool.submit(asked, number) for number in range(80)]
                    for _ in range(30):
                        assert answered.acquire(timeout=120)
                    running.close()
                    assert {end.result(120) for end in ends} <= {"length", "stop"}
                assert metric(served, 'slm_requests_total{outcome="ok"}') == 80
    sampled, logged, dropped = counts(tracer)
    assert sampled == 80 == logged + sum(dropped.values()) and dropped["store"] + dropped["stop"] > 0
    with tracked(uri):
        stored = mlflow.search_traces(
            locations=[tracer.experiment_id], max_results=500, return_type="list", include_spans=False
        )
    assert logged <= len(stored) <= logged + traces.BATCH  # the last batch may be stored unconfirmed, or without spans
    assert re.search(r"warning: \d+ traces? dropped; the last one: ", capfd.readouterr().err)


@pytest.mark.slow
@pytest.mark.fault("serving: the tracking server does not answer while traces are written")
def test_no_answer_waits_for_a_tracking_server_that_hangs(wrapper, tracking, tracer, monkeypatch):
    monkeypatch.setattr(traces, "MOST_WAITING", 3)
    monkeypatch.setattr(traces, "BATCH", 2)
    monkeypatch.setattr(traces, "STOP_SECONDS", 0.2)
    released = threading.Event()
    with in_front_of(tracking) as faults, tracked(faults.uri):
        faults.add(lambda: released.wait(120) and None, "POST", "traces")
        with here(wrapper.unwrap_python_model(), watches={"tracer": tracer}) as (address, client):
            for _ in range(9):
                ask(client, max_tokens=1)
            assert wait_for(address, SAMPLED, 9)
            queued = metric(address, "slm_waiting_traces")
            assert metric(address, LOGGED) == 0 and queued + metric(address, drops("queue")) == 9
        sampled, logged, dropped = counts(tracer)
        released.set()
        tracer._thread.join(60)
    assert (sampled, logged) == (9, 0) and dropped["queue"] >= 4 and dropped["queue"] + dropped["stop"] == 9
    assert counts(tracer) == (sampled, logged, dropped)  # what the thread still wrote was counted before


def drops(reason: str) -> str:
    return f'slm_dropped_traces_total{{reason="{reason}"}}'


def test_a_trace_larger_than_the_queue_is_dropped(tracer):
    tracer.show(Metrics())
    words = {"start": 0.0, "seconds": 1.0, "prompt_tokens": 1, "output_tokens": 1, "request_id": "", "model": ""}
    words |= {"model_uri": "", "model_id": "", "version": ""}
    for size in (traces.MOST_BYTES, 2):
        tracer.put(traces.Answered("chat", b"{}", b" " * size, **words))
    assert counts(tracer)[::2] == (2, {"queue": 1, "redact": 0, "store": 0, "stop": 0})
    assert len(tracer._queue) == 1


@pytest.mark.slow
@pytest.mark.fault("serving: the user's redaction fails")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "redact raised ValueError"),
        ("nothing", "redact returned no dict"),
        ("unwritable", "redact raised TypeError"),
    ],
)
def test_a_request_that_cannot_be_redacted_is_answered_and_its_trace_dropped(
    wrapper, tracer, database, tmp_path, capfd, name, told
):
    tracer.redact = traces.read_redact(file(tmp_path, name))
    with tracked(database[1]):
        with here(wrapper.unwrap_python_model(), watches={"tracer": tracer}) as (address, client):
            assert "Paris" in ask(client).choices[0].message.content
            assert wait_for(address, drops("redact"), 1)
        experiment = mlflow.get_experiment(tracer.experiment_id).name
    assert counts(tracer)[:2] == (1, 0) and found(experiment, database[1]) == []
    err = capfd.readouterr().err
    assert f"warning: 1 trace dropped; the last one: {told}\n" in err and "France" not in err


@pytest.mark.slow
def test_requests_without_a_whole_answer_have_no_trace(wrapper, tracer, database):
    with tracked(database[1]), here(wrapper.unwrap_python_model(), seconds=0.2, watches={"tracer": tracer}) as server:
        address, client = server
        with pytest.raises(openai.APIStatusError):
            ask(client, max_tokens=3000)
        with pytest.raises(openai.APIError):
            list(ask(client, max_tokens=3000, stream=True))
        assert wait_for(address, 'slm_requests_total{outcome="timeout"}', 2)
    assert counts(tracer)[0] == 0


def test_the_share_is_that_of_the_parameter():
    random.seed(22)
    drawn = [sum(traces.Tracer(share, "0").draws() for _ in range(4000)) for share in (0.0, 0.05, 1.0)]
    assert drawn[0] == 0 and 150 < drawn[1] < 250 and drawn[2] == 4000


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--traces=1.5", "traces: 1.5 is out of range; 0 to 1"),
        ("--redact=nowhere.py:f", "redact: 'nowhere.py' does not exist, from the repository's root or from here"),
        ("--redact={}:redactd", "redact: {} has no 'redactd' (did you mean 'redacted'?)"),
        ("--redact={}:REDACT", "redact: {} has no 'REDACT'"),
        ("--redact={}:later", "redact: {}:later is "),
        ("--redact={}:two", "redact: {}:two must take one argument, the request or the answer as a dict"),
    ],
)
def test_a_wrong_parameter_is_one_line_before_the_model_is_loaded(tmp_path, option, told):
    mine = file(tmp_path, "").rstrip(":")
    port = f"--port={free_port()}"
    store = f"sqlite:///{tmp_path}/mlflow.db"
    done = in_process("serve", "--model_uri=models:/x/1", port, option.format(mine), MLFLOW_TRACKING_URI=store)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"error: {told.format(mine)}")
    assert not (tmp_path / "mlflow.db").exists()


def test_without_a_name_the_traces_belong_to_the_run(database):
    with tracked(database[1]), mlflow.start_run(experiment_id=mlflow.create_experiment("of the run")) as run:
        tracer = traces.opened(0.5, "", None)
    assert (tracer.experiment_id, tracer.run_id) == (run.info.experiment_id, run.info.run_id)


def test_what_cannot_become_a_trace_is_dropped_and_the_next_one_is_written(tracer, database, monkeypatch):
    tracer.show(Metrics())
    words = {"start": 0.0, "seconds": 1.0, "prompt_tokens": 1, "output_tokens": 1, "request_id": "", "model": ""}
    words |= {"model_uri": "", "model_id": "", "version": ""}
    for body in (b"[", b'{"messages": [{"role": "user", "content": "Hello\\u0000"}]}'):
        tracer.put(traces.Answered("chat", body, b'{"choices": []}', **words))
    monkeypatch.setattr(traces, "STOP_SECONDS", 60)
    with tracked(database[1]):
        tracer.start()
        tracer.stop()
        [trace] = found(mlflow.get_experiment(tracer.experiment_id).name, database[1])
    assert counts(tracer) == (2, 1, {"queue": 0, "redact": 0, "store": 1, "stop": 0})
    assert trace.info.request_preview == "Hello\ufffd" and trace.data.spans[0].outputs == {"choices": []}
    assert trace.data.spans[0].inputs["messages"][0]["content"] == "Hello\0"


def test_two_servers_may_make_the_experiment_at_once(database, monkeypatch):
    create = mlflow.create_experiment

    def too_late(name):
        create(name)
        return create(name)

    monkeypatch.setattr(mlflow, "create_experiment", too_late)
    with tracked(database[1]):
        found = traces.trace_store.experiment_id("made twice")
        assert found == mlflow.get_experiment_by_name("made twice").experiment_id


def test_a_deleted_experiment_is_refused(database):
    with tracked(database[1]):
        mlflow.delete_experiment(traces.trace_store.experiment_id("gone"))
        with pytest.raises(BadInput, match="trace_experiment: 'gone' was deleted"):
            traces.opened(0.5, "gone", None)
        assert traces.opened(0.0, "gone", None) is None
        assert traces.opened(0.5, "new", None).experiment_id == mlflow.get_experiment_by_name("new").experiment_id
