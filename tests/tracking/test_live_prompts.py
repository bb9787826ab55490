"""Prompt sets of traces and of MLflow's datasets, read from a real server, and frozen for the run."""

import json
import os
import re
import time
from itertools import product

import mlflow
import pytest
from mlflow.entities import AssessmentSource, SpanType
from support.commands import entry_point, free_port
from support.openai_servers import here
from support.questions import GENERATION

from slm.base import parameters
from slm.base.errors import BadInput, Unavailable
from slm.engines import local
from slm.tracking import frozen_prompts, live_prompts

PERSON = AssessmentSource("HUMAN", "ada")


def talk(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def trace(experiment: str, inputs: object, session: str = "", fails: bool = False, **tags: str) -> str:
    """A trace as `serve` writes one of a request; gives its id."""
    destination = mlflow.entities.trace_location.MlflowExperimentLocation(experiment)
    with mlflow.start_span("chat", SpanType.CHAT_MODEL, trace_destination=destination) as span:
        span.set_inputs(inputs)
        span.set_outputs({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}}]})
        mlflow.update_current_trace(tags=tags, metadata={"mlflow.trace.session": session} if session else {})
        if fails:
            span.set_status("ERROR")
    return span.trace_id


@pytest.fixture(scope="module")
def traffic(tracking_server):
    """An experiment with the traces of a week, and the server's URI."""
    mlflow.set_tracking_uri(tracking_server)
    made = mlflow.create_experiment("traffic")
    trace(made, {"messages": talk("Hi")}, session="s1")
    liked = trace(made, {"messages": talk("Hi", "Hello", "What is the capital of France?")}, session="s1")
    trace(made, {"messages": talk("Name a river")})
    again = trace(made, {"messages": talk("Name a river"), "temperature": 1})
    trace(made, {"messages": talk("Name a river", "The Rhine", "Another one")})
    trace(made, {"messages": talk("Hi there")}, fails=True)
    trace(made, {"question": "Hi"})
    trace(made, {"messages": talk("Hi"), "tools": [{"type": "function"}]})
    trace(made, {"messages": talk("Of a prompt set")}, **{"mlflow.eval.requestId": "a#0"})
    mlflow.flush_trace_async_logging()
    mlflow.log_expectation(trace_id=liked, name="expected_response", value="Paris")
    mlflow.log_feedback(trace_id=liked, name="liked", value=True, source=PERSON)
    mlflow.log_feedback(trace_id=liked, name="length", value=3, source=AssessmentSource("CODE", "length"))
    mlflow.log_expectation(trace_id=again, name="expected", value=["Rhine", "Danube"])
    mlflow.set_tracking_uri(None)
    return tracking_server, made


@pytest.fixture(autouse=True)
def _on_the_server(traffic):
    mlflow.set_tracking_uri(traffic[0])
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def read():
    """Reads a prompt set as an entry point does; gives it."""

    def read(prompts: str, **options):
        words = [f"--{name}={value}" for name, value in options.items()]
        return local.read_prompts(parameters.parse("evaluate", "", [f"--prompts={prompts}", "--resume=false", *words]))

    return read


def test_traces_become_rows_once_each_and_clusters_by_conversation(read, capsys):
    found = read("traces:traffic?days=1")
    rows = {prompt.messages[-1]["content"]: prompt for prompt in found.prompts}
    assert rows.keys() == {"Hi", "What is the capital of France?", "Name a river", "Another one"}
    assert rows["Hi"].cluster == rows["What is the capital of France?"].cluster == "session s1"
    assert rows["Name a river"].cluster == rows["Another one"].cluster != "session s1"
    assert rows["What is the capital of France?"].expected == ("Paris",)
    assert rows["What is the capital of France?"].tags == ("liked: true",)
    assert rows["Name a river"].expected == ("Danube", "Rhine")
    assert [call.name for call in rows["Name a river"].scorers] == ["contains"] and not rows["Hi"].scorers
    assert re.fullmatch(r"chat-[0-9a-f]{12}", rows["Hi"].id) and found.name == "traces-traffic"
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "traces-traffic: 4 rows of 9 traces in traffic; left out: 1 failed, 1 of evaluations, 1 without a chat, "
        "1 with tools, 1 with the messages of another"
    )


