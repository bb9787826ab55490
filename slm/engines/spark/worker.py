"""The code of a Spark worker: it answers, scores and writes one bucket of prompts."""

import functools
import gc
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from slm.answers import asking, kept_answers, loading
from slm.base import cache, environment
from slm.base.errors import BadInput
from slm.base.parameters import HARDWARE
from slm.engines import answering
from slm.engines.spark.job import Job
from slm.engines.spark.prompt_frame import _asked, _prompt
from slm.prompts.prompt_sets import PromptSet
from slm.scorers import scorer_calls
from slm.tracking import mlflow_client
from slm.verdict import estimation, scored_model

FOLDER = "evaluation/samples.parquet"
MARKER = re.compile(r"_bucket-(\d{5})\.json")
ANSWERED = "kind string, content string"  # a bucket's marker; a shown sample; the text that a shown prompt became
COUNTS = ("rows", "rows_failed", "rows_unscored", "rows_cut")  # metrics of a bucket that are added up
VALUES = "name string, cluster string, value double, binary boolean, unit boolean, graded boolean"


def _described(job: Job) -> tuple[asking.ModelFacts | None, str]:
    try:
        return _model(job)[0].facts, ""
    except BadInput as error:
        return None, str(error)


def _answered(batches: Iterable, job: Job) -> Iterator:
    """On a worker: answers, scores and stores one bucket. Yields the bucket's marker and its shown samples."""
    import pyarrow

    rows = [row for batch in batches for row in batch.to_pylist()]
    if not rows:
        return
    bucket, earlier = rows[0]["bucket"], dict(job.earlier)
    bucket_set = PromptSet("", "", tuple(_prompt(json.loads(row["canonical"])) for row in rows), "")
    model, fetched = _model(job)
    loading.reset_peak_memory()
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="phi3-mlflow-"))
        # a folder of this bucket alone: the host's cache is shared, and each bucket would read all of it
        stack.enter_context(environment.variables({"PHI3_MLFLOW_CACHE": scratch}))
        asked = asking.questions(model, bucket_set.prompts, job.generation, job.repeats)
        if bucket in earlier:
            _take_over(job, earlier[bucket], bucket, asked, model.facts, Path(scratch))
        with scorer_calls.opened(_asked(job.scorers), False) as score_answer:
            scored = answering.score(
                model, bucket_set, asked, job.generation, "all", score_answer=score_answer, cut=job.cut
            )
        file = Path(scratch) / _file_name(bucket)
        clusters = {prompt.id: prompt.cluster for prompt in bucket_set.prompts}
        _write(scored.samples, clusters, file)
        speed = scored.metrics.get("output_tokens_per_second")
        tokens = sum(sample.output_tokens or 0 for sample in scored.samples)
        marker = {
            "bucket": bucket,
            "sha256": cache.file_sha256(file),
            **{name: int(scored.metrics[name]) for name in COUNTS},
            "reused": scored.reused,
            "output_tokens": tokens,
            "elapsed": tokens / speed if speed else 0.0,
            "measured": not scored.unmeasured,
            "peak_memory_bytes": scored.metrics.get("peak_memory_bytes", 0.0),
            "model_load_seconds": model.facts.load_seconds,
            "model_fetched": fetched,
            "worker": f"{socket.gethostname()} {os.getpid()}",
        }
        client = _client(job)
        client.log_artifact(job.run_id, str(file), FOLDER)
        path = Path(scratch) / f"_bucket-{bucket:05d}.json"
        path.write_text(json.dumps(marker), encoding="utf-8")
        client.log_artifact(job.run_id, str(path), FOLDER)  # after the file: the marker means that the file is complete
    last = tuple(job.last_shown or ())
    shown = [
        prompt
        for prompt, row in zip(bucket_set.prompts, rows, strict=True)
        if not last or (row["hash"], prompt.id) <= last
    ]
    ids = {prompt.id for prompt in shown}
    lines = zip(scored.samples, scored.sample_lines(), strict=True)
    sent = ([prompt.id, *scored.sent[prompt.id], scored.generated[prompt.id]] for prompt in shown)
    found = [{"kind": "bucket", "content": json.dumps(marker)}]
    found += [{"kind": "sample", "content": line} for sample, line in lines if sample.id in ids]
    found += [{"kind": "sent", "content": json.dumps(content)} for content in sent]
    yield pyarrow.RecordBatch.from_pylist(
        found, pyarrow.schema([("kind", pyarrow.string()), ("content", pyarrow.string())])
    )


def _take_over(
    job: Job, run_id: str, bucket: int, asked: list[asking.Question], facts: asking.ModelFacts, scratch: Path
) -> None:
    """Puts the answers of an earlier run into the cache of this bucket. An incomplete file is not used."""
    import pyarrow.parquet

    mlflow = mlflow_client.quiet_mlflow()
    keys = {(question.prompt.id, question.repeat): question.key for question in asked}
    try:
        folder = scratch / "earlier"
        folder.mkdir()
        client = _client(job)
        names = (f"_bucket-{bucket:05d}.json", _file_name(bucket))
        marker, file = (Path(client.download_artifacts(run_id, f"{FOLDER}/{name}", str(folder))) for name in names)
        told = json.loads(marker.read_text(encoding="utf-8"))
        if cache.file_sha256(file) != told["sha256"]:
            return
        rows = pyarrow.parquet.read_table(file).to_pylist()
        seconds, peak = told["elapsed"] / max(told["rows"], 1), int(told["peak_memory_bytes"])
        measured = told["measured"]
    except (mlflow.exceptions.MlflowException, OSError, ValueError, KeyError):
        return
    with kept_answers.opened(answering.identity(facts, job.generation), "none") as kept:
        for row in rows:
            key = keys.get((row["id"], row["repeat"]))
            if key is None or row["error"] is not None:
                continue
            answer = {name: row[name] for name in ("finish_reason", "prompt_tokens", "output_tokens")}
            kept.add(key, answer | {"text": row["output"], "seconds": row["latency_seconds"], "error": ""}, seconds)
        if measured:
            kept.finish(peak)


