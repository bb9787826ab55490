"""engine=spark: the same numbers as local, wrong rows by their line, lost workers and drivers, a real cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.commands import REPOSITORY, call, entry_point, free_port
from support.databases import sqlite_store
from support.effort import LONG

from entrypoints import evaluate
from slm.base.errors import BadInput
from slm.prompts import prompt_sets, row_mapping
from slm.scorers import scorer_calls

FLIPS = ("flips", "answers_changed")  # the first parts of metrics that need all answers

MODEL = """
import os, time
from pathlib import Path
import mlflow
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Slow(PythonModel):
    '''Repeats a number if its last digit is below {skill}, and writes down what it was asked and by whom.'''
    def predict(self, context, model_input, params=None):
        [text] = model_input["prompt"]
        with open("{log}", "a") as log:
            log.write(f"{{text}} {{os.getpid()}}\\n")
        time.sleep({delay})
        if Path("{log}.fail").exists() and text == "7":
            raise ValueError("seven is not answered")
        return [text if int(text) % 10 < {skill} else "no"]

set_model(Slow())
"""


def log_model(folder: Path, name: str, skill: int = 9, delay: float = 0.0) -> str:
    """A pyfunc model as MODEL has it, logged to the current store; its URI. What it was asked is in folder/name.log."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    code = folder / f"{name}.py"
    code.write_text(MODEL.format(skill=skill, delay=delay, log=folder / f"{name}.log"), encoding="utf-8")
    text = ModelSignature(Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]))
    return mlflow.pyfunc.log_model(name=name, python_model=str(code), pip_requirements=[], signature=text).model_uri


def asked(folder: Path, name: str) -> list[int]:
    return [int(line.split()[0]) for line in (folder / f"{name}.log").read_text().splitlines()]


def write_numbers(file: Path, count: int, clusters: int = 0) -> Path:
    rows = [{"id": f"q{n}", "prompt": str(n), "expected": str(n), "scorers": ["exact_match"]} for n in range(count)]
    for n, row in enumerate(rows):
        row |= {"cluster": f"c{n % clusters}"} if clusters and n % 3 else {}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def untimed(run) -> dict[str, float]:
    timed = ("latency", "output_tokens_per_second", "model_load", "peak_memory", "system/")
    return {name: value for name, value in run.data.metrics.items() if not name.startswith(timed)}


