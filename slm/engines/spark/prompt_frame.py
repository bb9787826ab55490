"""A prompt set that Spark reads. Spark's workers validate the rows with the code of slm/prompts."""

import functools
import hashlib
import itertools
import json
import re
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm.base import strict_json
from slm.base.errors import BadInput
from slm.base.wording import quoted
from slm.engines.spark.spark_session import _reason, _spark_errors, session
from slm.prompts import prompt_rows, prompt_sets, readers, row_mapping, system_prompts
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.prompts.row_mapping import RowMapper, RowMapping
from slm.scorers import scorer_calls, user_scorers

FILE, PLACE = "file of the row", "place of the row"  # names that no column of a table has
SHOWN = 10_000  # answers that the driver holds, samples.jsonl lists and the report shows
BUCKET_ROWS = 16  # a bucket's prompts, until MOST_BUCKETS are reached; then they grow
MOST_BUCKETS = 1000
PART_BYTES = 4 * 2**20  # of the prompt set: what goes through the driver at once, which hashes it in its order

VALIDATED = (
    "file string, row long, where string, id string, own_id boolean, hash long, canonical string, unnamed boolean, "
    "unscorable array<struct<scorer: string, reason: string>>, seen array<struct<kind: string, name: string>>, "
    "error string"
)


@dataclass(frozen=True)
class SparkPromptSet(PromptSet):
    """`frame` has all validated prompts. `prompts` has the prompts whose answers the driver holds: all, or a sample."""

    frame: Any
    rows: int
    buckets: int
    last_shown: tuple[int, str] | None  # of the sample: hash and id of its last prompt in that order
    scorers: tuple  # input of `_asked` on a worker

    @property
    def is_whole(self) -> bool:
        return self.last_shown is None

    @property
    def count(self) -> int:
        return self.rows

    @property
    def scorer_names(self) -> frozenset[str] | None:
        return super().scorer_names if self.is_whole else None


# ---------------------------------------------------------------------------------------------------------------------
# The prompt set


def read_prompts(
    location: str,
    given: str,
    master: str,
    scorers: str = "",
    repeats: int = 1,
    mapping: RowMapping = row_mapping.NONE,
) -> SparkPromptSet:
    """Reads and validates the prompt set at `location` on the workers. The user wrote `given`.

    Several workers read JSONL (compressed or not) and Parquet. One worker reads a CSV file, since a quoted cell may
    have several lines.

    Raises:
        BadInput: the set does not exist, or a row is wrong. The message names the file and line of the first such row.
        Unavailable: Spark does not work.
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
        checked = raw.mapInArrow(lambda batches: _validated(batches, kind, before, spec, title, mapping), VALIDATED)
        checked.unpersist()  # the session may hold older content of this path
        checked.persist()
        left_out = _left_out(checked, mapping, name)
        size, unnamed = _refuse(checked, asked, name, title)
        parts = -(-size // PART_BYTES)
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
    return SparkPromptSet(
        title,
        given,
        shown,
        digest.hexdigest(),
        checked,
        rows,
        buckets,
        last,
        spec,
        unnamed=unnamed,
        left_out=left_out,
        system=mapping.system,
    )


def release(prompt_set: SparkPromptSet) -> None:
    """Frees the workers' memory."""
    prompt_set.frame.unpersist()


def _name(location: str) -> str:
    return urllib.parse.unquote(location.rstrip("/").rpartition("/")[2])


def _raw(spark, location: str, given: str, kind: str):
    """The raw rows with file and place, and the number of lines before each block of a file."""
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    try:
        if kind == "csv":
            return spark.read.format("binaryFile").load(location).select(F.col("path").alias("file"), "content"), {}
        if kind == "parquet":
            place = [F.col("_metadata.file_path").alias(FILE), F.col("_metadata.row_index").alias(PLACE)]
            return spark.read.parquet(location).select("*", *place), {}
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


def _refuse(checked, asked: scorer_calls.Asked, name: str, title: str) -> tuple[int, int]:
    """Raises BadInput for the first wrong row, for an id that is there twice, and for a set without rows.

    Gives the set's size in bytes, and how many rows expect a text and name no scorer.
    """
    from pyspark.sql import functions as F

    wrong = checked.filter("error is not null").orderBy("file", "row").select("error").head()
    if wrong is not None:
        raise BadInput(wrong.error)
    unnamed = F.count_if("unnamed")
    rows, size, unnamed = checked.agg(F.count("*"), F.sum(F.octet_length("canonical")), unnamed).head()
    if not rows:
        raise BadInput(f"{name}: no rows; write at least one prompt")
    places = F.array_sort(F.collect_list(F.struct("file", "row", "where", "own_id")))
    twice = checked.groupBy("id").agg(places.alias("places")).filter("size(places) > 1")
    first = twice.orderBy(F.col("places")[1]["file"], F.col("places")[1]["row"]).head()
    if first is not None:
        one, other = first.places[:2]
        remedy = "ids are unique: change one" if other.own_id else "remove one, or give each an `id`"
        place = one.where if one.file != other.file else one.where.removeprefix(f"{_name(one.file)} ")
        raise BadInput(f"{other.where}: `id` {quoted(first.id)} is already used in {place}; {remedy}")
    if asked.added:
        unscorable = checked.select(F.explode("unscorable").alias("pair")).groupBy("pair.scorer")
        for found in unscorable.agg(F.count("*").alias("rows"), F.first("pair.reason").alias("reason")).collect():
            if found.rows == rows:
                raise BadInput(found.reason)
    return size, unnamed


