"""Runs that `mlflow run GIT-URL` made, and what each of them leaves."""

import json
from xml.etree import ElementTree

from support.commands import REPOSITORY, mlflow_command

SCORES = ("mean", "stderr", "ci95_low", "ci95_high")
COSTS = (
    "rows",
    "rows_failed",
    "rows_unscored",
    "rows_cut",
    "rows_cut/share",
    "output_tokens_per_second",
    "latency_seconds/p50",
    "latency_seconds/p95",
    "model_load_seconds",
    "peak_memory_bytes",
    "model_bytes",
)
SAMPLE_FIELDS = [
    "id",
    "repeat",
    "model",
    "messages",
    "expected",
    "output",
    "finish_reason",
    "prompt_tokens",
    "output_tokens",
    "latency_seconds",
    "scores",
    "reasons",
    "error",
]


def few_prompts(folder):
    """Every third of the 24 prompts that an evaluation takes by default. The pipeline needs a second for each."""
    file = folder / "smoke.jsonl"
    lines = (REPOSITORY / "prompts" / "smoke.jsonl").read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[::3]), "utf-8")
    return file


def run_from_git(git_server, tracking_uri, folder, name, *parameters):
    """`mlflow run` in an empty folder; the finished command and the id of its run."""
    options = [word for parameter in parameters for word in ("-P", parameter)]
    experiment = f"{folder.name}-{name}"
    done = mlflow_command(
        "run",
        git_server.url,
        "-v",
        git_server.commit,
        "-e",
        name,
        "--env-manager",
        "local",
        "--experiment-name",
        experiment,
        *options,
        cwd=folder,
        MLFLOW_TRACKING_URI=tracking_uri,
    )
    return done, experiment


def parent_and_children(client, experiment):
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    # of `evaluate`, another child holds the logged wrappers
    scored = [run for run in runs if run is not parent and run.info.run_name != "wrappers"]
    return parent, {run.info.run_name: run for run in scored}


def check_child(client, child, prompts=24):
    """Metrics, tags, dataset, samples, and their links to the logged model."""
    import mlflow

    metrics, tags = child.data.metrics, child.data.tags
    assert metrics["rows"] == prompts
    assert metrics["rows_failed"] == metrics["rows_unscored"] == 0
    assert {name for name in COSTS if name not in metrics} == set()
    assert {f"contains/{field}" for field in SCORES} <= metrics.keys()
    assert 0 < metrics["score/mean"] < 1  # the embedded model gets some right and some wrong
    assert tags["gate"] == "none"
    assert len(tags["fingerprint"]) == len(tags["prompts.sha256"]) == len(tags["model.sha256"]) == 64
    [dataset] = child.inputs.dataset_inputs
    assert dataset.dataset.name == "smoke"
    name, _, version = tags["model.uri"].removeprefix("models:/").rpartition("/")
    source = client.get_model_version(name, version).source if name else tags["model.uri"]
    logged = mlflow.get_logged_model(source.removeprefix("models:/"))
    linked = {metric.key: metric for metric in logged.metrics}
    assert linked["score/mean"].value == metrics["score/mean"]
    assert linked["score/mean"].dataset_digest == dataset.dataset.digest
    folder = mlflow.artifacts.download_artifacts(run_id=child.info.run_id, artifact_path="evaluation")
    names = {artifact.path for artifact in client.list_artifacts(child.info.run_id, "evaluation")}
    assert names == {
        f"evaluation/{name}" for name in ("samples.jsonl", "report.html", "report.md", "junit.xml", "environment.json")
    }
    with open(f"{folder}/samples.jsonl", encoding="utf-8") as file:  # noqa: PTH123
        samples = [json.loads(line) for line in file]
    assert [list(sample) for sample in samples] == [SAMPLE_FIELDS] * prompts
    ElementTree.parse(f"{folder}/junit.xml")
    return logged, samples
