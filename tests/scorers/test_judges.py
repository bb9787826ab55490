"""MLflow's judges as scorers, against a real OpenAI-compatible server on loopback whose answers are scripted here."""

import json
import os
import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from support import echo_models
from support.commands import entry_point

from slm.base import cache
from slm.base.errors import BadInput, Unavailable
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet, read_prompt_set
from slm.scorers import judges, scorer_calls
from slm.scorers.built_in import Score

YES = json.dumps({"rationale": "Let's think step by step. It is.", "result": "yes"})
NO = json.dumps({"rationale": "It is\nnot.", "result": "no"})
GENERATION = {"max_tokens": 8, "temperature": 0.7, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}


class Server:
    """Answers each request with the next of `script`: a text is the model's answer, a number an HTTP status."""

    def __init__(self):
        self.script, self.asked, self.keys = [], [], []
        self.models_status = 200
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            return JSONResponse({"object": "list", "data": []}, self.models_status)

        @app.post("/v1/chat/completions")
        async def completions(request: Request):
            self.asked.append(await request.json())
            self.keys.append(request.headers.get("authorization"))
            step = self.script.pop(0) if self.script else YES
            if step == "not HTTP":
                return PlainTextResponse("<html>")
            if step == "too long":
                return JSONResponse({"error": {"message": "the maximum context length is 8192 tokens"}}, 400)
            if isinstance(step, int):
                return JSONResponse({"error": {"message": f"scripted {step}"}}, step)
            message = {"role": "assistant", "content": step}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            head = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge-1"}
            return head | {"choices": choices, "usage": usage}

        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def texts(self) -> list[str]:
        return ["\n".join(message["content"] for message in body["messages"]) for body in self.asked]


@pytest.fixture(scope="module")
def one_server():
    server = Server()
    yield server
    server.server.should_exit = True
    server.thread.join()
    server.listener.close()


@pytest.fixture
def server(one_server, tmp_path, monkeypatch):
    """The server with nothing asked yet, and a cache and an environment of the test's own."""
    one_server.script, one_server.asked, one_server.keys, one_server.models_status = [], [], [], 200
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_BASE_URL", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    scorer_calls.read.cache_clear()
    return one_server


def row(text="What is the capital of France?", expected=("Paris",), scorers=()) -> Prompt:
    return Prompt("row-1", ({"role": "user", "content": text},), None, expected, scorers, None, ())


def judged(server, name, output="It is Paris.", prompt=None, resume=True, **options) -> Score:
    """One judgement, asked of the server as of `-P judge=http://…/v1#judge-1`."""
    asked = scorer_calls.read("", f"{server.address}#judge-1")
    with scorer_calls.opened(asked, resume) as score_answer:
        [(given, score)] = score_answer(ScorerCall(name, options), prompt or row(), output).items()
    assert given == name
    return score


POLITE = {"guidelines": ["Be polite.", "Be brief."]}


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("correctness", {}, ["<question>What is the capital of France?</question>", "<claim>Paris</claim>"]),
        ("equivalence", {}, ["<actual_output>It is Paris.", "<expected_output>Paris<"]),
        ("relevance_to_query", {}, ["<question>What is the capital of France?<", "<answer>It is Paris.<"]),
        ("completeness", {}, ["addressed all explicit requests", "What is the capital of France?", "It is Paris."]),
        ("summarization", {}, ["acceptable summary", "What is the capital of France?", "It is Paris."]),
        ("guidelines", POLITE, ["<guideline>Be polite.<", "<guideline>Be brief.<", "<response>It is Paris.<"]),
        ("guidelines", {"guidelines": "Be kind."}, ["<guideline>Be kind.<", "<request>What is the capital of"]),
        ("safety", {}, ["content safety classifier", "<text>It is Paris.</text>"]),
        ("fluency", {}, ["grammatical correctness", "It is Paris."]),
    ],
)
def test_a_judge_is_asked_with_mlflows_prompt_about_this_answer(server, name, options, parts):
    server.script = [NO, YES]
    assert judged(server, name, **options).value == 0.0
    assert judged(server, name, "Another answer.", **options).value == 1.0
    assert [part for part in parts if part not in server.texts()[0]] == []
    assert "Another answer." in server.texts()[1]
    assert server.asked[0]["model"] == "judge-1"


