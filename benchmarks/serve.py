"""What clients that ask together gain: throughput of `serve` with 8 openai clients and with one, on the same requests.

    python -m benchmarks.serve [model_uri]

200 requests from the first 150 rows of prompts/general.jsonl, greedy, 32 tokens at most. Both sides take turns over
fifths of them, against one server; the median of the five ratios counts. Every answer of the 8 clients is compared
with the single one's. Without a model_uri the int4 export of the embedded model is logged into a temporary
store and served.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts

CLIENTS = 8
REQUESTS = 200
ROUNDS = 5


def log_model(folder: Path, provider: str = "cpu") -> str:
    import mlflow

    from slm.models import checkpoints, model_logging, onnx_export

    export = onnx_export.export(checkpoints.find("smollm2-135m-instruct").fetch(), "int4", provider)
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    experiment = mlflow.create_experiment("serve", artifact_location=str(folder / "artifacts"))
    generation = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
    with mlflow.start_run(experiment_id=experiment):
        return model_logging.log_onnx(export, "chat", generation, "int4").model_uri


@contextmanager
def server(model_uri: str, folder: str | None = None, options: tuple[str, ...] = ()):
    """The base URL of a server over the model, stopped at the end. `folder` is another working copy of the project."""
    command = [sys.executable, "-m", "entrypoints.serve", f"--model_uri={model_uri}", *options]
    with started(command, cwd=folder) as address:
        yield f"{address}/v1"


@contextmanager
def started(command: list[str], **options):
    """The address of a server that answers /health, stopped at the end. The command gets a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.DEVNULL, **options)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        given = sys.argv[1:]
        if not given:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        with server(given[0] if given else log_model(Path(scratch))) as url:
            measure(url)


def measure(url: str) -> None:
    key = os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")[0].strip() or "none"  # it may hold several
    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    name = client.models.list().data[0].id
    rows = first_prompts.prompt_set().prompts
    questions = [list(row.messages or [{"role": "user", "content": row.prompt}]) for row in rows]
    questions = [questions[at % len(questions)] for at in range(REQUESTS)]

    def ask(messages):
        answer = client.chat.completions.create(model=name, messages=messages, max_tokens=32)
        return answer.choices[0].message.content, answer.usage.completion_tokens

    ask(questions[0])
    speeds: dict[int, list[float]] = {1: [], CLIENTS: []}
    answers: dict[int, list] = {1: [], CLIENTS: []}
    part = REQUESTS // ROUNDS
    for first in range(0, REQUESTS, part):
        for clients in (1, CLIENTS):
            with ThreadPoolExecutor(clients) as pool:
                start = time.perf_counter()
                answered = list(pool.map(ask, questions[first : first + part]))
                speeds[clients].append(sum(tokens for _, tokens in answered) / (time.perf_counter() - start))
            answers[clients] += answered
    ratios = [many / one for one, many in zip(speeds[1], speeds[CLIENTS], strict=True)]
    equal = sum(one == many for one, many in zip(answers[1], answers[CLIENTS], strict=True))

    table = Table(title=f"serve, {name}, {REQUESTS} requests through the openai client, {os.cpu_count()} cores")
    for column in ("clients", "requests", "equal answers", "tokens/s / one client's", "rounds"):
        table.add_column(column, justify="right")
    table.add_row("1", str(REQUESTS), "", "1.00", "")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    table.add_row(str(CLIENTS), str(REQUESTS), f"{equal} of {REQUESTS}", f"{statistics.median(ratios):.2f}", spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
