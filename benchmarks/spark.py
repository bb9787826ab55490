"""What engine=spark makes of more workers and of more rows, on clusters that this script starts on loopback.

    python -m benchmarks.spark                 rows per second: the int4 model on 1 and 2 workers, a model that only
                                               waits (DELAY) on 1, 2 and 4
    python -m benchmarks.spark --memory        the driver's memory at 10,000 and 1,000,000 rows (a quarter of an hour)
    python -m benchmarks.spark --udf           the int4 model by mlflow.pyfunc.spark_udf and by mapInArrow

Each worker is a standalone Spark worker with one core, and so one Python process and one model; the models come from an
`mlflow server`. Imports, Spark's start and the model's loading are left out: the seconds are those of the scoring job,
told by the log's `Scoring` line. The waiting model sleeps, so that more workers than cores can be simulated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from benchmarks.overhead import server
from slm.models import checkpoints, model_logging, onnx_export
from slm.tracking import mlflow_client

DELAY = 0.05  # seconds a row
DRIVER = "512m"  # of heap, for --memory
WAITING = """
import time
import mlflow
import pandas

class Waiting(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pandas.DataFrame, params=None):
        time.sleep({delay})
        return model_input["prompt"].tolist()

mlflow.models.set_model(Waiting())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--udf", action="store_true")
    args = parser.parse_args()
    os.environ.update(SPARK_LOCAL_IP="127.0.0.1", PYSPARK_PYTHON=sys.executable)
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch, server(Path(scratch)) as uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        mlflow_client.quiet_mlflow().set_tracking_uri(uri)
        if args.memory:
            memory(Path(scratch))
        elif args.udf:
            udf(Path(scratch))
        else:
            speed(Path(scratch))


