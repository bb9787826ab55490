"""Answers questions in this process and scores the answers.

Each answer is written to disk as it comes (slm/answers/kept_answers.py). Scoring begins after the last answer. This
module calls no MLflow and loads no model.
"""

import time
from collections.abc import Callable, Iterable

from slm.answers import kept_answers, loading
from slm.answers.asking import Answer, LoadedModel, ModelFacts, Question, answers, key_of, row_of
from slm.base import environment
from slm.base.wording import part_of
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
    advance: Callable[[int], None] = lambda tokens: None,
    score_answer: ScoreAnswer = built_in,
    cut: str = "score",
) -> ScoredModel:
    """Answers all questions (slm/answers/asking.py) and scores the answers.

    Calls `advance` once for each answer, with the tokens that were generated for it.
    `reuse` says which answers of earlier runs are taken. With "interrupted", only the answers of a stopped run are. The
    answers of an endpoint may have changed unseen, so a finished run's are not taken.
    `cut` says how an answer counts that max_tokens ended: by its "score", as "wrong", or not at all ("unscored").
    Speed, latency and memory are the figures of one run: of this one if it gave all answers, or of the earlier run that
    gave exactly these. In any other case they are left out, and `ScoredModel.unmeasured` says why.
    """
    facts = model.facts
    if not facts.sha256 and reuse == "all":
        reuse = "interrupted"
    answered: dict[tuple[str, int], Answer] = {}
    with kept_answers.opened(identity(facts, generation), reuse) as kept:
        missing = []
        for question in asked:
            if question.key not in kept.kept:
                missing.append(question)
                continue
            answered[question.prompt.id, question.repeat] = kept.kept[question.key]["answer"]
            advance(0)
        reused = len(asked) - len(missing)
        start = before = time.perf_counter()
        for question, answer in answers(model, missing, generation.get("batch_size") or 0):
            now = time.perf_counter()
            answered[question.prompt.id, question.repeat] = answer
            if not answer.get("error"):
                model.check_unchanged()
                kept.add(question.key, answer, now - before)
            before = now
            advance(answer["output_tokens"] or 0)
        peak = loading.peak_memory_bytes() or 0  # of the model alone: a judge is loaded later
        if missing:
            kept.finish(peak)
        if reused:
            measured = None if missing else kept.measured(question.key for question in asked)
        else:
            measured = kept_answers.Measured(before - start, peak)
    samples = tuple(
        _sample(facts, question, answered[question.prompt.id, question.repeat], score_answer, cut) for question in asked
    )
    estimates = estimate(samples, prompt_set)
    metrics, unmeasured = metrics_of(facts, samples, estimates, latencies=measured is not None), ""
    if measured:
        if measured.peak_memory_bytes and facts.sha256:  # the memory of an endpoint is elsewhere
            metrics["peak_memory_bytes"] = float(measured.peak_memory_bytes)
        tokens = [sample.output_tokens for sample in samples if sample.error is None]
        if tokens and None not in tokens and measured.seconds:  # a model of others may not count tokens
            metrics["output_tokens_per_second"] = sum(count for count in tokens if count) / measured.seconds
    else:
        unmeasured = (
            f"{part_of(reused, len(asked), 'answer')} reused" if missing else "no one run gave exactly these answers"
        )
    sent = {question.prompt.id: (question.text, question.token_ids) for question in asked if question.repeat == 0}
    first = {question.prompt.id: answered[question.prompt.id, 0] for question in asked if question.repeat == 0}
    generated = {id: tuple(answer.get("token_ids") or ()) for id, answer in first.items()}
    return ScoredModel(
        facts, samples, estimates, metrics, reused, sent=sent, generated=generated, unmeasured=unmeasured
    )


def count_kept(facts: ModelFacts, prompts: Iterable[Prompt], generation: dict, repeats: int) -> int:
    """How many answers of earlier runs `score` takes with `reuse="all"`."""
    keys = (
        key_of(row_of(facts, prompt, repeat, generation), repeat) for prompt in prompts for repeat in range(repeats)
    )
    return kept_answers.count(identity(facts, generation), keys)


# ---------------------------------------------------------------------------------------------------------------------


def _sample(facts: ModelFacts, question: Question, answer: Answer, score_answer: ScoreAnswer, cut: str) -> Sample:
    prompt = question.prompt
    failed = answer.get("error") or ""
    named: dict[str, Score] = {}
    unread = Score(None, f"not answered: {failed}") if failed else None
    if answer["finish_reason"] == "length" and cut != "score":
        unread = Score(0.0 if cut == "wrong" else None, f"cut at max_tokens, and cut={cut}")
    for call in prompt.scorers:
        named |= {call.name: unread} if unread else score_answer(call, prompt, answer["text"])
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
