"""Tool calls in a model's text: which form they have, and where they begin and end. Text in, plain data out.

Each family of models writes calls in a form of its own. FORMS has the forms that this project reads:
- tagged: <tool_call>{"name": ..., "arguments": ...}</tool_call>, of Qwen 2.5, Qwen 3 and Hermes;
- listed: <|tool_call|>[{"name": ..., "arguments": ...}]<|/tool_call|>, of Phi-4-mini;
- bare: {"name": ..., "parameters": ...} as the whole answer, perhaps after <|python_tag|>, of Llama 3.1, 3.2 and 3.3.

A reader takes a text in pieces of any size. A call is given when its end is known, in one piece. So a client never gets
half of a call. A text that only looks like a call is content, as the model wrote it.

Not covered: calls as XML or as Python (Qwen3-Coder, Llama 4, Llama's own tools such as brave_search).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """How a family of models writes calls. `opens` are the texts that begin calls, `closes` is the text after them."""

    name: str
    opens: tuple[str, ...]
    closes: str
    arguments: str  # the key of the arguments
    bare: bool = False  # whether a call may stand at the start of the text without an opening text
    before: str = ""  # what the family's models write between the opening text and the calls
    between: str = ""  # between two calls. "": each call has opening and closing texts of its own
    after: str = ""  # between the calls and the closing text
    several: bool = True  # whether the family's models make several calls in one answer


FORMS = {
    form.name: form
    for form in (
        Form("tagged", ("<tool_call>",), "</tool_call>", "arguments", before="\n", after="\n"),
        Form("listed", ("<|tool_call|>", "functools"), "<|/tool_call|>", "arguments", False, "[", ", ", "]"),
        Form("bare", ("<|python_tag|>",), "", "parameters", bare=True, several=False),
    )
}


@dataclass(frozen=True)
class Call:
    """A function that the model calls. `arguments` is a JSON object as text."""

    name: str
    arguments: str


BESIDE = " \t\r\n"


class CallReader:
    """Separates calls from content in one answer. The text comes in pieces.

    White space beside a call is no content. `names` are the functions of the request. Only such a function can be
    called by a bare object, because an answer may be an object of JSON too. A call with an opening text may have any
    name: the client finds out that there is no such function, and can tell the model.

    With `structured`, a grammar holds the answer: it is either calls, or a JSON value as content. So no call follows
    content, whatever the value's strings say.
    """

    def __init__(self, form: Form, names: Iterable[str], structured: bool = False):
        self._form, self._names, self._structured = form, frozenset(names), structured
        self._held = ""  # text that may belong to a call
        self._blank = ""  # white space that is content only if content follows it
        self._scan: _Scan | None = None  # of the JSON text that `_held` begins with after its opening text
        self._opened = ""  # the opening text of `_held`, as written
        self._begun = False  # whether there was content
        self._called = False  # whether the last piece was a call

    def feed(self, text: str) -> list[str | Call]:
        """The content and the calls that are certain after a further piece of text."""
        self._held += text
        return self._found(last=False)

    def finish(self, cut: bool) -> list[str | Call]:
        """The rest, at the end of the text. `cut`: the text ended at its last token, and half of a call is left out."""
        found = self._found(last=True)
        half = self._scan is not None and (self._opened.startswith("<") or bool(self._held))
        if self._scan is None:
            half = self._held != ""  # the begin of an opening text
        if not (cut and half):
            self._content(self._opened + self._held, found)
        if not self._called:
            self._add(self._blank, found)
        self._held = self._blank = ""
        return found

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _beside(self) -> str:
        """What may stand beside a call and is no content. Llama separates calls by semicolons."""
        return BESIDE + ";" if self._form.bare and self._called else BESIDE

    def _found(self, last: bool) -> list[str | Call]:
        found: list[str | Call] = []
        while self._held:
            if self._scan is None and not self._open(last, found):
                break
            if self._scan is not None and not self._close(last, found):
                break
        return found

    def _open(self, last: bool, found: list[str | Call]) -> bool:
        """Sends the text before a call as content. Whether a call may begin."""
        held = self._held
        if self._structured and (self._begun or not self._may_open(held)):
            self._content(held, found)
            self._held = ""
            return False
        if self._form.bare and not self._begun:
            start = held.lstrip(self._beside)
            self._content(held[: len(held) - len(start)], found)
            self._held = held = start
            if start.startswith("{"):
                self._opened, self._scan = "", _Scan()
                return True
        place, opening = min(((held.find(text), text) for text in self._form.opens if text in held), default=(-1, ""))
        if place >= 0:
            self._content(held[:place], found)
            self._opened, self._held, self._scan = opening, held[place + len(opening) :], _Scan()
            return True
        openings = [opening for opening in self._form.opens if opening.startswith("<") or not last]  # not words
        kept = max(_overlap(held, opening) for opening in openings)
        self._content(held[: len(held) - kept], found)
        self._held, self._opened = held[len(held) - kept :], ""
        return False

    def _may_open(self, text: str) -> bool:
        """Whether a text may begin with a call."""
        start = text.lstrip(self._beside)
        opens = [*self._form.opens, *(["{"] if self._form.bare else [])]
        return any(start.startswith(opening) or opening.startswith(start) for opening in opens)

    def _close(self, last: bool, found: list[str | Call]) -> bool:
        """Sends the calls whose end is known, or the text as content if it is no call. Whether anything was sent."""
        scan = self._scan
        assert scan is not None
        end, possible = scan.end(self._held)
        unmarked = not self._opened
        if possible and unmarked:
            possible = self._may_be_bare(self._held)
        calls: list[Call] = []
        if possible and end:
            calls = self._calls(self._held[:end], unmarked)
            possible = bool(calls)
        if not possible:  # the opening text is content, and a call may begin after it
            opened, self._opened, self._scan = self._opened, "", None
            if unmarked:
                opened, self._held = self._held[:1], self._held[1:]
            self._content(opened, found)
            return True
        if not end:
            return False
        rest = self._held[end:].lstrip(BESIDE)
        closes = self._form.closes
        if closes and not rest.startswith(closes):
            if not last and closes.startswith(rest):
                return False
        else:
            rest = rest[len(closes) :]
        self._held, self._opened, self._scan, self._blank, self._called = rest, "", None, "", True
        found.extend(calls)
        return True

    def _may_be_bare(self, text: str) -> bool:
        """Whether the begin of a JSON object may be a call of a function of this request."""
        compact = "".join(text[:200].split())
        for head in ('{"name":"', '{"type":"function","name":"'):
            if head.startswith(compact):
                return True
            if compact.startswith(head):
                name, closed, _ = compact[len(head) :].partition('"')
                names = ["".join(name.split()) for name in self._names]
                return name in names if closed else any(known.startswith(name) for known in names)
        return False

    def _calls(self, text: str, unmarked: bool) -> list[Call]:
        """The calls of a complete JSON text. Empty if it has something else."""
        try:
            value = json.loads(text, parse_constant=_refuse)
            if unmarked and self._structured and set(value) != {"name", self._form.arguments}:
                return []  # an object of the format, with an entry `name`
            calls = [_call(entry) for entry in (value if isinstance(value, list) else [value])]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return []
        return [] if unmarked and any(call.name not in self._names for call in calls) else calls

    def _content(self, text: str, found: list[str | Call]) -> None:
        text = self._blank + (text.lstrip(self._beside) if self._called else text)
        solid = text.rstrip(BESIDE)
        self._blank = text[len(solid) :]
        if solid:
            self._called = False
            self._begun = True
        self._add(solid, found)

    @staticmethod
    def _add(text: str, found: list[str | Call]) -> None:
        if text and found and isinstance(found[-1], str):
            found[-1] += text
        elif text:
            found.append(text)


class _Scan:
    """Finds the end of a JSON object or list, one character after the other."""

    def __init__(self):
        self._place = self._depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> tuple[int, bool]:
        """(the end of the value, or 0; whether the text may be such a value). Each call continues the last one."""
        for place in range(self._place, len(text)):
            mark = text[place]
            if self._quoted:
                if self._escaped or mark == "\\":
                    self._escaped = not self._escaped
                elif mark == '"':
                    self._quoted = False
            elif mark in "{[":
                self._depth += 1
            elif not self._depth:
                if mark not in BESIDE:
                    return 0, False
            elif mark == '"':
                self._quoted = True
            elif mark in "}]":
                self._depth -= 1
                if not self._depth:
                    self._place = place  # a further call finds the same end
                    self._depth = 1
                    return place + 1, True
        self._place = len(text)
        return 0, True


def read(form: Form, names: Iterable[str], text: str, cut: bool = False) -> tuple[str, list[Call]]:
    """The content and the calls of a whole text."""
    reader = CallReader(form, names)
    found = [*reader.feed(text), *reader.finish(cut)]
    return "".join(part for part in found if isinstance(part, str)), [part for part in found if isinstance(part, Call)]


def _call(entry: Any) -> Call:
    if isinstance(entry.get("function"), dict):  # OpenAI's own form, which some models write
        entry = entry["function"]
    name, arguments = entry["name"], entry.get("arguments", entry.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise TypeError("no name, or no object of arguments")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
        name.encode()
    except UnicodeEncodeError:  # half of a character, which no answer can hold
        return Call(name.encode(errors="replace").decode(), json.dumps(arguments))
    return Call(name, text)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _overlap(text: str, opening: str) -> int:
    """The number of characters at the end of `text` that could begin `opening`."""
    return next((size for size in range(min(len(text), len(opening)), 0, -1) if text.endswith(opening[:size])), 0)