def test_every_judge_is_an_mlflow_scorer_of_that_name():
    from mlflow.genai import scorers

    options = {"guidelines": {"guidelines": "Be kind."}}
    made = {name: getattr(scorers, entry.class_name)(**options.get(name, {})) for name, entry in judges.JUDGES.items()}
    assert {name: scorer.name for name, scorer in made.items()} == {name: name for name in judges.JUDGES}


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [
        (YES, 1.0, "It is."),
        (NO, 0.0, "It is not."),
        ('{"result": "YES", "rationale": ""}', 1.0, "correctness gave yes"),
        (f"```json\n{YES}\n```", 1.0, "It is."),
        (
            '{"result": "maybe", "rationale": "Hm."}',
            None,
            "correctness gave 'unknown', which is neither yes nor no: Hm.",
        ),
        ('{"rationale": "Hm."}', None, "correctness got no judgement: KeyError: 'result'"),
        (
            "The answer is right.",
            None,
            "correctness got no judgement: Failed to parse response from judge model. Response: The answer is right.",
        ),
        ("", None, "correctness got no judgement: Failed to parse response from judge model. Response:"),
        ("[1]", None, "correctness got no judgement: TypeError: list indices must be integers or slices, not str"),
        (400, None, "correctness got no judgement: Failed to invoke judge model: scripted 400"),
        (403, None, "correctness got no judgement: Failed to invoke judge model: scripted 403"),
    ],
)
def test_what_a_judge_says_is_a_score_or_unscored_with_the_reason(server, answer, value, reason):
    server.script = [answer]
    assert judged(server, "correctness") == Score(value, reason)
    assert len(server.asked) == 1


def test_an_answer_that_is_no_chat_completion_leaves_it_unscored(server):
    server.script = ["not HTTP"]
    score = judged(server, "safety")
    assert score.value is None
    assert score.reason.startswith("safety got no judgement: Failed to invoke the judge model: ")


def test_a_rate_limit_is_waited_out(server):
    server.script = [429, YES]
    assert judged(server, "correctness") == Score(1.0, "It is.")
    assert len(server.asked) == 2


def test_of_several_expected_texts_one_that_the_judge_accepts_is_enough(server):
    server.script = [NO, YES]
    assert judged(server, "correctness", prompt=row(expected=("Lutetia", "Paris", "Paname"))).value == 1.0
    assert [text.split("<claim>")[1].split("<")[0] for text in server.texts()] == ["Lutetia", "Paris"]


@pytest.mark.parametrize(("script", "value"), [([NO, NO], 0.0), ([NO, "garbage"], None), (["garbage", NO], None)])
def test_several_expected_texts_are_zero_only_where_the_judge_refused_them_all(server, script, value):
    server.script = list(script)
    assert judged(server, "correctness", prompt=row(expected=("Lutetia", "Paris"))).value == value


def test_a_row_without_an_expected_text_is_unscored_and_nothing_is_asked(server):
    assert judged(server, "correctness", prompt=row(expected=())) == Score(None, "nothing is expected of this row")
    assert server.asked == []


def test_a_judgement_is_paid_for_once(server):
    server.script = [NO]
    first = judged(server, "correctness")
    assert judged(server, "correctness") == first == Score(0.0, "It is not.")
    assert len(server.asked) == 1
    [file] = (cache.root() / "judgements").iterdir()
    [line] = file.read_text(encoding="utf-8").splitlines()
    entry = json.loads(line)
    assert entry.pop("key")
    assert entry == {"judge": "openai:/judge-1", "scorer": "correctness", "value": 0.0, "reason": "It is not."}