def samples(run) -> list[dict]:
    import mlflow

    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/evaluation/samples.jsonl")
    return [json.loads(line) | {"latency_seconds": 0} for line in text.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _java_compiles_little(tmp_path_factory):
    """Spark's defaults for each JVM here. Each lives for a minute, so its second compiler costs more than it saves."""
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    folder = tmp_path_factory.mktemp("spark-conf")
    lines = (f"spark.{role}.extraJavaOptions {quick}\n" for role in ("driver", "executor"))
    (folder / "spark-defaults.conf").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        patch.setenv("SPARK_DAEMON_JAVA_OPTS", quick)
        yield


@pytest.fixture(scope="module")
def session(all_cores_for_module):
    """A Spark session on two cores of this machine, the one that evaluations find."""
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"], os.environ["SPARK_LOCAL_IP"] = sys.executable, "127.0.0.1"
    builder = SparkSession.builder.master("local[2,4]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.sql.shuffle.partitions", "4").config("spark.ui.showConsoleProgress", "false")
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("FATAL")
    yield spark
    spark.stop()


@pytest.fixture
def run(session, tmp_path, monkeypatch, capsys):
    """Runs `evaluate` in this process on a store of the test's own; its exit code, output and runs by label."""
    import mlflow

    uri = sqlite_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("spark", artifact_location=str(tmp_path / "artifacts"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "spark")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def evaluated(**options):
        code = evaluate.main(
            [f"--{name}={value}" for name, value in ({"traces": "false", "trust_code": "true"} | options).items()]
        )
        out, err = capsys.readouterr()
        found = re.search(r"run: (\w+)", out)
        query = f"tags.`mlflow.parentRunId` = '{found[1] if found else ''}'"
        children = mlflow.search_runs(filter_string=query, output_format="list")
        return code, out + err, {child.info.run_name: child for child in children}

    yield evaluated
    for number, handler in handlers.items():
        signal.signal(number, handler)
    mlflow.set_tracking_uri(None)


# The prompt set -------------------------------------------------------------------------------------------------------


def read(location, **options):
    from slm.engines.spark import prompt_frame

    return prompt_frame.read_prompts(f"file://{location}", str(location), "", **options)


def test_a_prompt_set_is_the_same_one_that_is_read_locally(session, tmp_path):
    file = REPOSITORY / "prompts" / "general.jsonl"
    expected, found = prompt_sets.read_prompt_set(file, str(file), scorer_calls.IN_ROWS), read(file)
    assert (found.sha256, found.prompts, found.rows) == (expected.sha256, expected.prompts, len(expected.prompts))


def test_a_large_prompt_set_comes_through_the_driver_in_small_parts_and_in_its_order(session, tmp_path, monkeypatch):
    from pyspark import RDD

    from slm.engines.spark import prompt_frame

    file = write_numbers(tmp_path / "numbers.jsonl", 3000)
    parts = []
    whole = RDD.toLocalIterator

    def noted(lines, **words):
        parts.extend(lines.glom().map(lambda part: sum(map(len, part))).collect())
        return whole(lines, **words)

    monkeypatch.setattr(RDD, "toLocalIterator", noted)
    monkeypatch.setattr(prompt_frame, "PART_BYTES", 20_000)
    assert read(file).sha256 == prompt_sets.read_prompt_set(file, "", scorer_calls.IN_ROWS).sha256
    assert len(parts) > 10 and max(parts) < 2 * 20_000  # Spark draws the borders from a sample


def test_a_prompt_set_that_is_released_leaves_nothing_in_the_driver(session, tmp_path):
    """Spark 4.3 keeps what a DataFrame's toLocalIterator has brought, all of it, for as long as the driver lives."""
    from slm.engines.spark import prompt_frame

    file, long = tmp_path / "long.jsonl", "x" * 4000
    file.write_text(
        "".join(json.dumps({"id": f"q{n}", "prompt": f"{long}{n}"}) + "\n" for n in range(12_000)), encoding="utf-8"
    )  # 48 MB
    machine = session._jvm.java.lang.Runtime.getRuntime()

    def used() -> int:
        session._jvm.System.gc()
        return machine.totalMemory() - machine.freeMemory()

    before = used()
    prompt_frame.release(read(file))
    wait_for(lambda: used() - before < 16 * 2**20, 30)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl.gz", "folder"])
def test_csv_parquet_packed_files_and_folders_are_read_too(session, tmp_path, kind):
    import gzip

    import pandas

    rows = [
        {"id": f"q{n}", "prompt": f"line one,\nline {n}", "expected": ["a", "b"], "scorers": ["contains"]}
        for n in range(20)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "local.jsonl").write_text(lines)
    location = tmp_path / f"set of 20.{kind}"
    if kind == "csv":
        table = [row | {"expected": "|".join(row["expected"]), "scorers": "contains"} for row in rows]
        pandas.DataFrame(table).to_csv(location, index=False)
    elif kind == "parquet":
        pandas.DataFrame([row | {"tags": None} for row in rows]).to_parquet(location)
    elif kind == "folder":
        location = tmp_path / "set of 20.jsonl"
        location.mkdir()
        parts = lines.splitlines(keepends=True)
        (location / "part-0").write_text("".join(parts[:7]))
        (location / "part-1").write_text("".join(parts[7:]))
    else:
        location.write_bytes(gzip.compress(lines.encode()))
    found = read(location)
    assert found.sha256 == prompt_sets.read_prompt_set(tmp_path / "local.jsonl", "", scorer_calls.IN_ROWS).sha256
    assert found.name == "set of 20"


GOOD = b'{"id": "%d", "prompt": "What is it?"}\n'


@pytest.mark.parametrize(
    ("suffix", "wrong"),
    [
        ("jsonl", b'{"prompt": "x", "scorer": "regex"}\n'),
        ("jsonl", b'{"prompt": "x"\n'),
        ("jsonl", b'{"prompt": "x", "scorers": ["regexp"]}\n'),
        ("jsonl", b'{"prompt": "x", "expected": "a", "scorers": [{"regex": {"pattern": "("}}]}\n'),
        ("jsonl", b'{"prompt": "caf\xe9"}\n'),
        ("jsonl", b'{"id": "3", "prompt": "x"}\n'),
        ("csv", b"x,y,z\n"),
        ("csv", b'"x\n'),
    ],
)
def test_a_wrong_row_is_told_in_the_words_of_a_local_run_with_its_line(session, tmp_path, suffix, wrong):
    file = tmp_path / f"set.{suffix}"
    head = b"" if suffix == "jsonl" else b"id,prompt\n"
    good = [GOOD % n if suffix == "jsonl" else b"%d,What is it?\n" % n for n in range(200)]
    file.write_bytes(head + b"".join(good[:150]) + b"\n" + wrong + b"".join(good[150:]))
    with pytest.raises(BadInput) as local:
        prompt_sets.read_prompt_set(file, "", scorer_calls.IN_ROWS)
    session.conf.set("spark.sql.files.maxPartitionBytes", "1000")  # the line is in a later part of the file
    try:
        with pytest.raises(BadInput) as raised:
            read(file)
    finally:
        session.conf.unset("spark.sql.files.maxPartitionBytes")
    assert str(raised.value) == str(local.value)


def test_a_wrong_parquet_row_is_told_with_its_number(session, tmp_path):
    import pandas

    file = tmp_path / "set.parquet"
    pandas.DataFrame({"id": ["a", "b", "c"], "prompt": ["x", " ", "x"]}).to_parquet(file)
    with pytest.raises(BadInput) as raised:
        read(file)
    assert str(raised.value) == "set.parquet row 2: `prompt` is ' ', an empty text; write something or leave it out"


GSM = [
    {"nr": n, "inputs": {"question": f"What is {n} + {n}?"}, "answer": f"so\n#### {2 * n}", "file_path": "x"}
    for n in range(40)
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_mapped_columns_and_the_kept_part_are_those_of_a_local_run(session, tmp_path, kind):
    import pandas

    fields, file = "inputs.question:prompt,answer:expected,nr:id", tmp_path / f"set.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in GSM)
    (tmp_path / "local.jsonl").write_text(lines)
    if kind == "parquet":
        pandas.DataFrame(GSM).to_parquet(file)
    elif kind == "jsonl":
        file.write_text(lines)
    else:
        named = [{"inputs.question": row["inputs"]["question"]} | row for row in GSM]
        pandas.DataFrame(named).drop(columns="inputs").to_csv(file, index=False)
    mapping = row_mapping.read(fields, "#### (.+)")
    local = prompt_sets.read_prompt_set(tmp_path / "local.jsonl", "", scorer_calls.IN_ROWS, mapping)
    found = read(file, mapping=mapping)
    assert (found.sha256, found.prompts, found.left_out) == (local.sha256, local.prompts, ("file_path",))
    assert found.unnamed == local.unnamed == 40  # these get `contains`, and a run says so


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ("inputs.qestion:prompt,answer:expected", ""),
        ("inputs.question:prompt,answer:expected", "#### ([0-5])$"),
        ("inputs.question:prompt", r"\d"),
        ("answer:prompt,nr:tags,gone:id", ""),
        ("", ""),
    ],
)
def test_a_wrong_mapping_is_told_in_the_words_of_a_local_run(session, tmp_path, fields, pattern):
    file, mapping = tmp_path / "set.jsonl", row_mapping.read(fields, pattern)
    file.write_text("".join(json.dumps(row) + "\n" for row in GSM))
    with pytest.raises(BadInput) as local:
        prompt_sets.read_prompt_set(file, "", scorer_calls.IN_ROWS, mapping)
    with pytest.raises(BadInput) as raised:
        read(file, mapping=mapping)
    assert str(raised.value) == str(local.value)


def test_traffic_and_a_system_prompt_are_those_of_a_local_run(session, tracking, tmp_path):
    from slm.base import parameters
    from slm.engines import local
    from slm.engines.spark import engine

    location = tracking.entities.trace_location.MlflowExperimentLocation(tracking.create_experiment("traffic"))
    own = [{"role": "system", "content": "Be long."}]
    for begin, river in (([], "Rhine"), ([], "Ebro"), (own, "Po")):
        with tracking.start_span("chat", trace_destination=location) as span:
            span.set_inputs({"messages": [*begin, {"role": "user", "content": f"Where does the {river} end?"}]})
    tracking.flush_trace_async_logging()
    (tmp_path / "system.txt").write_text("Be brief.\n")
    given = ["--prompts=traces:traffic", f"--system_prompt={tmp_path / 'system.txt'}"]
    args = parameters.parse("evaluate", "", given)
    ours, theirs = engine.read_prompts(args), local.read_prompts(args)
    assert ours.sha256 == theirs.sha256 and ours.prompts == theirs.prompts and ours.system == theirs.system
    assert sorted(prompt.messages[0]["content"] for prompt in ours.prompts) == ["Be brief.", "Be brief.", "Be long."]


def test_added_scorers_are_those_of_a_local_run(session, tmp_path):
    file = tmp_path / "set.jsonl"
    rows = [{"prompt": "x", "expected": "B"}, {"prompt": "z"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text("def polite(outputs):\n    return True\n")
    parameter = f"{tmp_path}/own.py:polite,choice"
    local = scorer_calls.add(scorer_calls.read(parameter), prompt_sets.read_prompt_set(file, "", scorer_calls.IN_ROWS))
    found = read(file, scorers=parameter)
    assert (found.sha256, found.prompts) == (local.sha256, local.prompts)
    file.write_text('{"prompt": "z"}\n')
    with pytest.raises(BadInput, match="scorers: choice can score no row of set: "):
        read(file, scorers=parameter)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"judge": "openai:/gpt-4o-mini"}, "judge: is not asked from Spark's workers"),
        (
            {"model_uris": "http://127.0.0.1:9/v1#m"},
            "engine: spark scores logged models, and http://127.0.0.1:9/v1#m is",
        ),
        ({"engine": "local", "spark_master": "local[2]"}, "spark_master: 'local[2]' needs engine=spark"),
        ({"spark_master": "local[7]"}, "spark_master: 'local[7]' is not that of the session that is there"),
        ({"prompts": "gone.jsonl"}, "prompts: 'gone.jsonl' does not exist"),
        ({"prompts": "file:///gone.jsonl"}, "prompts: 'file:///gone.jsonl' can't be read by Spark: "),
        ({"prompts": "hdfs:///set.yaml"}, "prompts: 'hdfs:///set.yaml' is no .jsonl, .csv or .parquet file or folder"),
    ],
)
def test_what_spark_can_not_do_is_one_line(run, options, line):
    code, out, _ = run(**{"engine": "spark", "model_uris": "models:/m-1"} | options)
    assert (code, out.count("\n")) == (2, 1), out
    assert out.startswith(f"error: {line}"), out


