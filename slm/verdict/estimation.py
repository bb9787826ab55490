"""Computes estimates of one model's scores, and differences between two models, for each scorer over the prompts.

The scores of a prompt's repeats are averaged first. Unscored answers are left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from slm.prompts.prompt_sets import PromptSet
from slm.verdict import statistics
from slm.verdict.scored_model import OVERALL, Sample, ScoredModel, values_by_scorer


def estimate(samples: tuple[Sample, ...], prompt_set: PromptSet) -> dict[str, statistics.Estimate]:
    """The estimate of every name in `values_by_scorer`, over prompts. Rows of a cluster count as dependent."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    return {
        name: statistics.mean_estimate(list(values.values()), [clusters[key] for key in values])
        for name, values in sorted(values_by_scorer(samples).items())
    }


def differences(
    candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet
) -> dict[str, statistics.Difference]:
    """For each scorer, candidate minus baseline over the prompts with scores of both models."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    ours, theirs = candidate.values, baseline.values
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
    """The ids of the prompts whose score by one scorer fell (`worse`) or rose (`better`), in the prompt set's order."""

    worse: tuple[str, ...]
    better: tuple[str, ...]


def flips(candidate: ScoredModel, baseline: ScoredModel) -> dict[str, Flips]:
    """For each scorer, the prompts whose scores differ between the models. Both models must have a score."""
    ours, theirs = candidate.values, baseline.values
    found = {}
    for name in sorted(ours.keys() & theirs.keys()):
        gaps = {key: round(ours[name][key] - theirs[name][key], 12) for key in ours[name] if key in theirs[name]}
        found[name] = Flips(
            tuple(key for key, gap in gaps.items() if gap < 0), tuple(key for key, gap in gaps.items() if gap > 0)
        )
    return found


def changes(candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet) -> dict[str, statistics.Estimate]:
    """The estimates of fidelity.FLIPS: the shares of prompts whose score fell, rose, or whose first answer changed."""
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    ours, theirs = (model.values.get(OVERALL, {}) for model in (candidate, baseline))
    both = [key for key in ours if key in theirs]
    found = {}
    if both:
        gaps = {key: round(ours[key] - theirs[key], 12) for key in both}
        codes = [clusters[key] for key in both]
        found["flips/worse"] = statistics.mean_estimate([float(gaps[key] < 0) for key in both], codes)
        found["flips/better"] = statistics.mean_estimate([float(gaps[key] > 0) for key in both], codes)
    texts = [
        {sample.id: sample.output for sample in model.samples if sample.repeat == 0 and sample.error is None}
        for model in (candidate, baseline)
    ]
    answered = [key for key in texts[0] if key in texts[1]]
    if answered:
        changed = [float(texts[0][key] != texts[1][key]) for key in answered]
        found["answers_changed"] = statistics.mean_estimate(changed, [clusters[key] for key in answered])
    return found


def holm_p_values(compared: dict[str, statistics.Difference]) -> dict[str, float]:
    """Each scorer's p-value with Holm's correction for several scorers.

    OVERALL is made of the other scorers, so its p-value stays uncorrected. Other p-values are left out if they are not
    finite.
    """
    family = [name for name, gap in compared.items() if name != OVERALL and math.isfinite(gap.p_value)]
    adjusted = dict(zip(family, statistics.holm([compared[name].p_value for name in family]).tolist(), strict=True))
    return adjusted | {OVERALL: compared[OVERALL].p_value} if OVERALL in compared else adjusted


def difference_metrics(compared: dict[str, statistics.Difference]) -> dict[str, float]:
    fields = ("mean", "ci95_low", "ci95_high", "p_value", "detectable")
    named = {f"difference/{name}/{field}": getattr(gap, field) for name, gap in compared.items() for field in fields}
    named |= {f"difference/{name}/p_value_holm": p for name, p in holm_p_values(compared).items()}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def graded(samples: Iterable[Sample]) -> set[str]:
    """The scorers that give a sample another score than 0 or 1. They have no pass@k in the whole prompt set."""
    found = set()
    for sample in samples:
        scored = {name: value for name, value in sample.scores.items() if value is not None}
        found |= {name for name, value in scored.items() if value not in (0, 1)}
        if scored and sum(scored.values()) / len(scored) not in (0, 1):
            found.add(OVERALL)
    return found
