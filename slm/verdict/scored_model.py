"""Holds one answer with its scores, and a scored model. All figures are computed from these records."""

import json
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from slm.answers.asking import ModelFacts
from slm.verdict import statistics
from slm.verdict.fidelity import Fidelity, as_metrics
from slm.verdict.perplexity import TextScores

OVERALL = "score"  # the overall score: the mean of a row's scores, and then the mean over rows
FIGURES = ("mean", "stderr", "ci95_low", "ci95_high")  # of each estimate, as metrics `<name>/<figure>`
PLAIN = (  # the metrics of a scored model that are single figures
    "rows",
    "rows_failed",
    "rows_unscored",
    "rows_cut",
    "rows_cut/share",
    "output_tokens/mean",
    "output_tokens_per_second",
    "latency_seconds/p50",
    "latency_seconds/p95",
    "model_load_seconds",
    "peak_memory_bytes",
    "model_bytes",
)


@dataclass(frozen=True)
class Sample:
    """One answer with its scores: a line of samples.jsonl."""

    id: str
    repeat: int
    model: str
    messages: list[dict[str, str]]
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
    """A model's samples, with the estimates and metrics that are computed from them."""

    model: ModelFacts
    samples: tuple[Sample, ...]
    estimates: dict[str, statistics.Estimate]  # by scorer; OVERALL is one of the names
    metrics: dict[str, float]
    reused: int  # number of answers that were taken from earlier runs
    record: dict[str, Any] = field(default_factory=dict)  # the content of environment.json, for repeating the run
    # prompt id -> the text and the token ids that the model got
    sent: dict[str, tuple[str, list[int] | None]] = field(default_factory=dict)
    # prompt id -> the tokens of its first answer; only of a model of this project
    generated: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fidelity: Fidelity | None = None  # None: nothing was compared with it token by token
    texts: TextScores | None = None  # None: there are no texts to read
    # plain figures among the metrics that scorers gave, and figures that are missing: name -> why there is no interval
    figures: dict[str, str] = field(default_factory=dict)
    unmeasured: str = ""  # why there are no figures of speed, latency and memory; "": there are

    @cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """Scorer -> prompt id -> score, as `values_by_scorer` has it."""
        return values_by_scorer(self.samples)

    def sample_lines(self) -> list[str]:
        return [json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples]


def metrics_of(
    model: ModelFacts,
    samples: tuple[Sample, ...],
    estimates: dict[str, statistics.Estimate],
    latencies: bool = True,
) -> dict[str, float]:
    """Counts, estimates and latencies, by the name of the metric. Values that are not finite are left out."""
    answered = [sample for sample in samples if sample.error is None]
    seconds = [sample.latency_seconds for sample in answered]
    figures = as_metrics(estimates, FIGURES)
    # MLflow's pages have the columns in this order: the overall score first
    overall = {name: value for name, value in figures.items() if name.startswith(f"{OVERALL}/")}
    metrics = overall | {
        "rows": len(samples),
        "rows_failed": len(samples) - len(answered),
        # a row without scorers asks for no score
        "rows_unscored": sum(bool(one.scores) and set(one.scores.values()) == {None} for one in answered),
        "rows_cut": (cut := sum(sample.finish_reason == "length" for sample in answered)),
        "rows_cut/share": cut / len(samples) if samples else math.nan,
        "model_load_seconds": model.load_seconds,
    }
    if model.bytes:  # the size of an endpoint's model is unknown
        metrics["model_bytes"] = model.bytes
    metrics |= figures
    tokens = [sample.output_tokens for sample in answered if sample.output_tokens is not None]
    if tokens and len(tokens) == len(answered):  # a model of others may not count tokens
        metrics["output_tokens/mean"] = sum(tokens) / len(tokens)
    if latencies and seconds:
        metrics |= {f"latency_seconds/p{q}": statistics.percentile(seconds, q) for q in (50, 95)}
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def values_by_scorer(samples: tuple[Sample, ...]) -> dict[str, dict[str, float]]:
    """Scorer -> prompt id -> mean score over repeats. Unscored prompts are left out.

    OVERALL is one of the scorers: the mean of an answer's scores. If all scores are 0 or 1, the scorer also has
    `<scorer>/pass_at_k` and `<scorer>/pass_hat_k`. k is 2, 4, 8, … and the number of repeats. These entries have the
    prompts with at least k scored answers.
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
            for k in ks(repeats):
                enough = {key: (len(values), int(sum(values))) for key, values in rows.items() if len(values) >= k}
                if enough:
                    means[f"{name}/pass_at_{k}"] = {
                        key: statistics.pass_at_k(*counts, k) for key, counts in enough.items()
                    }
                    means[f"{name}/pass_hat_{k}"] = {
                        key: statistics.pass_hat_k(*counts, k) for key, counts in enough.items()
                    }
    return means


def is_of_a_scorer(name: str, names: Collection[str]) -> bool:
    """Whether an estimate is that of a scorer, such as `contains` or `arc/acc`, and not of its repeats, such as
    `contains/pass_at_4`. `names` are those of all estimates."""
    return name.rpartition("/")[0] not in names


def ks(repeats: int) -> list[int]:
    """The k of pass@k and pass^k: 2, 4, 8, … and the number of repeats."""
    return sorted({2**power for power in range(1, repeats.bit_length())} | {repeats} - {1})
