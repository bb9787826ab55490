"""Servers under load: throughput, time to first token and time between two tokens, by a client that is neither's.

    python -m benchmarks.load [--model_uri=URI] [--checkout=FOLDER] [--peer=URL] [--requests=64] [--rounds=3]

`--checkout` is another working copy of this repository, whose `serve` is measured too: an earlier commit, such as
`git worktree add FOLDER COMMIT`. `--peer` is the base URL of a server of OpenAI's API that runs already, such as
llama.cpp's `llama-server -m MODEL.gguf --port 8080` at http://127.0.0.1:8080. The servers answer the same requests in
turns, so that a slow minute of the machine meets all of them. The first 150 rows of prompts/general.jsonl are asked,
greedy, streamed, 32 tokens at most.

Closed loop: so many clients, each asks again as soon as it has its answer. Open loop: requests arrive at random times
(Poisson, one seed for all servers), at a share of the lowest throughput of the servers with 32 clients.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from benchmarks import first_prompts
from benchmarks.serve import log_model, server

CLOSED = (1, 8, 32)
OPEN = (0.25, 0.5, 0.75, 1.0)
MAX_TOKENS = 32


@dataclass
class Measured:
    """What the clients of one server saw under one load."""

    first: list[float] = field(default_factory=list)  # seconds to the first token, by request
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces of a stream
    whole: list[float] = field(default_factory=list)  # seconds to the last token, by request
    tokens: int = 0
    seconds: float = 0.0
    requests: int = 0
    failed: int = 0

    def row(self) -> list[str]:
        gap = percentile(self.gaps, 95) * 1000 if self.gaps else float("nan")
        firsts = [f"{percentile(self.first, share):.2f}" if self.first else "" for share in (50, 95)]
        return [f"{self.tokens / self.seconds:.0f}", *firsts, f"{gap:.0f}", str(self.failed)]


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1] if len(values) > 1 else values[0]


async def ask(url: str, messages: list[dict], found: Measured, **fields) -> None:
    """One streamed request over a connection of its own. `fields` are further fields of the request."""
    address = urlsplit(url)
    asked = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True} | fields
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    key = os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")[0].strip() or "none"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    start = last = time.perf_counter()
    tokens = 0
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + body)
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
            now = time.perf_counter()
            (found.gaps if last > start else found.first).append(now - last)
            last = now
    writer.close()
    found.whole.append(last - start)
    found.requests += 1
    found.failed += not tokens
    found.tokens += tokens


async def closed(url: str, questions: list, clients: int, found: Measured, **fields) -> None:
    waiting = iter(questions)

    async def client():
        for messages in waiting:
            await ask(url, messages, found, **fields)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds += time.perf_counter() - start


async def opened(url: str, questions: list, rate: float, seed: int, found: Measured) -> None:
    draws, start, at, tasks = random.Random(seed), time.perf_counter(), 0.0, []
    for messages in questions:
        at += draws.expovariate(rate)
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(url, messages, found)))
    await asyncio.gather(*tasks)
    found.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_uri", default="", help="of a logged model; empty: the int4 export is logged anew")
    parser.add_argument("--checkout", default="", help="another working copy, whose server is measured too")
    parser.add_argument("--peer", default="", help="base URL of another server, without /v1")
    parser.add_argument("--requests", type=int, default=64, help="of a load, for each server")
    parser.add_argument("--rounds", type=int, default=3, help="into which the requests of a load are divided")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if not args.model_uri:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        uri = args.model_uri or log_model(Path(scratch))
        urls = {"serve": stack.enter_context(server(uri)).removesuffix("/v1")}
        if args.checkout:
            extra = ("--trust_code=true",)  # the model was logged by this working copy
            urls[args.checkout] = stack.enter_context(server(uri, args.checkout, extra)).removesuffix("/v1")
        if args.peer:
            urls[args.peer] = args.peer.rstrip("/")
        show(asyncio.run(measure(urls, args.requests, args.rounds)))


async def measure(urls: dict[str, str], requests: int, rounds: int) -> dict[tuple[str, str], Measured]:
    rows = first_prompts.prompt_set().prompts
    questions = [list(row.messages or [{"role": "user", "content": row.prompt}]) for row in rows]
    questions = [questions[at % len(questions)] for at in range(requests)]
    parts = [questions[at::rounds] for at in range(rounds)]
    found: dict[tuple[str, str], Measured] = defaultdict(Measured)
    for url in urls.values():
        await ask(url, questions[0], Measured())
    for clients in CLOSED:
        for part in parts:
            for name, url in urls.items():
                await closed(url, part, clients, found[f"{clients} clients", name])
        tell(found, f"{clients} clients")
    most = [found[f"{CLOSED[-1]} clients", name] for name in urls]
    capacity = min(one.requests / one.seconds for one in most)
    for share in OPEN:
        load = f"{share:.0%} of {capacity:.2f} requests/s"
        for number, part in enumerate(parts):
            for name, url in urls.items():
                await opened(url, part, share * capacity, number, found[load, name])
        tell(found, load)
    return found


def tell(found: dict[tuple[str, str], Measured], load: str) -> None:
    """Prints a load when it is done: the whole table takes long on a slow machine."""
    for (done, name), measured in found.items():
        if done == load:
            print(load, name, *measured.row(), flush=True)


def show(found: dict[tuple[str, str], Measured]) -> None:
    table = Table(title=f"{MAX_TOKENS} tokens at most, {os.cpu_count()} cores")
    for column in ("load", "server"):
        table.add_column(column)
    for column in ("tokens/s", "first token p50, s", "p95, s", "between tokens p95, ms", "failed"):
        table.add_column(column, justify="right")
    for (load, name), measured in found.items():
        table.add_row(load, name, *measured.row())
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
