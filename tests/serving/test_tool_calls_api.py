"""Tools through the official openai client, in chat and in responses: a server in this process.

The model's template takes tools.
"""

import json

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from support.commands import REPOSITORY
from support.openai_servers import NAME, with_tools

TEMPLATE = REPOSITORY / "tests" / "support" / "tool_templates" / "qwen2.5.jinja"
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(wrapper):
    with with_tools(wrapper.unwrap_python_model(), TEMPLATE) as (_, client):
        yield client


def ask(client, **options):
    return client.chat.completions.create(**{"model": NAME, "messages": ASKED, "tools": TOOLS} | options)


@pytest.mark.slow
def test_a_streamed_call_has_its_name_first_and_equals_the_whole_call(client):
    [choice] = ask(client, tool_choice=NAMED).choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    chunks = list(ask(client, tool_choice=NAMED, stream=True))
    told = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.index for part in told] == [0] * len(told)
    assert told[0].id and (told[0].type, told[0].function.name) == ("function", "get_weather")
    assert "".join(part.function.arguments for part in told) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=NAME, messages=ASKED, tools=TOOLS, tool_choice=NAMED) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [("get_weather", call.function.arguments)]


class Weather(BaseModel):
    city: str
    days: int


@pytest.mark.slow
def test_a_pydantic_function_is_parsed_and_its_answer_goes_back(client):
    tools = [openai.pydantic_function_tool(Weather)]
    choice = {"type": "function", "function": {"name": "Weather"}}
    options = {"model": NAME, "messages": ASKED, "tools": tools, "temperature": 0.5, "max_tokens": 400}
    message = client.chat.completions.parse(**options, tool_choice=choice).choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    back = [*ASKED, message.model_dump(exclude_none=True, exclude={"parsed"}), {"role": "tool", "content": "sun"}]
    for entry in back[1]["tool_calls"]:
        entry["function"].pop("parsed_arguments", None)
    back[2]["tool_call_id"] = call.id
    assert ask(client, messages=back, max_tokens=4).choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_a_wrong_tool_is_refused_by_its_name(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tool_choice={"type": "function", "function": {"name": "get_wether"}})
    assert "(did you mean 'get_weather'?)" in str(refused.value) and refused.value.param == "tool_choice"


# ---------------------------------------------------------------------------------------------------------------------
# /v1/responses


FLAT = {"type": "function", "strict": False, **TOOLS[0]["function"]}


def respond(client, **options):
    return client.responses.create(**{"model": NAME, "input": ASKED, "tools": [FLAT]} | options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
def test_a_responses_call_is_the_chat_apis_whole_and_streamed(client, choice):
    options = {"tool_choice": choice, "parallel_tool_calls": False}
    named = choice if choice == "required" else NAMED
    [call] = ask(client, tool_choice=named, parallel_tool_calls=False).choices[0].message.tool_calls
    whole = respond(client, **options)
    assert (whole.status, whole.output_text, whole.parallel_tool_calls) == ("completed", "", False)
    [item] = whole.output
    assert (item.type, item.name, item.arguments) == ("function_call", "get_weather", call.function.arguments)
    assert whole.tools[0].name == "get_weather"
    events = list(respond(client, stream=True, **options))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[4].arguments == item.arguments and events[-1].response.output[0].arguments == item.arguments
    with client.responses.stream(model=NAME, input=ASKED, tools=[FLAT], **options) as stream:
        [streamed] = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (item.name, item.arguments)


@pytest.mark.slow
def test_a_responses_conversation_with_calls_and_results_goes_on(client):
    first = respond(client, tool_choice="required", parallel_tool_calls=False)
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    chat = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        ]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]  # fmt: skip
    expected = ask(client, messages=chat, max_tokens=6)
    for turns in ([*ASKED, *first.output, result], [*ASKED, call.model_dump(), result]):
        second = respond(client, input=turns, max_output_tokens=6)
        assert second.output_text == expected.choices[0].message.content
        assert second.usage.input_tokens == expected.usage.prompt_tokens


@pytest.mark.slow
def test_a_pydantic_function_is_parsed_by_responses_too(client):
    tools = [openai.pydantic_function_tool(Weather)]
    options = {"tool_choice": {"type": "function", "name": "Weather"}, "temperature": 0.5, "max_output_tokens": 400}
    [item] = client.responses.parse(model=NAME, input=ASKED, tools=tools, **options).output
    assert isinstance(item.parsed_arguments, Weather)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: 'web_search' is not supported by this model; only"),
        ({"tools": [FLAT | {"name": "a b"}]}, "tools[0].name must have 1 to 64 letters, digits, or marks of _-. and"),
        ({"tools": [FLAT | {"defer_loading": True}]}, "tools[0].defer_loading: there is no such field"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice: 'required' needs tools"),
        ({"tool_choice": {"type": "function", "name": "get_wether"}}, "tool_choice: 'get_wether' is none of the"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice must be none, auto, required or a function with its"),
        (
            {"tools": [FLAT | {"parameters": {"type": "object", "not": {}}}], "tool_choice": "required"},
            'tools[0].parameters: the schema can\'t be used: Unimplemented keys: ["not"]',
        ),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema must be a JSON schema"),
        ({"input": []}, "input must hold at least one message"),
        ({"input": [{"type": ["message"]}]}, "input.0.type: ['message'] is not supported by this model"),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
            "input.0.call_id must be text, got None",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]},
            "input.0.arguments must be a JSON object as text, got '[1]'",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
            "input.0.output: only parts of text",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x", "namespace": "n"}]},
            "input.0.namespace: there is no such field",
        ),
    ],
)
def test_a_wrong_tool_of_a_response_is_refused_by_the_name_that_it_has_there(client, options, reason):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            respond(client, stream=stream, **options)
        assert refused.value.body["message"].startswith(reason)
        assert refused.value.param in (next(iter(options)), "tool_choice")
