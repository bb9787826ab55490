"""System prompts from MLflow's prompt registry and from files, on a real server."""

import json

import mlflow
import pytest
from support.commands import entry_point
from support.questions import GENERATION

from slm.base.errors import BadInput
from slm.tracking import system_text


@pytest.fixture(scope="module")
def registry(tracking_server):
    """Versions 1 and 2 of `house`, with the alias `live` at 2; and prompts that can't be a system message."""
    mlflow.set_tracking_uri(tracking_server)
    mlflow.genai.register_prompt("house", "Answer with one word.")
    mlflow.genai.register_prompt("house", "Answer with one sentence.")
    mlflow.genai.set_prompt_alias("house", "live", 2)
    mlflow.genai.register_prompt("open", "You are {{who}}, in {{place}}.")
    mlflow.genai.register_prompt("chat", [{"role": "user", "content": "Hi"}])
    mlflow.set_tracking_uri(None)
    return tracking_server


@pytest.fixture(autouse=True)
def _on_the_server(registry):
    mlflow.set_tracking_uri(registry)
    yield
    mlflow.set_tracking_uri(None)


def test_an_alias_is_the_version_that_it_names(tmp_path):
    found = system_text.read("prompts:/house@live")
    assert (found.text, found.source) == ("Answer with one sentence.", "prompts:/house/2")
    assert system_text.read("prompts:/house/1").text == "Answer with one word."
    (tmp_path / "system.txt").write_text("\nAnswer with {one} word.\n")
    assert system_text.read(f"{tmp_path}/system.txt").text == "Answer with {one} word."
    assert system_text.read("") is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("prompts:/open/1", "prompts:/open/1 has 'place, who' to fill in; register the finished text"),
        ("prompts:/chat/1", "prompts:/chat/1 is a chat prompt of several messages; name a text prompt"),
        ("prompts:/house/9", "prompts:/house/9 can't be read: "),
        ("prompts:/house@none", "prompts:/house@none can't be read: "),
        ("prompts:/none/1", "prompts:/none/1 can't be read: "),
        ("prompts:/house", "prompts:/house can't be read: Invalid prompt URI format: prompts:/house; write "
         "prompts:/NAME/3 or prompts:/NAME@ALIAS"),
        ("none.txt", "'none.txt' does not exist"),
    ],
)  # fmt: skip
def test_what_is_no_system_message_is_one_line(given, line):
    with pytest.raises(BadInput) as error:
        system_text.read(given)
    assert str(error.value).startswith(f"system_prompt: {line}") and "\n" not in str(error.value)


def test_a_file_without_a_text_or_too_long_is_one_line(tmp_path):
    for text, line in ((" \n", "has no text"), ("a\0b", "has no text"), ("a" * 100_001, "has 100,001 characters")):
        (tmp_path / "system.txt").write_text(text)
        with pytest.raises(BadInput, match=line):
            system_text.read(f"{tmp_path}/system.txt")


@pytest.mark.slow
def test_a_run_records_the_version_and_its_text_and_is_another_run_for_it(registry, int4_export, tmp_path):
    from slm.models import model_logging

    with mlflow.start_run(experiment_id=mlflow.create_experiment("with a system prompt")):
        uri = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4").model_uri
    rows = [{"id": "a", "prompt": "Name a river."}, {"id": "b", "prompt": "Name a city."}]
    (tmp_path / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [f"--prompts={tmp_path / 'set.jsonl'}", f"--model_uris={uri}", "--max_tokens=4", "--traces=false"]
    settings = {"MLFLOW_TRACKING_URI": registry, "MLFLOW_EXPERIMENT_NAME": "with a system prompt"}
    found = []
    for system in ("prompts:/house@live", "prompts:/house/1", "prompts:/house/2"):
        done = entry_point("evaluate", *words, f"--system_prompt={system}", **settings)
        assert done.code == 0, done.out + done.err
        experiment = mlflow.get_experiment_by_name("with a system prompt").experiment_id
        children = mlflow.MlflowClient().search_runs([experiment], "tags.`model.uri` != ''")
        found.append((mlflow.get_run(children[0].data.tags["mlflow.parentRunId"]), children[0]))
    (parent, child), (other, _), (same, _) = found
    assert parent.data.params["system_prompt"] == "prompts:/house@live"
    for run in (parent, child):
        assert run.data.tags["system_prompt"] == "prompts:/house/2"
        assert run.data.tags["system_prompt.sha256"] == system_text.read("prompts:/house/2").sha256
    assert parent.data.tags["fingerprint"] == same.data.tags["fingerprint"] != other.data.tags["fingerprint"]
    record = mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/evaluation/environment.json")
    assert "-P system_prompt=prompts:/house/2 " in f"{record['again']} "
    samples = mlflow.artifacts.load_text(f"runs:/{child.info.run_id}/evaluation/samples.jsonl").splitlines()
    assert [json.loads(line)["messages"][0]["content"] for line in samples] == ["Answer with one sentence."] * 2
    assert json.loads(parent.data.tags["mlflow.linkedPrompts"]) == [{"name": "house", "version": "2"}]
