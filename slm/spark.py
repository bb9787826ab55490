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

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slm import (
    answers,
    cache,
    environment,
    loading,
    prompts,
    scorer_calls,
    scoring,
    statistics,
    strict_json,
    tracking,
    user_scorers,
)
from slm.errors import BadInput, Unavailable
from slm.prompts import Prompt, PromptSet, ScorerCall
from slm.scorers import quoted

SHOWN = 10_000  # answers that the driver holds, samples.jsonl lists and the report shows
LOCAL = "local[*,4]"  # a task is tried four times, as on a cluster
BUCKET_ROWS = 16  # a bucket's prompts, until MOST_BUCKETS are reached; then they grow
MOST_BUCKETS = 1000
PART_BYTES = 4 * 2**20  # of the prompt set: what goes through the driver at once, which hashes it in its order
OUT_OF_MEMORY = 3  # exit code of a JVM with ExitOnOutOfMemoryError
FOLDER = "evaluation/samples.parquet"
MARKER = re.compile(r"_bucket-(\d{5})\.json")
LOCAL_STORES = ("sqlite:", "file:", "/", ".")  # tracking URIs that mean something on this machine alone
PERCENTILE_ACCURACY = 10_000  # beyond SHOWN: a percentile's rank is off by 1/10,000 of the answers at most

VALIDATED = (
    "file string, row long, where string, id string, own_id boolean, hash long, canonical string, "
    "unscorable array<struct<scorer: string, reason: string>>, error string"
)
ANSWERED = "kind string, content string"  # a bucket's marker; of what is shown, a sample, what a prompt was sent as
VALUES = "name string, cluster string, value double, binary boolean, unit boolean, graded boolean"


@dataclass(frozen=True)
class SparkPromptSet(PromptSet):
    """`prompts` are those whose answers the driver holds: all, or a sample; `frame` holds all, validated."""

    frame: object
    rows: int
    buckets: int
    last_shown: tuple[int, str] | None  # of the sample: hash and id of its last prompt in that order
    scorers: tuple  # what `_asked` makes the scorers from, on a worker

    @property
    def is_whole(self) -> bool:
        return self.last_shown is None


@dataclass(frozen=True)
class SparkScoredModel(scoring.ScoredModel):
    """`samples` are those that are shown; all are in the run's artifacts, a file per bucket."""

    run_id: str = ""
    buckets: tuple[int, ...] = ()
    prompt_set: SparkPromptSet | None = None
    sent: dict | None = None  # text and token ids by id of the prompts that are shown, as loading.sent has them


@dataclass(frozen=True)
class Job:
    """What a worker needs to answer a bucket, beside its rows."""

    label: str
    uri: str
    model_key: str  # changes when `uri` comes to mean another model
    tracking_uri: str
    registry_uri: str
    generation: dict
    repeats: int
    threads: int
    scorers: tuple
    row_timeout: float = 0.0
    recorded: tuple[str, ...] = ()  # hashes of its manifest
    trust_code: bool = False
    run_id: str = ""
    earlier: tuple[tuple[int, str], ...] = ()  # buckets that an earlier run finished, and its id
    last_shown: tuple[int, str] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The session


