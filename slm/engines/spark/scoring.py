"""Evaluates on Apache Spark, for prompt sets and models that are too large for one machine.

Spark reads the prompt set. Its workers validate each row, and fetch the logged model from the tracking server once per
host. Each Python worker loads the model once, then answers and scores with the code of engine=local.

The unit of work is a bucket: the prompts whose ids hash to one number. There are at most MOST_BUCKETS buckets. A
finished bucket is a Parquet file in the run's artifacts, with a marker file beside it. A later run takes answers from
these files if the run was stopped, or if nothing changed. Spark handles scheduling, retries and lost machines.

The driver gets all answers if there are at most SHOWN. Its figures then equal those of engine=local to the last digit.
With more answers, the driver gets sums, and a sample of the answers to show.

Not covered: YAML prompt sets, endpoints, judges, Spark Connect. If a worker dies, its unfinished bucket is answered
again. The workers must have the packages that a user's scorer file imports.
"""

import json
from dataclasses import replace

from slm.answers import kept_answers
from slm.answers.asking import ModelFacts
from slm.base.errors import BadInput
from slm.base.wording import part_of
from slm.engines.spark.job import Job
from slm.engines.spark.prompt_frame import SparkPromptSet
from slm.engines.spark.spark_session import _spark_errors
from slm.engines.spark.sums import SparkScoredModel, _estimates
from slm.engines.spark.worker import ANSWERED, COUNTS, FOLDER, MARKER, _answered, _described
from slm.tracking import mlflow_client, run_records, tags
from slm.verdict import estimation, scored_model

# ---------------------------------------------------------------------------------------------------------------------
# Answering


def described(prompt_set: SparkPromptSet, job: Job) -> ModelFacts:
    """The facts of the model, which a worker loads for that.

    Raises:
        BadInput: the model can't be loaded.
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
    """Answers and scores every prompt on the workers. The results go into the artifacts of the run `run_id`.

    `reuse` says which buckets of earlier runs with this fingerprint are taken: of all runs, of the runs after the last
    finished one, or of none. Failed answers are made again.

    Raises:
        Unavailable: Spark gave up on a bucket.
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
    reused, rows = (sum(marker[name] for marker in markers) for name in ("reused", "rows"))
    unmeasured = ""
    if not all(marker["measured"] for marker in markers):  # of a bucket, the failed rows alone were answered now
        few = reused < rows
        unmeasured = f"{part_of(reused, rows, 'answer')} reused" if few else "no one run gave exactly these answers"
    if prompt_set.is_whole:
        estimates = estimation.estimate(samples, prompt_set)
        metrics = scored_model.metrics_of(model, samples, estimates, latencies=not unmeasured)
    else:
        estimates, latencies = _estimates(prompt_set, told, buckets)
        metrics = scored_model.metrics_of(model, samples, estimates, latencies=False)
        metrics |= {} if unmeasured else latencies
        metrics |= {name: float(sum(marker[name] for marker in markers)) for name in COUNTS}
        metrics["rows_cut/share"] = metrics["rows_cut"] / metrics["rows"]
        if "output_tokens/mean" in metrics:  # of the listed answers
            answered = max(metrics["rows"] - metrics["rows_failed"], 1.0)
            metrics["output_tokens/mean"] = sum(marker["output_tokens"] for marker in markers) / answered
    metrics["model_load_seconds"] = max(marker["model_load_seconds"] for marker in markers)
    peak = max(marker["peak_memory_bytes"] for marker in markers)
    metrics |= {"peak_memory_bytes": peak} if peak and not unmeasured else {}
    spent = [(marker["output_tokens"], marker["elapsed"]) for marker in markers if marker["elapsed"]]
    if not unmeasured and spent and len(spent) == sum(marker["rows"] > marker["rows_failed"] for marker in markers):
        metrics["output_tokens_per_second"] = sum(tokens for tokens, _ in spent) / sum(seconds for _, seconds in spent)
    lines = {line[0]: line[1:] for line in (json.loads(row.content) for row in found if row.kind == "sent")}
    return SparkScoredModel(
        model,
        samples,
        estimates,
        metrics,
        reused,
        run_id=run_id,
        buckets=buckets,
        prompt_set=prompt_set,
        sent={prompt.id: tuple(lines[prompt.id][:2]) for prompt in prompt_set.prompts},
        generated={prompt.id: tuple(lines[prompt.id][2]) for prompt in prompt_set.prompts},
        unmeasured=unmeasured,
    )


def _earlier(fingerprint: str, reuse: kept_answers.Reuse) -> tuple[tuple[int, str], ...]:
    """The finished buckets of earlier runs in this experiment, each with its newest run."""
    found: dict[int, str] = {}
    client = mlflow_client.quiet_mlflow().MlflowClient()
    for run in run_records.runs_with({tags.FINGERPRINT: fingerprint, tags.ENGINE: "spark"}) if reuse != "none" else ():
        if reuse == "interrupted" and run.info.status == "FINISHED":
            break
        for file in client.list_artifacts(run.info.run_id, FOLDER):
            marker = MARKER.fullmatch(file.path.rpartition("/")[2])
            if marker:
                found.setdefault(int(marker[1]), run.info.run_id)
    return tuple(sorted(found.items()))
