"""Requests with tools, and their answers: which functions a model may call, which it must call, and what it called.

`tool_choice` none hides the tools from the model, and auto lets the model decide. With required, or the name of a
function, a grammar holds the answer to calls whose arguments satisfy their schemas. A function with `strict: true` gets
such a grammar with auto too: the model may answer with text, but each call to the function satisfies its schema.
allowed_tools names the functions that the model sees, and auto or required for these.
With `response_format`, the answer is either calls, or text that satisfies the format.
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .fields import Request, did_you_mean
from .rows import Refused, Row
from .structured import GUIDANCE, checked_grammar, schema_grammar
from .tool_calls import Call, CallReader, Form

MOST_TOOLS = 128
MOST_CALLS = 16  # of one answer that a grammar holds to calls
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """The functions of a request, in OpenAI's form. `choice` is none, auto, required or the name of a function."""

    functions: tuple[dict, ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def shown(self) -> list[dict] | None:
        """The functions as the model sees them. `strict` is for the grammar alone."""
        if self.choice == "none":
            return None
        functions = [tool["function"] for tool in self.functions]
        kept = [{name: value for name, value in function.items() if name != "strict"} for function in functions]
        return [{"type": "function", "function": function} for function in kept]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.functions)


@dataclass(frozen=True)
class Reading:
    """How the calls of a row's text are read."""

    form: Form
    names: tuple[str, ...]
    parallel: bool
    structured: bool = False  # whether a text without calls is JSON, because the request has a response_format


def tools_of(request: Request) -> Tools:
    """The functions that a checked request has.

    Raises:
        Refused: a function or the choice has a wrong form.
    """
    tools = tuple(_tool(f"tools[{place}]", tool) for place, tool in enumerate(request["tools"] or []))
    found = Tools(tools, "none" if not tools else "auto", request["parallel_tool_calls"])
    if len(tools) > MOST_TOOLS:
        raise Refused(f"tools: {len(tools)} functions; at most {MOST_TOOLS}", "tools")
    for place, name in enumerate(found.names):
        if name in found.names[:place]:
            raise Refused(f"tools[{place}].function.name: {name!r} is the name of another function too", "tools")
    try:
        json.dumps(tools)
    except RecursionError:
        raise Refused("tools: the functions are nested too deeply", "tools") from None
    choice = request["tool_choice"]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(choice.get("allowed_tools"), found)
        found = Tools(tools, parallel=found.parallel)
    if choice is not None:
        found = Tools(tools, _choice(choice, found.names), found.parallel)
    return found


def _tool(where: str, tool: Any) -> dict:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise Refused(f"{where} must have the type 'function' and a function, got {tool!r:.80}", "tools")
    function = tool["function"]
    _no_others(where, tool, ("type", "function"), "tools")
    _no_others(f"{where}.function", function, ("name", "description", "parameters", "strict", "return"), "tools")
    name, parameters = function.get("name"), function.get("parameters", NOTHING)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        text = f"{where}.function.name must have 1 to 64 letters, digits, or marks of _-. and has {name!r:.80}"
        raise Refused(text, "tools")
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        text = f"{where}.function.parameters must be a JSON schema of type object, got {parameters!r:.80}"
        raise Refused(text, "tools")
    if not isinstance(function.get("description", ""), str) or not isinstance(function.get("strict", False), bool):
        raise Refused(f"{where}.function: description must be text, and strict true or false", "tools")
    return {"type": "function", "function": {**function, "parameters": {"type": "object", **parameters}}}


def _no_others(where: str, entries: dict, known: tuple[str, ...], field: str = "tool_choice") -> None:
    for name in entries:
        if name not in known:
            raise Refused(f"{where}.{name!s:.40}: there is no such field{did_you_mean(name, known)}", field)


def _choice(choice: Any, names: tuple[str, ...]) -> str:
    if choice in ("none", "auto") or (choice == "required" and names):
        return choice if names else "none"
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        _no_others("tool_choice", choice, ("type", "function"))
        _no_others("tool_choice.function", choice["function"], ("name",))
        name = choice["function"].get("name")
        if name in names:
            return name
        hint = did_you_mean(name, names)
        raise Refused(f"tool_choice: {name!r:.80} is none of the functions in tools{hint}", "tool_choice")
    if choice in CHOICES:
        raise Refused(f"tool_choice: {choice!r} needs tools", "tool_choice")
    text = f"tool_choice must be none, auto, required or a function with its name, got {choice!r:.80}"
    raise Refused(text, "tool_choice")


