"""Estimates and differences from sums, for more answers than the driver can hold."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slm.engines.spark.job import Job, job
from slm.engines.spark.prompt_frame import SparkPromptSet
from slm.engines.spark.spark_session import _spark_errors
from slm.engines.spark.worker import VALUES, _read, _value, _values
from slm.verdict import estimation, scored_model, statistics

PERCENTILE_ACCURACY = 10_000  # beyond SHOWN: a percentile's rank is off by 1/10,000 of the answers at most


@dataclass(frozen=True)
class SparkScoredModel(scored_model.ScoredModel):
    """`samples` has the shown answers. All answers are in the run's artifacts, one file per bucket."""

    run_id: str = ""
    buckets: tuple[int, ...] = ()
    prompt_set: SparkPromptSet = field(kw_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sums of what is too large for the driver


def _estimates(
    prompt_set: SparkPromptSet, job: Job, buckets: tuple[int, ...]
) -> tuple[dict[str, statistics.Estimate], dict[str, float]]:
    """Each scorer's estimate over all prompts, and the percentiles of the latency in seconds."""
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
    """For each scorer, candidate minus baseline over the prompts with scores of both, as `estimation.differences`."""
    from pyspark.sql import functions as F

    prompt_set = candidate.prompt_set
    if prompt_set.is_whole:
        return estimation.differences(candidate, baseline, prompt_set)
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
    """A data frame of the rows that `rows_of` makes from bucket numbers. The workers make the rows."""

    def made(batches):
        import pyarrow

        kinds = {"string": pyarrow.string(), "double": pyarrow.float64(), "boolean": pyarrow.bool_()}
        schema = pyarrow.schema({name: kinds[kind] for name, kind in map(str.split, VALUES.split(", "))})
        for batch in batches:
            for rows in rows_of([buckets[place] for place in batch.column(0).to_pylist()]):
                yield pyarrow.RecordBatch.from_pylist(rows, schema)

    return prompt_set.frame.sparkSession.range(0, len(buckets), 1, len(buckets)).mapInArrow(made, VALUES)


def _gaps(job: Job, runs: tuple[str, str], buckets: Iterable[int]) -> Iterator[list[dict]]:
    """On a worker: yields the difference of each prompt and scorer that both runs have."""
    import numpy

    for bucket in buckets:
        (ours, clusters), (theirs, _) = (_read(job, run_id, bucket) for run_id in runs)
        graded = estimation.graded(ours) | estimation.graded(theirs)
        new, old = scored_model.values_by_scorer(ours), scored_model.values_by_scorer(theirs)
        rows = []
        for name in new.keys() & old.keys():
            for id in new[name].keys() & old[name].keys():
                pair = new[name][id], old[name][id]
                binary, unit = all(value in (0, 1) for value in pair), all(0 <= value <= 1 for value in pair)
                gap = float(numpy.round(pair[0] - pair[1], 12))
                rows.append(_value(name, id, clusters, gap, binary, unit, name in graded))
        yield rows


def _summed(values) -> dict[str, statistics.Sums]:
    """The sums of each name's values. If a bucket has scores other than 0 and 1, pass@k is left out."""
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
