"""Scores a prompt set against a loaded model: answers, scores, sums up.

Each answer is kept on disk as it comes (slm/answers.py), and scored when all are there. MLflow is not called here, and
no model is loaded.
"""

import gc
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from slm import answers, environment, loading, scorers, statistics
from slm.prompts import Prompt, PromptSet, ScorerCall

OVERALL = "score"  # the mean of a row's scorers, over rows


@dataclass(frozen=True)
class Sample:
    """One answer, as it stands in samples.jsonl."""

    id: str
    repeat: int
    model: str
    messages: list[dict]
    expected: list[str]
    output: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int | None
    output_tokens: int | None
    latency_seconds: float
    scores: dict[str, float | None]
    reasons: dict[str, str]
    error: dict[str, str] | None


@dataclass(frozen=True)
class ScoredModel:
    """A model's samples and what they sum up to."""

    model: loading.LoadedModel
    samples: tuple[Sample, ...]
    estimates: dict[str, statistics.Estimate]  # by scorer, and OVERALL
    metrics: dict[str, float]
    reused: int  # answers that earlier runs had left
    record: dict | None = None  # what it takes to do it again, as environment.json has it

    def sample_lines(self) -> list[str]:
        return [json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples]


def built_in(call: ScorerCall, prompt: Prompt, text: str) -> dict[str, scorers.Score]:
    """What a built-in scorer says of one answer, by the score's name."""
    return {call.name: scorers.score(call.name, text, prompt.expected, call.options)}


def score(
    model: loading.LoadedModel,
    prompt_set: PromptSet,
    generation: dict,
    repeats: int = 1,
    reuse: answers.Reuse = "all",
    advance: Callable[[], None] = lambda: None,
    score_answer: Callable[[ScorerCall, Prompt, str], dict[str, scorers.Score]] = built_in,
) -> ScoredModel:
    """Answers every prompt `repeats` times and scores the answers; `advance` is called once for each.

    `reuse` says which answers of earlier runs are taken. Their seconds are those that were measured then, so that
    speeds are never those of reading a file; "interrupted" makes all but a stopped run's anew, which a comparison of
    speeds needs. What may have changed unseen, an endpoint, is never reused further.
    """
    wanted = [(prompt, repeat) for prompt in prompt_set.prompts for repeat in range(repeats)]
    asked = [answers.digest([loading.row_of(model, *one, generation), one[1]]) for one in wanted]
    if not model.sha256 and reuse == "all":
        reuse = "interrupted"
    answered: dict[tuple[str, int], dict] = {}
    elapsed = 0.0
    with answers.opened(identity(model, generation), reuse) as kept:
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


def estimate(samples: tuple[Sample, ...], prompt_set: PromptSet) -> dict[str, statistics.Estimate]:
    """Each scorer's mean over prompts (a prompt's repeats averaged first), and that of a prompt's scorers."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    return {
        name: statistics.mean_estimate(list(values.values()), [clusters[key] for key in values])
        for name, values in sorted(values_by_scorer(samples).items())
    }


def values_by_scorer(samples: tuple[Sample, ...]) -> dict[str, dict[str, float]]:
    """Scorer -> prompt id -> score, averaged over repeats; what wasn't scored is not there.

    OVERALL is one of them, and so are `<scorer>/pass_at_k` and `<scorer>/pass_hat_k` of scorers that say yes or no,
    where prompts were answered k times or more: k = 2, 4, 8, … and the number of repeats.
    """
    collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    repeats = 1
    for sample in samples:
        repeats = max(repeats, sample.repeat + 1)
        scored = {name: value for name, value in sample.scores.items() if value is not None}
        for name, value in scored.items():
            collected[name][sample.id].append(value)
        if scored:
            collected[OVERALL][sample.id].append(sum(scored.values()) / len(scored))
    means = {name: {key: sum(values) / len(values) for key, values in rows.items()} for name, rows in collected.items()}
    for name, rows in collected.items():
        if all(value in (0, 1) for values in rows.values() for value in values):
            for k in _ks(repeats):
                enough = {key: (len(values), int(sum(values))) for key, values in rows.items() if len(values) >= k}
                if enough:
                    means[f"{name}/pass_at_{k}"] = {
                        key: statistics.pass_at_k(*counts, k) for key, counts in enough.items()
                    }
                    means[f"{name}/pass_hat_{k}"] = {
                        key: statistics.pass_hat_k(*counts, k) for key, counts in enough.items()
                    }
    return means


def _ks(repeats: int) -> list[int]:
    return sorted({2**power for power in range(1, repeats.bit_length()) if 2**power < repeats} | {repeats} - {1})


def differences(
    candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet
) -> dict[str, statistics.Difference]:
    """Per scorer, candidate minus baseline on the prompts that both answered."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    ours, theirs = values_by_scorer(candidate.samples), values_by_scorer(baseline.samples)
    compared = {}
    for name in sorted(ours.keys() & theirs.keys()):
        both = [key for key in ours[name] if key in theirs[name]]
        if both:
            compared[name] = statistics.paired_difference(
                [ours[name][key] for key in both],
                [theirs[name][key] for key in both],
                [clusters[key] for key in both],
            )
    return compared


