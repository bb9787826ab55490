"""How a row is generated, and the one place where a row's next token is chosen.

A row at temperature 0 without penalties, biases and a grammar may skip this: its token is the likeliest one, which two
runtimes find themselves.

The order is that of transformers: penalties and biases change the logits, the grammar forbids tokens, the temperature
divides, and then top_k, top_p and min_p leave tokens out. Log probabilities are those of the logits before all this.
"""

from collections import Counter

import numpy as np

from .fields import Request
from .rows import Refused, Row, Sampling, TokenLogProbability

MOST_BIAS = 100.0  # as OpenAI's


def sampling_of(request: Request) -> Sampling:
    """The generation parameters of a checked request.

    Raises:
        Refused: two fields don't fit each other, or logit_bias has an entry that is no token id with a number.
    """
    if request["top_logprobs"] and not request["logprobs"]:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    return Sampling(
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        top_p=request["top_p"],
        seed=request["seed"],
        stop=tuple(request["stop"]),
        n=request["n"],
        top_k=max(request["top_k"], 0),
        min_p=request["min_p"],
        frequency_penalty=request["frequency_penalty"],
        presence_penalty=request["presence_penalty"],
        repetition_penalty=request["repetition_penalty"],
        logit_bias=_biases(request["logit_bias"]),
        logprobs=request["logprobs"],
        top_logprobs=request["top_logprobs"],
    )


def _biases(entries: dict) -> tuple[tuple[int, float], ...]:
    found = {}
    for name, value in entries.items():
        token = str(name)
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Refused(f"logit_bias: {name!r:.60} is not a token id", "logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST_BIAS:
            raise Refused(f"logit_bias: {token} must have a number from -100 to 100, got {value!r:.60}", "logit_bias")
        if value:
            found[int(token)] = float(value)
    return tuple(sorted(found.items()))


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    """The logits (vocabulary,) in float32 after penalties and biases.

    The repetition penalty counts the tokens of the prompt and the answer (arXiv:1909.05858). The other two penalties
    count the tokens of the answer, as OpenAI's do.
    """
    sampling, scores = row.sampling, logits.astype(np.float32)
    if sampling.repetition_penalty != 1:
        seen = np.array(sorted({*row.prompt, *row.output}))
        values = scores[seen]
        scores[seen] = np.where(values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty)
    if row.output and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(row.output)
        tokens = np.array(list(counts))
        times = np.array(list(counts.values()), dtype=np.float32)
        scores[tokens] -= times * sampling.frequency_penalty + sampling.presence_penalty
    for token, value in sampling.logit_bias:
        scores[token] += value
    return scores


def sample(logits: np.ndarray, sampling: Sampling, seed: int, step: int) -> int:
    """Draws one token id from `logits` (vocabulary,), by temperature, top_k, nucleus (arXiv:1904.09751) and min_p
    (arXiv:2407.01082).

    The temperature must be above 0. A token's noise depends only on the seed, the step and the token (the Gumbel-max
    trick, arXiv:1611.01144). Rounding differs from batch to batch. So rounding changes a draw only if two tokens are
    almost tied.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        cumulative = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
        kept = np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1
        scaled[order[kept:]] = -np.inf
    if sampling.min_p:
        scaled[scaled < scaled.max() + np.log(sampling.min_p)] = -np.inf
    return int(np.argmax(scaled + np.random.default_rng((seed, step)).gumbel(size=len(scaled))))


def next_token(logits: np.ndarray, row: Row) -> int:
    """The token id after `logits` (vocabulary,): at temperature 0 the likeliest token, else a drawn token.

    Of a row whose tokens are given, it is the given token. A row with a grammar gets only tokens that the grammar
    allows. If its grammar can't go on, the row gets an `error`.
    """
    if row.forced:
        row.see(len(row.output), logits[None])
        return row.forced[len(row.output)]
    scores = adjusted(logits, row) if row.sampling.changes_logits else logits
    token = _constrained(scores, row) if row.matcher is not None else _chosen(scores, row)
    if row.sampling.logprobs:
        row.log_probabilities.append(_log_probability(logits, token, row.sampling.top_logprobs))
    return token


def _chosen(scores: np.ndarray, row: Row) -> int:
    if row.sampling.temperature:
        return sample(scores, row.sampling, row.seed, len(row.output))
    return int(scores.argmax())


def _constrained(scores: np.ndarray, row: Row) -> int:
    matcher = row.matcher
    if not row.sampling.temperature:
        token = int(scores.argmax())
        if matcher.try_consume_tokens([token]) == 1:  # the usual case, without a mask
            return token
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    allowed = np.zeros(len(scores), dtype=bool)
    allowed[: len(bits)] = bits[: len(scores)]
    if matcher.is_error() or not allowed.any():
        row.error = _stuck(row, matcher.get_error() or "no token of the vocabulary is allowed")
        return 0
    token = _chosen(np.where(allowed, scores, -np.inf), row)
    if not matcher.consume_token(token):
        row.error = _stuck(row, matcher.get_error())
    return token


def _stuck(row: Row, reason: str) -> str:
    """The error of a row whose grammar can't go on. It names the field that the grammar comes from."""
    return f"{'tools' if row.tools else 'response_format'}: the grammar can't go on ({' '.join(reason.split()):.200})"


def _log_probability(logits: np.ndarray, token: int, most: int) -> TokenLogProbability:
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    likeliest: tuple[tuple[int, float], ...] = ()
    if most:
        places = np.argpartition(-values, most - 1)[:most] if most < len(values) else np.arange(len(values))
        ordered = sorted(places.tolist(), key=lambda place: (-values[place], place))
        likeliest = tuple((place, float(values[place])) for place in ordered)
    return TokenLogProbability(token, float(values[token]), likeliest)
