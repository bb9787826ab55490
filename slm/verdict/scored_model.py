"""One answer with its scores, and a scored model: what the numbers are computed from."""

import json
import math
from dataclasses import asdict, dataclass

from slm.answers import loading
from slm.verdict import statistics

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
    sent: dict | None = None  # by prompt id: text and token ids that reached the model, as loading.sent has them

    def sample_lines(self) -> list[str]:
        return [json.dumps(asdict(sample), ensure_ascii=False) for sample in self.samples]


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
