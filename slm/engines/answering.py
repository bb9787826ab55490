"""Answers a prompt set in this process and scores the answers.

Each answer is kept on disk as it comes (slm/answers/kept_answers.py), and scored when all are there. MLflow is not
called here, and no model is loaded.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace

from slm.answers import kept_answers, loading
from slm.base import environment
from slm.base.hashing import digest
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.scorers import confined
from slm.scorers.built_in import Score
from slm.verdict.estimation import estimate
from slm.verdict.scored_model import Sample, ScoredModel, metrics_of


def built_in(call: ScorerCall, prompt: Prompt, text: str) -> dict[str, Score]:
    """What a built-in scorer says of one answer, by the score's name."""
    return {call.name: confined.score(call.name, text, prompt.expected, call.options)}


def score(
    model: loading.LoadedModel,
    prompt_set: PromptSet,
    generation: dict,
    repeats: int = 1,
    reuse: kept_answers.Reuse = "all",
    advance: Callable[[], None] = lambda: None,
    score_answer: Callable[[ScorerCall, Prompt, str], dict[str, Score]] = built_in,
) -> ScoredModel:
    """Answers every prompt `repeats` times and scores the answers; `advance` is called once for each.

    `reuse` says which answers of earlier runs are taken. Their seconds are those that were measured then, so that
    speeds are never those of reading a file; "interrupted" makes all but a stopped run's anew, which a comparison of
    speeds needs. What may have changed unseen, an endpoint, is never reused further.
    """
    wanted = [(prompt, repeat) for prompt in prompt_set.prompts for repeat in range(repeats)]
    asked = [digest([loading.row_of(model, *one, generation), one[1]]) for one in wanted]
    if not model.sha256 and reuse == "all":
        reuse = "interrupted"
    answered: dict[tuple[str, int], dict] = {}
    elapsed = 0.0
    with kept_answers.opened(identity(model, generation), reuse) as kept:
        missing, peak = [], 0
        for one, key in zip(wanted, asked, strict=True):
            if key not in kept.kept:
                missing.append((one, key))
                continue
            found = kept.kept[key]
            answered[one[0].id, one[1]] = found["answer"]
            elapsed, peak = elapsed + found["elapsed"], max(peak, found["peak_memory_bytes"])
            advance()
        keys = {(prompt.id, repeat): key for (prompt, repeat), key in missing}
        before = time.perf_counter()
        for (prompt, repeat), answer in loading.answers(model, [one for one, _ in missing], generation):
            now = time.perf_counter()
            answered[prompt.id, repeat] = answer
            if not answer.get("error"):
                if model.unchanged:
                    model.unchanged()
                kept.add(keys[prompt.id, repeat], answer, now - before)
            elapsed, before = elapsed + now - before, now
            advance()
        own = loading.peak_memory_bytes() or 0  # the model's: a judge's comes later
        if missing:
            kept.finish(own)
        if missing or not peak:  # else nothing was generated now, and this process's says nothing
            peak = max(peak, own)
    samples = tuple(
        _sample(model, prompt, repeat, answered[prompt.id, repeat], score_answer) for prompt, repeat in wanted
    )
    estimates = estimate(samples, prompt_set)
    metrics = metrics_of(model, samples, estimates)
    if peak and model.sha256:  # an endpoint's memory is elsewhere
        metrics["peak_memory_bytes"] = float(peak)
    tokens = [sample.output_tokens for sample in samples if sample.error is None]
    if tokens and None not in tokens and elapsed:  # a stranger's model may not count them
        metrics["output_tokens_per_second"] = sum(tokens) / elapsed
    return ScoredModel(model, samples, estimates, metrics, len(wanted) - len(missing))


# ---------------------------------------------------------------------------------------------------------------------


def _sample(model: loading.LoadedModel, prompt: Prompt, repeat: int, answer: dict, score_answer) -> Sample:
    failed = answer.get("error") or ""
    named: dict[str, Score] = {}
    for call in prompt.scorers:
        unanswered = {call.name: Score(None, f"not answered: {failed}")}
        named |= unanswered if failed else score_answer(call, prompt, answer["text"])
    return Sample(
        id=prompt.id,
        repeat=repeat,
        model=model.uri,
        messages=list(prompt.messages) if prompt.messages else [{"role": "user", "content": prompt.prompt}],
        expected=list(prompt.expected),
        output=answer["text"],
        finish_reason=answer["finish_reason"],
        prompt_tokens=None if failed else answer.get("prompt_tokens"),
        output_tokens=None if failed else answer.get("output_tokens"),
        latency_seconds=answer.get("seconds", 0.0),
        scores={name: result.value for name, result in named.items()},
        reasons={name: result.reason for name, result in named.items()},
        error={"type": "refused", "message": failed} if failed else None,
    )


def identity(model: loading.LoadedModel, generation: dict) -> list:
    """What an answer depends on beside what is asked: the model, how it is run, library versions, the kind of machine.

    Folders of answers are moved and shared between machines, and another kind of CPU may round another way.
    """
    libraries = ("onnxruntime-genai", "onnxruntime", "torch", "transformers", "tokenizers", "jinja2")
    versions = {name: environment.version(name) for name in libraries}
    described = environment.describe()
    machine = [described[name] for name in ("cpu", "cpu_model", "cpu_flags", "gpus")] if model.sha256 else []
    return [model.sha256 or model.uri, model.identity, generation, versions, machine]


def release(scored: ScoredModel) -> ScoredModel:
    """The same results without the model, whose memory goes back."""
    freed = replace(scored, model=replace(scored.model, pyfunc=None, wrapper=None))
    gc.collect()
    return freed
