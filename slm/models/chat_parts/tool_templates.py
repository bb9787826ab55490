"""What a chat template does with tools, found by rendering small conversations with and without a tool.

A template gets tools as the variable `tools`, as in transformers. Phi-4-mini's own template takes them as JSON text in
the system message instead. The template's marks say in which form the model writes calls (tool_calls.FORMS).

Templates differ in how they take the calls and answers of a conversation:
- arguments as an object, as transformers documents them, or as JSON text, as OpenAI's API has them;
- no calls at all. The calls then become the content of the message, in the model's form;
- an answer with the function's name. OpenAI's API has only the call's id, so the name is taken from the call.

Not covered: folders of named templates (additional_chat_templates), and templates that need other variables.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Refused
from .templates import render
from .tool_calls import FORMS, Form

SYSTEM = "You are a helpful assistant with some tools."  # of Phi-4-mini's model card
ASKED: dict[str, Any] = {"role": "user", "content": "Hi"}
PROBE, ARGUMENT = "probe_tool_1", "probe_argument_1"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": "A probe",
        "parameters": {
            "type": "object",
            "properties": {"probed": {"type": "string", "description": "A probe"}},
            "required": ["probed"],
        },
    },
}


@dataclass(frozen=True)
class ToolTemplate:
    """How a template takes tools, and how its model writes calls."""

    form: Form
    in_system: bool  # whether the tools are JSON text in the system message
    calls: str  # how the template takes the calls of a conversation: object, text or content


def read_tool_template(folder: str | Path, template: str) -> str:
    """The template for requests with tools: the one named tool_use, if tokenizer_config.json has it, else `template`.

    transformers chooses in the same way.
    """
    path = Path(folder) / "tokenizer_config.json"
    if (Path(folder) / "chat_template.jinja").exists() or not path.exists():
        return template
    named = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    if not isinstance(named, list):
        return template
    return next((entry["template"] for entry in named if entry["name"] == "tool_use"), template)


def tool_template(template: str, special_tokens: dict[str, str]) -> ToolTemplate:
    """What a template does with tools.

    Raises:
        Refused: the template ignores tools, or the model's form of calls is not known.
    """
    return _found(template, tuple(special_tokens.items()))


@functools.lru_cache(maxsize=16)
def _found(template: str, special_tokens: tuple[tuple[str, str], ...]) -> ToolTemplate:
    special = dict(special_tokens)

    def text(messages: list[dict], tools: list[dict] | None = None) -> str:
        try:
            return render(template, special, messages, tools)
        except Refused:
            return ""

    in_system = False
    if PROBE not in text([ASKED], [TOOL]):
        in_system = PROBE in text(_with_system([ASKED], [TOOL]))
        if not in_system:
            raise Refused(
                "tools: the model's chat template ignores tools; ask without tools and calls, or use another model",
                "tools",
            )
    form = _form(template)
    for calls in ("object", "text"):
        arguments: Any = {ARGUMENT: "probe"}
        message = _message([(PROBE, json.dumps(arguments) if calls == "text" else arguments)])
        if f'"{ARGUMENT}"' in text([ASKED, message], None if in_system else [TOOL]):
            return ToolTemplate(form, in_system, calls)
    return ToolTemplate(form, in_system, "content")


def _message(calls: list[tuple[str, Any]]) -> dict:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    told = [
        {"id": f"call{place:05}", "type": "function", "function": function} for place, function in enumerate(functions)
    ]
    return {"role": "assistant", "content": "", "tool_calls": told}


def _form(template: str) -> Form:
    """
    Raises:
        Refused: the template has no marks of a known form.
    """
    if "<tool_call>" in template and "<function=" not in template:
        return FORMS["tagged"]
    if any(mark in template for mark in ("<|tool_call|>", "<|tool|>", "functools[")):
        return FORMS["listed"]
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return FORMS["bare"]
    raise Refused(
        "tools: the model's chat template has tools, but calls in a form that is not read here; "
        "the forms of Qwen 2.5 and 3, Hermes, Phi-4-mini and Llama 3 are",
        "tools",
    )


def fitted(messages: list[dict], tools: list[dict], found: ToolTemplate) -> tuple[list[dict], list[dict] | None]:
    """The messages and the variable `tools`, as the template takes them. The messages come from `messages_of`."""
    names: dict[str, str] = {}
    told = []
    for message in messages:
        calls = message.get("tool_calls", [])
        names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
        if calls:
            message = _calls_fitted(message, found)
        elif message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""))
            message = message | ({"name": name} if name else {})
            if found.in_system:  # there, <|tool|> begins the list of tools
                message["role"] = "tool_response"
        told.append(message)
    return (_with_system(told, tools), None) if found.in_system else (told, tools or None)


def _calls_fitted(message: dict, found: ToolTemplate) -> dict:
    functions = [call["function"] for call in message["tool_calls"]]
    if found.calls == "content":
        texts = [_call_text(function, found.form) for function in functions]
        if found.form.between:
            texts = [found.form.between.join(texts)]
        form = found.form
        written = "\n".join(f"{form.opens[0]}{form.before}{text}{form.after}{form.closes}" for text in texts)
        return {"role": message["role"], "content": message["content"] + written}
    if found.calls == "object":
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _call_text(function: dict, form: Form) -> str:
    return json.dumps({"name": function["name"], form.arguments: function["arguments"]}, ensure_ascii=False)


def _with_system(messages: list[dict], tools: list[dict]) -> list[dict]:
    if not tools:
        return messages
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    if messages[0]["role"] == "system":
        return [messages[0] | {"tools": text}, *messages[1:]]
    return [{"role": "system", "content": SYSTEM, "tools": text}, *messages]