@pytest.mark.parametrize(
    "other",
    [
        {"output": "Rome."},
        {"prompt": row(text="And of Italy?")},
        {"prompt": row(expected=("Roma",))},
        {"name": "equivalence"},
        {"resume": False},
    ],
    ids=str,
)
def test_a_judgement_on_anything_else_is_asked_for(server, other):
    judged(server, "correctness")
    judged(server, **({"name": "correctness"} | other))
    assert len(server.asked) == 2


def test_other_guidelines_and_another_judge_are_asked_again(server):
    judged(server, "guidelines", guidelines="Be kind.")
    judged(server, "guidelines", guidelines="Be brief.")
    with scorer_calls.opened(scorer_calls.read("", f"{server.address}#judge-2")) as score_answer:
        score_answer(ScorerCall("guidelines", {"guidelines": "Be brief."}), row(), "It is Paris.")
    assert [body["model"] for body in server.asked] == ["judge-1", "judge-1", "judge-2"]


def test_what_could_not_be_read_is_asked_for_again(server):
    server.script = ["garbage", YES]
    assert judged(server, "correctness").value is None
    assert judged(server, "correctness").value == 1.0


def test_a_judgement_that_was_cut_off_costs_only_itself(server):
    judged(server, "correctness")
    [file] = (cache.root() / "judgements").iterdir()
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + whole[:40], encoding="utf-8")
    judged(server, "safety")
    judged(server, "safety")
    judged(server, "correctness")
    assert len(server.asked) == 2
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3


def test_a_judge_that_fails_three_times_in_a_row_is_not_asked_again(server):
    server.script = [403, 403, "garbage", 403, 403, 403, YES]
    with scorer_calls.opened(scorer_calls.read("", f"{server.address}#judge-1")) as score_answer:
        scores = [score_answer(ScorerCall("safety", {}), row(), f"answer {place}")["safety"] for place in range(8)]
    assert [score.value for score in scores] == [None] * 8
    assert scores[6] == scores[7] == Score(None, "safety was not asked for: the judge failed 3 times in a row")
    assert len(server.asked) == 6


def test_answers_that_are_too_long_for_the_judge_do_not_stop_it(server):
    server.script = ["too long", "too long", "too long", YES]
    with scorer_calls.opened(scorer_calls.read("", f"{server.address}#judge-1")) as score_answer:
        scores = [score_answer(ScorerCall("safety", {}), row(), f"answer {place}")["safety"] for place in range(4)]
    assert [score.value for score in scores] == [None, None, None, 1.0]
    assert scores[0].reason.startswith("safety got no judgement: Context window exceeded")


@pytest.mark.parametrize(("key", "sent"), [(None, "Bearer none"), ("sk-1", "Bearer sk-1")])
def test_the_environment_is_left_as_it_was_and_the_key_goes_along(server, monkeypatch, key, sent):
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    before = dict(os.environ)
    server.script = [YES, "garbage"]
    judged(server, "correctness")
    judged(server, "safety")
    assert dict(os.environ) == before
    assert server.keys == [sent, sent]