def _left_out(checked, mapping: RowMapping, name: str) -> tuple[str, ...]:
    """The columns that `fields` leaves out. Raises BadInput if no row has a mapped column, or a text to search."""
    from pyspark.sql import functions as F

    if mapping == row_mapping.NONE:
        return ()
    kinds = checked.select(F.explode("seen").alias("one")).select("one.kind", "one.name").distinct()
    found = kinds.orderBy("kind", "name").limit(row_mapping.MOST_NAMES + len(mapping.columns)).collect()
    noted = {(one.kind, one.name) for one in found}  # "found" is the first kind, so the limit leaves it whole
    left_out = row_mapping.left_out(noted, mapping) if noted else ()
    if mapping.expected_pattern and not checked.filter("error is not null").head():
        has_expected = "size(from_json(canonical, 'expected array<string>').expected) > 0"
        row_mapping.check_expected(mapping, checked.filter(has_expected).head() is not None, name)
    return left_out


def _validated(batches: Iterable, kind: str, before: dict, spec: tuple, title: str, mapping: RowMapping) -> Iterator:
    """On a worker: turns each row into a checked, canonical prompt with the added scorers, or into its error."""
    import pyarrow

    asked, text = _asked(spec), pyarrow.string()
    fields = {"file": text, "row": pyarrow.int64(), "where": text, "id": text, "own_id": pyarrow.bool_()}
    fields |= {"hash": pyarrow.int64(), "canonical": text, "unnamed": pyarrow.bool_()}
    fields |= {"unscorable": pyarrow.list_(pyarrow.struct({"scorer": text, "reason": text}))}
    fields |= {"seen": pyarrow.list_(pyarrow.struct({"kind": text, "name": text})), "error": text}
    schema = pyarrow.schema(fields)
    places, mapper = _places(batches, kind, before, mapping), RowMapper(mapping)
    while found := [_checked(*place, asked, title, mapper) for place in itertools.islice(places, 1000)]:
        yield pyarrow.RecordBatch.from_pylist(found, schema)


def _places(
    batches: Iterable, kind: str, before: dict, mapping: RowMapping
) -> Iterator[tuple[str, int, str, object, str | None]]:
    """Yields (file, row number, place for messages, row, error or None) for each record of Spark's batches."""
    records = (record for batch in batches for record in batch.to_pylist())
    if kind == "csv":
        for record in records:
            yield from _csv_places(record["file"], record["content"], mapping.theirs)
    elif kind == "parquet":
        for record in records:
            file, number = record.pop(FILE), record.pop(PLACE) + 1
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
            for _, row in readers.READERS[".jsonl"](text, name):
                yield record["file_path"], number, where, row, None
        except BadInput as error:
            yield record["file_path"], number, where, None, str(error).replace(f"{name} line 1:", f"{where}:", 1)


def _csv_places(file: str, content: bytes, mapped: frozenset[str]) -> Iterator[tuple]:
    name, number, read = _name(file), 0, readers.reader(".csv", mapped)
    assert read is not None
    try:
        if len(content) > readers.FILE_BYTES:
            raise BadInput(f"{name}: is larger than {readers.FILE_BYTES // 2**20} MiB; split it, or write JSONL")
        for place, row in read(_decoded(content, name, 1), name):
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
    """A record without nulls. `messages`, `scorers` and `response_format` may be JSON texts: a column has one type."""
    if isinstance(value, list):
        return [_parquet_row(item) for item in value]
    if not isinstance(value, dict):
        return value
    row = {key: _parquet_row(item) for key, item in value.items() if item is not None}
    for field in ("messages", "scorers", "response_format"):
        text = row.get(field)
        if isinstance(text, str) and text.startswith(("[", "{")):
            row[field] = strict_json.parse(text)
    return row


def _checked(
    file: str, number: int, where: str, row: object, error: str | None, asked, title: str, mapper: RowMapper
) -> dict:
    found = {"file": file, "row": number, "where": where, "error": error}
    if error:
        return found
    found["seen"] = [{"kind": kind, "name": name} for kind, name in row_mapping.seen(row, mapper.mapping)]
    try:
        row = mapper(row, where)
        prompt = system_prompts.added(prompt_rows.read_row(row, where, scorer_calls.IN_ROWS), mapper.mapping.system)
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
    [canonical] = prompt_rows.canonical_rows(prompt_sets.with_scorers(one, asked.added).prompts)
    return found | {
        "id": prompt.id,
        "own_id": isinstance(row, dict) and "id" in row,
        "hash": int(hashlib.sha256(prompt.id.encode()).hexdigest()[:12], 16),
        "canonical": json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
        "unscorable": unscorable,
        "unnamed": prompt_sets.gets_contains(row, prompt),
    }


def _prompt(canonical: dict) -> Prompt:
    """The prompt of a canonical row. The row was checked before. Some of its scorers may be unable to score it."""
    return Prompt(
        id=canonical["id"],
        messages=tuple(canonical["messages"]) if "messages" in canonical else None,
        prompt=canonical.get("prompt"),
        expected=tuple(canonical["expected"]),
        scorers=tuple(ScorerCall(name, options) for call in canonical["scorers"] for name, options in call.items()),
        cluster=canonical.get("cluster"),
        tags=tuple(canonical["tags"]),
        response_format=canonical.get("response_format"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Scorers


def _scorer_spec(parameter: str) -> tuple:
    """The `scorers` parameter with the content of its files, so that the workers need no copies."""
    from slm.models import checkpoints

    spec = []
    for item in filter(None, (item.strip() for item in parameter.split(","))):
        if user_scorers.is_spec(item):
            given, _, attribute = item.rpartition(":")
            path = checkpoints.located(given)
            assert path is not None  # scorer_calls.read has found the file
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
