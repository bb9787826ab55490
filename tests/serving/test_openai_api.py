"""`serve` through the official openai client: a real server process over the logged int4 model, on loopback."""

import json
import re
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from support.commands import REPOSITORY, entry_point, free_port, running_warm
from support.effort import LONG as MANY
from support.openai_servers import LONG, NAME, ask, content, here, metric, serving, wait_for
from support.questions import PARIS, some_questions


@pytest.fixture(scope="module")
def address(store):
    with serving(store) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


CASES = {
    "one question": ({}, PARIS),
    "two stop strings": ({"stop": ["of Fr", "never"]}, PARIS),
    "one token": ({"max_tokens": 1}, PARIS),
    "unicode": ({"max_tokens": 12}, [{"role": "user", "content": "Repeat: Größe 日本 🎉\n\n«ok»"}]),
    "a drawn answer": ({"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 12}, PARIS),
    "twenty turns": (
        {"max_tokens": 8},
        [{"role": ("user", "assistant")[turn % 2], "content": f"Turn {turn}."} for turn in range(19)] + PARIS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "messages"), CASES.values(), ids=CASES)
def test_an_answer_is_the_wrappers_own_whole_and_streamed(client, wrapper, options, messages):
    [expected] = wrapper.predict({"messages": messages} | options)
    whole = ask(client, messages, **options)
    assert content(whole) == expected["choices"][0]["message"]["content"]
    assert whole.choices[0].finish_reason == expected["choices"][0]["finish_reason"]
    assert whole.usage.model_dump(exclude_none=True) == expected["usage"]
    *chunks, last = ask(client, messages, stream=True, stream_options={"include_usage": True}, **options)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == content(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage.model_dump(exclude_none=True) == expected["usage"]


@pytest.mark.slow
def test_max_tokens_cuts_under_both_of_its_names(client):
    for name in ("max_tokens", "max_completion_tokens"):
        cut = ask(client, **{name: 1})
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 1)


@pytest.mark.slow
def test_n_choices_come_whole_and_streamed(client):
    options = {"n": 2, "temperature": 1.5, "seed": 11, "max_tokens": 8}
    texts = [choice.message.content for choice in ask(client, **options).choices]
    assert len(set(texts)) == 2
    streamed = ["", ""]
    for chunk in ask(client, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.slow
def test_text_parts_and_fields_that_ask_for_nothing_are_accepted(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": PARIS[0]["content"]}]}]
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "user": "someone", "logit_bias": {}}
    assert content(ask(client, parts, n=1, **neutral)) == content(ask(client))


REFUSED = {
    "no message": ({"messages": []}, "messages must hold at least one message, got an empty conversation"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content: only parts of text, not 'image_url'",
    ),
    "role": ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role: 'narrator' is none of system, "),
    "temperature": ({"temperature": 3}, "temperature must be a number from 0.0 to 2.0, got 3"),
    "type": ({"max_tokens": "many"}, "max_tokens must be a number, got 'many'"),
    "cap": ({"max_tokens": 5000}, "max_tokens: 5000 is more than the 4096 allowed here"),
    "tools": (
        {"extra_body": {"tools": [{"type": "function"}]}},
        "tools[0] must have the type 'function' and a function",
    ),
    "unknown": ({"extra_body": {"beams": 4}}, "beams: there is no such field"),
    "near miss": ({"extra_body": {"min_pp": 0.1}}, "min_pp: there is no such field (did you mean 'min_p'?)"),
    "penalty": ({"presence_penalty": 3}, "presence_penalty must be a number from -2.0 to 2.0, got 3"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        'response_format: the schema can\'t be used: Unimplemented keys: ["not"]',
    ),
    "stream options": ({"extra_body": {"stream_options": {"usage": True}}}, "stream_options"),
    "context": (
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        "tokens; the context length is 8192",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_with_400_and_one_line(client, options, reason):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, stream=stream, **options)
        assert reason in raised.value.body["message"] and "\n" not in raised.value.body["message"]
        assert raised.value.body["type"] == "invalid_request_error"


def post(url: str, body: bytes, kind: str = "application/json") -> int:
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": kind})
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        assert set(json.load(error)["error"]) == {"message", "type", "param", "code"}
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b" " * (2**20 + 1), "application/json", 413),
        (b'{"messages": []}', "text/plain", 415),
    ],
)
def test_a_broken_request_gets_an_error_object(address, body, kind, status):
    assert post(address, body, kind) == status


@pytest.mark.slow
def test_the_model_is_listed_and_another_is_not_found(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        client.chat.completions.create(model="gpt-4", messages=PARIS)


@pytest.mark.slow
def test_requests_of_8_threads_are_answered_as_one_by_one(client, address):
    count = 200 if MANY else 80
    questions = [question["messages"] for question in some_questions(20)]
    alone = [content(ask(client, question, max_tokens=6)) for question in questions]
    names = ('slm_requests_total{outcome="ok"}', "slm_output_tokens_total", "slm_batch_texts_count")
    before = [metric(address, name) for name in names]
    with ThreadPoolExecutor(8) as pool:
        wanted = [place % len(questions) for place in range(count)]
        answers = list(pool.map(lambda place: ask(client, questions[place], max_tokens=6), wanted))
    assert [content(answer) for answer in answers] == [alone[place] for place in wanted]
    requests, tokens, batches = (metric(address, name) - was for name, was in zip(names, before, strict=True))
    assert requests == count
    assert tokens == sum(answer.usage.completion_tokens for answer in answers)
    assert batches < 0.75 * count  # they were generated together


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_place(client, address):
    cancelled = 'slm_requests_total{outcome="cancelled"}'
    before = metric(address, cancelled)
    stream = ask(client, LONG, stream=True, max_tokens=3000)
    for _ in range(3):
        next(stream)
    assert metric(address, "slm_generating") == 1
    stream.close()
    assert wait_for(address, "slm_generating", 0)
    assert wait_for(address, cancelled, before + 1)
    with pytest.raises(openai.APITimeoutError):  # one that waits for the whole answer
        ask(client, LONG, max_tokens=3000, timeout=1)
    assert wait_for(address, "slm_generating", 0)
    assert wait_for(address, cancelled, before + 2)
    assert "Paris" in content(ask(client))


@pytest.mark.slow
def test_the_key_is_asked_for_and_a_signal_ends_the_server_soon(store):
    with serving(store, "--drain=2", PHI3_MLFLOW_API_KEY="sesame") as (process, address):
        with pytest.raises(openai.AuthenticationError) as raised:
            ask(openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0))
        assert raised.value.body["code"] == "invalid_api_key"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/metrics", timeout=10)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0)
        stream = ask(client, LONG, stream=True, max_tokens=3000)
        next(stream)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - start < 12


@pytest.mark.slow
@pytest.mark.fault("serving: SIGTERM twice, while answers are generated")
def test_requests_under_way_end_before_the_server_does(store):
    """New requests are refused meanwhile. A second signal changes nothing."""
    with serving(store, "--drain=60") as (process, address), ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        streams = [ask(client, LONG, stream=True, max_tokens=150) for _ in range(4)]
        firsts = [next(stream) for stream in streams]
        whole = [pool.submit(ask, client, LONG, max_tokens=150) for _ in range(4)]
        assert wait_for(address, "slm_generating", 8)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        with pytest.raises(openai.APIConnectionError):
            for _ in range(100):
                ask(openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), max_tokens=1)
        ends = [list(stream)[-1].choices[0].finish_reason for stream in streams]
        ends += [future.result().choices[0].finish_reason for future in whole]
        assert set(ends) <= {"length", "stop"} and len(ends) == 8 and len(firsts) == 4
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_full_queue_answers_429(wrapper, monkeypatch):
    from slm.serving import batching

    model = wrapper.unwrap_python_model()
    monkeypatch.setattr(batching, "MOST_BATCHES", 1)
    monkeypatch.setattr(model, "batch_size", 1)
    with here(model, waiting=1) as (address, client), ThreadPoolExecutor(1) as pool:
        stream = ask(client, LONG, stream=True, max_tokens=1000)
        next(stream)
        assert wait_for(address, "slm_generating", 1)
        waits = pool.submit(ask, client, max_tokens=1000)  # a short one would not wait
        assert wait_for(address, "slm_waiting", 1)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        assert raised.value.body["code"] == "queue_full"
        assert raised.value.response.headers["retry-after"] == "1"
        stream.close()
        assert "Paris" in content(waits.result(60))
        assert metric(address, 'slm_requests_total{outcome="full"}') == 1