@dataclass(frozen=True)
class Flips:
    """Ids of the prompts whose score by one scorer fell or rose against the baseline, in the prompt set's order."""

    worse: tuple[str, ...]
    better: tuple[str, ...]


def flips(candidate: ScoredModel, baseline: ScoredModel) -> dict[str, Flips]:
    """Per scorer, the prompts that both answered and on which they differ."""
    ours, theirs = values_by_scorer(candidate.samples), values_by_scorer(baseline.samples)
    found = {}
    for name in sorted(ours.keys() & theirs.keys()):
        gaps = {key: round(ours[name][key] - theirs[name][key], 12) for key in ours[name] if key in theirs[name]}
        found[name] = Flips(
            tuple(key for key, gap in gaps.items() if gap < 0), tuple(key for key, gap in gaps.items() if gap > 0)
        )
    return found


def holm_p_values(compared: dict[str, statistics.Difference]) -> dict[str, float]:
    """Each scorer's p-value corrected for there being several; OVERALL, which is made of them, stands by itself."""
    family = [name for name, gap in compared.items() if name != OVERALL and math.isfinite(gap.p_value)]
    adjusted = dict(zip(family, statistics.holm([compared[name].p_value for name in family]).tolist(), strict=True))
    return adjusted | {OVERALL: compared[OVERALL].p_value} if OVERALL in compared else adjusted


def difference_metrics(compared: dict[str, statistics.Difference]) -> dict[str, float]:
    fields = ("mean", "ci95_low", "ci95_high", "p_value", "detectable")
    named = {f"difference/{name}/{field}": getattr(gap, field) for name, gap in compared.items() for field in fields}
    named |= {f"difference/{name}/p_value_holm": p for name, p in holm_p_values(compared).items()}
    return {name: value for name, value in named.items() if math.isfinite(value)}


# ---------------------------------------------------------------------------------------------------------------------


def _sample(model: loading.LoadedModel, prompt: Prompt, repeat: int, answer: dict, score_answer) -> Sample:
    failed = answer.get("error") or ""
    named: dict[str, scorers.Score] = {}
    for call in prompt.scorers:
        unanswered = {call.name: scorers.Score(None, f"not answered: {failed}")}
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


def metrics_of(model: loading.LoadedModel, samples: tuple[Sample, ...], estimates: dict) -> dict[str, float]:
    """Counts, estimates and latencies under their metrics' names."""
    answered = [sample for sample in samples if sample.error is None]
    latencies = [sample.latency_seconds for sample in answered]
    metrics = {
        "rows": len(samples),
        "rows_failed": len(samples) - len(answered),
        "rows_unscored": sum(not any(value is not None for value in sample.scores.values()) for sample in answered),
        "model_load_seconds": model.load_seconds,
    } | ({"model_bytes": model.bytes} if model.bytes else {})  # an endpoint doesn't say
    for name, entry in estimates.items():
        for field in ("mean", "stderr", "ci95_low", "ci95_high"):
            metrics[f"{name}/{field}"] = getattr(entry, field)
    if latencies:
        metrics |= {f"latency_seconds/p{q}": statistics.percentile(latencies, q) for q in (50, 95)}
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


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
