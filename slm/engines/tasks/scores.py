"""Turns what lm-evaluation-harness found into samples with scores, and into plain figures.

The library has one value per document, metric and filter. If its figure is the mean of values from 0 to 1, of which a
higher one is better, each value is the document's score: then intervals, pairs and gates are those of every prompt set.
Any other figure stands alone, with the reason why it has no interval.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from slm.answers.asking import ModelFacts
from slm.base.wording import counted, quoted
from slm.engines.tasks import reading
from slm.engines.tasks.harness_model import Asked
from slm.engines.tasks.reading import TaskSet
from slm.prompts.prompt_rows import Prompt, conversation
from slm.verdict.scored_model import Sample

SHOWN = 12  # choices whose log probabilities a reason tells


def samples_of(
    task_set: TaskSet, found: Mapping[str, Any], documents: Mapping[tuple[str, int], Asked], facts: ModelFacts, cut: str
) -> tuple[Sample, ...]:
    """One sample for each document. `found` is the result of the library's evaluate; `cut` is as in answering.score."""
    outside = _outside(task_set, found)
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, listed in found["samples"].items():
        for example in listed:
            examples[f"{name}/{example['doc_id']}"].append(example)
    samples = []
    for prompt in task_set.prompts:
        name, _, number = prompt.id.rpartition("/")
        asked = documents[name, int(number)]
        samples.append(_sample(task_set, name, prompt, examples[prompt.id], asked, facts, cut, outside))
    return tuple(samples)


def figures_of(
    task_set: TaskSet, found: Mapping[str, Any], documents: Mapping[tuple[str, int], Asked]
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures that are no mean of scores, by name, and for each why it has no interval or no value."""
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    failed = sum(bool(asked.error) for asked in documents.values())
    outside = _outside(task_set, found)
    groups = {name: content for name, content in (found.get("groups") or {}).items()}
    for owner, results in {**found["results"], **groups}.items():
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if owner in task_set.tasks:
                if reading.is_mean(task_set.tasks[owner], metric) and (owner, metric) not in outside:
                    continue
                reason = _reason(task_set.tasks[owner], owner, metric, outside)
            else:
                if _is_score_of_group(task_set, owner, metric, outside):
                    continue
                reason = f"of {metric}, {owner} combines the figures of its tasks"
            name = reading.score_name(owner, metric, filter_name)
            if failed:
                reasons[name] = f"{counted(failed, 'document')} failed"
            elif math.isfinite(value):
                values[name], reasons[name] = float(value), reason
            else:
                reasons[name] = f"lm-eval gives {value}"
    return values, reasons


def _is_score_of_group(task_set: TaskSet, group: str, metric: str, outside: set[tuple[str, str]]) -> bool:
    members = [task.task_name for task in task_set.groups[group].get_all_tasks()]
    own = [name for name in members if metric in task_set.tasks[name].aggregation()]
    return all(
        reading.is_mean(task_set.tasks[name], metric)
        and (name, metric) not in outside
        and group in reading.counting_groups(name, metric, task_set.groups)
        for name in own
    )


def _reason(task: Any, name: str, metric: str, outside: set[tuple[str, str]]) -> str:
    aggregation = task.aggregation().get(metric)
    if (name, metric) in outside:
        return "its values do not lie between 0 and 1"
    if task.higher_is_better().get(metric, True) is False:
        return "a lower value is better, and a higher score is"
    kind = getattr(aggregation, "__name__", "a function of the task")
    return f"{kind} is made of all documents at once, and not of one score for each"


def _outside(task_set: TaskSet, found: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The (task, metric) whose values are no numbers from 0 to 1."""
    seen = set()
    for name, listed in found["samples"].items():
        for example in listed:
            for metric in example["metrics"]:
                if reading.is_mean(task_set.tasks[name], metric) and _as_score(example[metric]) is None:
                    seen.add((name, metric))
    return seen


def _as_score(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:  # NaN is not
        return None
    return float(value)


def _sample(
    task_set: TaskSet,
    name: str,
    prompt: Prompt,
    examples: list[dict[str, Any]],
    asked: Asked,
    facts: ModelFacts,
    cut: str,
    outside: set[tuple[str, str]],
) -> Sample:
    is_cut = any(answer["finish_reason"] == "length" for answer in asked.answers)
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for example in examples:
        for metric in example["metrics"]:
            if not reading.is_mean(task_set.tasks[name], metric) or (name, metric) in outside:
                continue
            for owner in [name, *reading.counting_groups(name, metric, task_set.groups)]:
                key = reading.score_name(owner, metric, example["filter"])
                scores[key], reasons[key] = _as_score(example[metric]), _told(example)
    if asked.error or (is_cut and cut != "score"):
        value = 0.0 if is_cut and cut == "wrong" and not asked.error else None
        why = f"not answered: {asked.error}" if asked.error else f"cut at max_gen_toks, and cut={cut}"
        scores, reasons = dict.fromkeys(scores, value), dict.fromkeys(scores, why)
    tokens = [answer["output_tokens"] for answer in asked.answers]
    return Sample(
        id=prompt.id,
        repeat=0,
        model=facts.uri,
        messages=conversation(prompt),
        expected=list(prompt.expected),
        output="" if asked.error else _output(examples, asked),
        finish_reason="error" if asked.error else "length" if is_cut else "stop",
        prompt_tokens=None if asked.error or not asked.answers else asked.answers[0]["prompt_tokens"],
        output_tokens=None if asked.error or not tokens or None in tokens else sum(count or 0 for count in tokens),
        latency_seconds=max((answer["seconds"] for answer in asked.answers), default=0.0),
        scores=scores,
        reasons=reasons,
        error={"type": "refused", "message": asked.error} if asked.error else None,
    )


def _output(examples: list[dict[str, Any]], asked: Asked) -> str:
    """The generated text, the likeliest choice, or nothing where a text was read."""
    if asked.answers:
        return asked.answers[0]["text"]
    if not examples or len(examples[0]["arguments"]) < 2:
        return ""
    values = [response[0][0] for response in examples[0]["resps"]]
    best = max(range(len(values)), key=values.__getitem__)
    contexts = {arguments[0] for arguments in examples[0]["arguments"]}
    chosen = examples[0]["arguments"][best]
    return str(chosen[1] if len(contexts) == 1 else chosen[0]).strip()


def _told(example: dict[str, Any]) -> str:
    """What the library read: the log probability of each choice, or what its filter took of an answer."""
    first = example["resps"][0][0]
    if isinstance(first, tuple):
        told = [f"{response[0][0]:.3f}" for response in example["resps"][:SHOWN]]
        more = ", …" if len(example["resps"]) > SHOWN else ""
        return f"log probabilities: {', '.join(told)}{more}"
    if isinstance(first, float):
        return f"log probability: {first:.3f}"
    return f"read {quoted(example['filtered_resps'][0])}"
