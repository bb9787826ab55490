"""What it costs that `serve` writes a share of its requests to MLflow as traces: latency, and processor time.

    python -m benchmarks.tracing [--traces=0.05] [--requests=480] [--rounds=10] [--clients=4]

Two servers of the embedded model's int4 export stand beside an MLflow server on sqlite. They take turns on the same
requests, and the first turn changes in each round, so that a slow minute of the machine meets both. Requests are
greedy, streamed, 32 tokens at most, and each client asks again as soon as it has its answer. A latency is the time from
the connection to the last token. Each round gives a ratio of both servers' p50 and p95; the median of the rounds
counts. The count of traces that were dropped is read from /metrics.

In production, the tracking server is on another machine. Here, it is on the same cores, with the lowest priority
(`nice`). The second table does not depend on other work on the machine: it has the processor time of a request in
`serve` without traces, that of a trace in `serve`'s writing thread, and that of a trace in the tracking server.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from benchmarks.load import MAX_TOKENS, Measured, ask, closed, percentile
from benchmarks.serve import log_model, server, started
from slm.serving import traces
from slm.tracking import mlflow_client, trace_store

GOAL = 1.02
SHARES = (50, 95)
TRACES = 60  # whose processor time is measured


def tracking_server(folder: Path):
    """The address of an MLflow server on sqlite, stopped at the end."""
    store = f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/store"
    command = [sys.executable, "-m", "mlflow", "server", "--workers=1", *store]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its workers would take the cores
    return started(["nice", "-n", "19", *command], cwd=folder, env=environment, stderr=subprocess.DEVNULL)


def processor_seconds(address: str) -> float:
    """That the server at this address has used so far, with its children."""
    port = f"--port={address.rpartition(':')[2]}"
    found = [one for one in psutil.Process().children() if port in one.cmdline()]
    found += [child for one in found for child in one.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in found)


def trace_seconds(uri: str, batch: int) -> tuple[float, float]:
    """Processor time of one trace, in the thread that writes so many at a time and in the tracking server."""
    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(uri)
    tracer = traces.Tracer(1.0, trace_store.experiment_id("processor time"))
    asked = {
        "messages": [{"role": "user", "content": "What is the capital of France? " * 10}],
        "max_tokens": MAX_TOKENS,
    }
    answer = {"choices": [{"message": {"role": "assistant", "content": "Paris is the capital of France. " * 4}}]}
    answered = traces.Answered(
        "chat", json.dumps(asked).encode(), json.dumps(answer).encode(), time.time(), 0.3, 80, 32, "r", "m", "u", "", ""
    )
    trace_store.write(tracer.experiment_id, [tracer._written(answered)])
    here, there = time.thread_time(), processor_seconds(uri)
    for _ in range(TRACES // batch):
        trace_store.write(tracer.experiment_id, [tracer._written(answered) for _ in range(batch)])
    return (time.thread_time() - here) / TRACES, (processor_seconds(uri) - there) / TRACES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=float, default=0.05, help="share of the requests")
    parser.add_argument("--requests", type=int, default=480, help="for each server")
    parser.add_argument("--rounds", type=int, default=10, help="into which the requests are divided")
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        os.environ["MLFLOW_TRACKING_URI"] = stack.enter_context(tracking_server(Path(scratch)))
        uri = log_model(Path(scratch))
        options = (f"--traces={args.traces}", "--trace_experiment=traffic")
        off = stack.enter_context(server(uri)).removesuffix("/v1")
        on = stack.enter_context(server(uri, options=options)).removesuffix("/v1")
        before = processor_seconds(off)
        rounds = asyncio.run(measure(off, on, args))
        request = (processor_seconds(off) - before) / (args.requests + 1)
        text = urllib.request.urlopen(f"{on}/metrics", timeout=10).read().decode()
        spent = {batch: trace_seconds(os.environ["MLFLOW_TRACKING_URI"], batch) for batch in (1, traces.BATCH)}
    show(rounds, args, text)
    show_time(request, spent, args.traces)


async def measure(off: str, on: str, args: argparse.Namespace) -> list[tuple[Measured, Measured]]:
    """(off, on) for each round."""
    rows = first_prompts.prompt_set().prompts
    questions = [list(row.messages or [{"role": "user", "content": row.prompt}]) for row in rows]
    questions = [questions[at % len(questions)] for at in range(args.requests)]
    for url in (off, on):
        await ask(url, questions[0], Measured())
    found = []
    for at in range(args.rounds):
        sides = {off: Measured(), on: Measured()}
        for url in (off, on) if at % 2 else (on, off):
            await closed(url, questions[at :: args.rounds], args.clients, sides[url])
        found.append((sides[off], sides[on]))
    return found


def show(rounds: list[tuple[Measured, Measured]], args: argparse.Namespace, metrics: str) -> None:
    title = f"traces={args.traces:g}, {args.requests} requests, {args.clients} clients, {os.cpu_count()} cores"
    table = Table(title=title)
    for column in ("latency", "without, s", "with, s", "ratio, goal", "found", "rounds"):
        table.add_column(column, justify="right")
    for share in SHARES:
        sides = [[percentile(side.whole, share) for side in pair] for pair in rounds]
        ratios = [on / off for off, on in sides]
        medians = [f"{statistics.median(values):.3f}" for values in zip(*sides, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(f"p{share}", *medians, f"<= {GOAL}", f"{statistics.median(ratios):.3f}", spread)
    console = Console(width=120)
    console.print(table)
    console.print(f"failed requests: {sum(side.failed for pair in rounds for side in pair)}")
    for line in re.findall(r"^slm_\w+_traces(?:_total)?(?:\{.*\})? .*$", metrics, re.MULTILINE):
        console.print(line, markup=False)


def show_time(request: float, spent: dict[int, tuple[float, float]], share: float) -> None:
    table = Table(title=f"processor time: a request takes {request * 1000:.0f} ms, and {share:g} of them are traced")
    columns = (
        "traces at a time",
        "serve, ms a trace",
        "of a request's",
        "tracking server, ms a trace",
        "of a request's",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for batch, seconds in spent.items():
        cells = [cell for one in seconds for cell in (f"{one * 1000:.1f}", f"{share * one / request:.2%}")]
        table.add_row(str(batch), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
