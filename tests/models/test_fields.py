"""The table of a request's fields, and conversations as templates get them. No model is loaded."""

import numpy as np
import pytest
from support.commands import REPOSITORY

from slm.models import chat_model
from slm.models.chat_parts import fields, structured, templates

OPENAI = {  # the fields of chat completions in the openai client that the requirements name
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "messages", "metadata", "modalities", "model", "n", "parallel_tool_calls", "prediction",
    "presence_penalty", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "response_format",
    "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
}  # fmt: skip


def refusal(function, *arguments) -> str:
    with pytest.raises(chat_model.Refused) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_field_of_openais_client_is_in_the_table():
    from openai.types.chat import completion_create_params

    theirs = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs >= OPENAI - {"stream"}
    assert theirs <= set(fields.BY_NAME), "the client has new fields: say what happens to them"


def test_the_documentation_has_the_table():
    from docs import tables

    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == tables.page("serving.md"), "run python -m docs.tables"
    assert all(f"| `{entry.name}` |" in page for entry in fields.FIELDS)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"max_token": 5}, "max_token: there is no such field (did you mean 'max_tokens'?)"),
        ({"temprature": 5}, "temprature: there is no such field (did you mean 'temperature'?)"),
        ({"beams": 5}, "beams: there is no such field"),
        ({"prompt": "Hi"}, "prompt: there is no such field; this model takes messages"),
        ({"max_new_tokens": 5}, "max_new_tokens: there is no such field (did you mean 'max_tokens'?)"),
        ({"top_k": -2}, "top_k must be a whole number from -1 to 1048576, got -2"),
        ({"top_k": 1.5}, "top_k must be a whole number from -1 to 1048576, got 1.5"),
        ({"min_p": True}, "min_p must be a number, got True"),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be a number from -2.0 to 2.0, got 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 10.0, got 0"),
        ({"logprobs": 1}, "logprobs must be true or false, got 1"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs must be a whole number from 0 to 20, got 21"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logit_bias": {"Paris": 3}}, "logit_bias: 'Paris' is not a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias: 5 must have a number from -100 to 100, got 101"),
        ({"logit_bias": [5]}, "logit_bias must be an object, got [5]"),
        ({"tools": {}}, "tools must be a list, got {}"),
        ({"audio": {"voice": "x"}}, "audio: {'voice': 'x'} is not supported by this model: answers are text"),
        ({"response_format": "json"}, "response_format must be an object, got 'json'"),
        ({"user": 5}, "user must be text, got 5"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(row, reason):
    assert refusal(lambda: chat_model.sampling_of(chat_model.checked(row))) == reason


def test_what_asks_for_nothing_is_accepted_and_changes_nothing():
    nothing = {entry.name: None for entry in fields.FIELDS}
    neutral = {entry.name: entry.neutral[-1] for entry in fields.FIELDS if entry.refused and entry.neutral}
    free = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "parallel_tool_calls": True,
        "top_k": -1,
        "seed": np.nan,
    }
    plain = chat_model.sampling_of(chat_model.checked({}))
    for row in (nothing, neutral, free):
        assert chat_model.sampling_of(chat_model.checked(row)) == plain
    assert not plain.changes_logits


def test_the_rows_value_comes_before_the_calls_and_the_new_name_before_the_old():
    def most(row, params=None):
        return chat_model.checked(row, params)["max_tokens"]

    assert most({}) == 512 and most({}, {"max_tokens": 9}) == 9 and most({"max_tokens": 3}, {"max_tokens": 9}) == 3
    assert most({"max_completion_tokens": 5, "max_tokens": 3}, {"max_tokens": 9}) == 5
    assert most({"max_completion_tokens": 5}, {"max_tokens": 9}) == 5


def test_numbers_of_numpy_and_entries_without_a_value_are_read_as_their_own():
    row = {
        "n": np.int64(2),
        "stop": np.array(["a"]),
        "logit_bias": {"5": 1.0, "6": None},
        "temperature": np.float32(0.5),
    }
    sampling = chat_model.sampling_of(chat_model.checked(row))
    assert (sampling.n, sampling.stop, sampling.logit_bias, sampling.temperature) == (2, ("a",), ((5, 1.0),), 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (USER, USER),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": "Hi", "name": "Ann"}, {"role": "user", "content": "Hi", "name": "Ann"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 1}}}],
            },
        ),
        ({"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": [], "annotations": []}, "Yes"),
        (
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ),
    ],
)
def test_a_message_arrives_as_templates_want_it(message, found):
    [message] = templates.messages_of([message], "{{ message.tool_calls }}")
    assert (message if isinstance(found, dict) else message["content"]) == found