def _model(job: Job) -> tuple[asking.LoadedModel, bool]:
    """The job's model, which this process loads once, and whether this process fetched the files."""
    settings = {name: job.generation.get(name) for name in HARDWARE}
    settings |= {"threads": job.threads, "row_timeout": job.row_timeout}
    _client(job)
    return _loaded(job.label, job.uri, job.model_key, tuple(settings.items()), job.recorded, job.trust_code)


@functools.lru_cache(maxsize=1)  # the next model's loading frees this one
def _loaded(
    label: str, uri: str, model_key: str, settings: tuple, recorded: tuple[str, ...], trust_code: bool
) -> tuple[asking.LoadedModel, bool]:
    folder, fetched = _fetched(uri, model_key)
    return loading.load(label, uri, folder, dict(settings), recorded, trust_code), fetched


def forget_model() -> None:
    """Frees the model that this process has loaded."""
    _loaded.cache_clear()
    gc.collect()


def _fetched(uri: str, model_key: str) -> tuple[Path, bool]:
    """The model's folder in this host's cache, and whether this call fetched it. One process of the host fetches."""
    mlflow = mlflow_client.quiet_mlflow()
    name = hashlib.sha256(f"{mlflow.get_tracking_uri()} {uri} {model_key}".encode()).hexdigest()[:16]
    target = cache.private("spark") / f"model-{name}"
    with cache.lock(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            return target, False
        building = target.with_name(f"{target.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(building))).rename(target)
        shutil.rmtree(building, ignore_errors=True)
    return target, True


def _client(job: Job):
    return _connected(job.tracking_uri, job.registry_uri)


@functools.lru_cache(maxsize=1)
def _connected(tracking_uri: str, registry_uri: str):
    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    return mlflow.MlflowClient()


def _file_name(bucket: int) -> str:
    return f"bucket-{bucket:05d}.parquet"


def _write(samples: Sequence[scored_model.Sample], clusters: dict[str, str | None], file: Path) -> None:
    """Writes a bucket's samples as Parquet, with the fields of samples.jsonl and each prompt's cluster."""
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float64()
    schema = pyarrow.schema(
        {
            "id": text,
            "cluster": text,
            "repeat": pyarrow.int64(),
            "model": text,
            "messages": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
            "expected": pyarrow.list_(text),
            "output": text,
            "finish_reason": text,
            "prompt_tokens": pyarrow.int64(),
            "output_tokens": pyarrow.int64(),
            "latency_seconds": number,
            "scores": pyarrow.map_(text, number),
            "reasons": pyarrow.map_(text, text),
            "error": pyarrow.struct({"type": text, "message": text}),
        }
    )
    rows = []
    for sample in samples:
        row = asdict(sample) | {"cluster": clusters[sample.id]}
        rows.append(row | {name: list(row[name].items()) for name in ("scores", "reasons")})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file, compression="zstd")


def _read(job: Job, run_id: str, bucket: int) -> tuple[tuple[scored_model.Sample, ...], dict[str, str | None]]:
    """A bucket's samples, and the clusters of their prompts."""
    import pyarrow.parquet

    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        path = _client(job).download_artifacts(run_id, f"{FOLDER}/{_file_name(bucket)}", scratch)
        rows = pyarrow.parquet.read_table(path).to_pylist()
    clusters = {row["id"]: row.pop("cluster") for row in rows}
    samples = (scored_model.Sample(**row | {name: dict(row[name]) for name in ("scores", "reasons")}) for row in rows)
    return tuple(samples), clusters


def _values(job: Job, buckets: Iterable[int]) -> Iterator[list[dict]]:
    """On a worker: yields each prompt's score by each scorer. The seconds of each answer have the name ""."""
    for bucket in buckets:
        samples, clusters = _read(job, job.run_id, bucket)
        graded = estimation.graded(samples)
        rows = [
            _value(name, id, clusters, value, value in (0, 1), 0 <= value <= 1, name in graded)
            for name, values in scored_model.values_by_scorer(samples).items()
            for id, value in values.items()
        ]
        seconds = (sample.latency_seconds for sample in samples if sample.error is None)
        yield rows + [_value("", "", {}, value, False, False, False) for value in seconds]


def _value(name, id, clusters, value, binary, unit, graded) -> dict:
    cluster = clusters.get(id)
    return {
        "name": name,
        "cluster": f"row {id}" if cluster is None else f"cluster {cluster}",
        "value": value,
        "binary": binary,
        "unit": unit,
        "graded": graded,
    }