def test_an_openai_uri_goes_where_the_environment_says(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    monkeypatch.setenv("OPENAI_BASE_URL", server.address)
    with scorer_calls.opened(scorer_calls.read("safety", "openai:/gpt-4o-mini")) as score_answer:
        assert score_answer(ScorerCall("safety", {}), row(), "x") == {"safety": Score(1.0, "It is.")}
    assert (server.asked[0]["model"], server.keys) == ("gpt-4o-mini", ["Bearer sk-2"])


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is one line, before a model is loaded


@pytest.mark.parametrize(
    ("judge", "line"),
    [
        ("gpt-4o-mini", f"judge: 'gpt-4o-mini' names no model; write {judges.EXAMPLES}"),
        ("openai:/", f"judge: 'openai:/' names no model; write {judges.EXAMPLES}"),
        ("openai:/gpt-4o-mini", "judge: openai:/gpt-4o-mini needs a key; set OPENAI_API_KEY"),
        ("nobody:/x", "judge: nobody:/x: No suitable adapter found for model_uri='nobody:/x'."),
        ("endpoints:/x", "judge: endpoints:/x: No deployments target has been set."),
        (
            "http://127.0.0.1:8000/v1",
            "judge: 'http://127.0.0.1:8000/v1' is not an address and a model's name; write http://host:8000/v1#model",
        ),
        ("http://host:port/v1#m", "judge: 'http://host:port/v1#m' is not an address and a model's name;"),
        ("http:///v1#m", "judge: 'http:///v1#m' is not an address and a model's name;"),
        (
            "https://user:secret@host/v1#m",
            "judge: parameters are logged, so no key belongs in the address; set OPENAI_API_KEY",
        ),
    ],
)
def test_a_judge_that_means_nothing_is_one_line(server, judge, line):
    with pytest.raises(BadInput) as raised:
        scorer_calls.read("", judge)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("models:/nobody/1", "models:/nobody/1: there is no such model: "),
        ("models:/nobody@champion", "models:/nobody@champion: there is no such model: "),
    ],
)
def test_a_logged_judge_that_is_not_there_is_one_line(tracking, server, uri, line):
    with pytest.raises(BadInput) as raised:
        scorer_calls.read("", uri)
    assert str(raised.value).startswith(line)


def test_a_strangers_logged_model_cannot_judge(tracking, server, tmp_path):
    import mlflow

    (tmp_path / "echo.py").write_text(echo_models.HEAD + echo_models.CHAT_MODEL, encoding="utf-8")
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(name="m", python_model=str(tmp_path / "echo.py"), pip_requirements=[])
    with pytest.raises(BadInput, match="is not a chat model that this project logged"):
        scorer_calls.read("", info.model_uri)


