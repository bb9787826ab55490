"""Faults of serving: clients that take more than their share, and clients that look for what is not theirs.

The real model answers over real sockets. Most tests take its end tokens away: an answer then has max_tokens, and a test
knows what is being generated while it looks.
"""

import http.client
import json
import resource
import socket
import time
import urllib.request
from collections import deque

import openai
import pytest
from support.commands import in_process
from support.openai_servers import LONG, ask, content, here, metric, serving, wait_for
from support.questions import PARIS

from slm.base import credentials
from slm.base.errors import BadInput
from slm.models.chat_model import Row
from slm.serving import batching, http_app, protocol, versions
from slm.serving.batching import Batch, Place, Ticket, Worker, fair_order
from slm.serving.keys import Keys
from slm.serving.protocol import Limits, host_name, is_served

pytestmark = pytest.mark.slow


@pytest.fixture
def model(wrapper, monkeypatch):
    """The logged model, whose answers end at max_tokens alone, as if it were just loaded."""
    model = wrapper.unwrap_python_model()
    monkeypatch.setattr(model._runtime, "end_tokens", frozenset())
    model._runtime._idle.clear()
    yield model
    model._runtime._idle.clear()


def client_at(address: str, host: str = "", key: str = "none"):
    """A client with a key, whose requests come from an address, as a proxy on this machine tells it."""
    headers = {"X-Forwarded-For": host} if host else {}
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60, default_headers=headers)


# ---------------------------------------------------------------------------------------------------------------------
# Who is answered when


@pytest.fixture
def full_batches(model, monkeypatch):
    """The model, of which each batch has room for one text."""
    monkeypatch.setattr(model, "batch_size", 1)
    return model


def two_batches(client, address: str, key: str = "none") -> list:
    """Streams of two long answers, each in a batch of its own."""
    streams = []
    for number in (1, 2):
        streams.append(ask(client, LONG, stream=True, max_tokens=4096))
        assert wait_for(address, "slm_generating", number, key=key)
    return streams


@pytest.mark.fault("serving: two long answers, and one of one token")
def test_one_token_is_answered_while_two_long_answers_are_generated(full_batches):
    with here(full_batches) as (address, client):
        streams = two_batches(client, address)
        assert ask(client, max_tokens=1).usage.completion_tokens == 1
        assert metric(address, "slm_generating") == 2
        for stream in streams:
            stream.close()