@pytest.fixture
def rows_of(tmp_path):
    """The rows that an address gives, and what is said of them, read in this process."""

    def rows_of(address: str) -> tuple[list[dict], str]:
        folder = tmp_path / str(time.monotonic_ns())
        folder.mkdir()
        path, told = live_prompts.written(address, folder)
        return [json.loads(line) for line in path.read_text().splitlines()], told

    return rows_of


def test_a_sample_is_drawn_with_the_seed(rows_of, traffic):
    every = [rows_of(f"traces:traffic?seed={seed}")[0] for seed in range(6)]
    for seed, limit in product(range(6), (1, 2, 3)):
        found, told = rows_of(f"traces:traffic?limit={limit}&seed={seed}")
        assert found == every[seed][:limit]  # with what people said in traces that were not drawn
        assert re.search(r"left out: .*\d not drawn$", told)
    assert len({json.dumps(rows) for rows in every}) > 1
    assert rows_of(f"traces:{traffic[1]}")[0] == every[0]  # by the experiment's id


def test_days_and_mlflows_filter_choose_traces(rows_of):
    found, _ = rows_of("traces:traffic?days=1&filter=metadata.`mlflow.trace.session` = 's1'")
    assert [row["cluster"] for row in found] == ["session s1"] * 2
    with pytest.raises(BadInput, match="there is no row: 0 rows of 0 traces in traffic"):
        rows_of("traces:traffic?days=0.000001")


def test_what_several_people_expect_of_one_trace_counts_and_a_judges_feedback_does_not(rows_of, monkeypatch):
    experiment = mlflow.create_experiment("judged")
    for number in range(4):
        made = trace(experiment, {"messages": talk(f"Question {number}")})
        mlflow.flush_trace_async_logging()
        for name in ("ada", "ben"):
            value = f"Paris, says {name}"
            mlflow.log_expectation(
                trace_id=made, name="expected_response", value=value, source=AssessmentSource("HUMAN", name)
            )
            if number:
                break
        judge = AssessmentSource("LLM_JUDGE", "a judge")
        mlflow.log_feedback(trace_id=made, name="good", value=True, source=judge)
        if number == 3:
            mlflow.delete_assessment(made, mlflow.get_trace(made).info.assessments[0].assessment_id)
    found, _ = rows_of("traces:judged")
    by_text = {row["messages"][0]["content"]: row for row in found}
    assert by_text["Question 0"]["expected"] == ["Paris, says ada", "Paris, says ben"]
    assert "tags" not in by_text["Question 1"] and "expected" not in by_text["Question 3"]
    read = []
    inputs = live_prompts._inputs
    monkeypatch.setattr(live_prompts, "_inputs", lambda client, id: read.append(id) or inputs(client, id))
    monkeypatch.setattr(live_prompts, "TOGETHER", 1)
    for seed in range(20):
        del read[:]
        if rows_of(f"traces:judged?limit=1&seed={seed}")[0][0]["messages"][0]["content"] == "Question 3":
            break
    assert len(read) == 5  # the drawn one, the next one, and the three of which a person has said something


@pytest.mark.fault("prompt sets: a trace is deleted while traces are read")
def test_a_trace_that_is_deleted_meanwhile_is_left_out(rows_of, monkeypatch):
    experiment = mlflow.create_experiment("cleaned")
    gone, _ = (trace(experiment, {"messages": talk(text)}) for text in ("Old", "New"))
    mlflow.flush_trace_async_logging()
    described = live_prompts._described

    def and_then_deleted(client, asked):
        yield from described(client, asked)
        client.delete_traces(experiment, trace_ids=[gone])

    monkeypatch.setattr(live_prompts, "_described", and_then_deleted)
    rows, told = rows_of("traces:cleaned")
    assert [row["messages"] for row in rows] == [talk("New")]
    assert told == "1 row of 2 traces in cleaned; left out: 1 with spans that can't be read"


