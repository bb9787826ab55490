"""Questions for the embedded model, and how an answer is read."""

from support.commands import REPOSITORY

from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
GENERATION = {
    "max_tokens": 64,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "stop": [],
    "batch_size": 0,
    "dtype": "auto",
    "device": "auto",
}


def text(completion: dict) -> str:
    return completion["choices"][0]["message"]["content"]


def some_questions(count: int) -> list[dict]:
    rows = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS).prompts[:150:7][:count]
    return [{"messages": list(row.messages), "max_tokens": 24} for row in rows]
