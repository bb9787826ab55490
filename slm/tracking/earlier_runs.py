"""Finds the results of an experiment's earlier runs on the same prompts."""

from dataclasses import dataclass

from slm.tracking import tags
from slm.tracking.mlflow_client import quiet_mlflow

HISTORY = 50  # the most earlier runs that a report shows
NEWEST = 20  # the most earlier runs that a forecast reads


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


@dataclass(frozen=True)
class Pace:
    """How long a model's answers were in an earlier run, and how fast they came."""

    model_uri: str
    model_name: str  # as in ModelFacts
    tokens: float  # of an answer
    speed: float  # tokens per second

    def seconds(self, max_tokens: int) -> float:
        """The seconds for an answer of at most `max_tokens`."""
        return min(self.tokens, max_tokens) / self.speed


@dataclass(frozen=True)
class Earlier:
    """What the newest finished runs of an experiment have measured."""

    detectable: float | None  # a difference of the overall score on these prompts; None: no run compared two models
    paces: tuple[Pace, ...]  # the newest first; those on these prompts before those on other prompts

    def pace(self, uri: str, name: str) -> Pace | None:
        """The likely pace of a model: its own, or of a model of its name, or of another model. None if unknown."""
        own = [pace for pace in self.paces if pace.model_uri == uri]
        named = [pace for pace in self.paces if pace.model_name == name]
        return next(iter((*own, *named, *self.paces)), None)


def newest(prompts_sha256: str) -> Earlier:
    """The figures of earlier runs, in the experiment of the active run or of the environment."""
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
        return Earlier(None, ())

    def finished(comparison: str) -> list:
        query, order = f"tags.`{tags.PROMPTS_SHA256}` {comparison} and status = 'FINISHED'", ["start_time DESC"]
        return client.search_runs([experiment], query, max_results=NEWEST, order_by=order)

    runs, others = finished(f"= '{prompts_sha256}'"), finished(f"!= '{prompts_sha256}'")
    detectable = [run.data.metrics.get("difference/score/detectable") for run in runs]
    return Earlier(
        next((figure for figure in detectable if figure is not None), None),
        tuple(pace for run in (*runs, *others) if (pace := _pace(run))),
    )


def _pace(run) -> Pace | None:
    tokens, speed = (run.data.metrics.get(f"output_tokens{figure}") for figure in ("/mean", "_per_second"))
    if not tokens or not speed:
        return None
    return Pace(run.data.tags.get(tags.MODEL_URI, ""), run.data.tags.get(tags.MODEL_NAME, ""), tokens, speed)