def _allowed(given: Any, tools: Tools) -> tuple[tuple[dict, ...], str]:
    """The functions that `allowed_tools` leaves, and what it says of them: auto or required."""
    mode, listed = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else ("", [])
    _no_others("tool_choice.allowed_tools", given if isinstance(given, dict) else {}, ("mode", "tools"))
    listed = listed if isinstance(listed, list) else []
    if mode not in ("auto", "required") or not listed or not all(isinstance(entry, dict) for entry in listed):
        text = f"tool_choice.allowed_tools must have the mode auto or required, and tools, got {given!r:.80}"
        raise Refused(text, "tool_choice")
    names = {_choice(entry, tools.names) for entry in listed}
    return tuple(tool for tool in tools.functions if tool["function"]["name"] in names), mode


def tools_grammar(tools: Tools, form: Form, special: Mapping[str, int], answer: dict | None = None) -> str:
    """The grammar for the answer to a request, or "" if the model is free. `special` has the ids of special tokens.

    `answer` is the JSON schema of a text without calls. None: the text is free.

    Raises:
        Refused: a schema has something that the grammar can't have.
    """
    strict = [bool(tool["function"].get("strict")) for tool in tools.functions]
    free = tools.choice == "auto"
    if tools.choice == "none" or (free and answer is None and not any(strict)):
        return ""
    schemas = []
    for place, tool in enumerate(tools.functions):
        name, schema = tool["function"]["name"], tool["function"]["parameters"]
        if free and not strict[place]:
            schema = {"type": "object"}
        if tools.choice in ("auto", "required", name):
            try:
                checked_grammar(schema_grammar(schema), f"tools[{place}].function.parameters")
            except Refused as refusal:
                raise Refused(str(refusal), "tools") from None
            schemas.append((name, json.dumps(schema)))
    several = tools.parallel and form.several and tools.choice in ("auto", "required")
    text = None if not free else "" if answer is None else json.dumps(answer)
    return _grammar(form, tuple(schemas), text, several, tuple(sorted(special.items())))


@functools.lru_cache(maxsize=64)
def _grammar(
    form: Form,
    schemas: tuple[tuple[str, str], ...],
    text: str | None,
    several: bool,
    special: tuple[tuple[str, int], ...],
) -> str:
    """`text` is the schema of a text without calls, "" if this text is free, and None if there must be calls."""
    from llguidance import LLMatcher

    ids = dict(special)

    def mark(text: str) -> str:
        return f"<[{ids[text]}]>" if text in ids else _quoted(text)

    opening = "" if form.bare else f"{mark(form.opens[0])} {_quoted(form.before)}"
    closing = "" if form.bare else f"{_quoted(form.after)} {mark(form.closes)}"
    first, rules = opening, []
    if text == "" and not form.bare:  # text may stand before the first call
        first = f"TEXT? {opening}"
        if form.opens[0] not in ids:  # a pattern must find where the text ends, because the mark is text too
            first = f"head {_quoted(form.before)}"
            rules = [f"head[lazy]: /(?s:.*){_escaped(form.opens[0])}/"]
    more = f"{{0,{MOST_CALLS - 1}}}"
    if form.between:
        calls = f"{first} call" + (f" ({_quoted(form.between)} call){more}" if several else "") + f" {closing}"
    else:
        calls = f"{first} call {closing}" + (f' ("\\n" {opening} call {closing}){more}' if several else "")
    rules = [f"calls: {calls}", *rules]
    if text is None:
        rules = ["start: calls", *rules]
    elif text == "":
        rules = ["start: TEXT | calls", f"TEXT: {_text_without(form, ids)}", *rules]
    else:
        rules = ["start: answer | calls", f"answer: {_json(text)}", *rules]
    rules.append("call: " + " | ".join(f"call{place}" for place in range(len(schemas))))
    for place, (name, schema) in enumerate(schemas):
        begin = ["{", '"name"', ":", " ", json.dumps(name), ",", " ", f'"{form.arguments}"', ":", " "]
        if not (text and form.bare):  # else a call and a JSON answer begin alike, and must have the same pieces
            begin = ["".join(begin)]
        rules.append(f'call{place}: {" ".join(map(_quoted, begin))} arguments{place} "}}"')
        rules.append(f"arguments{place}: {_json(schema)}")
    return LLMatcher.grammar_from_lark("\n".join(rules) + "\n")


def _json(schema: str) -> str:
    return "%json " + json.dumps({**json.loads(schema), "x-guidance": GUIDANCE})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(mark: str) -> str:
    return mark.replace("|", r"\|")


