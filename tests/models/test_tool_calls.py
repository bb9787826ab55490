"""Tool calls in texts: recorded answers, cut at every place, give the same calls and the same content."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.models.chat_parts.tool_calls import FORMS, Call, CallReader, read

NAMES = ("get_weather", "add")
PARIS = Call("get_weather", '{"city": "Paris"}')
ROME = Call("get_weather", '{"city": "Rome"}')
ADD = Call("add", '{"a": 1, "b": {"c": [2, "}"]}}')

# (form, answer, content, calls)
ANSWERS = [
    ("tagged", "Hello.", "Hello.", []),
    ("tagged", " \n", " \n", []),
    ("tagged", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    (  # two calls after a text
        "tagged",
        'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n',
        "Let me look.",
        [PARIS, ROME],
    ),
    (  # Qwen 3 thinks first
        "tagged",
        '<think>\nThe user wants a sum.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": '
        '{"c": [2, "}"]}}}\n</tool_call>',
        "<think>\nThe user wants a sum.\n</think>",
        [ADD],
    ),
    ("tagged", '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}', "", [ROME]),  # no closing text
    ("tagged", '<tool_call>{"name":"get_weather","arguments":"{\\"city\\": \\"Rome\\"}"}</tool_call>', "", [ROME]),
    ("tagged", '<tool_call>{"name": "no_such"}</tool_call> then', "then", [Call("no_such", "{}")]),
    (
        "tagged",
        '<tool_call>\n{"name": "add", "arguments": {"a": "</tool_call> \\" }"}}\n</tool_call>',
        "",
        [Call("add", '{"a": "</tool_call> \\" }"}')],
    ),
    ("tagged", "a <tool_call> is a tag, 1 < 2", "a <tool_call> is a tag, 1 < 2", []),
    ("tagged", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("tagged", '<tool_call>{"name": "add", "arguments": [1]}', '<tool_call>{"name": "add", "arguments": [1]}', []),
    ("tagged", '<tool_call>{"name": add}</tool_call>', '<tool_call>{"name": add}</tool_call>', []),
    (
        "tagged",
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        [],
    ),
    ("tagged", '<tool_call>{"a"}<tool_call>{"name": "add"}', '<tool_call>{"a"}', [Call("add", "{}")]),
    ("tagged", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),  # it ended by itself
    ("tagged", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    (
        "tagged",
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800 é"}}',
        "",
        [Call("add", '{"a": "\\ud800 \\u00e9"}')],
    ),
    (
        "listed",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|>',
        "",
        [PARIS, ROME],
    ),
    (
        "listed",
        'Sure.<|tool_call|>{"name": "get_weather", "arguments": {"city": "Rome"}}<|/tool_call|>',
        "Sure.",
        [ROME],
    ),
    (
        "listed",
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        "",
        [PARIS],
    ),
    (
        "listed",
        '<|tool_call|>[{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]',
        "",
        [ROME],
    ),
    ("listed", "Use functools.partial, or functools", "Use functools.partial, or functools", []),
    ("listed", "<|tool_call|>[]<|/tool_call|>", "<|tool_call|>[]<|/tool_call|>", []),
    ("bare", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("bare", '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    ("bare", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    (
        "bare",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_weather", '
        '"parameters": {"city": "Rome"}}',
        "",
        [PARIS, ROME],
    ),
    ("bare", '{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),  # an answer in JSON
    ("bare", '{"city": "Paris"}', '{"city": "Paris"}', []),
    ("bare", "{% set x = 1 %}", "{% set x = 1 %}", []),
    (
        "bare",
        'I would call {"name": "get_weather", "parameters": {}}',
        'I would call {"name": "get_weather", "parameters": {}}',
        [],
    ),
    ("bare", '<|python_tag|>get_weather.call(city="Paris")', '<|python_tag|>get_weather.call(city="Paris")', []),
]
# (form, answer that was cut at its last token, content)
CUT = [
    ("tagged", 'Wait. <tool_call>\n{"name": "add", "arguments": {"a": 1', "Wait. "),
    ("tagged", "Wait. <tool_call>", "Wait. "),
    ("tagged", "Wait. <tool_", "Wait. "),
    ("tagged", "Wait. 1 ", "Wait. 1 "),
    ("listed", '<|tool_call|>[{"name": "add"}, {', ""),
    ("listed", "Use functools", "Use functools"),
    ("listed", "Use func", "Use func"),
    ("bare", '{"name": "ad', ""),
    ("bare", '{"name": "Al', '{"name": "Al'),
    ("bare", '{"city": "Par', '{"city": "Par'),
]
CALL = '{"name": "add", "arguments": {}}'
# (form, answer that a grammar holds to calls or to JSON, content, calls)
STRUCTURED = [
    ("tagged", f'{{"a": "<tool_call>{CALL}</tool_call>"}}'.replace('": {', '\\": {'), None, []),
    ("tagged", f' ["<tool_call>", {CALL}]', None, []),
    ("tagged", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "", [Call("add", "{}")] * 2),
    ("listed", '"functools[{}]"', None, []),
    ("listed", "false", None, []),
    ("listed", f"<|tool_call|>[{CALL}]<|/tool_call|>", "", [Call("add", "{}")]),
    ("bare", '{"name": "add", "parameters": {}}', "", [Call("add", "{}")]),
    ("bare", '{"name": "add", "city": "<|python_tag|>{}"}', None, []),
    ("bare", '{"name": "Ann"}', None, []),
]


def pieced(form: str, pieces: list[str], cut: bool = False, structured: bool = False) -> tuple[list[str], list[Call]]:
    reader = CallReader(FORMS[form], NAMES, structured)
    found = [part for piece in pieces for part in reader.feed(piece)] + reader.finish(cut)
    return [part for part in found if isinstance(part, str)], [part for part in found if isinstance(part, Call)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_an_answer_gives_its_content_and_calls_however_it_is_cut(form, text, content, calls):
    assert read(FORMS[form], NAMES, text) == (content, calls)
    cuts = [[text[:place], text[place:]] for place in range(len(text))] + [list(text)]
    for pieces in cuts:
        texts, found = pieced(form, pieces)
        assert ("".join(texts), found) == (content, calls), pieces


@pytest.mark.parametrize(("form", "text", "content", "calls"), STRUCTURED)
def test_the_strings_of_an_answer_in_json_are_no_calls(form, text, content, calls):
    expected = text if content is None else content
    for pieces in [[text[:place], text[place:]] for place in range(len(text))] + [list(text)]:
        texts, found = pieced(form, pieces, structured=True)
        assert ("".join(texts), found) == (expected, calls), pieces


@pytest.mark.parametrize(("form", "text", "content"), CUT)
def test_half_of_a_call_is_never_content(form, text, content):
    for pieces in ([text], list(text)):
        texts, found = pieced(form, pieces, cut=True)
        assert ("".join(texts), found) == (content, [])


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_content_is_sent_before_the_answer_ends_and_is_never_taken_back(form, text, content, calls):
    reader, sent = CallReader(FORMS[form], NAMES), ""
    for mark in text:
        sent += "".join(part for part in reader.feed(mark) if isinstance(part, str))
        assert content.startswith(sent)


def test_plain_content_is_sent_at_once():
    reader = CallReader(FORMS["tagged"], NAMES)
    assert [reader.feed(mark) for mark in ("Hel", "lo", " ", "you")] == [["Hel"], ["lo"], [], [" you"]]


MARKS = ["<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "functools", "[", "]", "; ", "\n", "<", "a"]
JSON = ['{"name": "add", "arguments": {"a": 1}}', '{"name": "x"', '{"', "}", '"', "\\", '{"name": "add"}', "{}"]
PARTS = st.sampled_from(MARKS + JSON)


@given(st.sampled_from(sorted(FORMS)), st.lists(PARTS, max_size=12), st.booleans())
def test_any_text_gives_the_same_however_it_is_cut(form, parts, cut):
    text = "".join(parts)
    whole = read(FORMS[form], NAMES, text, cut)
    for pieces in (parts, list(text)):
        texts, calls = pieced(form, pieces, cut)
        assert ("".join(texts), calls) == whole
    assert all(isinstance(json.loads(call.arguments), dict) for call in whole[1])


def test_a_long_call_is_read_in_a_time_that_grows_with_its_length():
    arguments = {"text": "x" * 200_000}
    text = f'<tool_call>{{"name": "add", "arguments": {json.dumps(arguments)}}}</tool_call>'
    pieces = ["".join(batch) for batch in itertools.batched(text, 50)] if hasattr(itertools, "batched") else list(text)
    texts, calls = pieced("tagged", pieces)
    assert not texts and json.loads(calls[0].arguments) == arguments


def test_a_deeply_nested_call_is_content():
    text = '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}</tool_call>"
    assert read(FORMS["tagged"], NAMES, text) == (text, [])
