"""The job of a Spark worker, as plain data."""

from dataclasses import dataclass

from slm.engines.spark.prompt_frame import SparkPromptSet
from slm.tracking import mlflow_client, registry


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs for a bucket, except the bucket's rows."""

    label: str
    uri: str
    model_key: str  # changes if `uri` gets another model
    tracking_uri: str
    registry_uri: str
    generation: dict
    repeats: int
    cut: str
    threads: int
    scorers: tuple
    row_timeout: float = 0.0
    recorded: tuple[str, ...] = ()  # hashes of its manifest
    trust_code: bool = False
    run_id: str = ""
    earlier: tuple[tuple[int, str], ...] = ()  # buckets that an earlier run finished, and its id
    last_shown: tuple[int, str] | None = None


def job(
    label: str,
    uri: str,
    prompt_set: SparkPromptSet,
    parameters: dict,
    row_timeout: float = 0.0,
    trust_code: bool = False,
) -> Job:
    """The job for the model of a resolved URI. `parameters` has the generation parameters and `repeats`."""
    mlflow = mlflow_client.quiet_mlflow()
    spark = prompt_set.frame.sparkSession
    return Job(
        label=label,
        uri=uri,
        model_key=mlflow.models.get_model_info(uri).model_uuid,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
        generation={name: value for name, value in parameters.items() if name not in ("repeats", "cut")},
        repeats=parameters["repeats"],
        cut=parameters.get("cut", "score"),
        threads=int(spark.conf.get("spark.task.cpus", "1")),
        scorers=prompt_set.scorers,
        row_timeout=row_timeout,
        recorded=registry.recorded_manifests(uri),
        trust_code=trust_code,
        last_shown=prompt_set.last_shown,
    )