@pytest.mark.fault("prompt sets: the tracking server is away while traces are read")
def test_a_server_that_is_away_is_told_in_one_line(read):
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match=r"^traces:traffic can't be downloaded: API request to [^\n]+$"):
        read("traces:traffic")


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("traces:", "prompts: 'traces:' names no experiment; write traces:NAME?days=7"),
        ("traces:a?dys=7", "prompts: traces have no option 'dys' (did you mean 'days'?); "
         "there are days, limit, seed, filter"),
        ("traces:a?days=x", "prompts: days=x of the traces is no number; write one such as 7"),
        ("traces:a?days=0", "prompts: traces take days above 0 and a limit from 1 to 100,000; not 'days=0'"),
        ("traces:a?limit=0", "prompts: traces take days above 0 and a limit from 1 to 100,000; not 'limit=0'"),
        ("traces:a?days=7&days=1", "prompts: days of the traces is given twice"),
        ("traces:trafic", "traces:trafic can't be downloaded: there is no experiment 'trafic' "
         "(did you mean 'traffic'?); name one, or its id"),
        ("traces:traffic?filter=nonsense", "traces:traffic?filter=nonsense can't be downloaded: "
         "INVALID_PARAMETER_VALUE: Invalid clause(s) in filter string: 'nonsense'"),
        ("datasets:none", "datasets:none can't be downloaded: there is no dataset 'none'; "
         "name one of mlflow.genai.datasets, or its id"),
    ],
)  # fmt: skip
def test_an_address_without_rows_is_one_line(read, address, line):
    with pytest.raises(BadInput) as error:
        read(address)
    assert str(error.value) == line


def test_texts_are_no_traces():
    from slm.engines import texts

    with pytest.raises(BadInput, match="texts: 'traces:traffic' is a prompt set, which `prompts` takes; name a file"):
        texts.read("traces:traffic")


def test_requests_that_mlflow_traces_by_itself_are_read(rows_of, traffic, int4_export, monkeypatch):
    """The traces of mlflow.openai.autolog, of requests to a server of this project."""
    from slm.models import model_logging
    from slm.serving import versions

    experiment = mlflow.create_experiment("clients")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with mlflow.start_run(experiment_id=experiment):
        uri = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4").model_uri
    mlflow.openai.autolog()
    try:
        with here(versions.load(uri).wrapper) as (_, client):
            client.chat.completions.create(model="smollm2-135m-instruct", messages=talk("Say hi"), max_tokens=2)
            client.responses.create(model="smollm2-135m-instruct", input="Say yes", max_output_tokens=2)
        mlflow.flush_trace_async_logging()
    finally:
        mlflow.openai.autolog(disable=True)
    found = [row["messages"] for row in rows_of("traces:clients")[0]]
    assert sorted(found, key=str) == [talk("Say hi"), talk("Say yes")]


def test_fields_maps_a_dataset_of_another_shape(read, traffic):
    from mlflow.genai import datasets

    made = datasets.create_dataset(name="gold", experiment_id=traffic[1])
    made.merge_records(
        [
            {"inputs": {"question": "2+2?"}, "expectations": {"expected_response": "4"}},
            {"inputs": {"question": "3+3?"}, "expectations": {"expected_response": "6"}},
        ]
    )
    with pytest.raises(BadInput, match=r"^gold.jsonl line \d `inputs`: unknown field 'question'"):
        read("datasets:gold")
    found = read("datasets:gold", fields="inputs.question:prompt,expectations.expected_response:expected")
    assert {(prompt.prompt, prompt.expected) for prompt in found.prompts} == {("2+2?", ("4",)), ("3+3?", ("6",))}


def test_a_dataset_of_traces_has_their_sessions_and_answers(rows_of, traffic):
    from mlflow.genai import datasets

    made = datasets.create_dataset(name="talks", experiment_id=traffic[1])
    made.merge_records(
        mlflow.search_traces(locations=[traffic[1]], filter_string="metadata.`mlflow.trace.session` = 's1'")
    )
    made.merge_records([{"inputs": {"messages": talk("2+2?")}, "expectations": {"expected": "4"}, "tags": {"a": "b"}}])
    found, told = rows_of("datasets:talks")
    assert told == f"3 rows of the dataset talks, {made.dataset_id}"
    assert found == rows_of(f"datasets:{made.dataset_id}")[0]
    assert sorted(row["cluster"].partition(" ")[0] for row in found) == ["begins", "session", "session"]
    [of_a_sum] = [row for row in found if row.get("expected") == ["4"]]
    assert of_a_sum["tags"] == ["a: b"] and of_a_sum["id"].startswith("dr-")
    assert sorted(row.get("expected", []) for row in found) == [[], ["4"], ["Paris"]]


# ---------------------------------------------------------------------------------------------------------------------
# Frozen for the run


