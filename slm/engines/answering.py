"""Answers questions in this process and scores the answers.

Each answer is written to disk as it comes (slm/answers/kept_answers.py). Scoring begins after the last answer. This
module calls no MLflow and loads no model.
"""

import time
from collections.abc import Callable

from slm.answers import kept_answers, loading
from slm.answers.asking import Answer, LoadedModel, ModelFacts, Question, answers
from slm.base import environment
from slm.prompts.prompt_rows import Prompt, ScorerCall, conversation
from slm.prompts.prompt_sets import PromptSet
from slm.scorers import confined
from slm.scorers.built_in import Score
from slm.verdict.estimation import estimate
from slm.verdict.scored_model import Sample, ScoredModel, metrics_of

ScoreAnswer = Callable[[ScorerCall, Prompt, str], dict[str, Score]]


def built_in(call: ScorerCall, prompt: Prompt, text: str) -> dict[str, Score]:
    """The score of one answer by a built-in scorer, as {name of the score: score}."""
    return {call.name: confined.score(call.name, text, prompt.expected, call.options)}


def score(
    model: LoadedModel,
    prompt_set: PromptSet,
    asked: list[Question],
    generation: dict,
    reuse: kept_answers.Reuse = "all",
    advance: Callable[[], None] = lambda: None,
    score_answer: ScoreAnswer = built_in,
) -> ScoredModel:
    """Answers all questions (slm/answers/asking.py) and scores the answers. Calls `advance` once for each answer.

    `reuse` says which answers of earlier runs are taken. A kept answer keeps its measured seconds, so a speed is never
    the speed of reading a file. With "interrupted", only the answers of a stopped run are taken. The comparison of
    speeds needs that. The answers of an endpoint may have changed unseen, so a finished run's are not taken.
    """
    facts = model.facts
    if not facts.sha256 and reuse == "all":
        reuse = "interrupted"
    answered: dict[tuple[str, int], Answer] = {}
    elapsed = 0.0
    with kept_answers.opened(identity(facts, generation), reuse) as kept:
        missing, peak = [], 0
        for question in asked:
            if question.key not in kept.kept:
                missing.append(question)
                continue
            found = kept.kept[question.key]
            answered[question.prompt.id, question.repeat] = found["answer"]
            elapsed, peak = elapsed + found["elapsed"], max(peak, found["peak_memory_bytes"])
            advance()
        before = time.perf_counter()
        for question, answer in answers(model, missing, generation.get("batch_size") or 0):
            now = time.perf_counter()
            answered[question.prompt.id, question.repeat] = answer
            if not answer.get("error"):
                model.check_unchanged()
                kept.add(question.key, answer, now - before)
            elapsed, before = elapsed + now - before, now
            advance()
        own = loading.peak_memory_bytes() or 0  # of the model alone: a judge is loaded later
        if missing:
            kept.finish(own)
        if missing or not peak:  # else nothing was generated now, and this process's memory means nothing
            peak = max(peak, own)
    samples = tuple(
        _sample(facts, question, answered[question.prompt.id, question.repeat], score_answer) for question in asked
    )
    estimates = estimate(samples, prompt_set)
    metrics = metrics_of(facts, samples, estimates)
    if peak and facts.sha256:  # the memory of an endpoint is elsewhere
        metrics["peak_memory_bytes"] = float(peak)
    tokens = [sample.output_tokens for sample in samples if sample.error is None]
    if tokens and None not in tokens and elapsed:  # a model of others may not count tokens
        metrics["output_tokens_per_second"] = sum(count for count in tokens if count) / elapsed
    sent = {question.prompt.id: (question.text, question.token_ids) for question in asked if question.repeat == 0}
    return ScoredModel(facts, samples, estimates, metrics, len(asked) - len(missing), sent=sent)


# ---------------------------------------------------------------------------------------------------------------------


def _sample(facts: ModelFacts, question: Question, answer: Answer, score_answer: ScoreAnswer) -> Sample:
    prompt = question.prompt
    failed = answer.get("error") or ""
    named: dict[str, Score] = {}
    for call in prompt.scorers:
        unanswered = {call.name: Score(None, f"not answered: {failed}")}
        named |= unanswered if failed else score_answer(call, prompt, answer["text"])
    return Sample(
        id=prompt.id,
        repeat=question.repeat,
        model=facts.uri,
        messages=conversation(prompt),
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


def identity(facts: ModelFacts, generation: dict) -> list:
    """Everything that an answer depends on, except the question: model, generation, libraries and kind of machine.

    Machines may share a folder of answers, and another kind of CPU may round differently. So the machine counts.
    """
    libraries = ("onnxruntime-genai", "onnxruntime", "torch", "transformers", "tokenizers", "jinja2")
    versions = {name: environment.version(name) for name in libraries}
    described = environment.describe()
    machine = [described[name] for name in ("cpu", "cpu_model", "cpu_flags", "gpus")] if facts.sha256 else []
    return [facts.sha256 or facts.uri, facts.identity, generation, versions, machine]
