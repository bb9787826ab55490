"""How far a model's next-token distributions are from the baseline's, over the same texts.

Both models get the same tokens: each prompt as the baseline gets it, followed by the baseline's own greedy answer. At
every token of the answer, the two distributions over the whole vocabulary are compared:

- kl: the Kullback-Leibler divergence of the model from the baseline, sum of p log(p / q), in nats. 0 means equal.
- top1: whether both would go on with the same token.
- nll_difference: the model's minus the baseline's -log p of the token. Its mean is the logarithm of the ratio of the
  two perplexities.

The tokens of one prompt depend on each other, and so do the prompts of one cluster. So intervals are over clusters.
Fidelity says how much a model has changed, and not how much worse it is (arXiv:2407.09141). This module is pure:
slm/engines/distributions.py reads the distributions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slm.verdict import statistics
from slm.verdict.statistics import Estimate

MEASURES = {"kl": "positive", "top1": "share", "nll_difference": "signed"}  # kinds of statistics.ratio_estimate
NAMES = tuple(f"fidelity/{name}" for name in MEASURES)  # of the estimates
PLAIN = ("fidelity/kl/p99", "fidelity/tokens")  # metrics that are single figures
FLIPS = ("flips/worse", "flips/better", "answers_changed")  # estimates over prompts, of slm/verdict/estimation.py
OF_A_PAIR = ("fidelity", "flips", "answers_changed")  # the first part of the names of all metrics that need a baseline


@dataclass(frozen=True)
class TokenFidelity:
    """The comparison at every token of one prompt's answer. The arrays have one entry per token, (tokens,)."""

    id: str  # of the prompt
    kl: np.ndarray  # nats
    top1: np.ndarray  # bool
    nll_difference: np.ndarray  # nats


@dataclass(frozen=True)
class LikelyTokens:
    """One token of the text with its divergence, and what each model finds likeliest there, as (text, probability)."""

    text: str
    kl: float
    baseline: tuple[tuple[str, float], ...]
    model: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Fidelity:
    """A model compared with the baseline, token by token. Without a comparison, `reason` says why."""

    prompts: tuple[TokenFidelity, ...] = ()
    left_out: int = 0  # prompts that were not compared
    why_left_out: str = ""
    worst: Mapping[str, tuple[LikelyTokens, ...]] | None = None  # by prompt id, the largest mean divergence first
    reason: str = ""

    @property
    def tokens(self) -> int:
        return sum(prompt.kl.size for prompt in self.prompts)


def estimates(fidelity: Fidelity, clusters: Mapping[str, str | None], first: str = "fidelity") -> dict[str, Estimate]:
    """The mean over all tokens of each of MEASURES, with its interval. Empty if nothing was compared.

    `first` is the first part of the names.
    """
    prompts = [prompt for prompt in fidelity.prompts if prompt.kl.size]
    if not prompts:
        return {}
    sizes = [prompt.kl.size for prompt in prompts]
    codes = [clusters.get(prompt.id) for prompt in prompts]
    return {
        f"{first}/{name}": statistics.ratio_estimate(
            [float(np.sum(getattr(prompt, name), dtype=np.float64)) for prompt in prompts], sizes, codes, kind
        )
        for name, kind in MEASURES.items()
    }


def plain_figures(fidelity: Fidelity, first: str = "fidelity") -> dict[str, float]:
    """The metrics in PLAIN, with the first part of their names. Empty if nothing was compared."""
    if not fidelity.tokens:
        return {}
    everything = np.concatenate([prompt.kl for prompt in fidelity.prompts])
    return {
        f"{first}/kl/p99": statistics.percentile(everything.tolist(), 99),
        f"{first}/tokens": float(everything.size),
    }


def prompt_means(prompts: Sequence[TokenFidelity]) -> dict[str, float]:
    """Each compared prompt's mean divergence, the largest first."""
    means = {prompt.id: float(prompt.kl.mean()) for prompt in prompts if prompt.kl.size}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


def as_metrics(
    found: Mapping[str, Estimate], figures: Sequence[str] = ("mean", "ci95_low", "ci95_high")
) -> dict[str, float]:
    """Estimates as metrics `<name>/<figure>`. Figures that are not finite are left out."""
    named = {f"{name}/{figure}": getattr(entry, figure) for name, entry in found.items() for figure in figures}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def compare(log_p: np.ndarray, log_q: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kl, top1, nll_difference) at each place, (places,) each. `log_p` (the baseline's) and `log_q` are (places,
    vocabulary) log probabilities; `tokens` are the tokens of the text.

    Vocabularies of two lengths differ by padding, which no token has. Both are then cut to the shorter one.
    """
    if log_p.shape[-1] != log_q.shape[-1]:
        shared = min(log_p.shape[-1], log_q.shape[-1])
        log_p, log_q = (_normalised(part[:, :shared]) for part in (log_p, log_q))
    gap = log_p - log_q
    kl = np.einsum("ij,ij->i", np.exp(log_p), np.where(log_p > LEAST, gap, 0.0), dtype=np.float64)
    rows = np.arange(len(tokens))
    top1 = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    return np.maximum(kl, 0.0), top1, gap[rows, list(tokens)].astype(np.float64)


LEAST = -80.0  # a log probability below this one adds nothing to a divergence in float32


def _normalised(log_p: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    return normalised
