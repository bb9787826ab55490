"""What can be asked besides the models logged here: anything that MLflow logs with text in and out, and endpoints."""

import json
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import echo_models
from support.commands import entry_point, free_port, running_warm, started, without_gpu
from support.databases import sqlite_store
from support.python_models import signature

from slm.answers import asking, endpoints, loading
from slm.base.errors import BadInput, Unavailable
from slm.prompts import prompt_rows
from slm.tracking import mlflow_client, registry

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's advice to those who log

GENERATION = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["END"]}
GREEDY = {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def prompt(id: str, *messages: str) -> prompt_rows.Prompt:
    """A conversation of "role: content" lines."""
    split = tuple(dict(zip(("role", "content"), line.split(": ", 1), strict=True)) for line in messages)
    return prompt_rows.Prompt(id, split, None, ("x",), (), None, ())


PLAIN = prompt_rows.Prompt("plain", None, "Hello", ("x",), (), None, ())
BRIEF = prompt("brief", "system: Be brief.", "user: Hi")
TURNS = prompt("turns", "user: Hi", "assistant: Hello", "user: Bye")
BAD = prompt("bad", "user: fail")


def answers_of(model: asking.LoadedModel, prompts, generation):
    """Each prompt, asked once, with its answer."""
    questions = asking.questions(model, prompts, generation, 1)
    for question, answer in asking.answers(model, questions, generation.get("batch_size") or 0):
        yield question.prompt, answer


def asked(model: asking.LoadedModel, wanted, generation=GENERATION) -> dict[str, dict]:
    """The answers by prompt id, each with its six fields. A model of this project also gives the tokens."""
    answers = {prompt.id: dict(answer) for prompt, answer in answers_of(model, wanted, generation)}
    tokens = {id: answer.pop("token_ids", ()) for id, answer in answers.items()}
    for answer in answers.values():  # only of a model of this project
        assert not answer.pop("calls", ()) and not answer.pop("log_probabilities", ())
    if isinstance(model, loading.OwnModel):
        assert all(len(tokens[id]) == (answer["output_tokens"] or 0) for id, answer in answers.items())
    fields = {"text", "finish_reason", "prompt_tokens", "output_tokens", "seconds", "error"}
    assert {frozenset(answer) for answer in answers.values()} == {frozenset(fields)}
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Logged models


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A tracking store of this module's own, with a run open; gives its URI and mlflow."""
    import mlflow

    folder = tmp_path_factory.mktemp("loading")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("loading", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        yield uri, mlflow
    mlflow.set_tracking_uri(None)


def log_echo(store, folder: Path, code: str, **log) -> str:
    """Logs a model from code; its URI."""
    path = folder / "model.py"
    path.write_text(echo_models.HEAD + code, encoding="utf-8")
    return store[1].pyfunc.log_model(name="echo", python_model=str(path), pip_requirements=[], **log).model_uri


def load(uri: str, **settings) -> asking.LoadedModel:
    uri = registry.resolve(uri, trust_code=True)
    folder = None if endpoints.is_endpoint(uri) else mlflow_client.download(uri)
    return loading.load("label", uri, folder, settings, trust_code=True)


@dataclass(frozen=True)
class Case:
    code: str
    texts: list[str]  # of PLAIN, BRIEF, TURNS
    ignored: tuple[str, ...] = ("max_tokens", "temperature", "top_p", "stop", "seed")
    log: dict = field(default_factory=dict)
    rest: tuple = ("stop", None, None)  # finish_reason, prompt_tokens, output_tokens


PASSED = '{"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop": ["END"]}'
FOR_RESPONSES = '{"max_output_tokens": 5, "temperature": 0.5, "top_p": 0.9}'
CONVERSATIONS = ["user: Hello", "system: Be brief. | user: Hi", "user: Hi | assistant: Hello | user: Bye"]
WRITTEN_OUT = ["Hello", "Be brief.\n\nHi", "User: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:"]
TEMPLATED = [
    "<user>Hello<assistant>",
    "<system>Be brief.<user>Hi<assistant>",
    "<user>Hi<assistant>Hello<user>Bye<assistant>",
]
EXAMPLE = {"messages": [{"role": "user", "content": "x"}], "stream": False, "n": 1}
CASES = {
    "ChatModel": Case(
        echo_models.CHAT_MODEL, [f"{text} {PASSED}" for text in CONVERSATIONS], ("seed",), rest=("length", 3, 4)
    ),
    "ChatAgent": Case(echo_models.CHAT_AGENT, CONVERSATIONS),
    "ResponsesAgent": Case(
        echo_models.RESPONSES_AGENT,
        [f"{text} {FOR_RESPONSES}" for text in CONVERSATIONS],
        ("stop", "seed"),
        rest=("length", 5, 6),
    ),
    "a text column, parameters in the row and in params": Case(
        echo_models.TABLE,
        [f'{text} {{"temperature": 0.5, "max_new_tokens": 5, "stop": "END", "seed": 7.0}}' for text in WRITTEN_OUT],
        ("top_p",),
        {
            "signature": signature(
                ("string", "question", True),
                ("double", "temperature", False),
                params=[("max_new_tokens", "long", 9), ("stop", "string", ""), ("seed", "double", 0.0)],
            )
        },
    ),
    "a list among the params": Case(
        echo_models.TABLE,
        [f'{text} {{"stop": ["END"]}}' for text in WRITTEN_OUT],
        ("max_tokens", "temperature", "top_p", "seed"),
        {"signature": signature(("string", "question", True), params=[("stop", "string", ["x"], (-1,))])},
    ),
    "a table out": Case(echo_models.COLUMN, WRITTEN_OUT, log={"signature": signature(("string", "text", True))}),
    "one text": Case(
        echo_models.ONE_TEXT_FOR_ALL, WRITTEN_OUT, log={"signature": signature(("string", "prompt", True))}
    ),
    "a chat template in its metadata": Case(
        echo_models.COLUMN,
        TEMPLATED,
        log={"signature": signature(("string", "prompt", True)), "metadata": {"chat_template": TEMPLATE}},
    ),
    "a function of list[str]": Case(echo_models.FUNCTION, WRITTEN_OUT),
    "a list of records": Case(
        echo_models.RECORDS,
        [f'{text} {{"max_tokens": 5}}' for text in ("Hello", "Hi", "Bye")],
        ("temperature", "top_p", "stop", "seed"),
    ),
    "a list of conversations": Case(echo_models.CONVERSATIONS, ["Hello", "Hi", "Bye"]),
    "messages, and columns that must be there": Case(
        echo_models.MESSAGES,
        [f'{text} {{"stream": false, "n": 1}}' for text in ("Hello", "Hi", "Bye")],
        log={"input_example": EXAMPLE},
    ),
}


@pytest.mark.parametrize("batch_size", [0, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_that_was_not_logged_here_is_asked_in_its_own_form(store, tmp_path, case, batch_size):
    model = load(log_echo(store, tmp_path, case.code, **case.log))
    assert model.facts.ignored == case.ignored
    answers = asked(model, [PLAIN, BRIEF, TURNS], GENERATION | {"batch_size": batch_size})
    assert [answer["text"] for answer in answers.values()] == case.texts
    assert {(a["finish_reason"], a["prompt_tokens"], a["output_tokens"]) for a in answers.values()} == {case.rest}
    assert {answer["error"] for answer in answers.values()} == {""}
    sent = asking.row_of(model.facts, BRIEF, 0, GENERATION)
    assert json.loads(json.dumps(sent)) == sent


@pytest.mark.parametrize("batch_size", [0, 3])
@pytest.mark.parametrize("name", ["ChatModel", "ResponsesAgent", "a table out", "a function of list[str]"])
@pytest.mark.fault("models: a row that raises")
def test_a_row_that_raises_fails_alone_and_says_why_in_one_line(store, tmp_path, name, batch_size):
    model = load(log_echo(store, tmp_path, CASES[name].code, **CASES[name].log))
    answers = asked(model, [PLAIN, BAD, BRIEF], GENERATION | {"batch_size": batch_size})
    assert [answers["plain"]["text"], answers["brief"]["text"]] == CASES[name].texts[:2]
    assert (answers["bad"]["text"], answers["bad"]["finish_reason"]) == ("", "error")
    assert "it was told to" in answers["bad"]["error"]
    assert answers["bad"]["prompt_tokens"] is None


def test_an_answer_without_text_is_the_rows_error(store, tmp_path):
    model = load(log_echo(store, tmp_path, echo_models.NO_TEXT, signature=signature(("string", "prompt", True))))
    assert asked(model, [PLAIN])["plain"]["error"] == "the answer holds no text, but None (finish reason None)"


def test_a_conversation_that_the_chat_template_refuses_is_the_rows_error(store, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    log = {"signature": signature(("string", "prompt", True)), "metadata": {"chat_template": template}}
    answers = asked(load(log_echo(store, tmp_path, echo_models.COLUMN, **log)), [PLAIN, BRIEF])
    assert answers["plain"]["text"] == TEMPLATED[0]
    assert answers["brief"]["error"] == "the model's chat template refused the conversation: no system"


def a_list_of(*names):
    from mlflow.types.schema import Array, Object, Property

    return Array(Object([Property(name, "string") for name in names]))


NEEDED = "a `messages` column, or one text column, is needed"
REFUSED = {
    "numbers": ([("double", "age", True)], f"takes the columns age (double); {NEEDED}"),
    "a column that only it knows": (
        [("string", "question", True), ("string", "customer", True)],
        f"takes the columns question (string), customer (string); {NEEDED}",
    ),
    "messages that want more than a role and a content": (
        [(a_list_of("role", "content", "id"), "messages", True)],
        "takes the columns messages (Array({content: string (required), id: string (required), role: string "
        f"(required)}})); {NEEDED}",
    ),
    "two texts": (
        [("string", "a", False), ("string", "b", False)],
        f"takes the columns a (string), b (string); {NEEDED}",
    ),
}


@pytest.mark.parametrize(("columns", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.fault("models: wrong signature")
def test_a_form_that_is_not_understood_is_refused_with_its_columns(store, tmp_path, columns, reason):
    uri = log_echo(store, tmp_path, echo_models.COLUMN, signature=signature(*columns))
    with pytest.raises(BadInput) as raised:
        load(uri)
    assert str(raised.value) == f"{uri} {reason}"


def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(store, tmp_path):
    log = {"signature": signature(("string", "prompt", True))}
    uri = log_echo(store, tmp_path, echo_models.NOT_LOADED, **log)
    with pytest.raises(BadInput, match=f"{uri} can't be loaded: no such library"):
        load(uri)


def test_a_model_is_the_same_one_after_it_was_loaded_from_a_store_on_this_machine(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    uri = log_echo(store, tmp_path, echo_models.FUNCTION)
    folder = mlflow_client.download(uri)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # MLflow's, when it was logged
    first, second = load(uri), load(uri)
    assert not (folder / "__pycache__").exists()
    assert first.facts.sha256 == second.facts.sha256


@pytest.mark.fault("models: no signature")
def test_a_model_without_a_signature_is_refused(store, tmp_path):
    uri = log_echo(store, tmp_path, echo_models.COLUMN)
    with pytest.raises(BadInput, match="has no signature; log it with one"):
        load(uri)


@pytest.fixture(scope="module")
def tiny_pipeline(checkpoint):
    """A transformers pipeline over 0.4 million random weights and a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return pipeline("text-generation", model=LlamaForCausalLM(config), tokenizer=tokenizer)


PIPELINES = {
    "llm/v1/chat": ({"task": "llm/v1/chat"}, ("stop", "seed"), True),
    "llm/v1/completions": ({"task": "llm/v1/completions"}, ("top_p", "stop", "seed"), True),
    "text-generation": (
        {"params": {"max_new_tokens": 9, "do_sample": True}},
        ("temperature", "top_p", "stop", "seed"),
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("log", "ignored", "counts"), PIPELINES.values(), ids=PIPELINES)
def test_a_transformers_pipeline_logged_by_mlflow_answers_greedily(
    store, tiny_pipeline, log, ignored, counts, monkeypatch
):
    from mlflow.models import infer_signature

    monkeypatch.setattr(sys, "ps1", "", raising=False)  # else pyspark ends a process whose main module has no file
    if "params" in log:
        log = {"signature": infer_signature("a", "b", params=log["params"])}
    logged = store[1].transformers.log_model(tiny_pipeline, name="tiny", pip_requirements=[], **log)
    model = load(logged.model_uri)
    assert model.facts.ignored == ignored
    answers = asked(model, [PLAIN, BRIEF, TURNS], GREEDY)
    for wanted in (PLAIN, BRIEF, TURNS):
        messages = list(wanted.messages or [{"role": "user", "content": wanted.prompt}])
        text = tiny_pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        [expected] = tiny_pipeline(text, max_new_tokens=5, do_sample=False, return_full_text=False)
        answer = answers[wanted.id]
        assert answer["error"] == ""
        assert answer["text"] == expected["generated_text"]
        assert (answer["output_tokens"], answer["finish_reason"]) == ((5, "length") if counts else (None, "stop"))


# ---------------------------------------------------------------------------------------------------------------------
# Endpoints


class Scripted(BaseHTTPRequestHandler):
    """OpenAI's API and MLflow's deployments API, answering with what was asked, or as the model's name or text says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if not self.allowed():
            return
        name = self.path.rsplit("/", 1)[1]
        if self.path.startswith("/api/2.0/endpoints/"):
            kind = {"chat": "llm/v1/chat", "text": "llm/v1/completions", "vectors": "llm/v1/embeddings"}
            facts = {"model": {"name": "m", "provider": "openai"}, "endpoint_url": "/", "limit": None}
            listed = [{"name": name, "endpoint_type": type} | facts for name, type in kind.items()]
            found = [entry for entry in listed if entry["name"] == name]
            body = {"endpoints": listed} if not name else found[0] if found else {"detail": "not found"}
            return self.answer(200 if found or not name else 404, body)
        if self.path.startswith("/unlisted/"):
            return self.error(404, "models are not listed")
        names = {"/one/v1/models": ["echo"], "/two/v1/models": ["echo", "other"], "/none/v1/models": []}.get(self.path)
        if names is None:
            return self.error(404, "no such path")
        self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.asked.append(body)
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        rest = {name: value for name, value in body.items() if name not in ("messages", "prompt", "model", "n")}
        with self.server.lock:
            seen = self.server.seen[text] = self.server.seen.get(text, 0) + 1
        if text == "drop":
            self.close_connection = True
            return
        if text == "gone":
            self.server.gone = True
        if text == "slow":
            time.sleep(0.5)
        while text == "endless" and self.server.patient:
            time.sleep(0.1)
        model = body.get("model")
        if model == "missing":
            return self.error(404, "The model does not exist")
        for name in {"thinking": ("max_tokens", "temperature"), "odd": ("messages",)}.get(model, ()):
            if name in body:
                return self.error(400, f"Unsupported parameter: {name}", name)
        if text == "malformed":
            return self.answer(200, {"choices": ["text"]})
        if model == "page":
            return self.answer(200, "<html>")
        if text == "moderated":
            return self.error(403, "not this")
        if text == "fail":
            return self.error(400, "it was\n told to")
        if (text == "busy" and seen == 1) or text == "full":
            return self.error(429, "try again")
        told = f"{text} {json.dumps(rest, sort_keys=True)}"
        choice = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": told}} if "messages" in body else {"text": told}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        self.answer(200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice], "usage": usage})

    def allowed(self) -> bool:
        if self.server.gone:
            self.close_connection = True
            return False
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.error(401, "wrong key")
            return False
        return True

    def error(self, status, message, param=None):
        self.answer(status, {"error": {"message": message, "type": "x", "param": param, "code": None}})

    def answer(self, status, body):
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "10")  # the openai client waits as long as it is told
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """A scripted server on loopback; `address` is its URL."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.daemon_threads = True
    server.asked, server.seen, server.lock, server.key, server.gone = [], {}, threading.Lock(), "", False
    server.patient = True  # "endless" is not answered
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.patient = False
    server.shutdown()
    server.server_close()


SENT = '{"max_tokens": 5, "seed": 7, "stop": ["END"], "temperature": 0.5, "top_p": 0.9}'
AT = {
    "the only model": ("/one/v1", "/one/v1#echo", SENT, ()),
    "a model by name": ("/two/v1#other", "/two/v1#other", SENT, ()),
    "a slash at the end": ("/one/v1/", "/one/v1#echo", SENT, ()),
    "a model that wants other parameters": (
        "/two/v1#thinking",
        "/two/v1#thinking",
        '{"max_completion_tokens": 5, "seed": 7, "stop": ["END"], "top_p": 0.9}',
        ("temperature",),
    ),
}


@pytest.mark.parametrize(("path", "frozen", "sent", "ignored"), AT.values(), ids=AT)
def test_an_openai_address_is_asked_for_every_row(server, path, frozen, sent, ignored):
    model = load(server.address + path)
    assert (model.facts.uri, model.facts.sha256, model.facts.bytes, model.facts.model_id) == (
        server.address + frozen,
        "",
        0,
        None,
    )
    assert (model.facts.is_chat, model.facts.is_ours, model.facts.ignored) == (True, False, ignored)
    server.asked.clear()
    answers = asked(model, [PLAIN, BRIEF])
    assert [answers["plain"]["text"], answers["brief"]["text"]] == [f"Hello {sent}", f"Hi {sent}"]
    assert {(a["finish_reason"], a["prompt_tokens"], a["output_tokens"], a["error"]) for a in answers.values()} == {
        ("length", 3, 4, "")
    }
    assert {body["model"] for body in server.asked} == {frozen.split("#")[1]}
    assert sorted(len(body["messages"]) for body in server.asked) == [1, 2]
    content = asking.row_of(model.facts, PLAIN, 0, GENERATION)
    assert json.loads(json.dumps(content)) == content
    assert content["to"] == model.facts.uri


WRONG = {
    "two models": ("/two/v1", BadInput, "lists echo, other; name one, as {address}/two/v1#name"),
    "no model": ("/none/v1", BadInput, "lists no model; name one"),
    "no such path": ("", BadInput, "refuses a request (404): no such path; is the address whole, as http://host/v1?"),
    "no such model": ("/one/v1#missing", BadInput, "refuses a request (404): The model does not exist"),
    "a web page": ("/one/v1#page", BadInput, "does not answer in OpenAI's form: "),
    "what every request has is refused": (
        "/one/v1#odd",
        BadInput,
        "refuses a request (400): Unsupported parameter: messages",
    ),
}


@pytest.mark.parametrize(("path", "kind", "reason"), WRONG.values(), ids=WRONG)
def test_an_address_that_cannot_be_asked_is_refused_before_any_row(server, path, kind, reason):
    with pytest.raises(kind) as raised:
        registry.resolve(server.address + path)
    assert reason.format(address=server.address) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["http://me:sesame@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?api-key=sesame", "http://"])
@pytest.mark.fault("security: a key in an endpoint's address")
def test_an_address_with_a_key_in_it_is_refused_without_repeating_it(uri):
    with pytest.raises(BadInput) as raised:
        registry.resolve(uri)
    assert "sesame" not in str(raised.value)


def test_the_key_is_taken_from_the_environment_and_a_wrong_one_is_infrastructure(server, monkeypatch):
    server.key = "sesame"
    with pytest.raises(Unavailable, match=r"needs a key: set OPENAI_API_KEY \(401\): wrong key"):
        registry.resolve(f"{server.address}/one/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(Unavailable, match=r"refuses the key in OPENAI_API_KEY \(401\): wrong key"):
        registry.resolve(f"{server.address}/one/v1#echo")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    model = load(f"{server.address}/one/v1")
    assert asked(model, [PLAIN])["plain"]["error"] == ""
    server.key = "changed"
    with pytest.raises(Unavailable):
        asked(model, [PLAIN])


def test_an_address_where_nobody_listens_is_infrastructure(monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 0)
    address = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Unavailable, match=f"{address} can't be reached: .*Connection refused"):
        registry.resolve(address)


def test_a_row_that_an_endpoint_refuses_or_drops_fails_alone(server, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 1)
    model = load(f"{server.address}/one/v1")
    rows = {text: prompt(text, f"user: {text}") for text in ("busy", "full", "fail", "drop", "moderated", "fine")}
    answers = asked(model, rows.values())
    assert {id for id, answer in answers.items() if answer["error"]} == {"full", "fail", "drop", "moderated"}
    assert server.seen["busy"] == 2  # it was tried again
    assert answers["fail"]["error"] == "it was told to"
    assert answers["full"]["error"] == "try again"


def test_a_row_that_is_dropped_fails_alone_where_no_models_are_listed(server, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 0)
    model = load(f"{server.address}/unlisted/v1#echo")
    answers = asked(model, [PLAIN, prompt("drop", "user: drop"), prompt("odd", "user: malformed")])
    assert {id: bool(answer["error"]) for id, answer in answers.items()} == {"plain": False, "drop": True, "odd": True}


def test_a_server_that_dies_ends_the_run_and_the_answers_so_far_are_kept(server, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 0)
    model = load(f"{server.address}/one/v1")
    wanted = [prompt(text, f"user: {text}") for text in ("one", "gone", "two", "three")]
    kept = []
    with pytest.raises(Unavailable, match="can't be reached"):
        for row, _ in answers_of(model, wanted, GENERATION | {"batch_size": 1}):
            kept.append(row.id)
    assert kept == ["one", "gone"]


def test_answers_come_in_the_order_they_finish_and_rows_are_asked_side_by_side(server):
    model = load(f"{server.address}/one/v1")
    wanted = [prompt(f"{place}", f"user: {text}") for place, text in enumerate(["slow", "fast", *["slow"] * 6])]
    start = time.perf_counter()
    order = [row.id for row, _ in answers_of(model, wanted, GENERATION)]
    assert time.perf_counter() - start < 2  # and not 7 times half a second
    assert order[0] == "1" and sorted(order) == [str(place) for place in range(8)]


@pytest.mark.fault("process: an endpoint's row that hangs, given up by row_timeout")
def test_an_endpoints_row_that_hangs_fails_alone_by_the_row_timeout(server):
    model = load(f"{server.address}/one/v1", row_timeout=1)
    wanted = [prompt(f"{place}", f"user: {text}") for place, text in enumerate(["endless", "a", "endless", "b", "c"])]
    for threads in (1, 8):
        answers = asked(model, wanted, GENERATION | {"batch_size": threads})
        late = {id: answer["error"] for id, answer in answers.items() if answer["error"]}
        assert late == {"0": "no answer within 1 s (row_timeout)", "2": "no answer within 1 s (row_timeout)"}


def test_a_model_of_ours_that_hangs_fails_what_is_left_by_the_row_timeout(store, int4_export):
    from slm.models import model_logging

    logged = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
    model = load(logged.model_uri, row_timeout=5)
    one = [prompt("plain", "user: Hello")]
    assert asked(model, one)["plain"]["error"] == ""
    with model.wrapper._lock:  # as a runtime that never comes back holds it
        found = asked(model, one)["plain"]
    assert (found["text"], found["error"]) == ("", "no answer within 5 s (row_timeout)")


def test_packages_that_differ_from_those_a_model_was_logged_with_are_named(store, int4_export, tmp_path, capsys):
    from importlib.metadata import version

    from slm.models import manifest, model_logging

    logged = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
    folder = tmp_path / "model"
    shutil.copytree(mlflow_client.download(logged.model_uri), folder)
    assert load(str(folder)).wrapper
    assert "was logged for" not in capsys.readouterr().out
    needed = folder / "requirements.txt"
    assert f"numpy=={version('numpy')}" in needed.read_text()
    lines = ["numpy==1.0", "no-such-package>=2", "jinja2", "-c constraints.txt", "./a/path", "onnxruntime>=1.0"]
    needed.write_text("\n".join(lines))
    (folder / manifest.NAME).unlink()
    manifest.write(folder, "artifacts/onnx", {})
    assert load(str(folder)).wrapper
    assert [line for line in capsys.readouterr().out.splitlines() if "was logged for" in line] == [
        f"label: was logged for numpy==1.0 ({version('numpy')} here)",
        "label: was logged for no-such-package>=2 (missing here)",
    ]


@without_gpu
def test_a_model_that_was_logged_to_run_on_a_gpu_says_in_one_line_that_there_is_none(store, int4_export, checkpoint):
    import torch

    from slm.models import model_logging

    # torch's CUDA build and its CPU build each say it in their own words
    absent = "Found no NVIDIA driver" if torch.version.cuda else "Torch not compiled with CUDA enabled"
    for logged, reason in (
        (
            model_logging.log_onnx(int4_export, "chat", GREEDY | {"execution_provider": "cuda"}, "int4"),
            "Cuda interface",
        ),
        (model_logging.log_pipeline(checkpoint, GREEDY | {"device": "cuda"}), absent),
    ):
        with pytest.raises(BadInput) as raised:
            load(logged.model_uri)
        assert str(raised.value).startswith(f"{registry.resolve(logged.model_uri)} can't be loaded: ")
        assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_more_is_asked_once_the_caller_has_gone(server):
    model = load(f"{server.address}/one/v1")
    server.asked.clear()
    wanted = [prompt(f"{place}", "user: slow") for place in range(20)]
    rows = answers_of(model, wanted, GENERATION | {"batch_size": 2})
    next(rows)
    rows.close()
    time.sleep(1.2)
    assert len(server.asked) <= 4


@pytest.mark.parametrize(("name", "is_chat"), [("chat", True), ("text", False)])
def test_an_endpoint_of_the_deployments_api_is_asked(server, monkeypatch, name, is_chat):
    monkeypatch.setenv("MLFLOW_DEPLOYMENTS_TARGET", server.address)
    model = load(f"endpoints:/{name}")
    assert (model.facts.uri, model.facts.is_chat, model.facts.ignored) == (f"endpoints:/{name}", is_chat, ())
    answers = asked(model, [PLAIN, BRIEF, BAD])
    texts = ["Hello", "Hi" if is_chat else "Be brief.\n\nHi"]
    assert [answers["plain"]["text"], answers["brief"]["text"]] == [f"{text} {SENT}" for text in texts]
    assert answers["plain"]["output_tokens"] == 4
    assert "400 Client Error" in answers["bad"]["error"]


def test_a_deployment_that_cannot_be_asked_is_refused(server, monkeypatch):
    monkeypatch.delenv("MLFLOW_DEPLOYMENTS_TARGET", raising=False)
    with pytest.raises(BadInput, match="set MLFLOW_DEPLOYMENTS_TARGET to the server's address"):
        registry.resolve("endpoints:/chat")
    monkeypatch.setenv("MLFLOW_DEPLOYMENTS_TARGET", server.address)
    with pytest.raises(BadInput, match="there is no such endpoint; there are: chat, text, vectors"):
        registry.resolve("endpoints:/chatt")
    with pytest.raises(
        BadInput, match=r"is of type llm/v1/embeddings; one of llm/v1/chat, llm/v1/completions is needed"
    ):
        registry.resolve("endpoints:/vectors")
    monkeypatch.setenv("MLFLOW_DEPLOYMENTS_TARGET", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Unavailable, match="can't be reached"):
        registry.resolve("endpoints:/chat")


@pytest.mark.slow
def test_a_real_gateway_is_asked_by_both_its_addresses(server, monkeypatch, tmp_path):
    pytest.importorskip("mlflow.gateway.cli", reason="mlflow gateway needs the packages of mlflow[gateway]")
    route = {"name": "ours", "endpoint_type": "llm/v1/chat", "model": {"provider": "openai", "name": "echo"}}
    route["model"]["config"] = {"openai_api_key": "none", "openai_api_base": f"{server.address}/one/v1"}
    (tmp_path / "gateway.yaml").write_text(json.dumps({"endpoints": [route]}), encoding="utf-8")
    port = free_port()
    command = ["mlflow", "gateway", "start", "--config-path", str(tmp_path / "gateway.yaml"), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with running_warm(command, f"{address}/health"):
        monkeypatch.setenv("MLFLOW_DEPLOYMENTS_TARGET", address)
        for uri in ("endpoints:/ours", f"{address}/v1#ours"):
            answers = asked(load(uri), [PLAIN, TURNS, BAD])
            assert [answers["plain"]["text"], answers["turns"]["text"]] == [f"Hello {SENT}", f"Bye {SENT}"], uri
            assert answers["plain"]["output_tokens"] == 4
            assert answers["bad"]["error"]
        with pytest.raises(BadInput, match="there is no such endpoint; there are: ours"):
            registry.resolve("endpoints:/theirs")


# ---------------------------------------------------------------------------------------------------------------------
# All the way


@pytest.mark.slow
def test_our_own_server_answers_as_the_model_that_it_serves(store, int4_export):
    from support.openai_servers import NAME, serving

    from slm.models import model_logging

    logged = model_logging.log_onnx(int4_export, "chat", GREEDY, "int4").model_uri
    here = asked(load(logged), [PLAIN, BRIEF, TURNS], GREEDY)
    with serving((store[0], {"chat": logged})) as (_, address):
        model = load(f"{address}/v1")
        assert (model.facts.uri, model.facts.ignored) == (f"{address}/v1#{NAME}", ())
        there = asked(model, [PLAIN, BRIEF, TURNS], GREEDY)
    for id, answer in here.items():
        assert {**there[id], "seconds": 0} == {**answer, "seconds": 0}


@pytest.mark.slow
def test_evaluate_scores_a_strangers_model_and_an_address_side_by_side(store, server, tmp_path):
    uri = log_echo(store, tmp_path, echo_models.CHAT_MODEL)
    rows = [{"id": word, "prompt": word, "expected": "Hello", "scorers": ["contains"]} for word in ("Hello", "fail")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = entry_point(
        "evaluate",
        f"--model_uris={uri},{server.address}/one/v1",
        "--trust_code=true",
        f"--prompts={tmp_path / 'two.jsonl'}",
        "--max_tokens=5",
        MLFLOW_TRACKING_URI=store[0],
        MLFLOW_EXPERIMENT_NAME="loading",
        PHI3_MLFLOW_CACHE=str(tmp_path / "cache"),
    )
    assert done.code == 0, done.err
    assert f"{uri} was not given seed: not declared by it" in " ".join(done.out.split())
    runs = {run.data.tags.get("model.uri"): run for run in store[1].search_runs(["1"], output_format="list")}
    outputs = {
        uri: 'user: Hello {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "stop": null}',
        f"{server.address}/one/v1#echo": 'Hello {"max_tokens": 5, "seed": 0, "temperature": 0.0, "top_p": 1.0}',
    }
    for name, output in outputs.items():
        metrics = runs[name].data.metrics
        assert (metrics["rows"], metrics["rows_failed"], metrics["contains/mean"]) == (2, 1, 1)
        path = f"{runs[name].info.artifact_uri}/evaluation/samples.jsonl"
        samples = [json.loads(line) for line in store[1].artifacts.load_text(path).splitlines()]
        assert [sample["output"] for sample in samples] == [output, ""]
        assert "it was told to" in samples[1]["error"]["message"]
    assert {body.get("seed") for body in server.asked} == {0}


@pytest.mark.slow
def test_evaluate_ends_with_4_where_nobody_listens_and_2_where_nothing_can_be_asked(store, server):
    for uri, code in ((f"http://127.0.0.1:{free_port()}/v1", 4), (f"{server.address}/two/v1", 2)):
        done = entry_point("evaluate", f"--model_uris={uri}", "--trust_code=true", MLFLOW_TRACKING_URI=store[0])
        assert (done.code, done.err.count("error: ")) == (code, 1), done.err
        assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_signal_ends_it_soon_while_rows_are_asked_and_the_answers_are_kept(store, server, tmp_path):
    rows = [
        {"id": word, "prompt": word, "expected": "x", "scorers": ["contains"]} for word in ("one", "two", "endless")
    ]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["evaluate", f"--model_uris={server.address}/one/v1", f"--prompts={tmp_path / 'three.jsonl'}"]
    environment = {"MLFLOW_TRACKING_URI": store[0], "MLFLOW_EXPERIMENT_NAME": "loading"}
    environment["PHI3_MLFLOW_CACHE"] = str(tmp_path / "cache")
    process = started(*command, **environment)
    while "endless" not in server.seen:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert time.monotonic() - start < 10
    server.asked.clear()
    server.seen["endless"] = 0
    server.patient = False
    done = entry_point(*command, **environment)
    assert done.code == 0, done.err
    assert [body["messages"][0]["content"] for body in server.asked if body["max_tokens"] > 1] == ["endless"]
