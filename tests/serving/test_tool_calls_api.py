"""Tools through the official openai client: a server in this process over a model whose template takes tools."""

import json

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from support.commands import REPOSITORY
from support.openai_servers import NAME, here

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
    model = wrapper.unwrap_python_model()
    kept = model.template, model.tool_template
    model.template = model.tool_template = TEMPLATE.read_text(encoding="utf-8")
    with here(model) as (_, client):
        yield client
    model.template, model.tool_template = kept


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
