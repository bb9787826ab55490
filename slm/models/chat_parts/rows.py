"""What a text is while it is generated, and what the caller gets: plain data that all parts share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .tool_calls import Call


class Refused(ValueError):
    """This row can't be answered. The other rows can. The message gives the reason in one line.

    `field` is the field of the request that is to blame, or "".
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Sampling:
    """The generation parameters of one row, with OpenAI's names."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    n: int
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def changes_logits(self) -> bool:
        """Whether the logits change before a token is chosen from them."""
        neutral = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) == (0, 0, 1)
        return bool(self.logit_bias) or not neutral


GREEDY = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=(), n=1)


@dataclass(frozen=True)
class TokenLogProbability:
    """What the model thought of a token that it generated, before temperature, penalties and grammar."""

    token: int
    value: float  # natural logarithm
    likeliest: tuple[tuple[int, float], ...] = ()  # (token id, log probability), the likeliest first


@dataclass(frozen=True)
class Answer:
    """One generated text. `output_tokens` counts every generated token, including the end token."""

    text: str
    finish_reason: str  # stop | length | tool_calls | error
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0  # from the start of the prompt, or of the batch, to the last token
    error: str = ""
    token_ids: tuple[int, ...] = ()  # all generated tokens, including the end token
    log_probabilities: tuple[TokenLogProbability, ...] = ()  # of these tokens, if the request asks for them
    calls: tuple[Call, ...] = ()  # functions that the model calls. They are not in `text`


@dataclass(frozen=True)
class TokenScores:
    """What a model thinks of given tokens: `token_scores` has one for each row."""

    log_probabilities: np.ndarray  # (tokens,) float32, natural logarithms
    likeliest: np.ndarray  # (tokens,) bool: whether the token is the likeliest one


# Gets (place of the row, first token, log probabilities (tokens, vocabulary) in float32). The pieces of a row may come
# in any order, and rows from several threads at once.
SeeDistributions = Callable[[int, int, np.ndarray], None]


@dataclass
class Row:
    """One text that is being generated: the token ids of its prompt, and its tokens so far."""

    index: tuple[int, int]  # (row of the input, which of its n answers)
    prompt: list[int]
    sampling: Sampling
    room: int  # the most tokens that may be generated
    seed: int
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    text: str = ""  # complete at the end; before that only with stop strings and in streams
    sent: int = 0  # characters of the text that a stream has given
    started: float = 0.0  # perf_counter; 0 if the row starts with its batch
    seconds: float = 0.0
    tenant: str = ""  # keys and values are copied only between rows of one tenant
    forced: list[int] = field(default_factory=list)  # the tokens, if they are given and not chosen: `room` of them
    matcher: Any = None  # llguidance's LLMatcher: what the row's grammar allows next (structured.Constraints)
    log_probabilities: list[TokenLogProbability] = field(default_factory=list)
    error: str = ""  # the reason in one line, if the row can't go on
    tools: Any = None  # how the calls in the text are read (tools.Reading), if the request has tools
    shown: frozenset[int] = frozenset()  # special tokens that stay in the text, because they mark calls
    # gets the place of a given token, and the logits (tokens, vocabulary) from which it and the next ones follow
    see: Callable[[int, np.ndarray], None] = lambda first, logits: None

    @property
    def span(self) -> int:
        """The number of tokens for which the row needs room in its keys and values."""
        return len(self.prompt) + self.room

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest one, and nobody needs the logits."""
        sampling = self.sampling
        alone = not (self.forced or self.matcher or sampling.temperature or sampling.logprobs)
        return alone and not sampling.changes_logits

    def end(self, reason: str) -> None:
        """Ends the row, for a reason such as stop, length, cancelled or dropped. The first reason stays."""
        self.finish_reason = self.finish_reason or reason
