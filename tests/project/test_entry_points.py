"""The main job as its users start it: `mlflow run GIT-URL -v COMMIT`, a tracking server over HTTP, another folder."""

import json
import re
import shlex
import signal
import time

import pytest
from support.commands import entry_point, in_process, mlflow_command, started
from support.project_runs import check_child, few_prompts, parent_and_children, run_from_git
from support.questions import GENERATION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def int4_on_server(tracking_server, int4_export):
    """The URI of the int4 model, logged on the tracking server."""
    import mlflow

    from slm.models import model_logging

    mlflow.set_tracking_uri(tracking_server)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("int4")):
        uri = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4").model_uri
    mlflow.set_tracking_uri(None)
    return uri


@pytest.fixture
def server(tracking_server):
    """A client of the tracking server."""
    import mlflow

    mlflow.set_tracking_uri(tracking_server)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def test_pipeline_from_a_git_url(git_server, tracking_server, server, tmp_path):
    import mlflow

    prompts = f"prompts={few_prompts(tmp_path)}"
    done, experiment = run_from_git(
        git_server, tracking_server, tmp_path, "pipeline", "registered_model_name=from-git", "max_tokens=16", prompts
    )
    assert done.code == 0, done.err
    assert "score, over all (8)" in done.out
    parent, children = parent_and_children(server, experiment)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.source.git.commit"] == git_server.commit
    assert parent.data.params["model"] == "smollm2-135m-instruct" and "cfg.model" not in parent.data.params
    assert parent.data.params["save_weights"] == "true" and "cfg.save_weights" not in parent.data.params
    assert parent.data.params.get("cfg.stop", parent.data.params["stop"]) == ""
    logged, _ = check_child(server, children["pipeline"], prompts=8)
    assert (logged.name, logged.source_run_id) == ("smollm2-135m-instruct-pipeline", parent.info.run_id)
    assert logged.status == "READY"
    version = server.get_model_version("from-git", "1")
    assert version.source == logged.model_uri
    told = "smollm2-135m-instruct, as a transformers pipeline. From embedded:smollm2-135m-instruct at "
    assert version.description == logged.tags["mlflow.note.content"] == f"{told}{version.tags['revision'][:12]}."
    assert {"source", "revision", "model.sha256", "prompts.sha256", "score", "gate"} <= version.tags.keys()
    answer = mlflow.pyfunc.load_model("models:/from-git/1").predict(
        {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    )
    assert "Paris" in answer[0]["choices"][0]["message"]["content"]


def test_onnx_from_a_git_url(git_server, tracking_server, server, tmp_path):
    done, experiment = run_from_git(
        git_server, tracking_server, tmp_path, "onnx", 'stop=it\'s a "$(test)"', "max_tokens=16"
    )
    assert done.code == 0, done.err
    parent, children = parent_and_children(server, experiment)
    assert parent.data.params["cfg.stop"] == 'it\'s a "$(test)"'
    logged, samples = check_child(server, children["onnx int4"])
    assert (logged.name, logged.source_run_id) == ("smollm2-135m-instruct-onnx-int4", parent.info.run_id)
    assert {sample["finish_reason"] for sample in samples} <= {"stop", "length"}
    assert all(sample["output_tokens"] > 0 for sample in samples)


@pytest.fixture(scope="module")
def evaluated(git_server, tracking_server, tmp_path_factory):
    """`mlflow run GIT-URL -e evaluate`: what was printed, and the name of its experiment."""
    folder = tmp_path_factory.mktemp("evaluated")
    parameters = (f"prompts={few_prompts(folder)}", "max_tokens=16", 'stop=it\'s "two words"', "resume=false")
    done, experiment = run_from_git(git_server, tracking_server, folder, "evaluate", *parameters)
    assert done.code == 0, done.err
    return done.out, experiment


def test_evaluate_from_a_git_url_scores_both_wrappers_side_by_side(evaluated, tracking_server, server, tmp_path):
    printed, experiment = evaluated
    assert "onnx int4" in printed and "pipeline" in printed and "output tokens per second" in printed
    assert "\x1b" not in printed  # the bar is for a terminal
    parent, children = parent_and_children(server, experiment)
    assert set(children) == {"onnx int4", "pipeline"}
    assert not parent.outputs.model_outputs  # MLflow's page of evaluations leaves out runs that logged models
    assert "| score, over all (8) |" in parent.data.tags["mlflow.note.content"]
    for child in children.values():
        check_child(server, child, prompts=8)
    difference = children["onnx int4"].data.metrics
    assert {f"difference/score/{field}" for field in ("mean", "ci95_low", "ci95_high", "p_value", "detectable")} <= (
        difference.keys()
    )
    expected = difference["score/mean"] - children["pipeline"].data.metrics["score/mean"]
    assert difference["difference/score/mean"] == pytest.approx(expected)

    # the models that this run logged, by URI, gated on themselves
    uris = [children[name].data.tags["model.uri"] for name in ("onnx int4", "pipeline")]
    gate = tmp_path / "gate.yaml"
    gate.write_text("rows_failed: {max: 0}\nscore/mean: {max_drop: 0.9}\n")
    options = [f"--model_uris={uris[0]}", f"--prompts={few_prompts(tmp_path)}"]
    options += [f"--thresholds={gate}", "--max_tokens=8"]
    baseline = (f"--baseline={uris[1]}", "--fidelity=off")
    done = entry_point("evaluate", *options, *baseline, MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 0, done.err
    assert "gate: pass" in done.out
    gate.write_text("score/mean: {min: 0.99}\n")
    done = entry_point("evaluate", *options, MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 3 and "gate: regress" in done.out


def test_a_run_from_a_git_url_is_done_again_by_its_recorded_command_to_the_byte(
    evaluated, git_server, tracking_server, server, tmp_path
):
    import mlflow

    first, children = parent_and_children(server, evaluated[1])
    record = json.loads(mlflow.artifacts.load_text(f"{first.info.artifact_uri}/evaluation/environment.json"))
    assert record["reproducible"] == "byte-identical on the same kind of CPU"
    assert record["code"]["git_commit"] == git_server.commit and not record["code"]["git_dirty"]
    again = shlex.split(record["again"])
    assert again[:5] == ["mlflow", "run", git_server.url, "-v", git_server.commit]
    assert again[5:9] == ["--env-manager", "local", "-e", "evaluate"]
    options = ("--experiment-name", f"{tmp_path.name}-again")
    done = mlflow_command(*again[1:], *options, cwd=tmp_path, MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 0, done.err
    second, replays = parent_and_children(server, f"{tmp_path.name}-again")
    assert second.data.tags["fingerprint"] == first.data.tags["fingerprint"] == record["fingerprint"]
    assert set(replays) == set(children) == {"onnx int4", "pipeline"}
    for name, child in children.items():
        for tag in ("fingerprint", "outputs.sha256", "model.sha256"):
            assert replays[name].data.tags[tag] == child.data.tags[tag]
        texts = [
            mlflow.artifacts.load_text(f"{run.info.artifact_uri}/evaluation/samples.jsonl")
            for run in (child, replays[name])
        ]
        kept = [re.sub(r'"latency_seconds": [\d.e-]+, |"model": "[^"]+", ', "", text) for text in texts]
        assert kept[0] == kept[1] and kept[0].count("\n") == 8
    ids = (first.info.run_id, second.info.run_id)
    done = entry_point("compare", *ids, MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 0, done.err
    told = f"8 answers: the fingerprints are equal ({children['pipeline'].data.tags['fingerprint'][:12]}), "
    assert f"pipeline, {told}and the answers and scores are byte-identical" in done.out
    assert len(done.out.splitlines()) == 2  # no table: nothing differs


@pytest.mark.parametrize(
    ("parameter", "line"),
    [
        ("prompts=nowhere.jsonl", "prompts: 'nowhere.jsonl' does not exist, from the repository's root or from here"),
        ("promts=x", "promts: there is no such parameter; did you mean prompts?"),
    ],
)
@pytest.mark.fault("parameters: bad input under mlflow run")
def test_bad_input_under_mlflow_run_ends_the_run_failed_with_the_line_in_a_tag(
    git_server, tracking_server, server, tmp_path, parameter, line
):
    done, experiment = run_from_git(git_server, tracking_server, tmp_path, "evaluate", parameter)
    assert done.code == 1  # mlflow run makes every failure 1
    assert f"error: {line}" in done.err
    parent, children = parent_and_children(server, experiment)
    assert (parent.info.status, parent.data.tags["error"], children) == ("FAILED", line, {})


@pytest.mark.parametrize(
    "missing", ["models:/m-00000000000000000000000000000000", "models:/nobody/1", "models:/no@one"]
)
@pytest.mark.fault("models: URI of a missing model, version or alias")
def test_a_model_that_is_not_there_is_bad_input_before_any_is_scored(tracking_server, server, int4_export, missing):
    done = in_process("evaluate", f"--model_uris={missing}", MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 2, done.err
    assert done.err.startswith(f"error: {missing}: there is no such model: ") and done.err.count("\n") == 1


def scoring_process(tracking_uri, experiment, folder, *options):
    """An `evaluate` with its cache in `folder`, which has some answers of the ONNX wrapper, and not all of them."""
    kept = folder / "answers"
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_EXPERIMENT_NAME": experiment}
    process = started("evaluate", "--max_tokens=40", *options, PHI3_MLFLOW_CACHE=str(folder), **environment)
    for _ in range(3000):
        if any(file.stat().st_size for file in kept.glob("*.jsonl")):
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no answer in five minutes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.fault("process: SIGTERM, SIGINT, SIGHUP")
def test_a_signal_ends_the_run_killed(tracking_server, server, int4_on_server, tmp_path, number, code):
    experiment = f"signal-{code}"
    process = scoring_process(tracking_server, experiment, tmp_path, f"--model_uris={int4_on_server}")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"stopped by {number.name}; the run is ended" in err
    parent, children = parent_and_children(server, experiment)
    assert {run.info.status for run in (parent, *children.values())} == {"KILLED"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.fault("process: kill -9 while scoring")
def test_an_interrupted_run_goes_on_and_ends_with_the_bytes_of_one_that_was_not(
    tracking_server, server, int4_on_server, tmp_path, number
):
    experiment = f"interrupted-{number.name}"
    process = scoring_process(tracking_server, experiment, tmp_path, f"--model_uris={int4_on_server}")
    process.send_signal(number)
    process.communicate(timeout=60)

    def evaluate(*options):
        options = (f"--model_uris={int4_on_server}", "--max_tokens=40", *options)
        environment = {"MLFLOW_TRACKING_URI": tracking_server, "PHI3_MLFLOW_CACHE": str(tmp_path)}
        done = entry_point("evaluate", *options, **environment)
        assert done.code == 0, done.err
        told = re.search(r": (\d+) of 24 answers (?:is|are) reused \(resume=true\)", done.out)
        return int(told[1]) if told else 0, samples_of(server, done)

    reused, resumed = evaluate()
    assert 0 < reused < 24
    assert evaluate() == (24, resumed)  # nothing has changed: no answer is generated
    assert evaluate("--resume=false") == (0, resumed)


def samples_of(client, done) -> str:
    """The samples.jsonl of an evaluate's one scored model, without its seconds."""
    import mlflow

    parent = client.get_run(done.out.split("run: ")[1].split()[0])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    [child] = client.search_runs([parent.info.experiment_id], query)
    text = mlflow.artifacts.load_text(f"{child.info.artifact_uri}/evaluation/samples.jsonl")
    return re.sub(r'"latency_seconds": [\d.e-]+, ', "", text)
