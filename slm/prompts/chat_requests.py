"""Turns requests of OpenAI's API, as traces and MLflow's datasets hold them, into rows of a prompt set.

A row has the conversation alone: the model answers it with the parameters of the evaluation. Both shapes of a request
are read: `messages` (chat completions), and `input` with `instructions` (responses). This module reads no trace.

Not covered: requests with tools, images or sound, and those that go on from an earlier answer. A row can't hold them.
`chat` says why it leaves a request out.
"""

from collections.abc import Iterable
from typing import Any

from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.prompts import prompt_rows

NO_CHAT, TOOLS, MEDIA, STATE = "no chat", "tools", "images or sound", "a state that the server keeps"
UNREADABLE = "a text or schema that can't be a row"
ROLES = {"developer": "system"} | {role: role for role in prompt_rows.ROLES}
TEXT_PARTS = ("text", "input_text", "output_text")
TAG = 100  # characters of a tag


class LeftOut(Exception):
    """A request that can't be a row. The message is one of the constants above."""


def chat(request: object) -> dict[str, Any]:
    """The fields of a row that a request gives: `messages`, and `response_format` if the request has one.

    Raises:
        LeftOut: the request has no conversation, or one that a row can't hold.
    """
    if not isinstance(request, dict):
        raise LeftOut(NO_CHAT)
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, str) and "messages" not in request:
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise LeftOut(NO_CHAT)
    if request.get("tools") or request.get("functions"):
        raise LeftOut(TOOLS)
    if request.get("previous_response_id") or request.get("conversation"):
        raise LeftOut(STATE)
    if request.get("instructions"):
        messages = [{"role": "system", "content": request["instructions"]}, *messages]
    row: dict[str, Any] = {"messages": [_message(message) for message in messages]}
    text = request.get("text")
    form = request.get("response_format") or response_format(text.get("format") if isinstance(text, dict) else None)
    if form and form != {"type": "text"}:
        row["response_format"] = form
    return row


def response_format(given: Any) -> Any:
    """`text.format` of a responses request in the form of a chat request, where the schema has an object of its own."""
    if not isinstance(given, dict) or given.get("type") != "json_schema" or "json_schema" in given:
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def identity(row: dict[str, Any]) -> str:
    """The id of a conversation. It is the same in each reading, and does not depend on what is expected."""
    return f"chat-{digest([row['messages'], row.get('response_format')])[:12]}"


def cluster(row: dict[str, Any], session: str) -> str:
    """What the turns of a conversation have in common: its session, and otherwise the user's first message."""
    first = next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
    return f"session {session}" if session.strip() else f"begins {digest(first)[:12]}"


def expected(expectations: Iterable[tuple[str, Any]]) -> list[str]:
    """The texts of MLflow's expectations `expected_response`, or else of `expected`. Others are no answers.

    Several people may give one name several values. A number is a text.
    """
    given = list(expectations)
    values = [value for name, value in given if name == "expected_response"]
    values = values or [value for name, value in given if name == "expected"]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    plain = [str(text) if isinstance(text, int | float) and not isinstance(text, bool) else text for text in texts]
    return [text for text in plain if isinstance(text, str) and text.strip()]


def tags(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """`liked: true`: tags of a row from named values, such as people's feedback. Other values than plain ones have no
    tag."""
    plain = ((name, value) for name, value in pairs if isinstance(value, str | bool | int | float))
    told = {f"{name}: {str(value).lower() if isinstance(value, bool) else value}"[:TAG] for name, value in plain}
    return sorted(told)


def checked(row: dict[str, Any]) -> prompt_rows.Prompt:
    """The prompt of a row.

    Raises:
        LeftOut: the check of rows refuses the row, such as for a NUL in a text.
    """
    try:
        return prompt_rows.read_row(row, "", {"contains": lambda expected, options: None})
    except BadInput:
        raise LeftOut(UNREADABLE) from None


def _message(message: object) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("type", "message") != "message":
        raise LeftOut(TOOLS if isinstance(message, dict) else NO_CHAT)
    if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise LeftOut(TOOLS)
    role, content = ROLES.get(str(message.get("role"))), message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in TEXT_PARTS for part in content):
            raise LeftOut(MEDIA)
        content = "\n".join(str(part.get("text", "")) for part in content)  # as the model gets them
    if role is None or not isinstance(content, str):
        raise LeftOut(NO_CHAT)
    return {"role": role, "content": content}