def test_a_template_with_a_developer_gets_a_developer():
    [message] = templates.messages_of([{"role": "developer", "content": "x"}], "{% if role == 'developer' %}")
    assert message["role"] == "developer"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "messages[0].role: 'narrator' is none of system, developer, user, "),
        ({"content": "x"}, "messages[0].role: None is none of"),
        ({"role": "user"}, "messages[0] must have a content, which is text or a list of parts, got None"),
        ({"role": "user", "content": []}, "messages[0] must have a content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content: only parts of text, not 'image_url'",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls is not supported"),
        ({"role": "user", "content": "x", "nam": "y"}, "(did you mean 'name'?)"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id is missing: a tool's answer names its call"),
        ({"role": "assistant", "content": None}, "messages[0] must have a content"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "add", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments must be an object, got [1]",
        ),
        ("Hi", "messages[0] must be an object with a role and a content, got 'Hi'"),
    ],
)
def test_a_message_that_would_lose_something_is_refused(message, reason):
    assert reason in refusal(templates.messages_of, [message])


def test_arguments_that_are_no_json_are_refused():
    broken = CALL | {"function": {"name": "add", "arguments": "{"}}
    message = {"role": "assistant", "tool_calls": [broken]}
    told = refusal(templates.messages_of, [message], "tool_calls")
    assert told == "messages[0].tool_calls[0].function.arguments is not JSON: '{'"


# ---------------------------------------------------------------------------------------------------------------------
# What a schema may not contain


def schema(content) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"type": "json"}, "response_format.type: 'json' is none of text, json_object, json_schema"),
        ({}, ""),
        ({"type": "text"}, ""),
        ({"type": "json_object", "schema": {}}, "response_format.schema: there is no such field"),
        ({"type": "json_schema"}, "response_format.json_schema.schema must be a JSON schema, which is an object"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "shema": 1}},
            "response_format.json_schema.shema: there is no such field (did you mean 'schema'?)",
        ),
        (schema({"not": {}}), 'response_format: the schema can\'t be used: Unimplemented keys: ["not"]'),
        (schema({"type": "array", "uniqueItems": True}), '["uniqueItems"]'),
        (schema({"type": "string", "format": "colour"}), "Unknown format: colour"),
        (schema({"type": "txt"}), "Invalid type: txt"),
        (schema({"$ref": "https://example.org/x"}), "retrieving it failed"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), '["not"]'),
        (schema({"oneOf": [{"type": "string"}, {"type": "string"}]}), "oneOf constraints are not supported"),
        (schema({"enum": []}), "Unsatisfiable schema"),
    ],
)
def test_a_schema_is_refused_by_what_it_may_not_contain(form, reason):
    def grammar():
        found = structured.schema_of(form)
        return found is not None and structured.checked_grammar(structured.schema_grammar(found))

    if reason:
        assert reason in refusal(grammar)
    else:
        assert grammar() is False


def nested(depth: int) -> dict:
    found: dict = {}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"], "additionalProperties": False}
    return found


@pytest.mark.fault("schemas: one that is nested too deeply, or too large to check")
@pytest.mark.parametrize(
    "content",
    [
        nested(5000),
        nested(200),
        {"type": "string", "pattern": "(a{0,900}){0,900}b{0,9999}"},
        {"type": "array", "minItems": 10**9},
        {"anyOf": [{"type": "string", "pattern": f"^{'(x|y)?' * 40}{place}$"} for place in range(3000)]},
    ],
    ids=["5000 levels", "200 levels", "a large pattern", "a billion items", "3000 patterns"],
)
def test_a_hostile_schema_is_refused_in_one_line_within_bounds(content):
    def grammar():
        return structured.checked_grammar(structured.schema_grammar(content))

    try:
        assert grammar()
    except chat_model.Refused as refused:
        assert str(refused).startswith("response_format: ") and "\n" not in str(refused)
    good = structured.checked_grammar(structured.schema_grammar({"type": "object"}))
    assert good  # the next request is not harmed