def test_without_pyspark_one_line_says_what_to_install(monkeypatch):
    from slm.engines.spark import spark_session

    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(BadInput, match=r"needs pyspark, .*; pip install -r requirements-spark.txt -c constraints.txt"):
        spark_session.session("")


# Scoring --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spark_gives_the_samples_and_metrics_of_a_local_run(run, int4_export, tmp_path):
    import mlflow

    from slm.models import model_logging

    options = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}
    with mlflow.start_run():
        uri = model_logging.log_onnx(int4_export, "chat", options, "int4").model_uri
    prompts = tmp_path / "general.jsonl"
    lines = (REPOSITORY / "prompts" / "general.jsonl").read_text("utf-8").splitlines(keepends=True)
    prompts.write_text("".join(lines[: 150 if LONG else 60]), "utf-8")  # 60 are four buckets, for two workers
    asked = {"model_uris": uri, "prompts": prompts, "max_tokens": 8}
    _, out, local = run(**asked)
    code, out, spark = run(engine="spark", **asked)
    assert code == 0, out
    assert samples(spark[uri]) == samples(local[uri])
    assert untimed(spark[uri]) == untimed(local[uri])
    same = ("prompts.sha256", "model.sha256", "model.uri", "model.name", "fingerprint", "outputs.sha256")
    assert {name: spark[uri].data.tags[name] for name in same} == {name: local[uri].data.tags[name] for name in same}
    assert spark[uri].data.metrics["output_tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_spark_gives_the_fidelity_of_a_local_run(run, int4_export, int8_export, tmp_path, temperature):
    import mlflow

    from slm.models import model_logging

    options = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}
    with mlflow.start_run():
        exports = ((int4_export, "int4"), (int8_export, "int8"))
        uris = [model_logging.log_onnx(export, "chat", options, name).model_uri for export, name in exports]
    prompts = tmp_path / "general.jsonl"
    lines = (REPOSITORY / "prompts" / "general.jsonl").read_text("utf-8").splitlines(keepends=True)
    prompts.write_text("".join(lines[:20]), "utf-8")  # two buckets
    asked = {"model_uris": uris[0], "baseline": uris[1], "prompts": prompts, "max_tokens": 8}
    asked |= {"temperature": temperature}
    if not temperature:
        texts = tmp_path / "texts.jsonl"
        rows = ({"text": f"Rain falls on {place} today, and nobody minds."} for place in ("Oslo", "Lima", "Rome"))
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        asked["texts"] = texts
    measured = ("fidelity/", "nll/", "perplexity")
    _, _, local = run(**asked)
    for repeated in range(1 if temperature else 2):  # the second time, the answers are those of the first
        code, out, spark = run(engine="spark", **asked)
        assert code == 0, out
        assert ("answers are reused" in out) == bool(repeated), out
        ours, theirs = (
            {name: value for name, value in found[uris[0]].data.metrics.items() if name.startswith(measured)}
            for found in (spark, local)
        )
        assert len(ours) == (11 if temperature else 28) and ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
        baseline = (found[uris[1]].data.metrics.get("perplexity") for found in (spark, local))
        assert next(baseline) == (None if temperature else pytest.approx(next(baseline), rel=1e-4))


