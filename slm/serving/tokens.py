"""/tokenize and /detokenize, in the form of vLLM: a model's tokens for a text or a conversation, and back."""

import asyncio

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from slm.models.chat_parts.templates import messages_of
from slm.serving.exchanges import Present
from slm.serving.protocol import ApiError, refused_as_error


class TokenizeRequest(BaseModel):
    """A text, or a conversation that goes through the chat template."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    prompt: str | None = None
    messages: list[dict] | None = None
    add_special_tokens: bool | None = Field(None, description="Of a prompt: also the tokenizer's own. Default true.")
    add_generation_prompt: bool | None = Field(None, description="Only true, its default.")
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    tokens: list[int]


def tokenize_endpoint(present: Present):
    def ids_of(model, asked: TokenizeRequest) -> list[int]:
        if asked.prompt is not None:
            return model.token_ids(asked.prompt, asked.add_special_tokens is not False)
        return model.token_ids(model.render(messages_of(asked.messages, model.template)), False)

    async def tokenize(request: Request):
        service = await present()
        model = service.model
        with service.counted():
            asked = await service.read(request, TokenizeRequest)
            if (asked.prompt is None) == (asked.messages is None):
                raise ApiError(400, "give either prompt or messages", param="prompt")
            if asked.messages is not None and asked.add_special_tokens:
                text = "add_special_tokens: not with messages; the chat template has its own"
                raise ApiError(400, text, param="add_special_tokens")
            if asked.add_generation_prompt is False:
                text = "add_generation_prompt: false is not supported by this model"
                raise ApiError(400, text, param="add_generation_prompt")
            ids = await asyncio.to_thread(refused_as_error, ids_of, model, asked)
        strings = [model.text_of([token]) for token in ids] if asked.return_token_strs else None
        content = {"count": len(ids), "max_model_len": model.context_length, "tokens": ids, "token_strs": strings}
        return JSONResponse(content, headers=service.headers)

    return tokenize


def detokenize_endpoint(present: Present):
    async def detokenize(request: Request):
        service = await present()
        model = service.model
        with service.counted():
            asked = await service.read(request, DetokenizeRequest)
            ids = refused_as_error(model.in_vocabulary, asked.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(model.text_of, ids)}, headers=service.headers)

    return detokenize