@pytest.mark.fault("serving: another client's long prompt")
def test_a_long_prompt_is_read_in_pieces_between_which_others_have_their_turn(model, monkeypatch):
    monkeypatch.setattr(model._runtime, "piece_tokens", 16)
    question = {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 2}
    [row], [dropped] = model.prepare(question), model.prepare(question)
    turns = [len(step) for step in model.stream([row])]
    pieces = -(-len(row.prompt) // 16)
    assert turns[: pieces - 1] == [0] * (pieces - 1) and turns[pieces - 1 :] == [1, 1]
    model._runtime._idle.clear()  # else the second one begins where the first one ended
    steps = model.stream([dropped])
    assert next(steps) == []
    dropped.end("cancelled")
    assert next(steps, None) is None and not dropped.output


@pytest.mark.fault("serving: one client's many long answers, and another client")
@pytest.mark.parametrize("known_by", ["address", "key"])
def test_a_client_is_answered_beside_another_ones_many_long_answers(full_batches, known_by):
    keys = "many,one" if known_by == "key" else ""
    with here(full_batches, api_key=keys) as (address, _):
        many, one = (
            client_at(address, key=name) if keys else client_at(address, host)
            for name, host in (("many", "192.0.2.1"), ("one", "192.0.2.2"))
        )
        streams = two_batches(many, address, "many")
        streams += [ask(many, LONG, stream=True, max_tokens=4096) for _ in range(4)]
        last = ask(one, LONG, stream=True, max_tokens=4096)
        next(chunk for chunk in last if chunk.choices[0].delta.content)
        assert metric(address, "slm_generating", "one") == 3
        assert metric(address, "slm_waiting", "one") == 4
        for stream in (*streams, last):
            stream.close()


@pytest.mark.fault("serving: a queue that one client fills")
def test_a_queue_that_one_client_fills_has_room_for_another(full_batches):
    with here(full_batches, waiting=1) as (address, _):
        many, one = client_at(address, "192.0.2.1"), client_at(address, "192.0.2.2")
        streams = [*two_batches(many, address), ask(many, LONG, stream=True, max_tokens=4096)]
        assert wait_for(address, "slm_waiting", 1)
        with pytest.raises(openai.RateLimitError):
            ask(many, LONG, max_tokens=4096)
        assert ask(one, max_tokens=1).usage.completion_tokens == 1
        assert (metric(address, "slm_generating"), metric(address, "slm_waiting")) == (2, 1)
        for stream in streams:
            stream.close()


def place(name: str, arrived: float, tokens: int, prompt: int = 8) -> Place:
    row = Row((0, 0), [1] * prompt, None, tokens, 0)
    ticket = Ticket(False, None, name.split()[0])
    ticket.arrived = arrived
    return Place(row, ticket)


@pytest.mark.parametrize(
    ("waiting", "running", "expected"),
    [
        ([("a long", 0, 4000), ("a short", 1, 10)], [], ["a short", "a long"]),
        ([("a long", 0, 4000), ("a short", 100, 10)], [], ["a long", "a short"]),
        ([("a 1", 0, 50), ("a 2", 0, 50), ("b 1", 0.5, 50)], [], ["a 1", "b 1", "a 2"]),
        ([("a 1", 0, 50), ("b 1", 0.5, 50)], [("a 0", 0, 400)], ["b 1", "a 1"]),
    ],
    ids=["short first", "none waits for ever", "clients in turn", "what is under way counts"],
)
def test_the_queue_is_fair(waiting, running, expected):
    names = {place(*words): words[0] for words in waiting}
    assert [names[each] for each in fair_order(names, [place(*words) for words in running])] == expected


@pytest.mark.parametrize("share", [1.0, 2.0], ids=["full caches", "texts larger than a cache"])
def test_batches_for_short_texts_keep_to_the_memory_that_is_left(model, share):
    worker = Worker(model, Limits())
    worker.running = [Batch([place("a", 0, 4096)], iter(()), share) for _ in range(2)]
    worker.waiting.extend(place("a", time.monotonic(), 200, prompt=2000) for _ in range(40))
    for _ in range(3):
        places, most = worker._next_places()
        taken = model.cache_share([each.row for each in places])
        left = batching.MOST_CACHES - sum(min(batch.share, 1.0) for batch in worker.running)
        assert 0 < taken <= left / 2 == most
        worker.running.append(Batch([place("a", 0, 4096)], iter(()), taken))


def test_a_batch_for_short_texts_is_joined_by_short_texts_alone(model):
    """Else long texts would take the room that short ones have beside them."""
    worker = Worker(model, Limits())
    full = [Batch([place("a", 0, 4096) for _ in range(11)], iter(()), 1.0, deque()) for _ in range(2)]
    assert not model.fits([each.row for each in full[0].places], place("a", 0, 4000).row)
    short = Batch([place("a", 0, 100)], iter(()), 0.0, deque(), most=0.25)
    worker.running = [*full, short]
    arrived = time.monotonic()
    worker.waiting.extend([place("a", arrived, 4000), place("a", arrived, 100), place("b", arrived, 2000)])
    worker._join()
    assert [each.row.room for each in short.places] == [100, 100]
    assert [each.row.room for each in worker.waiting] == [4000, 2000]
    full[0].places.pop()
    worker._join()
    assert [each.row.room for each in worker.waiting] == [4000]  # it would end later than the other client's text


@pytest.mark.fault("serving: a request that arrives beside a long answer")
def test_requests_join_a_running_batch_of_any_client(model):
    with here(model) as (address, _):
        many, one = client_at(address, "192.0.2.1"), client_at(address, "192.0.2.2")
        streams = [ask(client, LONG, stream=True, max_tokens=4096) for client in (many, many, one)]
        for stream in streams:
            next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert metric(address, "slm_generating") == 3
        assert metric(address, "slm_batch_texts_count") == 1
        assert metric(address, "slm_joined_texts_total") >= 2
        for stream in streams:
            stream.close()


# ---------------------------------------------------------------------------------------------------------------------
# Connections


def connect(address: str, request: bytes, **options) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.socket()
    for option, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    connection.sendall(request)
    connection.setblocking(False)
    return connection


def has_ended(connection: socket.socket, more: bytes = b"") -> bool:
    """Whether the server has ended the connection; else it is sent more, and what came is thrown away."""
    try:
        while connection.recv(2**16):
            pass
        return True
    except BlockingIOError:
        pass
    except OSError:
        return True
    try:
        connection.send(more)
    except BlockingIOError:
        pass
    except OSError:
        return True
    return False


def is_healthy(address: str) -> bool:
    return urllib.request.urlopen(f"{address}/health", timeout=20).status == 200


def all_end(connections: list[socket.socket], more: bytes, address: str, seconds: float = 90) -> bool:
    """Whether the connections are ended in time, each of which sends a little more twice a second."""
    try:
        end = time.monotonic() + seconds
        while connections and time.monotonic() < end:
            assert is_healthy(address)
            ended = [connection for connection in connections if has_ended(connection, more)]
            for connection in ended:
                connection.close()
            connections = [connection for connection in connections if connection not in ended]
            time.sleep(0.5)
        return not connections
    finally:
        for connection in connections:
            connection.close()


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
UNREAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"  # is answered 415


@pytest.mark.fault("serving: headers that never end")
def test_connections_whose_headers_never_end_are_ended(model, monkeypatch):
    from slm.serving import connections as bounded

    monkeypatch.setattr(bounded, "HEADER_SECONDS", 1.0)  # the next test waits for a server as it comes
    with here(model, http=bounded.Guarded) as (address, _):
        connections = [connect(address, begun) for begun in (b"", HEAD, GET + HEAD, UNREAD)]
        assert all_end(connections, b"x: y\r\n", address)


def test_a_connection_that_waits_for_its_next_request_stays_open(model, monkeypatch):
    from slm.serving import connections as bounded

    monkeypatch.setattr(bounded, "HEADER_SECONDS", 0.3)
    with here(model, http=bounded.Guarded) as (address, _):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        opened = connection.sock
        time.sleep(1)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200 and connection.sock is opened
        connection.close()


BODY = HEAD + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{"


@pytest.mark.fault("serving: more connections than descriptors")
def test_health_is_answered_beside_more_connections_than_descriptors(store):
    with serving(store) as (process, address):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (200, 200))
        for begun, more in ((HEAD, b"x: y\r\n"), (BODY, b" ")):
            connections = []
            for _ in range(230):
                connections.append(connect(address, begun))
                if len(connections) % 10 == 0:
                    assert is_healthy(address)
            assert all_end(connections, more, address)
        assert "Paris" in content(ask(client_at(address)))


@pytest.mark.fault("serving: more requests than connections")
def test_health_is_answered_where_every_connection_has_a_request(model, monkeypatch):
    from slm.serving import connections as bounded

    monkeypatch.setattr(bounded, "MOST_CONNECTIONS", 2)
    with here(model, http=bounded.Guarded) as (address, client):
        streams = []
        for _ in range(2):
            streams.append(ask(client, LONG, stream=True, max_tokens=4096))
            next(streams[-1])
        for _ in range(bounded.ROOM + 2):
            with pytest.raises(openai.InternalServerError) as raised:
                ask(client, max_tokens=1)
            assert (raised.value.status_code, raised.value.body["code"]) == (503, "overloaded")
            assert is_healthy(address)
        streams.pop().close()
        for _ in range(100):
            try:
                assert ask(client, max_tokens=1).usage.completion_tokens == 1
                break
            except openai.InternalServerError:  # the server has not seen the end of the stream yet
                time.sleep(0.1)
        else:
            raise AssertionError("no connection was free again")
        streams.pop().close()


@pytest.mark.fault("serving: an answer that nobody reads")
def test_a_client_that_reads_nothing_loses_its_connection(model, monkeypatch):
    from slm.serving import connections as bounded

    monkeypatch.setattr(bounded, "READER_SECONDS", 1.0)
    with here(model, http=bounded.Guarded) as (address, _):
        connection = connect(address, GET, SO_RCVBUF=4096)
        connection.settimeout(60)
        with pytest.raises(ConnectionError):
            for _ in range(10**6):
                connection.sendall(GET * 100)
        connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# What one client can find out about another


@pytest.fixture
def computed(model, monkeypatch):
    """How many tokens of prompts went through the graph, call by call; the others' keys and values were copied."""
    counts, run = [], type(model._runtime)._run

    def counted(self, binding, tokens, lengths):
        if tokens.shape[1] > 1:
            counts.append(tokens.shape[1])
        return run(self, binding, tokens, lengths)

    monkeypatch.setattr(type(model._runtime), "_run", counted)
    return counts


@pytest.mark.fault("serving: a guess at another client's prompt")
def test_no_beginning_is_taken_from_another_tenant(model, computed):
    def answer(*names: str) -> None:
        rows = []
        for name in names:
            tenant, question, max_tokens = name.split()
            messages = [{"role": "user", "content": f"My secret is {question}."}]
            [row] = model.prepare({"messages": messages, "max_tokens": int(max_tokens)})
            row.tenant = tenant
            rows.append(row)
        computed.clear()
        for _ in model.stream(rows):
            pass

    answer("a tulip 2")
    [whole] = computed
    answer("b tulip 2")
    assert computed == [whole]
    answer("b tulip 2")
    assert computed == [2]
    answer("b cactus 2", "a tulip 8")  # the first one ends, and the second one moves to its slot
    answer("b tulip 2")
    assert computed == [whole]


@pytest.mark.fault("serving: a guess at another client's prompt, over HTTP")
def test_beginnings_are_shared_within_one_key(model, computed):
    with here(model, api_key="one, two") as (address, _):
        counts = []
        for key in ("one", "one", "two", "two"):
            ask(client_at(address, key=key), max_tokens=1)
            counts.append(computed[-1])
    assert counts[0] == counts[2] > 2
    assert counts[1] == counts[3] == 2


def test_beginnings_are_shared_by_all_where_there_is_no_key(model, computed):
    with here(model) as (address, _):
        for host in ("192.0.2.1", "192.0.2.2"):
            ask(client_at(address, host), max_tokens=1)
    assert computed[0] > 2 and computed[1:] == [2]


def test_several_keys_need_a_model_that_keeps_them_apart(model, monkeypatch):
    monkeypatch.setattr(type(model), "separates_tenants", False)
    loaded = versions.Loaded(model, {}, (model.name,), "")
    http_app.build(loaded, keys=Keys("one"))
    with pytest.raises(BadInput, match=r"^model_uri: .* log the model again$"):
        http_app.build(loaded, keys=Keys("one,two"))


@pytest.mark.fault("serving: one of several keys in a text")
def test_each_of_several_keys_is_left_out_of_what_is_shown(monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_API_KEY", "first-long-word, second-long-word")
    assert credentials.scrubbed("a second-long-word b") == "a … b"


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask, and how


def answered(address: str, host: str, method: str = "GET", path: str = "/health") -> tuple[int, dict]:
    """The status and the body of a request with this Host header."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host)
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    response = connection.getresponse()
    body = json.load(response)
    connection.close()
    return response.status, body


@pytest.mark.fault("serving: a page that gives its own name this machine's address")
def test_only_the_names_that_are_served_are_answered(model):
    with here(model, host_names=["192.0.2.7", "LLM.example.org"]) as (address, _):
        for host in ("evil.example", "evil.example:5005", "127.0.0.1.evil.example", "192.0.2.8", "0.0.0.0", ""):
            for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
                status, body = answered(address, host, method, path)
                assert (status, body["error"]["code"]) == (421, "misdirected_request"), (host, path)
                assert body["error"]["message"].startswith(f"Host: {host!r} is not served here")
        for host in ("localhost:1", "127.0.0.1", "[::1]:5005", "127.0.0.2", "192.0.2.7:80", "llm.example.org"):
            assert answered(address, host)[0] == 200, host


@pytest.mark.parametrize(
    ("host", "expected"),
    [("192.0.2.7:80", True), ("[2001:db8::1]:80", True), ("evil.example", False), ("localhost", True), ("", False)],
)
def test_numeric_addresses_are_served_at_a_wildcard(host, expected):
    assert is_served(host, {"localhost", "0.0.0.0"}) == expected


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Example.org.:5005", "example.org"),
        ("[2001:DB8:0::1]:80", "2001:db8::1"),
        ("2001:db8:0::1", "2001:db8::1"),
        ("a:b:c", "a:b:c"),
    ],
)
def test_a_host_has_one_form(given, name):
    assert host_name(given) == name


OPEN = "is open to others, who would need no key; set PHI3_MLFLOW_API_KEY, or write open_to_all=true\n"


@pytest.mark.fault("serving: an open address without a key")
@pytest.mark.parametrize(
    ("options", "key", "line"),
    [
        (["--host=0.0.0.0"], "", f"error: host: 0.0.0.0 {OPEN}"),
        (["--host=0"], "", f"error: host: 0 {OPEN}"),
        (["--host=0.0.0.0"], " , ", "error: PHI3_MLFLOW_API_KEY: holds no key; write one, or several with commas"),
        (["--host=0.0.0.0", "--open_to_all=true"], "", "error: models:/gone/1: there is no such model"),
        (["--host=0.0.0.0"], "sesame", "error: models:/gone/1: there is no such model"),
        (["--host=127.0.0.2"], "", "error: models:/gone/1: there is no such model"),
        (["--allowed_hosts=https://x.org"], "", "error: allowed_hosts: 'https://x.org' can't be one"),
        (["--allowed_hosts=*"], "", "error: allowed_hosts: '*' can't be one"),
    ],
)
def test_an_open_address_without_a_key_is_one_line(tmp_path, options, key, line):
    environment = {"PHI3_MLFLOW_API_KEY": key, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = in_process("serve", "--model_uri=models:/gone/1", "--port=5999", *options, **environment)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith(line)


@pytest.mark.fault("serving: a key twice in one request's JSON")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"messages": [], "messages": []}', "the key 'messages' is given twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' is given twice"),
        ('{"messages": [], "user": {"x": 1, "x": 2}}', "the key 'x' is given twice"),
        ('{"messages": [], "temperature": NaN}', "NaN is not a JSON value"),
    ],
)
def test_json_that_says_two_things_is_refused_by_name(body, message):
    with pytest.raises(protocol.ApiError) as raised:
        protocol.read_request(body.encode(), protocol.ChatRequest)
    assert raised.value.status == 400
    assert raised.value.content["error"]["message"] == f"Invalid JSON: {message}"


def test_an_allowed_host_and_a_key_reach_a_server_that_is_open(store):
    options = ("--host=0.0.0.0", "--allowed_hosts=llm.example.org, other.example")
    with serving(store, *options, PHI3_MLFLOW_API_KEY="one,two") as (_, address):
        for host, status in (("other.example", 200), ("192.0.2.1", 200), ("evil.example", 421)):
            assert answered(address, host)[0] == status
        for key in ("one", "two"):
            assert "Paris" in content(ask(client_at(address, key=key), PARIS))
        with pytest.raises(openai.AuthenticationError):
            ask(client_at(address, key="one,two"))