def speed(scratch: Path) -> None:
    table = Table(title=f"engine=spark, {os.cpu_count()} cores")
    for column in ("model", "workers", "rows", "rows/s", "/ one worker's"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model, rows, counts in (
        ("int4", embedded(), first_prompts.ROWS, (1, 2)),
        (f"waits {DELAY} s", waiting(scratch, DELAY), 800, (1, 2, 4)),
    ):
        prompts = first_prompts.written(scratch) if name == "int4" else written(scratch, rows)
        first = None
        for workers in counts:
            with cluster(scratch, workers) as master:
                seconds, _ = scored(model, prompts, master, "--max_tokens=32")
            first = first or rows / seconds
            table.add_row(name, str(workers), f"{rows:,}", f"{rows / seconds:.1f}", f"{rows / seconds / first:.2f}")
    Console(width=100).print(table)


def memory(scratch: Path) -> None:
    """The driver's Python process and its JVM, at their peaks; the workers are processes of their own.

    A JVM fills the heap it is allowed before it collects garbage (1 GB by Spark's default): so it is allowed DRIVER,
    the least that Spark takes. What it holds is what full collections leave, one in five idle seconds ("JVM, held").
    """
    log = scratch / "gc.log"
    os.environ["SPARK_DRIVER_MEMORY"] = DRIVER
    os.environ["SPARK_SUBMIT_OPTS"] = (
        f"-Xlog:gc:file={log} -XX:G1PeriodicGCInterval=5000 -XX:-G1PeriodicGCInvokesConcurrent"
    )
    table = Table(title="the driver's peak memory")
    for column in ("rows", "Python", "JVM", "JVM, held", "rows/s", "seconds in all"):
        table.add_column(column, justify="right")
    model = waiting(scratch, 0)
    for rows in (10_000, 1_000_000):
        prompts = written(scratch, rows)
        with cluster(scratch, 2) as master:
            start = time.perf_counter()
            seconds, peaks = scored(model, prompts, master)
            total = time.perf_counter() - start
        left = re.findall(r"Pause Full.*->(\d+)M", log.read_text(encoding="utf-8"))
        sizes = [f"{peak / 1e6:,.0f} MB" for peak in (*peaks, max(map(int, left)) * 2**20)]
        table.add_row(f"{rows:,}", *sizes, f"{rows / seconds:.0f}", f"{total:.0f}")
    Console(width=100).print(table)


def udf(scratch: Path) -> None:
    """Seconds for 150 prompts twice over in one session: spark_udf, then the engine's own way."""
    import mlflow
    from pyspark.sql import SparkSession

    model, prompts = embedded("prompt"), first_prompts.written(scratch)
    with cluster(scratch, 2) as master:
        spark = SparkSession.builder.master(master).config("spark.ui.showConsoleProgress", "false").getOrCreate()
        spark.sparkContext.setLogLevel("FATAL")
        rows = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
        texts = [(row["messages"][-1]["content"] if "messages" in row else row["prompt"],) for row in rows]
        frame = spark.createDataFrame(texts, "prompt string").repartition(10).cache()
        frame.count()
        for turn in (1, 2):
            start = time.perf_counter()
            answer = mlflow.pyfunc.spark_udf(spark, model, result_type="string", params={"max_tokens": 32})
            frame.select(answer("prompt")).collect()
            print(f"spark_udf, turn {turn}: {time.perf_counter() - start:.1f} s")
        spark.stop()
        seconds, _ = scored(model, prompts, master, "--max_tokens=32")
        print(f"engine=spark, scores and samples included: {seconds:.1f} s")


def embedded(schema: str = "chat") -> str:
    import mlflow

    export = onnx_export.export(checkpoints.find("smollm2-135m-instruct").fetch(), "int4", "cpu")
    options = {"max_tokens": 32, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}
    with mlflow.start_run():
        return model_logging.log_onnx(export, schema, options, "int4").model_uri


def waiting(scratch: Path, delay: float) -> str:
    import mlflow
    import pandas

    code = scratch / "waiting.py"
    code.write_text(WAITING.format(delay=delay), encoding="utf-8")
    with mlflow.start_run():
        example = pandas.DataFrame({"prompt": ["What comes after 1?"]})
        return mlflow.pyfunc.log_model(name="waiting", python_model=str(code), input_example=example).model_uri


def written(scratch: Path, rows: int) -> Path:
    file = scratch / f"{rows}.jsonl"
    with file.open("w") as out:
        for n in range(rows):
            row = {"id": f"q{n}", "prompt": f"What comes after {n}?", "expected": str(n), "scorers": ["contains"]}
            out.write(json.dumps(row) + "\n")
    return file


def scored(model: str, prompts: Path, master: str, *options: str) -> tuple[float, tuple[int, int]]:
    """Seconds of the scoring job, and the peak bytes of the driver's Python process and of its JVM."""
    command = [sys.executable, "-m", "entrypoints.evaluate", "--engine=spark", f"--spark_master={master}"]
    command += [f"--model_uris={model}", f"--prompts={prompts}", "--traces=false", "--resume=false"]
    command += ["--trust_code=true", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = {}
    watching = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
    watching.start()
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(out)
    seconds = float(re.search(r"Scoring .* parts \(([\d.]+) s\)", out)[1])
    return seconds, (peaks.get("python", 0), peaks.get("java", 0))


def _watch(process: subprocess.Popen, peaks: dict[str, int]) -> None:
    """Notes the peak memory of the driver, and of the JVM that is its child."""
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (str(process.pid), *children):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                name = "python" if pid == str(process.pid) else "java"
                if name == "java" and not Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"java"):
                    continue
                peaks[name] = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        time.sleep(0.2)


@contextmanager
def cluster(scratch: Path, workers: int):
    """The URL of a standalone master with that many workers of one core each."""
    import pyspark

    home = Path(pyspark.__file__).parent
    environment = os.environ | {"SPARK_HOME": str(home), "SPARK_DAEMON_MEMORY": "256m"}
    log, started = scratch / f"master-{time.monotonic_ns()}.log", []

    def start(name: str, *words: str, output=subprocess.DEVNULL) -> None:
        command = [str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}", "--host", "127.0.0.1", *words]
        started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    try:
        with log.open("w") as output:
            start("master.Master", "--port", "0", "--webui-port", "0", output=output)
        url = _found(log, r"Starting Spark master at (\S+)")
        for number in range(workers):
            folder = scratch / f"worker-{number}"
            words = ("--webui-port", "0", "--cores", "1", "--memory", "1g", "--work-dir", str(folder), url)
            start("worker.Worker", *words)
        _found(log, "(?s)" + "Registering worker.*" * workers)
        yield url
    finally:
        for process in started:
            process.terminate()
            process.wait(30)


def _found(log: Path, pattern: str) -> str:
    for _ in range(300):
        match = re.search(pattern, log.read_text())
        if match:
            return match[1] if match.groups() else ""
        time.sleep(0.2)
    raise SystemExit(log.read_text())


if __name__ == "__main__":
    main()