def session(master: str):
    """The Spark session that is there, else one on `master` (empty: all cores of this machine).

    Raises:
        BadInput: pyspark or Java is missing, `master` can't be one, or it isn't that of the session that is there.
        Unavailable: the master doesn't answer.
    """
    mlflow = tracking.quiet_mlflow()  # of pyspark's warnings, too
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        remedy = "pip install -r requirements-spark.txt -c constraints.txt"
        raise BadInput(f"engine: spark needs pyspark, which is not installed; {remedy}") from None
    active = SparkSession.getActiveSession()
    if active is not None:
        there = active.sparkContext.master
        if master not in ("", there):
            raise BadInput(
                f"spark_master: {master!r} is not that of the session that is there, {there}; leave it empty"
            )
    elif not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise BadInput("engine: spark needs Java, which is not on PATH; install a JRE, version 17 or 21")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has chosen a master
    builder = SparkSession.builder.appName("phi3-mlflow evaluate")
    if active is None and (master or not submitted):
        builder = builder.master(master or LOCAL).config("spark.ui.showConsoleProgress", "false")
        if (master or "local").startswith("local"):
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
            builder = builder.config("spark.ui.enabled", "false")  # it would listen on every address
    interrupt = signal.getsignal(signal.SIGINT)
    # else a thread of the driver dies alone, and the driver waits for what it should have brought, for ever
    options = {"SPARK_SUBMIT_OPTS": f"{os.environ.get('SPARK_SUBMIT_OPTS', '')} -XX:+ExitOnOutOfMemoryError"}
    try:
        with environment.variables(options):
            spark = active or builder.getOrCreate()
    except Exception as error:
        if "parse Master URL" in str(error):
            raise BadInput(f"spark_master: {master!r} is none; write local[4], spark://host:7077, yarn, …") from None
        raise Unavailable(f"spark_master: {master or LOCAL}: {_reason(error)}") from None
    finally:
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # pyspark puts its own in the place of ours
    if active is None:
        spark.sparkContext.setLogLevel("FATAL")  # what a task died of is told in one line
    if not spark.sparkContext.master.startswith("local"):
        uri = mlflow.get_tracking_uri()
        if uri.startswith(LOCAL_STORES):
            raise BadInput(f"engine: workers can't reach the tracking store {uri}; set MLFLOW_TRACKING_URI to a server")
    _send_package(spark.sparkContext)
    return spark


def _send_package(context) -> None:
    """This package for the workers, unpacked where Spark puts files and Python looks for modules."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".html"))
    content = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()[:16]
    target = cache.private("spark") / f"package-{content}.zip"
    if not target.exists():
        building = target.with_name(f"{target.name}.{os.getpid()}")
        with zipfile.ZipFile(building, "w") as package:
            for path in files:
                package.write(path, path.name)
        building.replace(target)
    context.addArchive(f"{target}#{folder.name}")
    for name in ("requirements.txt", "constraints.txt"):  # slm/environment.py reads them
        context.addFile(str(environment.REPOSITORY / name))


@contextmanager
def _spark_errors() -> Iterator[None]:
    """What Spark has given up on, in one line."""
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JNetworkError, EOFError, ConnectionError) as error:  # nobody is there any more
        process = getattr(SparkContext._gateway, "proc", None)
        with suppress(subprocess.TimeoutExpired):
            if process and process.wait(10) == OUT_OF_MEMORY:
                remedy = "give it more, SPARK_DRIVER_MEMORY=4g"
                raise Unavailable(f"spark: the memory of the driver's JVM is used up; {remedy}") from error
        raise Unavailable(f"spark: the driver's JVM doesn't answer ({_reason(error)})") from error
    except (PySparkException, Py4JError) as error:
        raise Unavailable(f"spark: a task failed, after retries: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of a trace that names the error: the workers', where it came from there."""
    named = re.findall(
        r"^\s*((?:Caused by: )?[\w.]+(?:Error|Exception|BadInput|Unavailable)\b[^\n]*)", str(error), re.M
    )
    workers = [line for line in named if not line.startswith(("Caused by", "org.", "java."))]
    line = (workers or named or [str(error)])[-1]
    return " ".join(line.split())[:500]


# ---------------------------------------------------------------------------------------------------------------------
# The prompt set


