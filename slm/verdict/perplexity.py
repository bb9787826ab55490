"""What a model thinks of given texts: the mean negative log probability of a token, and the perplexity.

- nll: the mean of -log p over all tokens of all texts, in nats per token.
- perplexity: exp(nll), one figure.

The tokens of one text depend on each other, and so do the texts of one cluster. So intervals are over clusters, and one
text has no interval. Tokens of other vocabularies have other lengths: compare only models with one vocabulary. This
module is pure: slm/engines/texts.py reads the models.
"""

import math
from dataclasses import dataclass

from slm.verdict import fidelity, statistics
from slm.verdict.statistics import Estimate

NLL = "nll"
PLAIN = ("perplexity", "nll/tokens")  # metrics that are single figures
ON_TEXTS = "fidelity/texts"  # the first part of the names of fidelity's metrics on texts
PAIRS = tuple(f"{ON_TEXTS}/{name}" for name in fidelity.MEASURES)
PLAIN_PAIRS = (f"{ON_TEXTS}/kl/p99", f"{ON_TEXTS}/tokens")


@dataclass(frozen=True)
class TextScores:
    """A model's sums over each text. Without them, `reason` says why."""

    name: str  # of the file
    nlls: tuple[float, ...] = ()  # the sum of -log p over each text's tokens, in nats
    tokens: tuple[int, ...] = ()  # of each text
    clusters: tuple[str | None, ...] = ()  # of each text
    reason: str = ""
    compared: fidelity.Fidelity | None = None  # with the baseline; its prompts are windows of the texts
    windows: dict[str, str] | None = None  # the id of each window -> its text's cluster


def estimates(scores: TextScores) -> dict[str, Estimate]:
    """NLL with its interval. Empty if nothing was measured."""
    found = {}
    if sum(scores.tokens):
        found[NLL] = statistics.ratio_estimate(scores.nlls, scores.tokens, scores.clusters, "positive")
    return found


def pair_estimates(scores: TextScores) -> dict[str, Estimate]:
    """The estimates of fidelity on the texts. Empty if nothing was compared."""
    if scores.compared is None:
        return {}
    return fidelity.estimates(scores.compared, scores.windows or {}, ON_TEXTS)


def plain_pair_figures(scores: TextScores) -> dict[str, float]:
    """The metrics in PLAIN_PAIRS. Empty if nothing was compared."""
    return fidelity.plain_figures(scores.compared, ON_TEXTS) if scores.compared else {}


def unread(scores: TextScores) -> str:
    """Why there are no figures, or none of fidelity on the texts. "" if there are all."""
    return scores.reason or (scores.compared.reason if scores.compared else "fidelity=off, or it is the baseline")


def plain_figures(scores: TextScores) -> dict[str, float]:
    """The metrics in PLAIN. Empty if nothing was measured."""
    count = sum(scores.tokens)
    if not count:
        return {}
    mean = sum(scores.nlls) / count
    return {"perplexity": math.exp(min(mean, 700.0)), "nll/tokens": float(count)}


def is_of_texts(metric: str) -> bool:
    """Whether a metric is one of those that `texts` gives."""
    return metric.startswith(("nll/", f"{ON_TEXTS}/")) or metric == "perplexity"