def test_a_start_after_one_that_did_not_end_takes_the_same_rows(monkeypatch, capsys):
    experiment = mlflow.create_experiment("growing")
    trace(experiment, {"messages": talk("One")})
    mlflow.flush_trace_async_logging()

    def rows(*options: str) -> int:
        args = parameters.parse("evaluate", "", ["--prompts=traces:growing", *options])
        return len(local.read_prompts(args).prompts)

    assert rows() == 1
    trace(experiment, {"messages": talk("Two")})
    mlflow.flush_trace_async_logging()
    capsys.readouterr()
    assert rows() == 1
    assert re.match(
        r"traces-growing: the rows of the start at \d{4}-\d\d-\d\d \d\d:\d\d UTC, which did not end; "
        r"resume=false reads new ones\n",
        capsys.readouterr().out,
    )
    assert rows("--resume=false") == 2
    args = parameters.parse("evaluate", "", ["--prompts=traces:growing"])
    frozen_prompts.forget(args)
    assert rows() == 2
    with monkeypatch.context() as patch:  # another start, which takes the rows of this one and goes on after its end
        patch.setattr(os, "getpid", lambda: 1)
        theirs = frozen_prompts.file(args)
    frozen_prompts.forget(args)
    assert theirs.read_text().count("\n") == 2 and theirs.stem == "traces-growing"
    assert rows() == 2
    monkeypatch.setattr(frozen_prompts, "FRESH", -1)
    capsys.readouterr()
    assert frozen_prompts.file(args).read_text().count("\n") == 2 and "did not end" not in capsys.readouterr().out


GATE = "fidelity/kl/mean: {max: 5}\nrows_failed: {max: 0}\nrows_unscored: {max: 0}\n"


@pytest.mark.slow
def test_traffic_without_expected_answers_is_gated_by_fidelity(traffic, int4_export, int8_export, tmp_path, read):
    from slm.models import model_logging

    experiment = mlflow.create_experiment("asked")
    for river in ("Rhine", "Danube", "Volga", "Thames", "Seine", "Ebro"):
        trace(experiment, {"messages": talk(f"Where does the {river} end?")})
    mlflow.flush_trace_async_logging()
    with mlflow.start_run(experiment_id=mlflow.create_experiment("models")):
        ours, theirs = (
            model_logging.log_onnx(export, "chat", GENERATION, "int4").model_uri
            for export in (int4_export, int8_export)
        )
    (tmp_path / "gate.yaml").write_text(GATE)
    words = ["--prompts=traces:asked?days=1", f"--model_uris={ours}", f"--baseline={theirs}", "--max_tokens=8"]
    settings = {"MLFLOW_TRACKING_URI": traffic[0], "MLFLOW_EXPERIMENT_NAME": "gated"}
    done = entry_point("evaluate", *words, f"--thresholds={tmp_path / 'gate.yaml'}", **settings)
    assert done.code == 0, done.out + done.err
    assert "6 prompts can find no difference in scores, because no row has a scorer; fidelity compares" in done.out
    assert "6 prompts of 6 have no scorer, and are part of no score" in done.out
    assert "token by token: KL " in done.out.replace("\n", " ")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("gated").experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    [child] = [run for run in runs if run.info.run_name == ours]
    assert parent.data.tags["gate"] == "pass" and child.data.metrics["fidelity/tokens"] > 0
    assert parent.data.metrics["fidelity/kl/mean"] == child.data.metrics["fidelity/kl/mean"] > 0
    assert "score/mean" not in child.data.metrics and child.data.metrics["rows_unscored"] == 0
    # frozen: the run has its rows, and the command that repeats it reads these
    address = f"runs:/{parent.info.run_id}/evaluation/prompts.jsonl"
    again = mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/evaluation/environment.json")["again"]
    assert f"-P prompts={address} " in again
    trace(experiment, {"messages": talk("And the Po?")})
    mlflow.flush_trace_async_logging()
    assert read(address).sha256 == parent.data.tags["prompts.sha256"] != read("traces:asked").sha256
    refused = entry_point("evaluate", *words, "--thresholds=gates/default.yaml", **settings)
    assert refused.code == 2 and refused.err == (
        "error: thresholds: score/mean needs scores, and no row of traces-asked has a scorer; give fidelity rules, "
        "as in gates/traffic.yaml, or name scorers\n"
    )
