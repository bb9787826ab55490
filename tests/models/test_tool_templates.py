"""What chat templates do with tools, and how conversations with calls are rendered: as transformers renders them.

The five templates in tests/support/tool_templates have the documented forms of Qwen 2.5, Qwen 3, Llama 3, Phi-4-mini
and Hermes. Their texts are this project's own.
"""

import copy
import json
import re

import pytest
from support.commands import REPOSITORY

from slm.models import chat_model
from slm.models.chat_parts import templates
from slm.models.chat_parts.tool_calls import FORMS, read
from slm.models.chat_parts.tool_templates import fitted, read_tool_template, tool_template

FOLDER = REPOSITORY / "tests" / "support" / "tool_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city <b>'now'</b>, in °C",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": ["integer", "null"], "default": None},
                "units": {"type": "array", "items": {"type": "string", "enum": ["°C", "°F"]}},
            },
            "required": ["city"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}


def call(number: int, name: str, arguments: dict) -> dict:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


ASKED = [{"role": "user", "content": " What's the weather in Köln? "}]
TOLD = [{"role": "system", "content": "Be brief."}, *ASKED]
ANSWERED = [
    *TOLD,
    {"role": "assistant", "content": None, "tool_calls": [call(1, "get_weather", {"city": "Köln", "days": None})]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 20}'},
    {"role": "assistant", "content": "It is 20 °C."},
    {"role": "user", "content": "And now?"},
]
TWICE = [
    *ASKED,
    {
        "role": "assistant",
        "content": "Wait.",
        "tool_calls": [call(1, "now", {}), call(2, "get_weather", {"city": "x"})],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
]
CONVERSATIONS = {"asked": ASKED, "told": TOLD, "answered": ANSWERED, "twice": TWICE}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of transformers whose special tokens are those of SPECIAL."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, "<s>")), **SPECIAL)


def rendered(template: str, messages: list[dict], tools: list[dict]) -> str:
    """The prompt text of a request, as the wrapper renders it."""
    use = tool_template(template, SPECIAL)
    told, given = fitted(templates.messages_of(messages, template), tools, use)
    return chat_model.render(template, SPECIAL, told, given)


def as_documented(name: str, messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict] | None]:
    """The same request as the documents of transformers and of the models want it."""
    messages, names = copy.deepcopy(messages), {}
    for message in messages:
        message["content"] = message["content"] or ""
        for made in message.get("tool_calls", []):
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
            names[made["id"]] = made["function"]["name"]
        if message["role"] == "tool":
            message["name"] = names[message["tool_call_id"]]
    if name != "phi4-mini":
        return messages, tools
    for message in messages:
        if calls := message.pop("tool_calls", None):
            told = [{"name": made["function"]["name"], "arguments": made["function"]["arguments"]} for made in calls]
            message["content"] += f"<|tool_call|>{json.dumps(told, ensure_ascii=False)}<|/tool_call|>"
        if message["role"] == "tool":
            message["role"] = "tool_response"
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
    messages[0]["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return messages, None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_with_tools_is_rendered_as_transformers_renders_it(tokenizer, name, conversation):
    template, messages, tools = TEMPLATES[name], CONVERSATIONS[conversation], [WEATHER, TIME]
    told, given = as_documented(name, messages, tools)
    if (name, conversation) == ("llama3", "twice"):
        with pytest.raises(chat_model.Refused, match="This model makes one call at a time"):
            rendered(template, messages, tools)
        return
    expected = tokenizer.apply_chat_template(
        told, tools=given, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    text = rendered(template, messages, tools)
    assert text == expected
    assert "get_weather" in text
    words = [word for message in messages for word in re.findall(r"\w+", message["content"] or "")]
    assert words and all(word in text for word in words)


@pytest.mark.parametrize(
    ("name", "form", "in_system", "calls"),
    [
        ("qwen2.5", "tagged", False, "object"),
        ("qwen3", "tagged", False, "object"),
        ("hermes", "tagged", False, "object"),
        ("llama3", "bare", False, "object"),
        ("phi4-mini", "listed", True, "content"),
    ],
)
def test_a_template_says_how_its_model_takes_and_makes_calls(name, form, in_system, calls):
    found = tool_template(TEMPLATES[name], SPECIAL)
    assert (found.form.name, found.in_system, found.calls) == (form, in_system, calls)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "llama3"])
def test_the_calls_of_a_rendered_conversation_are_read_again(name):
    template = TEMPLATES[name]
    text = rendered(template, TWICE, [WEATHER, TIME])
    said = text[text.index("Köln") :]
    begin = said.index(tool_template(template, SPECIAL).form.opens[0])
    _, calls = read(tool_template(template, SPECIAL).form, (), said[begin:])
    assert [(found.name, json.loads(found.arguments)) for found in calls] == [
        ("now", {}),
        ("get_weather", {"city": "x"}),
    ]


def test_arguments_are_text_where_a_template_wants_text():
    template = TEMPLATES["qwen2.5"].replace("(call.arguments | tojson)", "call.arguments")
    assert tool_template(template, SPECIAL).calls == "text"
    assert '"arguments": {"city": "Köln", "days": null}}' in rendered(template, ANSWERED, [WEATHER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ messages[0].content }}",
            "tools: the model's chat template ignores tools; ask without tools and calls",
        ),
        (
            "{{ messages[0].content }}{% for tool in tools or [] %}{{ tool.function.name }}[TOOL_CALLS]{% endfor %}",
            "tools: the model's chat template has tools, but calls in a form that is not read here",
        ),
        (
            "{{ messages[0].content }}{{ tools }}<tool_call><function=x></function></tool_call>",
            "tools: the model's chat template has tools, but calls in a form that is not read here",
        ),
    ],
)
def test_a_template_without_tools_or_with_a_strange_form_is_refused(template, reason):
    with pytest.raises(chat_model.Refused) as caught:
        tool_template(template, {})
    assert str(caught.value).startswith(reason) and caught.value.field == "tools"


def test_a_checkpoint_may_have_a_template_of_its_own_for_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert read_tool_template(tmp_path, "plain") == "with tools"
    config.write_text(json.dumps({"chat_template": named[:1]}), encoding="utf-8")
    assert read_tool_template(tmp_path, "plain") == "plain"
    config.write_text(json.dumps({"chat_template": "one"}), encoding="utf-8")
    assert read_tool_template(tmp_path, "one") == "one"


def test_every_form_has_a_template():
    assert {tool_template(template, SPECIAL).form.name for template in TEMPLATES.values()} == set(FORMS)
