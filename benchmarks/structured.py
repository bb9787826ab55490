"""What a grammar costs: throughput of `serve` with 8 clients, with `response_format` and without.

    python -m benchmarks structured

Greedy, streamed, 32 tokens. The same questions are asked in turns: free, with a schema of one long text, and with a
schema of many short fields, where the grammar changes many tokens. The questions ask for long texts. A question is left
out unless all three answers have 32 tokens. So all sides generate texts of one length after the same prompts. The first
answers, which read the schemas, are not measured.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from benchmarks import first_prompts, load, serve
from benchmarks.ratios import Row, in_turn, ratios

CLIENTS = 8
ROUNDS = 5
QUESTIONS = 32


def closed_object(**properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PLACE = closed_object(
    name={"type": "string", "maxLength": 12},
    kind={"enum": ["a city", "a river", "a mountain"]},
    height={"type": "integer"},
    known={"type": "boolean"},
)
SCHEMAS = {
    "a long text": closed_object(text={"type": "string"}),
    "short fields": closed_object(places={"type": "array", "items": PLACE, "minItems": 20}),
}


def measure(scratch: Path, provider: str) -> list[Row]:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
    with serve.server(serve.log_model(scratch, provider)) as base:
        url = base.removesuffix("/v1")
        asked: dict[str, dict[str, Any]] = {"free": {}}
        for name, schema in SCHEMAS.items():
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            asked[name] = {"response_format": form}
        questions = asyncio.run(full_length(url, asked))
        sides = {name: lambda fields=fields: throughput(url, questions, fields) for name, fields in asked.items()}
        found = in_turn(sides, ROUNDS)
    note = f"{len(questions)} questions, {load.MAX_TOKENS} tokens each"
    return [
        Row(f"`serve` with a grammar, {name}", "without", 0.90, ratios(found[name], found["free"]), note=note)
        for name in SCHEMAS
    ]


async def full_length(url: str, asked: dict[str, dict]) -> list[list[dict]]:
    """The first questions whose answers all have MAX_TOKENS tokens."""
    kept: list[list[dict]] = []
    for row in first_prompts.prompt_set().prompts:
        about = row.prompt or row.messages[-1]["content"]
        messages = [{"role": "user", "content": f"Write a long essay about this question: {about}"}]
        answers = [load.Measured() for _ in asked]
        sides = zip(answers, asked.values(), strict=True)
        await asyncio.gather(*(load.ask(url, messages, found, **fields) for found, fields in sides))
        if all(found.tokens == load.MAX_TOKENS for found in answers):
            kept.append(messages)
        if len(kept) == QUESTIONS:
            break
    return kept


def throughput(url: str, questions: list[list[dict]], fields: dict) -> float:
    """Tokens per second."""
    found = load.Measured()
    asyncio.run(load.closed(url, questions, CLIENTS, found, **fields))
    return found.tokens / found.seconds