@pytest.mark.slow
def test_a_table_of_other_columns_is_evaluated_as_its_rows_in_our_own_form_are(run, tmp_path):
    import mlflow
    import pandas

    theirs = [{"question": str(n), "answer": f"it is {n}", "solution": "s", "source": "x"} for n in range(20)]
    pandas.DataFrame(theirs).to_parquet(tmp_path / "set.parquet")
    ours = [{"prompt": str(n), "expected": str(n)} for n in range(20)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    uri = log_model(tmp_path, "model")
    _, out, local = run(model_uris=uri, prompts=tmp_path / "set.jsonl")
    assert "left out" not in out
    mapped = {"fields": "question:prompt,answer:expected", "expected_pattern": r"\d+"}
    code, out, spark = run(engine="spark", model_uris=uri, prompts=tmp_path / "set.parquet", **mapped)
    assert code == 0 and out.count("set: left out: solution, source\n") == 1, out
    assert samples(spark[uri]) == samples(local[uri])
    assert spark[uri].data.tags["prompts.sha256"] == local[uri].data.tags["prompts.sha256"]
    parent = mlflow.get_run(spark[uri].data.tags["mlflow.parentRunId"])
    assert mapped.items() <= parent.data.params.items()
    record = mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/evaluation/environment.json")
    assert "-P fields=question:prompt,answer:expected -P 'expected_pattern=\\d+'" in record["again"]


@pytest.mark.slow
def test_what_is_too_much_for_the_driver_comes_as_sums_and_a_sample(run, tmp_path, monkeypatch):
    import mlflow
    import pandas

    from slm.engines.spark import prompt_frame

    numbers = write_numbers(tmp_path / "numbers.jsonl", 120, clusters=30)
    uris = [log_model(tmp_path, f"model{skill}", skill) for skill in (9, 6)]
    options = {"model_uris": uris[1], "baseline": uris[0], "prompts": numbers, "repeats": 2, "temperature": 0.5}
    _, _, local = run(**options)
    monkeypatch.setattr(prompt_frame, "SHOWN", 40)
    code, out, found = run(engine="spark", **options)
    assert code == 0, out
    assert "of 240 answers, samples.jsonl and the report show 40; all are in evaluation/samples.parquet" in out
    for uri in uris:
        assert len(untimed(local[uri])) > 10
        # a flip is a pair of answers, and not all answers are at hand
        summed = {name: value for name, value in untimed(local[uri]).items() if name.split("/")[0] not in FLIPS}
        assert untimed(found[uri]) == pytest.approx(summed, rel=1e-9)
        assert found[uri].data.tags["prompts.sha256"] == local[uri].data.tags["prompts.sha256"]
        shown, every = samples(found[uri]), samples(local[uri])
        assert len(shown) == 40 and all(sample in every for sample in shown)
        folder = mlflow.artifacts.download_artifacts(f"{found[uri].info.artifact_uri}/evaluation/samples.parquet")
        table = pandas.read_parquet(folder)
        expected = {(sample["id"], sample["repeat"], sample["output"]) for sample in every}
        assert set(zip(table["id"], table["repeat"], table["output"], strict=True)) == expected
    assert {sample["id"] for sample in samples(found[uris[0]])} == {sample["id"] for sample in samples(found[uris[1]])}


@pytest.mark.slow
def test_a_row_that_fails_is_a_row_with_an_error_and_alone_is_asked_again(run, tmp_path):
    numbers, uri = write_numbers(tmp_path / "numbers.jsonl", 40), log_model(tmp_path, "model")
    options = {"engine": "spark", "model_uris": uri, "prompts": numbers}
    (tmp_path / "model.log.fail").touch()
    _, _, first = run(**options)
    [failed] = [sample for sample in samples(first[uri]) if sample["error"]]
    assert (failed["id"], failed["error"]["message"]) == ("q7", "seven is not answered")
    assert first[uri].data.metrics["rows_failed"] == 1
    assert sorted(asked(tmp_path, "model")) == list(range(40))
    (tmp_path / "model.log.fail").unlink()
    _, out, second = run(**options)
    assert second[uri].data.metrics["rows_failed"] == 0
    assert "39 of 40 answers are reused" in out
    assert asked(tmp_path, "model")[40:] == [7]
    measured = {"output_tokens_per_second", "latency_seconds/p50", "latency_seconds/p95", "peak_memory_bytes"}
    assert not measured & set(second[uri].data.metrics)
    assert "no speed, latency or memory, because 39 of 40 answers are reused; resume=false measures them" in out
    _, out, third = run(**options)  # all answers are kept now, of two runs
    assert not measured & set(third[uri].data.metrics)
    assert "no speed, latency or memory, because no one run gave exactly these answers" in out
    run(**options, resume="false")
    assert sorted(asked(tmp_path, "model")[41:]) == list(range(40))


@pytest.mark.slow
@pytest.mark.fault("storage: the memory of Spark's driver at its end")
def test_a_driver_whose_jvm_runs_out_of_memory_ends_in_one_line():
    """Without ExitOnOutOfMemoryError a thread of it dies alone, and the evaluation waits for ever."""
    code = (
        "from slm.base import errors\nfrom slm.engines.spark import spark_session\n"
        "context = spark_session.session('').sparkContext\n"
        "try:\n"
        "    with spark_session._spark_errors(): context._jvm.java.nio.ByteBuffer.allocate(2**31 - 1)\n"
        "except errors.Unavailable as error: print(error)\n"
    )
    done = call(sys.executable, "-c", code, SPARK_DRIVER_MEMORY="600m")
    line = "spark: the memory of the driver's JVM is used up; give it more, SPARK_DRIVER_MEMORY=4g"
    assert done.out.splitlines()[-1] == line, done.err


# Faults ---------------------------------------------------------------------------------------------------------------


def wait_for(what, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def markers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("_bucket-*.json"))


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_resumes_from_the_parts_that_are_done(run, tmp_path):
    numbers, uri = write_numbers(tmp_path / "numbers.jsonl", 160), log_model(tmp_path, "model", delay=0.1)
    options = {"model_uris": uri, "prompts": numbers, "engine": "spark"}
    command = [sys.executable, "-m", "entrypoints.evaluate", "--spark_master=local[2,4]", "--traces=false"]
    command.append("--trust_code=true")
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"MLFLOW_EXPERIMENT_NAME": "spark"}
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: driver.poll() is not None or len(markers(tmp_path / "artifacts")) >= 3)
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    workers = {line.split()[1] for line in (tmp_path / "model.log").read_text().splitlines()}
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # they may finish what they are at
    sizes = {file.name: json.loads(file.read_text())["rows"] for file in markers(tmp_path / "artifacts")}
    before, kept = len(asked(tmp_path, "model")), sum(sizes.values())
    code, out, found = run(**options)
    assert code == 0, out
    assert f"{kept} of 160 answers are reused" in out and 0 < kept < 160, out
    again = asked(tmp_path, "model")[before:]
    assert len(again) == 160 - kept
    assert [sample["id"] for sample in samples(found[uri])] == [f"q{n}" for n in range(160)]
    assert found[uri].data.metrics["exact_match/mean"] == pytest.approx(0.9)