def read_prompts(location: str, given: str, master: str, scorers: str = "", repeats: int = 1) -> SparkPromptSet:
    """The prompt set at `location` (which the user named `given`), read and validated by the workers.

    JSONL (packed or not) and Parquet are read in parts; a CSV file by one worker, as a quoted cell may span lines.

    Raises:
        BadInput: it isn't there, or a row of it is wrong: the first one is named by file and line.
        Unavailable: Spark is.
    """

    name = _name(location)
    suffix = re.search(r"\.(jsonl|csv|parquet)(\.\w+)?$", name)
    if suffix is None:
        raise BadInput(f"prompts: {given!r} is no .jsonl, .csv or .parquet file or folder, which engine=spark reads")
    asked = scorer_calls.read(scorers)
    spec = _scorer_spec(scorers)
    spark = session(master)
    title, kind = name[: suffix.start()], suffix[1]
    with _spark_errors():
        raw, before = _raw(spark, location, given, kind)
        checked = raw.mapInArrow(lambda batches: _validated(batches, kind, before, spec, title), VALIDATED)
        checked.unpersist()  # what the session may still hold of this path is of another day
        checked.persist()
        parts = -(-_refuse(checked, asked, name, title) // PART_BYTES)
        digest, rows, kept = hashlib.sha256(b"["), 0, []
        most = max(SHOWN // repeats, 1)
        lines = checked.select("file", "row", "canonical").repartitionByRange(parts, "file", "row")
        # by its RDD: of a DataFrame's toLocalIterator, Spark 4.3's scheduler holds every part for as long as it lives
        ordered = lines.sortWithinPartitions("file", "row").rdd.map(lambda row: row.canonical)
        for canonical in ordered.toLocalIterator(prefetchPartitions=True):
            digest.update((b"," if rows else b"") + canonical.encode())
            rows += 1
            if rows <= most:
                kept.append(canonical)
        last = None
        if rows > most:
            sample = (
                checked.orderBy("hash", "id").limit(most).select("hash", "id", "file", "row", "canonical").collect()
            )
            last = (sample[-1].hash, sample[-1].id)
            kept = [row.canonical for row in sorted(sample, key=lambda row: (row.file, row.row))]
    digest.update(b"]")
    shown = tuple(_prompt(json.loads(canonical)) for canonical in kept)
    buckets = min(max(-(-rows // BUCKET_ROWS), 1), MOST_BUCKETS)
    return SparkPromptSet(title, given, shown, digest.hexdigest(), checked, rows, buckets, last, spec)


def release(prompt_set: SparkPromptSet) -> None:
    """Gives the workers' memory back."""
    prompt_set.frame.unpersist()


def _name(location: str) -> str:
    return urllib.parse.unquote(location.rstrip("/").rpartition("/")[2])


def _raw(spark, location: str, given: str, kind: str):
    """The rows as Spark reads them, each with its file and its place; and how many lines are before a file's block."""
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    try:
        if kind == "csv":
            return spark.read.format("binaryFile").load(location).select(F.col("path").alias("file"), "content"), {}
        if kind == "parquet":
            return spark.read.parquet(location).select("*", "_metadata.file_path", "_metadata.row_index"), {}
        lines = spark.read.option("lineSep", "\n").text(location)  # its default would cut at a lone \r as well
    except AnalysisException as error:
        raise BadInput(f"prompts: {given!r} can't be read by Spark: {_reason(error)}") from None
    place = ["_metadata.file_path", F.col("_metadata.file_block_start").alias("block")]
    counted = lines.select(*place).groupBy("file_path", "block").count().collect()
    before, file, number = {}, None, 0
    for part in sorted(counted, key=lambda part: (part.file_path, part.block)):
        number = number if part.file_path == file else 0
        file, before[part.file_path, part.block] = part.file_path, number
        number += part["count"]
    return lines.select(F.col("value").cast("binary").alias("value"), *place), before


def _refuse(checked, asked: scorer_calls.Asked, name: str, title: str) -> int:
    """Raises BadInput for the first wrong row, for an id that is there twice, and for a set without rows.

    Gives the set's size, in bytes.
    """
    from pyspark.sql import functions as F

    wrong = checked.filter("error is not null").orderBy("file", "row").select("error").head()
    if wrong is not None:
        raise BadInput(wrong.error)
    rows, size = checked.agg(F.count("*"), F.sum(F.octet_length("canonical"))).head()
    if not rows:
        raise BadInput(f"{name}: no rows; write at least one prompt")
    places = F.array_sort(F.collect_list(F.struct("file", "row", "where", "own_id")))
    twice = checked.groupBy("id").agg(places.alias("places")).filter("size(places) > 1")
    first = twice.orderBy(F.col("places")[1]["file"], F.col("places")[1]["row"]).head()
    if first is not None:
        one, other = first.places[:2]
        remedy = "ids are unique: change one" if other.own_id else "remove one, or give each an `id`"
        place = one.where if one.file != other.file else one.where.removeprefix(f"{_name(one.file)} ")
        raise BadInput(f"{other.where}: `id` {quoted(first.id)} is that of {place} too; {remedy}")
    if asked.added:
        unscorable = checked.select(F.explode("unscorable").alias("pair")).groupBy("pair.scorer")
        for found in unscorable.agg(F.count("*").alias("rows"), F.first("pair.reason").alias("reason")).collect():
            if found.rows == rows:
                raise BadInput(found.reason)
    return size


def _validated(batches: Iterable, kind: str, before: dict, spec: tuple, title: str) -> Iterator:
    """On a worker: each row as a checked, canonical prompt with the added scorers in it, or what is wrong with it."""
    import pyarrow

    asked, text = _asked(spec), pyarrow.string()
    fields = {"file": text, "row": pyarrow.int64(), "where": text, "id": text, "own_id": pyarrow.bool_()}
    fields |= {"hash": pyarrow.int64(), "canonical": text}
    fields |= {"unscorable": pyarrow.list_(pyarrow.struct({"scorer": text, "reason": text})), "error": text}
    schema = pyarrow.schema(fields)
    places = _places(batches, kind, before)
    while found := [_checked(*place, asked, title) for place in itertools.islice(places, 1000)]:
        yield pyarrow.RecordBatch.from_pylist(found, schema)


def _places(batches: Iterable, kind: str, before: dict) -> Iterator[tuple]:
    """(file, row number, where, row, what is wrong) of everything in Spark's batches."""
    records = (record for batch in batches for record in batch.to_pylist())
    if kind == "csv":
        for record in records:
            yield from _csv_places(record["file"], record["content"])
    elif kind == "parquet":
        for record in records:
            file, number = record.pop("file_path"), record.pop("row_index") + 1
            where = f"{_name(file)} row {number}"
            try:
                yield file, number, where, _parquet_row(record), None
            except ValueError as error:
                yield file, number, where, None, f"{where}: {error}"
    else:
        yield from _line_places(records, before)


def _line_places(records: Iterable[dict], before: dict) -> Iterator[tuple]:
    block, number = None, 0
    for record in records:
        number = (
            number if (record["file_path"], record["block"]) == block else before[record["file_path"], record["block"]]
        )
        block, number = (record["file_path"], record["block"]), number + 1
        name = _name(record["file_path"])
        where = f"{name} line {number}"
        try:
            text = _decoded(record["value"], name, number)
            for _, row in prompts.READERS[".jsonl"](text, name):
                yield record["file_path"], number, where, row, None
        except BadInput as error:
            yield record["file_path"], number, where, None, str(error).replace(f"{name} line 1:", f"{where}:", 1)


def _csv_places(file: str, content: bytes) -> Iterator[tuple]:
    name, number = _name(file), 0
    try:
        if len(content) > prompts.FILE_BYTES:
            raise BadInput(f"{name}: is larger than {prompts.FILE_BYTES // 2**20} MiB; split it, or write JSONL")
        for place, row in prompts.READERS[".csv"](_decoded(content, name, 1), name):
            number += 1
            yield file, number, f"{name} {place}", row, None
    except BadInput as error:
        yield file, number + 1, name, None, str(error)


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise BadInput(f"{name} line {line}: byte {data[error.start]:#04x} is not UTF-8; save as UTF-8") from None


def _parquet_row(value: object) -> object:
    """A record without its nulls; `messages` and `scorers` may be JSON texts, since their columns have one type."""
    if isinstance(value, list):
        return [_parquet_row(item) for item in value]
    if not isinstance(value, dict):
        return value
    row = {key: _parquet_row(item) for key, item in value.items() if item is not None}
    for field in ("messages", "scorers"):
        if isinstance(row.get(field), str) and row[field].startswith("["):
            row[field] = strict_json.parse(row[field])
    return row


def _checked(file: str, number: int, where: str, row: object, error: str | None, asked, title: str) -> dict:
    found = {"file": file, "row": number, "where": where, "error": error}
    if error:
        return found
    try:
        prompt = prompts.read_row(row, where, scorer_calls.IN_ROWS)
        one = PromptSet(title, "", (prompt,), "")
        scorer_calls.add(replace(asked, added=()), one)
    except BadInput as problem:
        return found | {"error": str(problem)}
    unscorable = []
    for call in asked.added:
        try:
            scorer_calls.add(replace(asked, added=(call,)), one)
        except BadInput as problem:
            unscorable.append({"scorer": call.name, "reason": str(problem)})
    [canonical] = prompts.canonical_rows(prompts.with_scorers(one, asked.added).prompts)
    return found | {
        "id": prompt.id,
        "own_id": "id" in row,
        "hash": int(hashlib.sha256(prompt.id.encode()).hexdigest()[:12], 16),
        "canonical": json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
        "unscorable": unscorable,
    }


def _prompt(canonical: dict) -> Prompt:
    """The prompt that a canonical row was made of; it was checked before, and may have scorers that can't score it."""
    return Prompt(
        id=canonical["id"],
        messages=tuple(canonical["messages"]) if "messages" in canonical else None,
        prompt=canonical.get("prompt"),
        expected=tuple(canonical["expected"]),
        scorers=tuple(ScorerCall(name, options) for call in canonical["scorers"] for name, options in call.items()),
        cluster=canonical.get("cluster"),
        tags=tuple(canonical["tags"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scorers


def _scorer_spec(parameter: str) -> tuple:
    """The `scorers` parameter with the text of the files that it names, so that workers need not have them."""
    from slm import checkpoints

    spec = []
    for item in filter(None, (item.strip() for item in parameter.split(","))):
        if user_scorers.is_spec(item):
            given, _, attribute = item.rpartition(":")
            path = checkpoints.located(given)
            spec.append((path.name, attribute, path.read_bytes()))
        else:
            spec.append(("", item, b""))
    return tuple(spec)


@functools.cache
def _asked(spec: tuple) -> scorer_calls.Asked:
    items = []
    for name, attribute, source in spec:
        if name:
            path = Path(tempfile.mkdtemp(prefix="phi3-mlflow-")) / name
            path.write_bytes(source)
            attribute = f"{path}:{attribute}"
        items.append(attribute)
    return scorer_calls.read(",".join(items))


# ---------------------------------------------------------------------------------------------------------------------
# Answering


def job(
    label: str,
    uri: str,
    prompt_set: SparkPromptSet,
    parameters: dict,
    row_timeout: float = 0.0,
    trust_code: bool = False,
) -> Job:
    """What workers are told of the model that `uri` (resolved) names; `parameters` are of generation, and repeats."""
    mlflow = tracking.quiet_mlflow()
    spark = prompt_set.frame.sparkSession
    return Job(
        label=label,
        uri=uri,
        model_key=mlflow.models.get_model_info(uri).model_uuid,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
        generation={name: value for name, value in parameters.items() if name != "repeats"},
        repeats=parameters["repeats"],
        threads=int(spark.conf.get("spark.task.cpus", "1")),
        scorers=prompt_set.scorers,
        row_timeout=row_timeout,
        recorded=tracking.recorded_manifests(uri),
        trust_code=trust_code,
        last_shown=prompt_set.last_shown,
    )


def described(prompt_set: SparkPromptSet, job: Job) -> loading.LoadedModel:
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


def _described(job: Job) -> tuple[loading.LoadedModel | None, str]:
    try:
        return replace(_model(job)[0], pyfunc=None, wrapper=None, ask=None, unchanged=None), ""
    except BadInput as error:
        return None, str(error)


def score(
    job: Job,
    model: loading.LoadedModel,
    prompt_set: SparkPromptSet,
    run_id: str,
    fingerprint: str,
    reuse: answers.Reuse,
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
    samples = (scoring.Sample(**json.loads(row.content)) for row in found if row.kind == "sample")
    samples = tuple(sorted(samples, key=lambda sample: (places[sample.id], sample.repeat)))
    buckets = tuple(sorted(marker["bucket"] for marker in markers))
    if prompt_set.is_whole:
        estimates = scoring.estimate(samples, prompt_set)
        metrics = scoring.metrics_of(model, samples, estimates)
    else:
        estimates, latencies = _estimates(prompt_set, told, buckets)
        metrics = scoring.metrics_of(model, samples, estimates) | latencies
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


def _earlier(fingerprint: str, reuse: answers.Reuse) -> tuple[tuple[int, str], ...]:
    """Buckets that earlier runs of this experiment finished, each with the newest run that did."""
    found: dict[int, str] = {}
    client = tracking.quiet_mlflow().MlflowClient()
    for run in tracking.runs_with({"fingerprint": fingerprint, "engine": "spark"}) if reuse != "none" else ():
        if reuse == "interrupted" and run.info.status == "FINISHED":
            break
        for file in client.list_artifacts(run.info.run_id, FOLDER):
            marker = MARKER.fullmatch(file.path.rpartition("/")[2])
            if marker:
                found.setdefault(int(marker[1]), run.info.run_id)
    return tuple(sorted(found.items()))


def _answered(batches: Iterable, job: Job) -> Iterator:
    """On a worker: one bucket answered, scored and stored; its marker, and those of its samples that are shown."""
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
        # answers go to a folder of the bucket's own: the host's cache is shared, and would be read for every bucket
        stack.enter_context(environment.variables({"PHI3_MLFLOW_CACHE": scratch}))
        if bucket in earlier:
            _take_over(job, earlier[bucket], bucket, bucket_set, model, Path(scratch))
        with scorer_calls.opened(_asked(job.scorers), False) as score_answer:
            scored = scoring.score(model, bucket_set, job.generation, job.repeats, "all", score_answer=score_answer)
        file = Path(scratch) / _file_name(bucket)
        clusters = {prompt.id: prompt.cluster for prompt in bucket_set.prompts}
        _write(scored.samples, clusters, file)
        speed = scored.metrics.get("output_tokens_per_second")
        tokens = sum(sample.output_tokens or 0 for sample in scored.samples)
        marker = {
            "bucket": bucket,
            "sha256": cache.file_sha256(file),
            **{name: int(scored.metrics[name]) for name in ("rows", "rows_failed", "rows_unscored")},
            "reused": scored.reused,
            "output_tokens": tokens,
            "elapsed": tokens / speed if speed else 0.0,
            "peak_memory_bytes": scored.metrics.get("peak_memory_bytes", 0.0),
            "model_load_seconds": model.load_seconds,
            "model_fetched": fetched,
            "worker": f"{socket.gethostname()} {os.getpid()}",
        }
        client = _client(job)
        client.log_artifact(job.run_id, str(file), FOLDER)
        path = Path(scratch) / f"_bucket-{bucket:05d}.json"
        path.write_text(json.dumps(marker), encoding="utf-8")
        client.log_artifact(job.run_id, str(path), FOLDER)  # after the file, and so says that it is whole
    last = tuple(job.last_shown or ())
    shown = [
        prompt
        for prompt, row in zip(bucket_set.prompts, rows, strict=True)
        if not last or (row["hash"], prompt.id) <= last
    ]
    ids = {prompt.id for prompt in shown}
    lines = zip(scored.samples, scored.sample_lines(), strict=True)
    sent = ([prompt.id, *loading.sent(model, prompt, job.generation)] for prompt in shown)
    found = [{"kind": "bucket", "content": json.dumps(marker)}]
    found += [{"kind": "sample", "content": line} for sample, line in lines if sample.id in ids]
    found += [{"kind": "sent", "content": json.dumps(content)} for content in sent]
    yield pyarrow.RecordBatch.from_pylist(
        found, pyarrow.schema([("kind", pyarrow.string()), ("content", pyarrow.string())])
    )


def _take_over(job: Job, run_id: str, bucket: int, bucket_set: PromptSet, model, scratch: Path) -> None:
    """Puts an earlier run's answers where `scoring.score` finds them; a file that isn't whole is left alone."""
    import pyarrow.parquet

    mlflow = tracking.quiet_mlflow()
    wanted = {(prompt.id, repeat): prompt for prompt in bucket_set.prompts for repeat in range(job.repeats)}
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
    except (mlflow.exceptions.MlflowException, OSError, ValueError, KeyError):
        return
    with answers.opened(scoring.identity(model, job.generation), "none") as kept:
        for row in rows:
            prompt = wanted.get((row["id"], row["repeat"]))
            if prompt is None or row["error"] is not None:
                continue
            asked = answers.digest([loading.row_of(model, prompt, row["repeat"], job.generation), row["repeat"]])
            answer = {name: row[name] for name in ("finish_reason", "prompt_tokens", "output_tokens")}
            kept.add(asked, answer | {"text": row["output"], "seconds": row["latency_seconds"], "error": ""}, seconds)
        kept.finish(peak)


def _model(job: Job) -> tuple[loading.LoadedModel, bool]:
    """The job's model, loaded once in this process; and whether this process fetched it."""
    settings = {name: job.generation.get(name) for name in ("dtype", "device")}
    settings |= {"threads": job.threads, "row_timeout": job.row_timeout}
    _client(job)
    return _loaded(job.label, job.uri, job.model_key, tuple(settings.items()), job.recorded, job.trust_code)


@functools.lru_cache(maxsize=1)  # the next model's loading frees this one
def _loaded(
    label: str, uri: str, model_key: str, settings: tuple, recorded: tuple[str, ...], trust_code: bool
) -> tuple[loading.LoadedModel, bool]:
    folder, fetched = _fetched(uri, model_key)
    return loading.load(label, uri, folder, dict(settings), recorded, trust_code), fetched


def _fetched(uri: str, model_key: str) -> tuple[Path, bool]:
    """The model's folder in this host's cache, brought there once, whichever process asks first."""
    mlflow = tracking.quiet_mlflow()
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
    mlflow = tracking.quiet_mlflow()
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    return mlflow.MlflowClient()


def _file_name(bucket: int) -> str:
    return f"bucket-{bucket:05d}.parquet"


def _write(samples: Sequence[scoring.Sample], clusters: dict[str, str | None], file: Path) -> None:
    """A bucket's samples as Parquet: the fields of samples.jsonl, and each prompt's cluster."""
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


def _read(job: Job, run_id: str, bucket: int) -> tuple[tuple[scoring.Sample, ...], dict[str, str | None]]:
    """A bucket's samples, and the clusters of their prompts."""
    import pyarrow.parquet

    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        path = _client(job).download_artifacts(run_id, f"{FOLDER}/{_file_name(bucket)}", scratch)
        rows = pyarrow.parquet.read_table(path).to_pylist()
    clusters = {row["id"]: row.pop("cluster") for row in rows}
    samples = (scoring.Sample(**row | {name: dict(row[name]) for name in ("scores", "reasons")}) for row in rows)
    return tuple(samples), clusters


# ---------------------------------------------------------------------------------------------------------------------
# Summing up what is too much for the driver


def _estimates(
    prompt_set: SparkPromptSet, job: Job, buckets: tuple[int, ...]
) -> tuple[dict[str, statistics.Estimate], dict[str, float]]:
    """Each scorer's estimate over all prompts, and percentiles of the latency."""
    from pyspark.sql import functions as F

    with _spark_errors():
        values = _spread(prompt_set, buckets, lambda numbers: _values(job, numbers)).persist()
        found = _summed(values.filter("name != ''"))
        shares = F.percentile_approx("value", [0.5, 0.95], PERCENTILE_ACCURACY)
        [latency] = values.filter("name = ''").select(shares.alias("seconds")).collect()
        values.unpersist()
    estimates = {name: statistics.estimate_from_sums(sums) for name, sums in found.items()}
    metrics = dict(zip(("latency_seconds/p50", "latency_seconds/p95"), latency.seconds or (), strict=False))
    return estimates, metrics


def differences(candidate: SparkScoredModel, baseline: SparkScoredModel) -> dict[str, statistics.Difference]:
    """Per scorer, candidate minus baseline on the prompts that both answered, as `scoring.differences` has it."""
    from pyspark.sql import functions as F

    prompt_set = candidate.prompt_set
    if prompt_set.is_whole:
        return scoring.differences(candidate, baseline, prompt_set)
    told = job("", candidate.model.uri, prompt_set, {"repeats": 1})
    runs = candidate.run_id, baseline.run_id
    both = tuple(sorted({*candidate.buckets} & {*baseline.buckets}))
    with _spark_errors():
        gaps = _spread(prompt_set, both, lambda numbers: _gaps(told, runs, numbers)).persist()
        found = _summed(gaps)
        signs = {
            row.name: (row.better, row.worse)
            for row in gaps.groupBy("name")
            .agg(F.sum(F.expr("int(value > 0)")).alias("better"), F.sum(F.expr("int(value < 0)")).alias("worse"))
            .collect()
        }
        clusters = gaps.groupBy("name", "cluster").agg(F.round(F.sum("value"), 12).alias("value"))
        counts: dict[str, list] = {}
        for row in clusters.groupBy("name", "value").count().collect():
            counts.setdefault(row.name, []).append((row.value, row["count"]))
        gaps.unpersist()
    return {name: statistics.difference_from_sums(sums, *signs[name], counts[name]) for name, sums in found.items()}


def _spread(prompt_set: SparkPromptSet, buckets: tuple[int, ...], rows_of):
    """The rows that `rows_of` makes of bucket numbers, made on the workers."""

    def made(batches):
        import pyarrow

        kinds = {"string": pyarrow.string(), "double": pyarrow.float64(), "boolean": pyarrow.bool_()}
        schema = pyarrow.schema({name: kinds[kind] for name, kind in map(str.split, VALUES.split(", "))})
        for batch in batches:
            for rows in rows_of([buckets[place] for place in batch.column(0).to_pylist()]):
                yield pyarrow.RecordBatch.from_pylist(rows, schema)

    return prompt_set.frame.sparkSession.range(0, len(buckets), 1, len(buckets)).mapInArrow(made, VALUES)


def _values(job: Job, buckets: Iterable[int]) -> Iterator[list[dict]]:
    """On a worker: every prompt's score by every scorer, and the seconds of every answer under the name ""."""
    for bucket in buckets:
        samples, clusters = _read(job, job.run_id, bucket)
        graded = _graded(samples)
        rows = [
            _value(name, id, clusters, value, value in (0, 1), 0 <= value <= 1, name in graded)
            for name, values in scoring.values_by_scorer(samples).items()
            for id, value in values.items()
        ]
        seconds = (sample.latency_seconds for sample in samples if sample.error is None)
        yield rows + [_value("", "", {}, value, False, False, False) for value in seconds]


def _gaps(job: Job, runs: tuple[str, str], buckets: Iterable[int]) -> Iterator[list[dict]]:
    """On a worker: the difference of every prompt that both runs scored, by every scorer that both have."""
    import numpy

    for bucket in buckets:
        (ours, clusters), (theirs, _) = (_read(job, run_id, bucket) for run_id in runs)
        graded = _graded(ours) | _graded(theirs)
        new, old = scoring.values_by_scorer(ours), scoring.values_by_scorer(theirs)
        rows = []
        for name in new.keys() & old.keys():
            for id in new[name].keys() & old[name].keys():
                pair = new[name][id], old[name][id]
                binary, unit = all(value in (0, 1) for value in pair), all(0 <= value <= 1 for value in pair)
                gap = float(numpy.round(pair[0] - pair[1], 12))
                rows.append(_value(name, id, clusters, gap, binary, unit, name in graded))
        yield rows


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


def _graded(samples: Iterable[scoring.Sample]) -> set[str]:
    """The scorers that say more than yes or no here, which leaves them without pass@k everywhere."""
    found = set()
    for sample in samples:
        scored = {name: value for name, value in sample.scores.items() if value is not None}
        found |= {name for name, value in scored.items() if value not in (0, 1)}
        if scored and sum(scored.values()) / len(scored) not in (0, 1):
            found.add(scoring.OVERALL)
    return found


def _summed(values) -> dict[str, statistics.Sums]:
    """The sums of each name's values; pass@k is left out where a bucket has more than yes or no."""
    from pyspark.sql import functions as F

    clusters = values.groupBy("name", "cluster").agg(
        F.count("*").alias("n"),
        F.sum("value").alias("total"),
        F.sum(F.expr("value * value")).alias("squares"),
        F.min("value").alias("low"),
        F.max("value").alias("high"),
        F.min("binary").alias("binary"),
        F.min("unit").alias("unit"),
        F.max("graded").alias("graded"),
    )
    rows = (
        clusters.groupBy("name")
        .agg(
            F.sum("n").alias("n"),
            F.sum("total").alias("total"),
            F.sum("squares").alias("squares"),
            F.min("low").alias("low"),
            F.max("high").alias("high"),
            F.min("binary").alias("binary"),
            F.min("unit").alias("unit"),
            F.count("*").alias("groups"),
            F.sum(F.expr("total * total")).alias("group_squares"),
            F.sum(F.expr("n * total")).alias("group_products"),
            F.sum(F.expr("double(n) * n")).alias("group_sizes"),
            F.max("graded").alias("graded"),
        )
        .orderBy("name")
        .collect()
    )
    graded = {row.name for row in rows if row.graded}
    found = {row.name: row.asDict() for row in rows if row.name.rpartition("/pass_")[0] not in graded}
    names = statistics.Sums.__dataclass_fields__
    return {name: statistics.Sums(**{field: row[field] for field in names}) for name, row in found.items()}