@pytest.mark.slow
def test_a_request_whose_time_is_up_is_ended_with_an_error(wrapper):
    with here(wrapper.unwrap_python_model(), seconds=1.0) as (address, client):
        with pytest.raises(openai.APIStatusError) as raised:
            ask(client, LONG, max_tokens=1000)
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"not answered within 1 seconds"):
            list(ask(client, LONG, max_tokens=1000, stream=True))
        assert wait_for(address, "slm_generating", 0)
        assert metric(address, 'slm_requests_total{outcome="timeout"}') == 2


@pytest.mark.slow
def test_a_batch_that_fails_is_a_500_and_the_next_one_is_answered(wrapper, monkeypatch, capfd):
    model = wrapper.unwrap_python_model()

    def broken(arriving):
        raise RuntimeError("out of memory")
        yield

    with here(model) as (address, client):
        monkeypatch.setattr(model, "joined", broken)
        with pytest.raises(openai.InternalServerError, match="the model failed: RuntimeError: out of memory"):
            ask(client)
        monkeypatch.undo()
        assert "Paris" in content(ask(client))
        assert metric(address, 'slm_requests_total{outcome="error"}') == 1


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.fault("security: serving listens on loopback unless told otherwise")
def test_the_server_listens_on_loopback_alone(address):
    """/proc/net/tcp has addresses in hexadecimal, the lowest byte first, and 0A for a socket that listens."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    sockets = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
        if Path("/proc/net", name).exists()
    ]
    listening = {
        place.partition(":")[0] for _, place, _, state, *_ in sockets if place.endswith(f":{port}") and state == "0A"
    }
    assert listening == {"0100007F"}


def test_a_model_that_cannot_be_served_and_a_port_in_use_are_one_line(store):
    import socket

    done = entry_point("serve", f"--model_uri={store[1]['prompt']}", MLFLOW_TRACKING_URI=store[0])
    assert done.code == 2
    assert "has the prompt schema; log it with schema=chat to serve it" in done.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = entry_point("serve", "--model_uri=models:/x/1", f"--port={taken.getsockname()[1]}")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "can't be used: Address already in use" in done.err


def test_mlflows_gateway_in_front_passes_conversations_and_streams(address, client, tmp_path):
    """The recipe of docs/serving.md, with this server's address and model name."""
    page = (REPOSITORY / "docs" / "serving.md").read_text("utf-8")
    recipe = re.search(r"```yaml\n(endpoints:.*?)```", page, re.DOTALL)[1]
    recipe = recipe.replace("http://127.0.0.1:5005", address).replace("name: phi3  ", f"name: {NAME}  ")
    (tmp_path / "gateway.yaml").write_text(recipe.replace("$PHI3_MLFLOW_API_KEY", "none"))
    port = free_port()
    command = ["mlflow", "gateway", "start", "--port", str(port)]
    command += ["--config-path", str(tmp_path / "gateway.yaml")]
    with running_warm(command, f"http://127.0.0.1:{port}/health", cwd=tmp_path):
        turns = [*PARIS, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
        direct = content(ask(client, turns, max_tokens=12))
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as through:
            answer = through.chat.completions.create(model="phi3", messages=turns, max_tokens=12)
            assert content(answer) == direct
            stream = through.chat.completions.create(model="phi3", messages=turns, max_tokens=12, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == direct
