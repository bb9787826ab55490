"""Writes the dataset, metrics, tags and samples of a run. Finds other runs by their tags."""

import os
import re

from slm.base.parameters import ENTRY_POINTS
from slm.tracking import live_prompts
from slm.tracking.earlier_runs import HISTORY
from slm.tracking.mlflow_client import _or_found, quiet_mlflow
from slm.tracking.tags import NOTE, PARENT, SKIPPED, SYSTEM_PROMPT, SYSTEM_PROMPT_SHA256

# MLflow's own names are of the form selective-ram-123
UNNAMED = re.compile(rf"([a-z]+-[a-z]+-\d+|{'|'.join(ENTRY_POINTS)})?")

_under_way: dict[str, str] = {}  # the names of this process's runs that tell what goes on, by run id


def log_dataset(prompt_set):
    """Logs the prompt set as an MLflow dataset, an input of the active run. Returns the dataset."""
    import json

    import pandas as pd

    mlflow = quiet_mlflow()
    from mlflow.data.code_dataset_source import CodeDatasetSource

    from slm.prompts.prompt_rows import canonical_rows

    rows = [
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in row.items()
        }
        for row in canonical_rows(prompt_set.prompts)
    ]
    frame = pd.DataFrame(rows).astype("string").fillna("").astype(object)
    source = prompt_set.source
    # MLflow downloads these URIs, but has no dataset source for them
    if source.startswith(("runs:/", "models:/", *live_prompts.SCHEMES)):
        source = CodeDatasetSource({"prompts": source})
    dataset = mlflow.data.from_pandas(frame, source=source, name=prompt_set.name)
    _or_found(lambda: mlflow.log_input(dataset, context="evaluation"), "BAD_REQUEST")  # from the database's rules
    return dataset


def system_prompt(prompt_set) -> dict[str, str]:
    """The tags that tell which system message the prompts got. Empty if they got none."""
    found = prompt_set.system
    return {SYSTEM_PROMPT: found.source, SYSTEM_PROMPT_SHA256: found.sha256} if found else {}


def log_scored(scored, dataset, tags: dict[str, str]) -> None:
    """Logs a scored model's metrics, tags and samples to the active run. Metrics link to the model and the dataset."""
    mlflow = quiet_mlflow()
    mlflow.log_metrics(scored.metrics, model_id=scored.model.model_id, dataset=dataset)
    mlflow.set_tags(tags)
    mlflow.log_text("".join(f"{line}\n" for line in scored.sample_lines()), "evaluation/samples.jsonl")


def runs_with(tags: dict[str, str], status: str = "") -> list:
    """Other runs with these tags in the active run's experiment, the newest first. No tag value may hold a quote."""
    mlflow = quiet_mlflow()
    own = mlflow.active_run().info
    wanted = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
    wanted += [f"attributes.status = '{status}'"] if status else []
    found = mlflow.MlflowClient().search_runs(
        [own.experiment_id], " and ".join(wanted), order_by=["attributes.start_time DESC"], max_results=HISTORY
    )
    return [run for run in found if run.info.run_id != own.run_id]


def name_run(run_id: str, name: str, description: str = "") -> None:
    """Names a run by what it did, unless a person named it, and describes it. A child run keeps its name.

    A name that `name_run_under_way` gave stays in front.
    """
    client = quiet_mlflow().MlflowClient()
    run = client.get_run(run_id)
    if PARENT in run.data.tags:
        return
    before = _under_way.pop(run_id, None)
    if before and run.info.run_name == before:
        client.update_run(run_id, name=f"{before[:200]}, {name}"[:250])
    elif UNNAMED.fullmatch(run.info.run_name or ""):
        client.update_run(run_id, name=name[:250])
    if description:
        client.set_tag(run_id, NOTE, description)


def name_run_under_way(run_id: str, name: str) -> None:
    """Names a run by what it does until it ends, unless a person named it."""
    client = quiet_mlflow().MlflowClient()
    if UNNAMED.fullmatch(client.get_run(run_id).info.run_name or ""):
        _under_way[run_id] = name[:250]
        client.update_run(run_id, name=_under_way[run_id])


def tag_active_run(tags: dict[str, str]) -> None:
    """Tags the active run. A run that is skipped is named by it."""
    mlflow = quiet_mlflow()
    mlflow.set_tags(tags)
    if SKIPPED in tags:
        name_run(mlflow.active_run().info.run_id, tags[SKIPPED])


def tag_waiting_run(tags: dict[str, str]) -> None:
    """The same for the run that `mlflow run` made for this process, if there is one. Does not end the run."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    for key, value in tags.items():
        quiet_mlflow().MlflowClient().set_tag(run_id, key, value)
    if SKIPPED in tags:
        name_run(run_id, tags[SKIPPED])
