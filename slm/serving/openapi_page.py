"""GET /openapi.json: what this server answers, as an OpenAPI 3.1 description.

The bodies come from the models that read the requests, and from the table of a chat request's fields.
"""

from typing import Any

from pydantic import BaseModel

from slm.models import chat_model
from slm.models.chat_parts.fields import FIELDS, Field
from slm.serving.completions import CompletionRequest
from slm.serving.protocol import MOST_STOPS, Limits
from slm.serving.responses import ResponsesRequest
from slm.serving.tokens import DetokenizeRequest, TokenizeRequest

KINDS: dict[str, dict] = {
    "number": {"type": "number"},
    "whole number": {"type": "integer"},
    "flag": {"type": "boolean"},
    "text": {"type": "string"},
    "texts": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
        ]
    },
    "list": {"type": "array"},
    "object": {"type": "object"},
    "any": {},
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}},
                    {"type": "null"},
                ]
            },
            "name": {"type": ["string", "null"]},
        },
    },
}
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
MODEL_CARD = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
EVENT = {
    "type": "object",
    "description": "One event of a stream. `data` is JSON, or [DONE] at the end of the first two addresses' streams.",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
FINISH_REASON = {"enum": ["stop", "length", "tool_calls"]}


def page(limits: Limits, with_keys: bool) -> dict:
    """The description of a server with these limits."""
    schemas: dict[str, Any] = {
        "Error": ERROR,
        "Usage": USAGE,
        "Model": MODEL_CARD,
        "TextPart": TEXT_PART,
        "Event": EVENT,
        "ChatRequest": chat_request(limits),
    }
    for kind in (CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest):
        schemas |= component(kind)
    paths = {
        "/v1/chat/completions": post("ChatRequest", completion_schema("chat.completion", "message", "object"), True),
        "/v1/completions": post("CompletionRequest", completion_schema("text_completion", "text", "string"), True),
        "/v1/responses": post("ResponsesRequest", response_schema(), True),
        "/tokenize": post("TokenizeRequest", tokens_schema()),
        "/detokenize": post("DetokenizeRequest", objects(prompt={"type": "string"})),
        "/v1/models": get(objects(object={"const": "list"}, data={"type": "array", "items": ref("Model")})),
        "/v1/models/{name}": get(ref("Model"), 404)
        | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]},
        "/metrics": get({"type": "string"}, kind="text/plain"),
        "/health": get(objects(status={"const": "ok"}, model={"type": "string"}), 503) | {"security": []},
        "/openapi.json": get({"type": "object"}) | {"security": []},
    }
    for path in paths.values():
        security = path.pop("security", [{"key": []}] if with_keys else [])
        for operation in path.values():
            if isinstance(operation, dict):
                operation["security"] = security
                if security:
                    operation["responses"]["401"] = answer(ref("Error"), "The key is missing or wrong.")
    return {
        "openapi": "3.1.0",
        "info": {"title": "phi3-mlflow serve", "version": chat_model.VERSION},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def chat_request(limits: Limits) -> dict:
    """The table of fields as a schema."""
    properties = {entry.name: chat_field(entry, limits) for entry in FIELDS}
    return {"type": "object", "required": ["messages"], "additionalProperties": False, "properties": properties}


def chat_field(entry: Field, limits: Limits) -> dict:
    if entry.name == "messages":
        return MESSAGES | {"description": entry.meaning}
    told = entry.meaning + (f" Not supported: {entry.refused}." if entry.refused else "")
    if entry.refused:
        return {"enum": [None, *entry.neutral], "description": told}
    schema = dict(KINDS[entry.kind])
    if entry.kind in ("number", "whole number"):
        most = limits.max_tokens if entry.name in ("max_tokens", "max_completion_tokens") else entry.high
        schema |= {"minimum": entry.low, "maximum": most}
    if entry.default is not None:
        schema["default"] = min(entry.default, limits.max_tokens) if entry.name == "max_tokens" else entry.default
    return {"anyOf": [schema, {"type": "null"}], "description": told}


def component(kind: type[BaseModel]) -> dict[str, Any]:
    """A model's schema by its name, with the schemas that it refers to."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/" + kind.__name__ + "{model}")
    inner = {kind.__name__ + name: content for name, content in schema.pop("$defs", {}).items()}
    return {kind.__name__: schema} | inner


def ref(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def objects(**properties: dict) -> dict:
    """An object with these properties, all of them required."""
    return {"type": "object", "required": list(properties), "properties": properties}


def completion_schema(kind: str, name: str, content: str) -> dict:
    choice = objects(index={"type": "integer"}, finish_reason=FINISH_REASON, **{name: {"type": content}})
    return objects(
        id={"type": "string"},
        object={"const": kind},
        created={"type": "integer"},
        model={"type": "string"},
        choices={"type": "array", "items": choice},
        usage=ref("Usage"),
    )


def response_schema() -> dict:
    return objects(
        id={"type": "string"},
        object={"const": "response"},
        created_at={"type": "integer"},
        status={"enum": ["completed", "incomplete"]},
        model={"type": "string"},
        output={"type": "array", "items": {"type": "object"}},
        usage={"type": "object"},
    )


def tokens_schema() -> dict:
    ids = {"type": "array", "items": {"type": "integer"}}
    strings = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
    return objects(count={"type": "integer"}, max_model_len={"type": "integer"}, tokens=ids, token_strs=strings)


def answer(schema: dict, description: str, kind: str = "application/json") -> dict:
    return {"description": description, "content": {kind: {"schema": schema}}}


ERRORS = {
    400: "The request is not valid, or asks for something that the model lacks.",
    404: "The model has another name.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    421: "The server has another host name.",
    429: "The queue is full.",
    500: "The model failed.",
    503: "The server is stopping.",
    504: "The time is up.",
}


def failures(*codes: int) -> dict[str, dict]:
    return {str(code): answer(ref("Error"), ERRORS[code]) for code in codes}


def post(body: str, schema: dict, generates: bool = False) -> dict:
    """An endpoint that reads JSON. One that generates can also stream."""
    done = answer(schema, "The answer.")
    if generates:
        done["content"]["text/event-stream"] = {"schema": ref("Event")}
    codes = [400, 404, 408, 413, 415, 421] + ([429, 500, 503, 504] if generates else [])
    request = {"required": True, "content": {"application/json": {"schema": ref(body)}}}
    return {"post": {"requestBody": request, "responses": {"200": done} | failures(*codes)}}


def get(schema: dict, *codes: int, kind: str = "application/json") -> dict:
    return {"get": {"responses": {"200": answer(schema, "The answer.", kind)} | failures(*codes, 421)}}
