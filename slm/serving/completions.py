"""/v1/completions: texts that go on, without a chat template. A prompt is a text, or token ids.

With `echo` and `logprobs`, the prompt's tokens get their log probabilities too, which lm-eval's `local-completions`
needs. They are read in the generating thread, piece by piece, between the steps of the running batches.

Not covered: suffix, best_of, and log probabilities or echo in streams.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from slm.serving.exchanges import Exchange, Present, Service, server_sent_events, stream_of
from slm.serving.protocol import MOST_STOPS, ApiError, Limits, refused_as_error

MOST_PROMPTS = 64
MAX_TOKENS = 16  # OpenAI's default
HONOURED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias",
)  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """The body of a request. The model itself checks the ranges of the generation parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description=f"A text, up to {MOST_PROMPTS} texts, token ids, or up to {MOST_PROMPTS} lists of token ids."
    )
    max_tokens: int | None = Field(None, ge=0, description=f"Default {MAX_TOKENS}. 0 needs echo.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20, description="Log probabilities, with so many likeliest tokens.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    best_of: int | None = Field(None, description="Only 1.")
    suffix: str | None = Field(None, description="Only an empty text.")
    user: str | None = None

    def check(self, limits: Limits) -> None:
        """
        Raises:
            ApiError: the request needs something that this server does not have.
        """
        most = limits.max_tokens
        for name, problem in (
            ("best_of", self.best_of not in (None, 1) and f"{self.best_of} is not supported by this model; use n"),
            ("suffix", bool(self.suffix) and "text after the answer is not supported by this model"),
            ("stream_options", bool(self.stream_options) and not self.stream and "needs stream: true"),
            ("logprobs", self.logprobs is not None and self.stream and "not supported in a stream"),
            ("echo", self.echo and self.stream and "not supported in a stream"),
            ("max_tokens", self.max_tokens == 0 and not self.echo and "0 needs echo: true"),
            ("max_tokens", (self.max_tokens or 0) > most and f"{self.max_tokens} is more than the {most} allowed here"),
            ("stop", isinstance(self.stop, list) and len(self.stop) > MOST_STOPS and f"at most {MOST_STOPS} texts"),
        ):
            if problem:
                raise ApiError(400, f"{name}: {problem}", param=name)

    def prompts(self) -> list[str] | list[list[int]]:
        """
        Raises:
            ApiError: there is no prompt, or there are too many.
        """
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or not all(given):
            raise ApiError(400, "prompt: must hold a text or token ids, got nothing", param="prompt")
        if len(given) > MOST_PROMPTS:
            raise ApiError(400, f"prompt: {len(given)} prompts; at most {MOST_PROMPTS}", param="prompt")
        return given


@dataclass
class Prompt:
    """A prompt of a request, the texts that continue it, and what the model thinks of its own tokens."""

    ids: list[int]
    text: str
    rows: list = field(default_factory=list)  # empty with max_tokens 0
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)  # of the tokens after the first

    def see(self, most: int) -> Callable[[int, int, np.ndarray], None]:
        """Gets distributions, and keeps each token's log probability and the likeliest tokens."""

        def seen(row: int, first: int, distributions: np.ndarray) -> None:
            for token, found in zip(self.ids[first + 1 :], distributions, strict=False):
                top = np.argpartition(-found, most)[:most] if most else np.zeros(0, dtype=int)
                top = top[np.argsort(-found[top], kind="stable")]
                self.scores.append((float(found[token]), [(int(other), float(found[other])) for other in top]))

        return seen


def prepared(asked: CompletionRequest, service: Service) -> list[Prompt]:
    """The prompts of a request with the texts to generate.

    Raises:
        ValueError: the model refuses the request (Refused).
    """
    model = service.model
    row: dict[str, Any] = {name: value for name in HONOURED if (value := getattr(asked, name)) is not None}
    most = min(MAX_TOKENS, service.limits.max_tokens)
    row["max_tokens"] = (most if asked.max_tokens is None else asked.max_tokens) or 1
    if asked.logprobs is not None:
        row |= {"logprobs": True, "top_logprobs": asked.logprobs}
    prompts: list[Prompt] = []
    for given in asked.prompts():
        ids = model.token_ids(given) if isinstance(given, str) else given
        if not ids:
            raise ApiError(400, "prompt: has no tokens", param="prompt")
        rows = model.prepare(row, service.defaults, len(prompts), prompt_ids=ids)  # checks the parameters, in any case
        text = given if isinstance(given, str) else model.text_of(ids)
        prompts.append(Prompt(ids, text, [] if asked.max_tokens == 0 else rows))
    return prompts


