"""What evaluating costs beside generating: 2,000 prompts put to a logged model that only echoes them.

    python -m benchmarks.overhead

The figure holds all that `evaluate` does for a model: loading it, rendering the prompts, asking, scoring by two
scorers, logging, reporting; the echo's own hundredths of a millisecond too. Imports are left out, by a first small
evaluation. 500 and 2,000 prompts take turns, and the median of three counts; memory is the highest peak. Then the
evaluation view, which is written when all that is done, and read back and counted. Both into sqlite and through an
`mlflow server`, each from a process of its own.
"""

import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from slm.base import cache, console, parameters
from slm.prompts import prompt_sets
from slm.scorers.confined import CHECKS
from slm.tracking import lifecycle, mlflow_client

GOAL = 2.0  # ms a prompt, without the evaluation view
SIZES = (500, 2000)
ROUNDS = 3
TRACED = 300
ECHO = """
import mlflow
import pandas

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pandas.DataFrame, params=None):
        return model_input["prompt"].tolist()

mlflow.models.set_model(Echo())
"""


def main() -> None:
    evaluating = Table(title=f"evaluating, {os.cpu_count()} cores")
    for column in ("store", "prompts", "ms a prompt", "until logged", "reporting", "of it CPU", "goal", "peak memory"):
        evaluating.add_column(column, justify="left" if column == "store" else "right")
    view = Table(title="the evaluation view")
    for column in ("store", "rows", "read back", "ms a row"):
        view.add_column(column, justify="left" if column == "store" else "right")
    cache.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch, server(Path(scratch)) as http:
        for store, uri in (("sqlite", f"sqlite:///{scratch}/local.db"), ("mlflow server", http)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                costs, (found, cost) = process.submit(measure, uri, Path(scratch) / store).result()
            for size, rounds in costs.items():
                total, scored, reported, cpu, _ = map(statistics.median, zip(*rounds, strict=True))
                goal = f"< {GOAL:g}: {'met' if total < GOAL else 'missed'}"
                parts = [f"{value:.2f}" for value in (total, scored, reported, cpu)]
                peak = max(peak for *_, peak in rounds)
                evaluating.add_row(store, f"{size:,}", *parts, goal, f"{peak / 1e6:.0f} MB")
            view.add_row(store, str(TRACED), str(found), f"{cost:.1f}")
    for table in (evaluating, view):
        Console(width=120).print(table)


def measure(uri: str, scratch: Path) -> tuple[dict[int, list[tuple]], tuple]:
    """By size, each round's ms a prompt (all, until logged, reporting, CPU) and peak bytes; (rows found, ms a row)."""
    console.out.quiet = True
    os.environ["PHI3_MLFLOW_CACHE"] = str(scratch / "cache")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    scratch.mkdir()
    mlflow = mlflow_client.quiet_mlflow()
    import pandas

    from slm.answers import loading
    from slm.evaluation import conclusion, scoring
    from slm.report import traces

    mlflow.set_tracking_uri(uri)
    artifacts = None if uri.startswith("http") else str(scratch / "artifacts")
    experiment = mlflow.create_experiment("overhead", artifact_location=artifacts)
    mlflow.set_experiment(experiment_id=experiment)
    code = scratch / "echo_model.py"
    code.write_text(ECHO, encoding="utf-8")
    with mlflow.start_run():
        example = pandas.DataFrame({"prompt": ["What comes after 1?"]})
        logged = mlflow.pyfunc.log_model(name="echo", python_model=str(code), input_example=example)
    costs: dict[int, list[tuple]] = {size: [] for size in SIZES}
    for turn, size in enumerate((20, *SIZES * ROUNDS)):
        prompt_set = made(turn, size, scratch / f"{turn}.jsonl")
        args = parameters.parse("evaluate", "", [f"--model_uris={logged.model_uri}"])
        with lifecycle.run("overhead", args):
            start, cpu = time.perf_counter(), time.process_time()
            scored, run_id = scoring.score_model("echo", logged.model_uri, prompt_set, args)
            middle = time.perf_counter()
            conclusion.finish("overhead", [scoring.Result(scored, run_id)], args, prompt_set)
            end, cpu = time.perf_counter(), time.process_time() - cpu
        if scored.metrics["contains/mean"] < 1:
            raise SystemExit(f"the echo was not scored as one: {scored.metrics}")
        if turn:
            spent = [seconds * 1000 / size for seconds in (end - start, middle - start, end - middle, cpu)]
            costs[size].append((*spent, loading.peak_memory_bytes() or 0))
    rows, model_id = scored.samples[:TRACED], scored.model.model_id
    view = traces.log(rows, prompt_set.prompts, run_id, experiment, model_id, time.time(), seconds=600)
    found = mlflow.search_traces(locations=[experiment], run_id=run_id, max_results=500, return_type="list")
    return costs, (len(found), view.seconds * 1000 / TRACED)


def made(turn: int, size: int, path: Path) -> prompt_sets.PromptSet:
    rows = []
    for n in range(size):
        question = f"Turn {turn}: after {n} comes the number {n + 1}, and what comes then?"
        rows.append({"id": f"row-{n}", "prompt": question, "expected": str(n + 1), "scorers": ["contains", "token_f1"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prompt_sets.read_prompt_set(path, str(path), CHECKS)


@contextmanager
def server(folder: Path):
    """The URI of an `mlflow server` over sqlite, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/server.db", f"--artifacts-destination={folder}/store"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
