"""Conversations to text: reads a checkpoint's chat template, and renders it.

A stranger may have written a chat template, and a template is a program. A child process renders the template within
bounds of time and memory (Confined).
"""

import datetime
import functools
import inspect
import json
from pathlib import Path

import numpy as np

from .confined import CallFailed, Confined
from .fields import did_you_mean, plain
from .rows import Refused

TEMPLATE_SECONDS = 5  # of processor time for one rendering
TEMPLATE_BYTES = 2**29  # of memory for one rendering
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "name")


def read_chat_template(folder: str | Path) -> tuple[str, dict[str, str]]:
    """A checkpoint folder's chat template, and its special tokens by name. Without a template, the first is "".

    Raises:
        Refused: a file can't be read, or the template or a token is not text.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    try:
        template, special = _templates_of(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise Refused(
            f"the chat template or tokenizer_config.json can't be read ({type(error).__name__}: {error})"
        ) from None
    return template, special


def _templates_of(config: dict) -> tuple[str, dict[str, str]]:
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several templates with names
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(name)
        if token:
            special[name] = token["content"] if isinstance(token, dict) else token
    if not all(isinstance(text, str) for text in (template, *special.values())):
        raise TypeError("one of them is no text")
    return template, special


@functools.lru_cache(maxsize=4)  # compiling takes longer than rendering
def _compiled(template: str):
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _rendered(
    template: str, special_tokens: dict[str, str], messages: list[dict], tools: list[dict] | None
) -> dict[str, str]:
    """Runs in the confined process. Gives {"text"}, or {"refused"} with the reason in one line."""
    import jinja2

    try:
        text = _compiled(template).render(
            messages=messages, add_generation_prompt=True, tools=tools, documents=None, **special_tokens
        )
        # the tokenizer then reads this text without bounds
        most = 2**20 + 4 * len(json.dumps([messages, tools]))
        if len(text) <= most:
            return {"text": text}
        reason = f"its text has {len(text):,} characters; the limit is {most:,}"
    except MemoryError:
        raise
    except (jinja2.TemplateError, TypeError) as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    printable = "".join(mark if mark.isprintable() else " " for mark in reason[:1000])
    return {"refused": " ".join(printable.split())[:300]}


_templates = Confined(
    "\n".join(
        [
            "import datetime, functools, json",
            inspect.getsource(_compiled),  # read at import: this file may be gone later
            inspect.getsource(_rendered),
            "FUNCTIONS = {'render': (_rendered, ['', {}, [], None])}",
        ]
    ),
    TEMPLATE_SECONDS,
    TEMPLATE_BYTES,
)


def render(template: str, special_tokens: dict[str, str], messages: list[dict], tools: list[dict] | None = None) -> str:
    """The prompt text of a conversation. The template is rendered by the rules of transformers.

    `tools` are the functions that the model may call, in OpenAI's form.

    A rendering may take TEMPLATE_SECONDS of processor time and TEMPLATE_BYTES of memory, where Confined has bounds.

    Raises:
        Refused: the template refuses the conversation, fails, or exceeds a bound.
    """
    try:
        rendered = _templates.call("render", template, special_tokens, messages, tools)
    except CallFailed as reason:
        raise Refused(f"the model's chat template {reason}") from None
    if "refused" in rendered:
        raise Refused(f"the model's chat template refused the conversation: {rendered['refused']}")
    return rendered["text"]


def messages_of(value, template: str = "") -> list[dict]:
    """A conversation as the templates of transformers want it: content is one text, arguments are objects.

    Text parts are joined by line ends. If the template has no role developer, the role becomes system.

    Raises:
        Refused: the value is no list, the list is empty, or a message has something that the model can't take.
    """
    messages = plain(value) if isinstance(value, list | tuple | np.ndarray) else None
    if not messages:
        raise Refused("messages must hold at least one message, got an empty conversation", "messages")
    return [_message(f"messages[{place}]", message, template) for place, message in enumerate(messages)]


def _message(where: str, message, template: str) -> dict:
    if not isinstance(message, dict):
        raise Refused(f"{where} must be an object with a role and a content, got {message!r:.80}", "messages")
    role = message.get("role")
    if role not in ROLES:
        raise Refused(f"{where}.role: {role!r:.40} is none of {', '.join(ROLES)}", "messages")
    own = MESSAGE_FIELDS + {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
    for name, content in message.items():
        if name not in own and content not in ("", [], {}):  # clients send back the fields that they got
            hint = did_you_mean(name, own)
            raise Refused(f"{where}.{name!s:.40} is not supported by this model{hint}", "messages")
    calls = message.get("tool_calls") or []
    found = {"role": "system" if role == "developer" and "developer" not in template else role}
    found["content"] = _content(where, message.get("content"), empty=bool(calls))
    if calls:
        found["tool_calls"] = [_call(f"{where}.tool_calls[{place}]", call) for place, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if message.get(name):
            if not isinstance(message[name], str):
                raise Refused(f"{where}.{name} must be text, got {message[name]!r:.60}", "messages")
            found[name] = message[name]
    if role == "tool" and "tool_call_id" not in found:
        raise Refused(f"{where}.tool_call_id is missing: a tool's answer names its call", "messages")
    return found


def _content(where: str, content, empty: bool) -> str:
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise Refused(f"{where}.content: only parts of text, not {kind!r:.40}", "messages")
        return "\n".join(part["text"] for part in content)
    if isinstance(content, str):
        return content
    if content is None and empty:
        return ""
    raise Refused(f"{where} must have a content, which is text or a list of parts, got {content!r:.60}", "messages")


def _call(where: str, call) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where} must have a function with a name, got {call!r:.80}", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Refused(f"{where}.function.arguments is not JSON: {arguments!r:.60}", "messages") from None
    if not isinstance(arguments, dict):
        raise Refused(f"{where}.function.arguments must be an object, got {arguments!r:.60}", "messages")
    return call | {"type": "function", "function": function | {"arguments": arguments}}
