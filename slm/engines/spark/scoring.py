"""Evaluates on Apache Spark: prompt sets and models that outgrow one machine.

Spark reads the prompt set, and its workers validate each row, fetch the logged model from the tracking server (once per
host), load it (once per Python worker), answer and score, by the code that engine=local runs. The unit of work is a
bucket: the prompts whose id hashes to one number, MOST_BUCKETS at most. A finished bucket is a Parquet file in the
run's artifacts, and a marker beside it; a run that was stopped, or in which nothing changed, takes its answers from
there. Scheduling, retries and lost machines are Spark's.

Up to SHOWN answers are all brought to the driver, whose figures are then those of engine=local to the last digit.
Beyond, it gets sums, and a sample of the answers to show.

Not covered: YAML prompt sets, endpoints, judges, Spark Connect. A bucket that is not finished when its worker dies is
answered anew. What users' scorers import beside their file has to be on the workers.
"""

import json
from dataclasses import replace

from slm.answers import kept_answers
from slm.answers.asking import ModelFacts
from slm.base.errors import BadInput
from slm.engines.spark.job import Job
from slm.engines.spark.prompt_frame import SparkPromptSet
from slm.engines.spark.spark_session import _spark_errors
from slm.engines.spark.sums import SparkScoredModel, _estimates
from slm.engines.spark.worker import ANSWERED, FOLDER, MARKER, _answered, _described
from slm.tracking import mlflow_client, run_records
from slm.verdict import estimation, scored_model

# ---------------------------------------------------------------------------------------------------------------------
# Answering


def described(prompt_set: SparkPromptSet, job: Job) -> ModelFacts:
    """The model as a worker loads it, without its memory.

    Raises:
        BadInput: it can't be loaded.
    """
    with _spark_errors():
        task = prompt_set.frame.sparkSession.sparkContext.parallelize([0], 1)
        [(model, problem)] = task.map(lambda _: _described(job)).collect()
    if problem:
        raise BadInput(problem)
    return model


def score(
    job: Job,
    model: ModelFacts,
    prompt_set: SparkPromptSet,
    run_id: str,
    fingerprint: str,
    reuse: kept_answers.Reuse,
) -> SparkScoredModel:
    """Answers and scores every prompt on the workers, into the artifacts of the run `run_id`.

    `reuse` says which buckets of earlier runs with this fingerprint are taken: of all; of those since one last came to
    its end; or of none. Answers that failed are made anew.

    Raises:
        Unavailable: Spark has given up on a bucket.
    """
    from pyspark.sql import functions as F

    told = replace(job, run_id=run_id, earlier=_earlier(fingerprint, reuse))
    bucket = (F.col("hash") % prompt_set.buckets).cast("int").alias("bucket")
    rows = prompt_set.frame.select(bucket, "hash", "file", "row", "canonical")
    tasks = rows.repartitionById(prompt_set.buckets, "bucket").sortWithinPartitions("file", "row")
    with _spark_errors():
        found = tasks.mapInArrow(lambda batches: _answered(batches, told), ANSWERED).collect()
    markers = [json.loads(row.content) for row in found if row.kind == "bucket"]
    places = {prompt.id: place for place, prompt in enumerate(prompt_set.prompts)}
    listed = (scored_model.Sample(**json.loads(row.content)) for row in found if row.kind == "sample")
    samples = tuple(sorted(listed, key=lambda sample: (places[sample.id], sample.repeat)))
    buckets = tuple(sorted(marker["bucket"] for marker in markers))
    if prompt_set.is_whole:
        estimates = estimation.estimate(samples, prompt_set)
        metrics = scored_model.metrics_of(model, samples, estimates)
    else:
        estimates, latencies = _estimates(prompt_set, told, buckets)
        metrics = scored_model.metrics_of(model, samples, estimates) | latencies
        metrics |= {
            name: float(sum(marker[name] for marker in markers)) for name in ("rows", "rows_failed", "rows_unscored")
        }
    metrics["model_load_seconds"] = max(marker["model_load_seconds"] for marker in markers)
    metrics["peak_memory_bytes"] = max(marker["peak_memory_bytes"] for marker in markers)
    spent = [(marker["output_tokens"], marker["elapsed"]) for marker in markers if marker["elapsed"]]
    if spent and len(spent) == sum(marker["rows"] > marker["rows_failed"] for marker in markers):
        metrics["output_tokens_per_second"] = sum(tokens for tokens, _ in spent) / sum(seconds for _, seconds in spent)
    reused = sum(marker["reused"] for marker in markers)
    sent = {id: (text, ids) for id, text, ids in (json.loads(row.content) for row in found if row.kind == "sent")}
    sent = {prompt.id: sent[prompt.id] for prompt in prompt_set.prompts}
    return SparkScoredModel(
        model, samples, estimates, metrics, reused, run_id=run_id, buckets=buckets, prompt_set=prompt_set, sent=sent
    )


def _earlier(fingerprint: str, reuse: kept_answers.Reuse) -> tuple[tuple[int, str], ...]:
    """Buckets that earlier runs of this experiment finished, each with the newest run that did."""
    found: dict[int, str] = {}
    client = mlflow_client.quiet_mlflow().MlflowClient()
    for run in run_records.runs_with({"fingerprint": fingerprint, "engine": "spark"}) if reuse != "none" else ():
        if reuse == "interrupted" and run.info.status == "FINISHED":
            break
        for file in client.list_artifacts(run.info.run_id, FOLDER):
            marker = MARKER.fullmatch(file.path.rpartition("/")[2])
            if marker:
                found.setdefault(int(marker[1]), run.info.run_id)
    return tuple(sorted(found.items()))
