"""Finds the results of an experiment's earlier runs on the same prompts."""

from dataclasses import dataclass

from slm.tracking import tags
from slm.tracking.mlflow_client import quiet_mlflow

HISTORY = 50  # the most earlier runs that a report shows
SPEED = "output_tokens_per_second"


@dataclass(frozen=True)
class Point:
    """One metric of an earlier run with the same prompts and model name."""

    run_id: str
    start: float  # seconds since 1970, UTC
    version: str  # of the registered model, or ""
    gate: str
    mean: float
    ci95_low: float
    ci95_high: float


def history(prompts_sha256: str, model_name: str, names) -> dict[str, tuple]:
    """The results of this experiment's finished runs with the same prompts and model name, the oldest first.

    Returns Points by scorer. The child runs of the active run are left out.
    """
    mlflow = quiet_mlflow()
    parent = mlflow.active_run()
    quoted = model_name.replace("'", "''")
    runs = mlflow.MlflowClient().search_runs(
        [parent.info.experiment_id],
        f"tags.`{tags.PROMPTS_SHA256}` = '{prompts_sha256}' and tags.`{tags.MODEL_NAME}` = '{quoted}' "
        "and status = 'FINISHED'",
        max_results=HISTORY,
        order_by=["attributes.start_time DESC"],
    )
    found: dict[str, tuple] = {}
    for run in reversed(runs):
        told, metrics = run.data.tags, run.data.metrics
        if told.get(tags.PARENT) == parent.info.run_id:
            continue
        version = told.get(tags.MODEL_URI, "").rpartition("/")[2]
        for name in names:
            figures = [metrics.get(f"{name}/{field}") for field in ("mean", "ci95_low", "ci95_high")]
            if None not in figures:
                version = version if version.isdigit() else ""
                point = Point(run.info.run_id, run.info.start_time / 1000, version, told.get(tags.GATE, ""), *figures)
                found[name] = (*found.get(name, ()), point)
    return found


def newest(prompts_sha256: str) -> dict[str, float]:
    """The metrics of the newest finished runs on these prompts, in the experiment of the active run or of the
    environment.

    Of two runs with the same metric, the newer one counts. Of SPEED, the slowest counts: the models of a run differ.
    """
    import os

    mlflow = quiet_mlflow()
    client, name = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    active = mlflow.active_run()
    found = client.get_experiment_by_name(name) if name and not active else None
    if active:
        experiment = active.info.experiment_id
    else:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or (found.experiment_id if found else "" if name else "0")
    if not experiment:
        return {}
    runs = client.search_runs(
        [experiment],
        f"tags.`{tags.PROMPTS_SHA256}` = '{prompts_sha256}' and status = 'FINISHED'",
        max_results=10,
        order_by=["attributes.start_time DESC"],
    )
    metrics = {key: value for run in reversed(runs) for key, value in run.data.metrics.items()}
    speeds = [run.data.metrics[SPEED] for run in runs if SPEED in run.data.metrics]
    return metrics | ({SPEED: min(speeds)} if speeds else {})