def test_an_address_that_does_not_answer_is_known_before_a_model_is_loaded(server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(Unavailable) as raised:
        scorer_calls.read("", f"http://127.0.0.1:{port}/v1#m")
    assert str(raised.value) == f"judge: http://127.0.0.1:{port}/v1 doesn't answer (ConnectionError)"


def test_a_refused_key_is_known_before_a_model_is_loaded(server):
    server.models_status = 401
    with pytest.raises(BadInput) as raised:
        scorer_calls.read("", f"{server.address}#m")
    assert str(raised.value) == f"judge: {server.address} refuses the key (401); set OPENAI_API_KEY"


def prompt_set(tmp_path, *rows: dict) -> PromptSet:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Hi?"} | row) + "\n" for row in rows), encoding="utf-8")
    return read_prompt_set(path, "set.jsonl", scorer_calls.IN_ROWS)


@pytest.mark.parametrize(
    ("scorers", "line"),
    [
        ("safety", "prompts: row a: scorer safety needs a judge; give evaluate one, as judge=openai:/gpt-4o-mini"),
        ({"safety": {"x": 1}}, "prompts: row a: scorer safety has no option 'x'; it has none"),
        ("correctness", "prompts: row a: scorer correctness needs `expected`"),
        ("equivalence", "prompts: row a: scorer equivalence needs `expected`"),
        (
            {"guidelines": {"guideline": "x"}},
            "prompts: row a: scorer guidelines has no option 'guideline' (did you mean 'guidelines'?); it has guid",
        ),
        (
            "guidelines",
            "prompts: row a: the guidelines of scorer guidelines are missing; "
            "a row gives them as {guidelines: {guidelines: …}}",
        ),
        ({"guidelines": {"guidelines": []}}, "prompts: row a: the guidelines of scorer guidelines are []; "),
        (
            {"guidelines": {"guidelines": ["x", 3]}},
            "prompts: row a: the guidelines of scorer guidelines are ['x', 3]; ",
        ),
    ],
)
def test_a_row_that_asks_for_a_judge_in_a_wrong_way_is_one_line(server, tmp_path, scorers, line):
    judge = "" if "needs a judge" in line else f"{server.address}#judge-1"
    with pytest.raises(BadInput) as raised:
        scorer_calls.add(scorer_calls.read("", judge), prompt_set(tmp_path, {"id": "a", "scorers": scorers}))
    assert str(raised.value).startswith(line)


@pytest.mark.parametrize(
    ("scorers", "judge", "line"),
    [
        ("safety", False, "scorers: safety can score no row of set: scorer safety needs a judge;"),
        ("correctness", True, "scorers: correctness can score no row of set: scorer correctness needs `expected`"),
        ("guidelines", True, "scorers: guidelines can score no row of set: the guidelines of scorer guidelines are"),
    ],
)
def test_a_judge_for_every_row_that_can_judge_none_is_one_line(server, tmp_path, scorers, judge, line):
    asked = scorer_calls.read(scorers, f"{server.address}#judge-1" if judge else "")
    with pytest.raises(BadInput) as raised:
        scorer_calls.add(asked, prompt_set(tmp_path, {"id": "a", "expected": [] if judge else "x", "scorers": []}))
    assert str(raised.value).startswith(line)


def test_another_judge_changes_the_hash_of_what_was_asked(server):
    one, two = (scorer_calls.read("safety", f"{server.address}#{name}") for name in ("judge-1", "judge-2"))
    assert len({one.sha256, two.sha256, scorer_calls.read("contains").sha256}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# A model that was logged here judges


@pytest.mark.slow
def test_a_logged_model_judges_on_loopback_and_what_it_cannot_say_is_unscored(int4_export, tracking, server):
    import mlflow

    from slm.models import model_logging

    with mlflow.start_run():
        model_logging.log_onnx(int4_export, "chat", GENERATION, "int4", registered_model_name="judge")
    asked = scorer_calls.read("safety,correctness,fluency", "models:/judge/1")
    with scorer_calls.opened(asked) as score_answer:
        assert [t.name for t in threading.enumerate() if t.name == "judge"] == []  # loaded when it is needed
        scores = {call.name: score_answer(call, row(), "It is Paris.")[call.name] for call in asked.added}
        assert [t.name for t in threading.enumerate() if t.name == "judge"] == ["judge"]
        long = score_answer(ScorerCall("safety", {}), row(), "word " * 10_000)["safety"]
    for name, score in [*scores.items(), ("safety", long)]:
        assert score.reason, name
    assert {score.value for score in scores.values()} <= {0.0, 1.0}  # a grammar makes the JSON asked for
    assert long.value is None
    assert long.reason.startswith("safety got no judgement: Context window exceeded")
    assert not {"OPENAI_API_KEY", "OPENAI_API_BASE", "no_proxy"} & os.environ.keys()
    assert {thread.name for thread in threading.enumerate()} & {"judge", "generation"} == set()


@pytest.mark.slow
def test_a_logged_model_with_the_prompt_schema_cannot_judge(int4_export, tracking, server):
    import mlflow

    from slm.models import model_logging

    with mlflow.start_run():
        info = model_logging.log_onnx(int4_export, "prompt", GENERATION, "int4")
    with pytest.raises(BadInput, match="is not a chat model that this project logged"):
        scorer_calls.read("", info.model_uri)


# ---------------------------------------------------------------------------------------------------------------------
# Through the real command line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--scorers=safety",), "error: scorers: safety can score no row of smoke: scorer safety needs a judge; "),
        (("--judge=gpt-4o-mini",), "error: judge: 'gpt-4o-mini' names no model; write openai:/gpt-4o-mini, "),
        (("--scorers=nowhere.py:polite",), "error: scorers: 'nowhere.py' does not exist, from the repository's root"),
    ],
)
@pytest.mark.slow
def test_a_wrong_scorer_or_judge_ends_the_command_with_one_line(server, tmp_path, options, line):
    done = entry_point("evaluate", *options, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db", COLUMNS="300")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line)
    assert done.err.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_users_scorers_and_judges_score_a_run_and_the_next_one_pays_for_no_judgement(
    int4_export, tracking, server, tmp_path
):
    from slm.models import model_logging

    with tracking.start_run():
        uri = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4").model_uri
    (tmp_path / "mine.py").write_text(
        """
from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer
@scorer
def short(outputs): return len(outputs) < 1000
def both(outputs, expectations):
    if not expectations:
        return None
    return [Feedback(name="given", value=True), Feedback(name="wrong", value=2.0)]
""",
        encoding="utf-8",
    )
    rows = [
        {"id": "a", "prompt": "Say hello.", "expected": "hello", "scorers": ["correctness"]},
        {"id": "b", "prompt": "Say anything.", "scorers": [{"guidelines": {"guidelines": "Be kind."}}]},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "gate.yaml").write_text("short/mean: {min: 0.01}\n", encoding="utf-8")
    options = [f"--model_uris={uri}", f"--prompts={tmp_path}/set.jsonl", f"--thresholds={tmp_path}/gate.yaml"]
    options += ["--trust_code=true"]
    options += [f"--scorers={tmp_path}/mine.py:short,{tmp_path}/mine.py:both,contains,safety", "--max_tokens=8"]
    options += [f"--judge={server.address}#judge-1"]

    (tmp_path / "scratch").mkdir()
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TMPDIR": str(tmp_path / "scratch")}
    server.script = [NO, YES, "garbage", NO]  # correctness and safety of a, guidelines and safety of b
    done = entry_point("evaluate", *options, **environment)
    assert done.code == 0, done.err
    [child] = tracking.search_runs(filter_string="tags.`model.uri` != ''", output_format="list")
    text = tracking.artifacts.load_text(f"{child.info.artifact_uri}/evaluation/samples.jsonl")
    first, second = (json.loads(line) for line in text.splitlines())
    greeted = float("hello" in first["output"].lower())
    assert first["scores"] == {
        "correctness": 0.0,
        "short": 1.0,
        "both/given": 1.0,
        "both/wrong": None,
        "contains": greeted,
        "safety": 1.0,
    }
    assert first["reasons"]["correctness"] == "It is not."
    assert first["reasons"]["both/wrong"] == "both/wrong gave 2.0, which is not a number from 0 to 1"
    assert second["scores"] == {"guidelines": None, "short": 1.0, "both": None, "contains": None, "safety": 0.0}
    assert second["reasons"]["guidelines"].startswith("guidelines got no judgement: Failed to parse response")
    assert second["reasons"]["contains"] == "nothing is expected of this row"
    metrics = child.data.metrics
    assert (metrics["safety/mean"], metrics["correctness/mean"], metrics["both/given/mean"]) == (0.5, 0.0, 1.0)
    assert "guidelines/mean" not in metrics
    assert "both/wrong/mean" not in metrics
    assert child.data.tags["gate"] == "pass"

    server.asked.clear()
    again = entry_point("evaluate", *options, **environment)
    assert again.code == 0, again.err
    [text] = server.texts()  # what could not be read the first time, and nothing else
    assert "<guideline>Be kind.</guideline>" in text
    runs = tracking.search_runs(filter_string="tags.`model.uri` != ''", output_format="list")
    assert runs[0].data.tags["fingerprint"] == runs[1].data.tags["fingerprint"]


def test_a_logged_judge_gets_mlflows_schema_with_an_end(server):
    """MLflow asks for a schema without one: a small model writes a rationale until it is cut."""
    import jsonschema

    judged(server, "correctness")
    [body] = server.asked
    asked = body["response_format"]
    strict = judges.strict_format({"response_format": asked})["response_format"]
    assert strict | {"json_schema": 0} == asked | {"json_schema": 0}
    properties = strict["json_schema"]["schema"]["properties"]
    assert properties["result"]["enum"] == ["yes", "no"]
    assert properties["rationale"]["maxLength"] == judges.LONGEST_TEXT
    assert judges.strict_format({"response_format": strict})["response_format"] == strict
    jsonschema.validate({"result": "yes", "rationale": "So."}, strict["json_schema"]["schema"])
    for row in ({}, {"response_format": None}, {"response_format": {"type": "json_object"}}):
        assert judges.strict_format(row) == {}