@pytest.fixture
def cluster(session, tmp_path):
    """A standalone master and two workers with a core each, every one with a cache of its own; gives its URL."""
    import pyspark

    session.stop()  # there is one session in a process
    home, port = Path(pyspark.__file__).parent, free_port()
    base = os.environ | {
        "SPARK_HOME": str(home),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_DAEMON_MEMORY": "256m",
    }
    started = []

    def start(name, *words, **extra):
        command = [home / "bin" / "spark-class", f"org.apache.spark.deploy.{name}", "--host", "127.0.0.1", *words]
        with (tmp_path / f"{len(started)}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*map(str, command)], env=base | extra, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                )
            )

    url = f"spark://127.0.0.1:{port}"
    try:
        start("master.Master", "--port", port, "--webui-port", free_port())
        wait_for(lambda: "I have been elected leader" in (tmp_path / "0.log").read_text())
        for number in (1, 2):
            folder = tmp_path / f"worker{number}"
            words = ["--webui-port", free_port(), "--cores", 1, "--memory", "1g", "--work-dir", folder, url]
            start("worker.Worker", *words, PHI3_MLFLOW_CACHE=str(folder / "cache"))
        wait_for(lambda: (tmp_path / "0.log").read_text().count("Registering worker") == 2)
        yield url
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_cluster_of_which_a_worker_is_killed_gives_the_local_result(cluster, tracking_server, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    mlflow.set_tracking_uri(tracking_server)
    experiment = mlflow.create_experiment(tmp_path.name)
    numbers, uri = write_numbers(tmp_path / "numbers.jsonl", 160), log_model(tmp_path, "model", delay=0.1)
    killed = []

    def parent(pid: int) -> int:
        return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])

    def kill():
        """Kills a worker and its executor, when both workers have finished a bucket (22 prompts at most)."""
        log = tmp_path / "model.log"

        def counts() -> Counter:
            return Counter(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else Counter()

        wait_for(lambda: len(counts()) >= 2 and min(counts().values()) > 22)
        python = int(log.read_text().splitlines()[-1].split()[1])
        executor = parent(parent(python))  # a daemon is between them
        for pid, name in ((parent(executor), b"deploy.worker.Worker"), (executor, b"CoarseGrainedExecutorBackend")):
            assert name in Path(f"/proc/{pid}/cmdline").read_bytes()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    options = [f"--model_uris={uri}", f"--prompts={numbers}", "--traces=false", "--trust_code=true"]
    done = entry_point(
        "evaluate", *options, "--engine=spark", f"--spark_master={cluster}",
        SPARK_LOCAL_IP="127.0.0.1", PYSPARK_PYTHON=sys.executable,
    )  # fmt: skip
    killer.join()
    assert done.code == 0, done.out + done.err
    assert len(killed) == 2 and len(asked(tmp_path, "model")) > 160  # what it was at was asked again
    local = entry_point("evaluate", *options, PHI3_MLFLOW_CACHE=str(tmp_path / "local"))
    assert local.code == 0, local.out + local.err
    by_engine = {
        run.data.tags.get("engine", "local"): run
        for run in mlflow.search_runs([experiment], "tags.`model.uri` != ''", output_format="list")
    }
    assert samples(by_engine["spark"]) == samples(by_engine["local"])
    assert untimed(by_engine["spark"]) == untimed(by_engine["local"])
    folder = Path(
        mlflow.artifacts.download_artifacts(f"{by_engine['spark'].info.artifact_uri}/evaluation/samples.parquet")
    )
    told = [json.loads(file.read_text()) for file in markers(folder)]
    assert sum(marker["rows"] for marker in told) == 160
    assert len({marker["worker"] for marker in told}) >= 2
    for number in (1, 2):  # the model came from the server, once to each cache
        assert len([path for path in (tmp_path / f"worker{number}" / "cache").rglob("MLmodel")]) == 1
    mlflow.set_tracking_uri(None)
    shutil.rmtree(folder)
