"""Requests of OpenAI's API as rows of a prompt set."""

import pytest

from slm.prompts import chat_requests
from slm.prompts.chat_requests import MEDIA, NO_CHAT, STATE, TOOLS, UNREADABLE, LeftOut

HI = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("request_", "row"),
    [
        ({"model": "phi3", "messages": [HI], "temperature": 0.7}, {"messages": [HI]}),
        ({"messages": [HI | {"name": "Ada"}]}, {"messages": [HI]}),
        ({"messages": [{"role": "developer", "content": "Be brief."}, HI]},
         {"messages": [{"role": "system", "content": "Be brief."}, HI]}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
         {"messages": [HI | {"content": "H\ni"}]}),
        ({"messages": [HI], "response_format": {"type": "text"}, "tools": []}, {"messages": [HI]}),
        ({"messages": [HI], "response_format": SCHEMA}, {"messages": [HI], "response_format": SCHEMA}),
        ({"input": "Hi", "instructions": "Be brief."},
         {"messages": [{"role": "system", "content": "Be brief."}, HI]}),
        ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
         {"messages": [HI]}),
        ({"input": "Hi", "text": {"format": {"type": "json_schema", **SCHEMA["json_schema"]}}},
         {"messages": [HI], "response_format": SCHEMA}),
        ({"input": "Hi", "text": {"format": {"type": "text"}}}, {"messages": [HI]}),
        ({"input": "Hi", "text": {"format": {"type": "json_object"}}},
         {"messages": [HI], "response_format": {"type": "json_object"}}),
    ],
)  # fmt: skip
def test_a_request_becomes_a_row(request_, row):
    assert chat_requests.chat(request_) == row


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (None, NO_CHAT),
        ("Hi", NO_CHAT),
        ({"question": "Hi"}, NO_CHAT),
        ({"messages": []}, NO_CHAT),
        ({"messages": ["Hi"]}, NO_CHAT),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, NO_CHAT),
        ({"messages": [{"role": "user", "content": None}]}, NO_CHAT),
        ({"messages": [HI], "tools": [{"type": "function"}]}, TOOLS),
        ({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, TOOLS),
        ({"messages": [HI, {"role": "tool", "content": "4"}]}, TOOLS),
        ({"input": [{"type": "function_call_output", "output": "4"}]}, TOOLS),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, MEDIA),
        ({"input": "And then?", "previous_response_id": "resp_1"}, STATE),
        ({"input": "And then?", "conversation": {"id": "conv_1"}}, STATE),
    ],
)
def test_a_request_that_a_row_cannot_hold_is_left_out(request_, why):
    with pytest.raises(LeftOut, match=f"^{why}$"):
        chat_requests.chat(request_)


@pytest.mark.parametrize("content", ["", "a\0b", "\ud83d", "x" * 2**21])
def test_a_text_that_a_row_cannot_hold_is_left_out(content):
    with pytest.raises(LeftOut, match=UNREADABLE):
        chat_requests.checked(chat_requests.chat({"messages": [HI | {"content": content}]}))


def test_the_turns_of_a_conversation_are_one_cluster():
    turns = [HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    first, second = ({"messages": turns[:1]}, {"messages": turns})
    assert chat_requests.identity(first) != chat_requests.identity(second)
    assert chat_requests.cluster(first, "") == chat_requests.cluster(second, "")
    other = {"messages": turns[2:]}
    assert chat_requests.cluster(first, "") != chat_requests.cluster(other, "")
    assert chat_requests.cluster(first, "s1") == chat_requests.cluster(other, "s1") == "session s1"


@pytest.mark.parametrize(
    ("expectations", "texts"),
    [
        ([("expected_response", "Paris"), ("expected", "Lyon")], ["Paris"]),
        ([("expected_response", "Paris"), ("expected_response", "Paris, France")], ["Paris", "Paris, France"]),
        ([("expected", ["Paris", "It is Paris."])], ["Paris", "It is Paris."]),
        ([("expected", 42), ("expected", [4.5, True])], ["42", "4.5"]),
        ([("expected_facts", ["Paris is a city"])], []),
        ([("expected_response", {"city": "Paris"})], []),
        ([("expected_response", " ")], []),
    ],
)
def test_expectations_are_read(expectations, texts):
    assert chat_requests.expected(expectations) == texts


def test_feedback_becomes_tags():
    told = [("liked", True), ("stars", 4), ("why", "too long"), ("more", {"a": 1}), ("liked", True)]
    assert chat_requests.tags(told) == ["liked: true", "stars: 4", "why: too long"]