def _text_without(form: Form, ids: Mapping[str, int]) -> str:
    """A pattern of llguidance for text in which no call begins. A text can't have special tokens anyway."""
    pattern = r"/(?s:[^\s{].*)/" if form.bare else "/(?s:.+)/"
    for opening in form.opens:
        if opening not in ids:
            mark = _escaped(opening) + ("" if opening.startswith("<") else r"\s*[\[{]")
            pattern += f" & ~/(?s:.*{mark}.*)/"
    return pattern


class Parts:
    """What a row's text says, in the order of the text: content and calls. The text comes in pieces."""

    def __init__(self, row: Row):
        self._row = row
        tools = getattr(row, "tools", None)  # rows of older wrappers have none
        self._reader = CallReader(tools.form, tools.names, getattr(tools, "structured", False)) if tools else None
        self._called = False

    def of(self, text: str, ended: bool, cut: bool = False) -> list[str | Call]:
        """The parts that a further piece of the text makes certain. `cut`: the text does not end by itself."""
        if self._reader is None:
            return [text] if text else []
        found: list[str | Call] = []
        for part in self._reader.feed(text) + (self._reader.finish(cut) if ended else []):
            if isinstance(part, Call):
                if self._called and not self._row.tools.parallel:
                    continue
                self._called = True
            found.append(part)
        return found


class Deltas:
    """One choice of a stream, in the form of OpenAI's deltas. Each call has two: its name, and its arguments."""

    def __init__(self, row: Row, end_tokens: Iterable[int]):
        self._parts, self._row, self._ends, self._calls = Parts(row), row, frozenset(end_tokens), 0

    def of(self, text: str, finish_reason: str) -> list[dict]:
        """The deltas of a further piece of text."""
        found: list[dict] = []
        for part in self._parts.of(text, bool(finish_reason), is_cut(self._row, self._ends)):
            if isinstance(part, str):
                found.append({"content": part})
                continue
            head = {"index": self._calls} | openai_call(Call(part.name, ""))
            found.append({"tool_calls": [head]})
            found.append({"tool_calls": [{"index": self._calls, "function": {"arguments": part.arguments}}]})
            self._calls += 1
        return found

    def reason(self, finish_reason: str) -> str:
        """The finish_reason that the client gets."""
        return said_reason(finish_reason, bool(self._calls))


class ChoiceStream:
    """The entries of `choices` in a stream's chunks, for the rows of one request. A row may serve several choices.

    `pieces` has each row's log probabilities in the pieces of a stream (model.LogProbabilityPieces), or is empty.
    """

    def __init__(self, rows: Sequence[Row], end_tokens: Iterable[int], pieces: Sequence[Any]):
        self._n, self._rows, self._pieces = rows[0].sampling.n, len(rows), pieces
        self._deltas = [Deltas(rows[choice % len(rows)], end_tokens) for choice in range(self._n)]

    def begin(self) -> Iterator[dict]:
        """The first entry of each choice."""
        for choice in range(self._n):
            yield _entry(choice, {"role": "assistant", "content": ""})

    def of(self, place: int, text: str, finish_reason: str) -> Iterator[dict]:
        """The entries for a further piece of a row's text. `place` is the row's place in the request."""
        logprobs = self._pieces[place].sent_with(text, finish_reason) if self._pieces else None
        for choice in range(place, self._n, self._rows):
            deltas = self._deltas[choice]
            found = deltas.of(text, finish_reason)
            if not found and logprobs and not finish_reason:
                found = [{"content": ""}]
            for number, delta in enumerate(found):
                yield _entry(choice, delta, None, None if number else logprobs)
            if finish_reason:
                yield _entry(choice, {}, deltas.reason(finish_reason), None if found else logprobs)


def _entry(choice: int, delta: dict, finish_reason: str | None = None, logprobs: dict | None = None) -> dict:
    entry = {"index": choice, "delta": delta, "finish_reason": finish_reason}
    return entry | ({"logprobs": logprobs} if logprobs else {})


def said(row: Row, end_tokens: Iterable[int]) -> tuple[str, tuple[Call, ...]]:
    """The content and the calls of a finished row."""
    parts = Parts(row).of(row.text, True, is_cut(row, frozenset(end_tokens)))
    content = "".join(part for part in parts if isinstance(part, str))
    return content, tuple(part for part in parts if isinstance(part, Call))


def is_cut(row: Row, end_tokens: frozenset[int]) -> bool:
    """Whether a row's text ended before the model said so."""
    return not (row.output and row.output[-1] in end_tokens)


def said_reason(finish_reason: str, called: bool) -> str:
    return "tool_calls" if called and finish_reason == "stop" else finish_reason


def openai_call(call: Call) -> dict:
    """A call in OpenAI's form, with an id of its own."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