def endpoint(present: Present):
    """What answers /v1/completions."""

    async def answer(request: Request):
        service = await present()
        exchange = Exchange(service.worker, request)
        with service.counted():
            asked = await service.read(request, CompletionRequest)
            asked.check(service.limits)
            prompts = await asyncio.to_thread(refused_as_error, prepared, asked, service)
            service.begin(exchange, [row for prompt in prompts for row in prompt.rows], asked.stream)
        n = asked.n or 1
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            begin = head(service)
            events = server_sent_events(chunks(begin, exchange, prompts, n, with_usage))
            whole = partial(completion, service.model, asked, prompts, begin)
            return stream_of(service, events, service.traced("completion", exchange, whole))
        await exchange.finished()
        if asked.echo and asked.logprobs is not None:
            try:
                await read_prompts(service, prompts, asked.logprobs)
            except ApiError as error:
                exchange.record.outcome = error.outcome
                raise
        content = completion(service.model, asked, prompts, head(service))
        background = service.traced("completion", exchange, lambda: content)
        return JSONResponse(content, headers=service.headers, background=background)

    return answer


def completion(model, asked: CompletionRequest, prompts: list[Prompt], begin: dict) -> dict:
    """The whole answer to a request. `begin` has its id."""
    n = asked.n or 1
    choices = [
        choice(model, asked, prompt, prompt.rows[at % len(prompt.rows)] if prompt.rows else None)
        for prompt in prompts
        for at in range(n)
    ]
    told = [entry | {"index": index} for index, entry in enumerate(choices)]
    return begin | {"choices": told, "usage": usage(prompts, n)}


async def read_prompts(service: Service, prompts: list[Prompt], most: int) -> None:
    """
    Raises:
        ApiError: the time is up, too many texts wait, or the server is stopping.
    """
    try:
        async with asyncio.timeout(service.limits.seconds):
            for prompt in prompts:
                await service.worker.run(service.model.reading(prompt.ids, prompt.see(most)))
    except TimeoutError:
        text = f"not answered within {service.limits.seconds:g} seconds"
        raise ApiError(504, text, "timeout_error", code="timeout") from None


def choice(model, asked: CompletionRequest, prompt: Prompt, row) -> dict:
    """One answer of a request, without its index. Without a row, it is the prompt alone."""
    text, finish_reason = (row.text, row.finish_reason) if row else ("", "length")
    logprobs = None
    if asked.logprobs is not None:
        found: list = [(prompt.ids[0], None, None)] if asked.echo else []
        if asked.echo:
            found += [(token, value, top) for token, (value, top) in zip(prompt.ids[1:], prompt.scores, strict=True)]
        if row:
            found += [(one.token, one.value, one.likeliest) for one in row.log_probabilities]
        logprobs = written(model, found)
    text = prompt.text + text if asked.echo else text
    return {"text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def written(model, found: list[tuple]) -> dict:
    """Log probabilities in OpenAI's older form. Of tokens with one text, the likeliest one counts."""
    texts = [model.text_of([token]) for token, _, _ in found]
    tops: list[dict | None] = []
    for text, (_, value, likeliest) in zip(texts, found, strict=True):
        top: dict[str, float] = {}
        for token, other in likeliest or ():
            top.setdefault(model.text_of([token]), other)
        if value is not None:
            top.setdefault(text, value)
        tops.append(None if value is None else top)
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    values = [value for _, value, _ in found]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets[:-1]}


def head(service: Service) -> dict:
    made = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    return made | {"model": service.names[0]} | service.fingerprint


def usage(prompts: list[Prompt], n: int) -> dict[str, int]:
    read = sum(len(prompt.ids) for prompt in prompts)
    made = sum(len(row.output) * (n // len(prompt.rows)) for prompt in prompts for row in prompt.rows)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


async def chunks(
    begin: dict, exchange: Exchange, prompts: list[Prompt], n: int, with_usage: bool
) -> AsyncIterator[dict]:
    """The chunks of a stream. One text may serve several choices."""
    start = begin | ({"usage": None} if with_usage else {})
    served = [  # by row: the indices of its choices
        range(number * n + at, number * n + n, len(prompt.rows))
        for number, prompt in enumerate(prompts)
        for at in range(len(prompt.rows))
    ]
    async for place, text, finish_reason in exchange.news():
        for index in served[place]:
            if text or finish_reason:
                told = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason or None}
                yield start | {"choices": [told]}
    if with_usage:
        yield start | {"choices": [], "usage": usage(prompts, n)}
