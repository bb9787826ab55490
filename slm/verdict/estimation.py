"""A model's scores as estimates, and two models' scores as differences: per scorer, over prompts, with intervals.

A prompt's repeats are averaged first. Unscored answers take no part.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from slm.prompts.prompt_sets import PromptSet
from slm.verdict import statistics
from slm.verdict.scored_model import OVERALL, Sample, ScoredModel


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


def graded(samples: Iterable[Sample]) -> set[str]:
    """The scorers that say more than yes or no here, which leaves them without pass@k everywhere."""
    found = set()
    for sample in samples:
        scored = {name: value for name, value in sample.scores.items() if value is not None}
        found |= {name for name, value in scored.items() if value not in (0, 1)}
        if scored and sum(scored.values()) / len(scored) not in (0, 1):
            found.add(OVERALL)
    return found
