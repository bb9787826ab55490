"""Prompt sets, scored models and reports, made without a model."""

from dataclasses import replace

from slm.answers.asking import ModelFacts
from slm.answers.forms import Form
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.report import summary
from slm.verdict import estimation, gate, scored_model

GENERATION = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "batch_size": 0}


def prompts(count: int, clusters: int = 0) -> PromptSet:
    """Prompts of the tag `even` or `odd`; with `clusters`, in that many groups of neighbours."""
    made = tuple(
        Prompt(
            id=f"p{place}",
            messages=None,
            prompt=f"Question {place}",
            expected=("yes",),
            scorers=(ScorerCall("contains", {}),),
            cluster=f"c{place * clusters // count}" if clusters else None,
            tags=("all",),
        )
        for place in range(count)
    )
    return PromptSet("set", "set.jsonl", made, "0" * 64)


def facts(**changes) -> ModelFacts:
    uri = "http://host/v1"
    return replace(ModelFacts("m", uri, uri, Form("prompt", False), load_seconds=0.0, identity=""), **changes)


def scored(values: list[dict], prompt_set: PromptSet, **changes) -> scored_model.ScoredModel:
    samples = tuple(
        scored_model.Sample(
            id=prompt.id,
            repeat=0,
            model="m",
            messages=[{"role": "user", "content": prompt.prompt}],
            expected=list(prompt.expected),
            output="text",
            finish_reason="stop",
            prompt_tokens=1,
            output_tokens=1,
            latency_seconds=0.1,
            scores=scores,
            reasons=dict.fromkeys(scores, ""),
            error=None,
        )
        for prompt, scores in zip(prompt_set.prompts, values, strict=True)
    )
    estimates = estimation.estimate(samples, prompt_set)
    metrics = scored_model.metrics_of(facts(), samples, estimates)
    return replace(scored_model.ScoredModel(facts(), samples, estimates, metrics, 0), **changes)


def report(models: list, prompt_set: PromptSet, verdict: gate.Verdict, compared: dict | None = None) -> summary.Report:
    count, none = len(models), gate.Verdict("none", ())
    return summary.Report(
        title="t",
        prompt_set=prompt_set,
        models=tuple(models),
        verdict=verdict,
        verdicts=(verdict, none)[:count],
        baseline=1 if count > 1 else None,
        differences=(compared or {}, {})[:count],
        history=({},) * count,
        facts={"run": "r"},
    )
