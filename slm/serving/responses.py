"""/v1/responses, OpenAI's newer API, without state: a request holds the whole conversation.

Not covered: stored responses (previous_response_id, conversation, background), tools other than functions, images,
files, reasoning and log probabilities. A request for any of them is refused.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from slm.prompts import chat_requests
from slm.serving.access_log import Record
from slm.serving.exchanges import Exchange, Present, Service, server_sent_event, stream_of
from slm.serving.protocol import ApiError, Limits, refused_as_error
from slm.serving.response_items import Output, chat_choice, chat_tools, messages_of

STATE = "this server keeps no responses; send the whole conversation as input"
NEUTRAL: dict[str, tuple] = {  # fields that this server lacks, and the values that ask for nothing
    "include": ([],),
    "truncation": ("disabled",),
    "background": (False,),
    "reasoning": ({},),
    "top_logprobs": (0,),
    "max_tool_calls": (),
    "prompt": (),
    "context_management": ([],),
}
CHAT_NAMES = (  # how the chat API's names in a refusal read here
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^(tools\[\d+\])\.function\b", r"\1"),
    (r"^messages\b", "input"),
)


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: dict[str, Any] | None = Field(None, description="text, json_object, or json_schema with a schema.")
    verbosity: str | None = Field(None, description="Only medium.")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_obfuscation: bool | None = Field(None, description="Nothing is added to the events.")


class ResponsesRequest(BaseModel):
    """The body of a request. The model itself checks the ranges of the generation parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    input: str | list[dict[str, Any]] = Field(description="A user's text, or the messages of a conversation.")
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="Nothing is stored, whatever the value.")
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="Functions that the model may call.")
    tool_choice: str | dict[str, Any] | None = Field(None, description="none, auto, required or a function.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    previous_response_id: str | None = Field(None, description="Only null.")
    conversation: Any = Field(None, description="Only null.")
    include: Any = Field(None, description="Only an empty list.")
    truncation: Any = Field(None, description="Only disabled.")
    background: Any = Field(None, description="Only false.")
    reasoning: Any = Field(None, description="Only an empty object.")
    top_logprobs: Any = Field(None, description="Only 0.")
    max_tool_calls: Any = Field(None, description="Only null.")
    prompt: Any = Field(None, description="Only null.")
    context_management: Any = Field(None, description="Only an empty list.")

    def row(self, limits: Limits) -> dict:
        """The request as a row of the model's input.

        Raises:
            ApiError: the request needs something that this server does not have.
        """
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise ApiError(400, f"{name}: {STATE}", param=name)
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            empty = isinstance(value, dict) and name == "reasoning" and not any(value.values())
            if value is not None and not empty and not any(value is one or value == one for one in neutral):
                raise ApiError(400, f"{name}: {value!r:.60} is not supported by this model", param=name)
        if self.text and self.text.verbosity not in (None, "medium"):
            text = f"text.verbosity: {self.text.verbosity!r:.40} is not supported by this model"
            raise ApiError(400, text, param="text")
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        most = self.max_output_tokens
        if most is not None and not 1 <= most <= limits.max_tokens:
            text = f"max_output_tokens must be a whole number from 1 to {limits.max_tokens}, got {most}"
            raise ApiError(400, text, param="max_output_tokens")
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        row = {
            "messages": told + messages_of(items),
            "max_tokens": most,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": chat_requests.response_format(self.text.format if self.text else None),
            "tools": chat_tools(self.tools),
            "tool_choice": chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        return {name: value for name, value in row.items() if value is not None}


def prepared(asked: ResponsesRequest, service: Service) -> list:
    """The text to generate.

    Raises:
        ApiError: the model refuses the request.
    """
    try:
        return refused_as_error(service.model.prepare, asked.row(service.limits), service.defaults)
    except ApiError as error:
        raise in_own_names(error) from None


def in_own_names(error: ApiError) -> ApiError:
    """A refusal of the chat API with the names that the fields have here."""
    message, param = str(error), error.content["error"]["param"]
    for pattern, name in CHAT_NAMES:
        message = re.sub(pattern, name, message)
    param = {"response_format": "text", "messages": "input"}.get(param, param)
    return ApiError(error.status, message, error.content["error"]["type"], param, error.content["error"]["code"])


def endpoint(present: Present):
    """What answers /v1/responses."""

    async def answer(request: Request):
        service = await present()
        exchange = Exchange(service.worker, request)
        with service.counted():
            asked = await service.read(request, ResponsesRequest)
            rows = await asyncio.to_thread(prepared, asked, service)
            service.begin(exchange, rows, asked.stream)
        response = Response(service, asked, rows[0], exchange.record)
        if asked.stream:
            background = service.traced("response", exchange, response.content)
            return stream_of(service, response.events(exchange), background)
        try:
            await exchange.finished()
        except ApiError as error:
            raise in_own_names(error) from None
        content = response.whole()
        background = service.traced("response", exchange, lambda: content)
        return JSONResponse(content, headers=service.headers, background=background)

    return answer


class Response:
    """The answer to one request, in the form of OpenAI's Response object and its events."""

    def __init__(self, service: Service, asked: ResponsesRequest, row, record: Record):
        self.service, self.asked, self.row, self.record = service, asked, row, record
        self.id, self.output = f"resp_{uuid.uuid4().hex}", Output(row, service.model.end_tokens)
        self.created = int(time.time())
        self.number = 0  # of the next event

    def content(self, status: str = "", error: dict | None = None) -> dict:
        """The Response object. Without `status`, it is that of the finished row."""
        row, asked = self.row, self.asked
        cut = row.finish_reason == "length"
        if row.finish_reason == "stop" and any(item["type"] == "function_call" for item in self.output.items):
            self.record.finish_reasons = ["tool_calls"]
        ended = not status
        status = status or ("incomplete" if cut else "completed")
        usage = {
            "input_tokens": len(row.prompt),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": len(row.output),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(row.prompt) + len(row.output),
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if ended and cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.service.names[0],
            "output": self.output.items if ended else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": row.sampling.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": False} | tool for tool in asked.tools or []],
            "top_p": row.sampling.top_p,
            "truncation": "disabled",
            "usage": usage if ended else None,
            "user": asked.user,
        }

    def whole(self) -> dict:
        """The Response object of the finished row, of which no events were sent."""
        for _ in self.output.of(self.row.text, self.row.finish_reason):
            pass
        return self.content()

    def event(self, kind: str, **content) -> str:
        self.number += 1
        return server_sent_event({"type": kind, "sequence_number": self.number - 1} | content, kind)

    async def events(self, exchange: Exchange) -> AsyncIterator[str]:
        """The events of a stream, in OpenAI's order."""
        try:
            yield self.event("response.created", response=self.content("in_progress"))
            yield self.event("response.in_progress", response=self.content("in_progress"))
            async for _, text, finish_reason in exchange.news():
                for kind, content in self.output.of(text, finish_reason):
                    yield self.event(kind, **content)
        except ApiError as error:
            told = {"code": "server_error", "message": str(in_own_names(error))}
            yield self.event("response.failed", response=self.content("failed", told))
            return
        done = self.content()
        yield self.event(f"response.{done['status']}", response=done)
