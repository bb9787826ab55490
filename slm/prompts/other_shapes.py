"""Recognises the rows of other tools: lm-eval, promptfoo, OpenAI evals, ShareGPT. Says in one line how to read them.

A row of an unknown shape gets a proposal if its names are usual, such as `question` and `answer`. The proposal is a
value of the parameter `fields` (slm/prompts/row_mapping.py). This module reads no file and changes no row.
"""

import re
from collections.abc import Mapping
from typing import Any

QUESTIONS = ("question", "instruction", "query", "problem", "input")  # usual names of `prompt`, the most usual first
FURTHER = ("input", "context", "passage", "choices", "options", "A")  # columns that belong into the prompt as well
ANSWERS = ("answer", "output", "target", "response", "completion", "solution")  # and of `expected`
SAME_TEXT = ("equals", "contains", "icontains", "contains-any", "icontains-any")  # promptfoo's checks with texts
PROMPTFOO_TEST = {"vars", "assert", "description", "options", "threshold", "metadata", "provider", "prompts"}
TOP_LEVEL = re.compile(r"^([A-Za-z_]+):", re.MULTILINE)


def explained(row: Mapping[str, Any]) -> str:
    """The part of an error line behind the place: the shape of the row, and the remedy. "" for no known shape."""
    if "doc_to_text" in row:
        return "is a task of lm-eval (`doc_to_text`) without rows; read the samples_*.jsonl of lm_eval --log_samples"
    if "tests" in row and ("prompts" in row or "providers" in row):
        remedy = "write a row per test: the prompt with its `vars` as `prompt`, the text of `assert` as `expected`"
        return f"is a configuration of promptfoo (`tests`); {remedy}"
    if {"doc", "target"} <= row.keys():
        return f"is a sample of lm-eval (`doc`, `target`); {_lm_eval(row)}"
    if "vars" in row and row.keys() <= PROMPTFOO_TEST:
        return f"is a test of promptfoo (`vars`); {_promptfoo(row)}"
    if {"input", "ideal"} <= row.keys():
        field = "prompt" if isinstance(row["input"], str) else "messages"
        return f"is a sample of OpenAI evals (`input`, `ideal`); give fields=input:{field},ideal:expected"
    if "conversations" in row and "messages" not in row:
        return "is a conversation of ShareGPT (`conversations`); docs/prompt-sets.md converts it"
    return ""


def explained_text(text: str) -> str:
    """The same for a YAML text that is no list of rows, or that can't be read, such as a task with `!function`."""
    return explained(dict.fromkeys(TOP_LEVEL.findall(text)))


def usual_names(row: Mapping[str, Any]) -> str:
    """What to do with a row that has no prompt and usual names, as `fields=question:prompt,answer:expected`, or ""."""
    if "prompt" in row or "messages" in row:
        return ""
    question = next((name for name in QUESTIONS if name in row and isinstance(row[name], str | None)), "")
    answer = next((name for name in ANSWERS if name in row and isinstance(row[name], str | list | int | None)), "")
    if not question:
        return ""
    if any(name in row for name in FURTHER if name != question):
        return "docs/prompt-sets.md shows how to read such rows"
    return f"give fields={question}:prompt" + (f",{answer}:expected" if answer and "expected" not in row else "")


def _lm_eval(row: Mapping[str, Any]) -> str:
    if not isinstance(row["target"], str | None):  # the number of a choice, or a list of another meaning
        return "write rows: the question and its choices as `prompt`, the right one as `expected`"
    asked, prompt = row.get("arguments"), "arguments.gen_args_0.arg_0"
    if isinstance(asked, list):  # lm-eval wrote a list until 0.4.2
        prompt = "arguments.0.0"
    elif not isinstance(asked, dict | None) or asked is None:
        prompt = f"doc.{_first_text(row['doc'], 'question')}"
    return f"give fields={prompt}:prompt,target:expected"


def _promptfoo(row: Mapping[str, Any]) -> str:
    checks = row.get("assert")
    first = checks[0] if isinstance(checks, list) and checks and isinstance(checks[0], dict) else {}
    if checks and not (first.get("type") in SAME_TEXT and isinstance(first.get("value"), str | list)):
        return "write a row per test, with `prompt`, `expected` and `scorers`"
    field = f"vars.{_first_text(row['vars'], 'question')}"
    return f"if {field} is the whole prompt, give fields={field}:prompt" + (
        ",assert.0.value:expected" if checks else ""
    )


def _first_text(mapping: object, otherwise: str) -> str:
    """The first short name of a text in the mapping."""
    found = mapping.items() if isinstance(mapping, dict) else ()
    usable = (name for name, value in found if isinstance(value, str) and re.fullmatch(r"\w{1,40}", str(name)))
    return next(usable, otherwise)
