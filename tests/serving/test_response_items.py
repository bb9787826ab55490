"""What the items of a response are, for texts with and without calls, in pieces of any size."""

import json

import pytest

from slm.models.chat_parts.rows import GREEDY, Row
from slm.models.chat_parts.tool_calls import FORMS
from slm.models.chat_parts.tools import Reading
from slm.serving.response_items import Output

END = 2
SUN = '<tool_call>\n{"name": "sun", "arguments": {"city": "Nîmes"}}\n</tool_call>'
MOON = '<tool_call>{"name": "moon", "arguments": {}}</tool_call>'
CASES = {  # text -> the items
    "a text": ("It rains.", ["It rains."]),
    "nothing": ("", [""]),
    "a call": (SUN, [("sun", {"city": "Nîmes"})]),
    "a text and two calls": (f"Let me see.\n{SUN}\n{MOON}", ["Let me see.", ("sun", {"city": "Nîmes"}), ("moon", {})]),
    "a text after a call": (f"{MOON} Done.", [("moon", {}), "Done."]),
    "half of a call": ('Wait. <tool_call>{"name": "sun", "argu', ["Wait. "]),
}


def row_of(text: str, tools: bool = True) -> Row:
    row = Row((0, 0), [1], GREEDY, 100, 0, text=text)
    row.output = [5] if text.endswith("argu") else [5, END]  # a cut row has no end token
    row.finish_reason = "length" if text.endswith("argu") else "stop"
    row.tools = Reading(FORMS["tagged"], ("sun", "moon"), True) if tools else None
    return row


def told(text: str, size: int, tools: bool = True) -> tuple[list[dict], list[tuple[str, dict]]]:
    """The items and the events of a text that comes in pieces of this size."""
    row = row_of(text, tools)
    output, events = Output(row, [END]), []
    pieces = [text[place : place + size] for place in range(0, len(text), size)] or [""]
    for place, piece in enumerate(pieces, 1):
        events += output.of(piece, row.finish_reason if place == len(pieces) else "")
    return output.items, json.loads(json.dumps(events))


def plain(items: list[dict]) -> list:
    return [
        (item["name"], json.loads(item["arguments"])) if item["type"] == "function_call" else item["content"][0]["text"]
        for item in items
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_items_stand_in_the_order_of_the_text_and_events_tell_the_same(case, size):
    text, expected = CASES[case]
    items, events = told(text, size)
    assert plain(items) == expected
    assert len({item["id"] for item in items}) == len(items)
    ends = [content["item"] for kind, content in events if kind == "response.output_item.done"]
    assert ends == items
    for index, item in enumerate(items):
        of_item = [
            (kind.removeprefix("response."), content) for kind, content in events if content["output_index"] == index
        ]
        kinds = [kind for kind, _ in of_item if kind != "output_text.delta"]
        deltas = "".join(content.get("delta", "") for _, content in of_item)
        if item["type"] == "function_call":
            begin = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
            assert kinds == [*begin, "output_item.done"] and deltas == item["arguments"]
            assert item["status"] == "completed" and item["call_id"].startswith("call_")
        else:
            begin = ["output_item.added", "content_part.added", "output_text.done", "content_part.done"]
            assert kinds == [*begin, "output_item.done"] and deltas == item["content"][0]["text"]
            assert item["status"] == ("incomplete" if case == "half of a call" else "completed")


def test_a_text_without_tools_is_a_message_whatever_it_says():
    items, _ = told(SUN, 5, tools=False)
    assert plain(items) == [SUN]
