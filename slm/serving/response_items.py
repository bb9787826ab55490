"""The items of /v1/responses: those of a request become messages of the chat API, and a text becomes items.

An answer has a message for its text, and an item for each call of a function, in the order of the text.

Not covered: items of other tools, of reasoning and of stored responses. A request with one of them is refused.
"""

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from slm.models.chat_parts.tool_calls import Call
from slm.models.chat_parts.tools import Parts, is_cut
from slm.serving.protocol import ApiError

PARTS = ("input_text", "output_text", "text")
ROLES = ("system", "developer", "user", "assistant")
FIELDS = {  # of each kind of item
    "message": ("type", "role", "content", "id", "status", "phase"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status"),
    "function_call_output": ("type", "call_id", "output", "id", "status"),
}


def messages_of(items: list[dict]) -> list[dict]:
    """The items of `input` as messages of the chat API. Calls join the assistant's message before them.

    Raises:
        ApiError: an item has a wrong form, or is neither a text nor a call of a function nor a call's result.
    """
    messages: list[dict] = []
    for place, item in enumerate(items):
        where, kind = f"input.{place}", item.get("type") or "message"
        if not isinstance(kind, str) or kind not in FIELDS:
            text = f"{where}.type: {kind!r:.40} is not supported by this model; {', '.join(FIELDS)} are"
            raise ApiError(400, text, param="input")
        for name, value in item.items():
            if name not in FIELDS[kind] and value is not None:  # clients send back what they got, with empty fields
                raise ApiError(400, f"{where}.{name!s:.40}: there is no such field", param="input")
        if kind == "message":
            messages.append(_message(item, where))
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_chat_call(item, where))
        else:
            result = {"role": "tool", "tool_call_id": _text(item, "call_id", where)}
            messages.append(result | {"content": _content(item, "output", where)})
    return messages


def _message(item: dict, where: str) -> dict:
    content = _content(item, "content", where)
    if item.get("role") not in ROLES:
        raise ApiError(400, f"{where}.role: {item.get('role')!r:.40} is none of {', '.join(ROLES)}", param="input")
    return {"role": item["role"], "content": content}


def _chat_call(item: dict, where: str) -> dict:
    name, arguments = _text(item, "name", where), _text(item, "arguments", where)
    try:
        whole = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise ApiError(400, f"{where}.arguments must be a JSON object as text, got {arguments!r:.60}", param="input")
    function = {"name": name, "arguments": arguments}
    return {"id": _text(item, "call_id", where), "type": "function", "function": function}


def _content(item: dict, name: str, where: str) -> str:
    content = item.get(name)
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{where}.{name}: only parts of text", param="input")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.{name} must be a text, or a list of parts of text", param="input")
    return content


def _text(item: dict, name: str, where: str) -> str:
    if not isinstance(item.get(name), str) or not item[name]:
        raise ApiError(400, f"{where}.{name} must be text, got {item.get(name)!r:.60}", param="input")
    return item[name]


def chat_tools(tools: list[dict] | None) -> list[dict] | None:
    """The functions of a request in the form of the chat API, where each is an object of its own.

    Raises:
        ApiError: a tool is no function.
    """
    for place, tool in enumerate(tools or []):
        if tool.get("type") != "function":
            text = f"tools.{place}.type: {tool.get('type')!r:.40} is not supported by this model; only function"
            raise ApiError(400, text, param="tools")
    return tools and [
        {
            "type": "function",
            "function": {name: value for name, value in tool.items() if name != "type" and value is not None},
        }
        for tool in tools
    ]


def chat_choice(choice: Any) -> Any:
    """`tool_choice` in the form of the chat API, where names and lists are in an object of their own."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools" and "allowed_tools" not in choice:
        inside = {name: value for name, value in choice.items() if name != "type"}
        listed = inside.get("tools")
        if isinstance(listed, list):
            inside["tools"] = [chat_choice(entry) for entry in listed]
        return {"type": "allowed_tools", "allowed_tools": inside}
    if isinstance(choice, dict) and set(choice) == {"type", "name"}:
        return {"type": choice["type"], "function": {"name": choice["name"]}}
    return choice


class Output:
    """The items of one answer, and the events that a stream has for them. The text comes in pieces."""

    def __init__(self, row, end_tokens: Iterable[int]):
        self.items: list[dict] = []
        self._row, self._ends, self._parts = row, frozenset(end_tokens), Parts(row)
        self._text: str | None = None  # of the last item, while it is a message that goes on

    def of(self, text: str, finish_reason: str) -> Iterator[tuple[str, dict]]:
        """The events (kind, content) for a further piece of the text."""
        ended = finish_reason not in ("", "error")
        for part in self._parts.of(text, ended, is_cut(self._row, self._ends)):
            yield from self._called(part) if isinstance(part, Call) else self._said(part)
        if ended:
            if not self.items:
                yield from self._said("")
            yield from self._closed("incomplete" if finish_reason == "length" else "completed")

    def _said(self, text: str) -> Iterator[tuple[str, dict]]:
        if self._text is None:
            self._text = ""
            message = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": "in_progress", "role": "assistant"}
            yield from self._added(message | {"content": []})
            yield "response.content_part.added", self._inside() | {"part": _part("")}
        if text:
            self._text += text
            yield "response.output_text.delta", self._inside() | {"delta": text, "logprobs": []}

    def _called(self, call: Call) -> Iterator[tuple[str, dict]]:
        yield from self._closed("completed")
        ids = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": f"call_{uuid.uuid4().hex[:24]}"}
        yield from self._added(ids | {"name": call.name, "arguments": "", "status": "in_progress"})
        inside, arguments = self._place() | {"item_id": ids["id"]}, {"arguments": call.arguments}
        yield "response.function_call_arguments.delta", inside | {"delta": call.arguments}
        yield "response.function_call_arguments.done", inside | {"name": call.name} | arguments
        yield from self._done(arguments | {"status": "completed"})

    def _closed(self, status: str) -> Iterator[tuple[str, dict]]:
        """The end of a message, if one goes on."""
        if self._text is None:
            return
        part = _part(self._text)
        yield "response.output_text.done", self._inside() | {"text": self._text, "logprobs": []}
        yield "response.content_part.done", self._inside() | {"part": part}
        self._text = None
        yield from self._done({"status": status, "content": [part]})

    def _added(self, item: dict) -> Iterator[tuple[str, dict]]:
        self.items.append(item)
        yield "response.output_item.added", self._place() | {"item": item}

    def _done(self, ended: dict) -> Iterator[tuple[str, dict]]:
        self.items[-1] = self.items[-1] | ended
        yield "response.output_item.done", self._place() | {"item": self.items[-1]}

    def _place(self) -> dict:
        return {"output_index": len(self.items) - 1}

    def _inside(self) -> dict:
        return self._place() | {"item_id": self.items[-1]["id"], "content_index": 0}


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
