"""What a request may say about its generation, and the one place where a row's next token is chosen."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .rows import Refused, Row, Sampling

# Of a request that doesn't say. 512 tokens are a page: most answers end by themselves before
DEFAULTS = {"max_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "n": 1}
MOST_CHOICES = 16


def _number(name: str, value, kind: type, low: float, high: float):
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise Refused(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (kind is int and value != int(value)):  # NaN fails the comparison
        words = "a whole number" if kind is int else "a number"
        raise Refused(f"{name} must be {words} from {low} to {high}, got {value!r}")
    return kind(value)


def _given(value) -> bool:
    """Whether a table's cell holds a value. pandas fills empty cells with None or NaN."""
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def sampling_of(row: dict, params: dict) -> Sampling:
    """The parameters of a row. The row's value comes first, then the call's value, then the default.

    Raises:
        Refused: a value is out of its range, or the model does not support the parameter.
    """

    def value(name):
        return row[name] if _given(row.get(name)) else params[name] if _given(params.get(name)) else DEFAULTS[name]

    for name in ("frequency_penalty", "presence_penalty", "top_k", "tools", "stream"):
        asked: Any = row.get(name)
        if _given(asked) and np.size(asked) and np.any(asked):
            hint = "; call predict_stream instead" if name == "stream" else ""
            raise Refused(f"{name} is not supported by this model, got {asked!r}{hint}")
    stop = value("stop")
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if any(not isinstance(text, str) or not text for text in stop):
        raise Refused(f"stop must hold non-empty strings, got {list(stop)!r}")
    return Sampling(
        max_tokens=_number("max_tokens", value("max_tokens"), int, 1, 2**20),
        temperature=_number("temperature", value("temperature"), float, 0.0, 2.0),
        top_p=_number("top_p", value("top_p"), float, 1e-6, 1.0),
        seed=_number("seed", value("seed"), int, 0, 2**63 - 1),
        stop=stop,
        n=_number("n", value("n"), int, 1, MOST_CHOICES),
    )


def sample(logits: np.ndarray, sampling: Sampling, seed: int, step: int) -> int:
    """Draws one token id from `logits` (vocabulary,), by temperature and nucleus (arXiv:1904.09751).

    The temperature must be above 0. A token's noise depends only on the seed, the step and the token (the Gumbel-max
    trick, arXiv:1611.01144). Rounding differs from batch to batch. So rounding changes a draw only if two tokens are
    almost tied.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        cumulative = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
        kept = np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1
        scaled[order[kept:]] = -np.inf
    return int(np.argmax(scaled + np.random.default_rng((seed, step)).gumbel(size=len(scaled))))


def next_token(logits: np.ndarray, row: Row) -> int:
    """The token id after `logits` (vocabulary,): at temperature 0 the likeliest token, else a drawn token.

    Of a row whose tokens are given, it is the given token.
    """
    if row.forced:
        row.see(len(row.output), logits[None])
        return row.forced[len(row.output)]
    if row.sampling.temperature:
        return sample(logits, row.sampling, row.seed, len(row.output))
    return int(logits.argmax())
