"""Requests with tools on real and on random weights: what is called is valid, and nothing half is told.

SmolLM2's own template ignores tools. So these tests give the models the templates of tests/support/tool_templates.
"""

import json
import shutil
from contextlib import contextmanager

import jsonschema
import pytest
from mlflow.exceptions import MlflowException
from support.commands import REPOSITORY
from support.effort import LONG
from support.questions import PARIS

from slm.models import chat_model
from slm.models.chat_parts import tools
from slm.models.chat_parts.tool_calls import FORMS

FOLDER = REPOSITORY / "tests" / "support" / "tool_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
MARKS = {"<tool_call>": False, "</tool_call>": False, "<|tool_call|>": True, "<|/tool_call|>": True}
MARKS |= {"<|python_tag|>": True, "<|start_header_id|>": True}  # whether the token is special
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]


def tool(name: str, properties: dict, required: list | None = None, **more) -> dict:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    schema["required"] = list(properties) if required is None else required
    function = {"name": name, "description": f"{name} of a thing", "parameters": schema} | more
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}})
ADD = tool("add", {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}})
PLACE = tool("go", {"to": {"$ref": "#/$defs/place"}})
PLACE["function"]["parameters"]["$defs"] = {
    "place": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2}
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time"}}
ALL = [WEATHER, ADD, PLACE, NOW]
SCHEMAS = {entry["function"]["name"]: entry["function"].get("parameters", {"maxProperties": 0}) for entry in ALL}


@contextmanager
def speaking(wrapper, template: str):
    """A wrapper with another chat template, for a while."""
    kept = wrapper.template, wrapper.tool_template
    wrapper.template = wrapper.tool_template = template
    try:
        yield wrapper
    finally:
        wrapper.template, wrapper.tool_template = kept


@pytest.fixture(scope="module")
def random_model(checkpoint, tmp_path_factory):
    """A wrapper over weights that were never trained. Its tokenizer has the marks of calls as tokens."""
    import torch
    import transformers
    from mlflow.pyfunc.model import PythonModelContext
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=49160, initializer_range=0.2, max_position_embeddings=4096, eos_token_id=2, pad_token_id=2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(checkpoint.folder / "tokenizer_config.json", folder)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark, special in MARKS.items()])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = chat_model.SmallLanguageModel()
    model.load_context(PythonModelContext({"checkpoint": str(folder)}, {}))
    return model


REAL, RANDOM = WEIGHTS = ("real weights", "random weights")
FORM_OF = {"qwen2.5": "tagged", "phi4-mini": "listed", "llama3": "bare"}  # a template for each form of calls
# Real weights generate for seconds, and templates of one form have the same grammar
WEIGHTS_AND_TEMPLATES = [
    (weights, name) for weights in WEIGHTS for name in TEMPLATES if LONG or weights == RANDOM or name in FORM_OF
]


@pytest.fixture(scope="module", params=WEIGHTS)
def wrapper(request):
    if request.param == RANDOM:
        return request.getfixturevalue("random_model")
    return request.getfixturevalue("models")["onnx int4"].unwrap_python_model()


def asked(**values) -> dict:
    return {"messages": ASKED, "tools": ALL, "max_tokens": 200} | values


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *tools) -> dict:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def check(calls) -> None:
    """Every call is one of the functions, and its arguments satisfy their schema."""
    for call in calls:
        jsonschema.Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "name"), WEIGHTS_AND_TEMPLATES, indirect=["wrapper"])
def test_required_and_named_calls_have_valid_arguments_in_one_batch(wrapper, name):
    choices = ["required", "required", *map(named, SCHEMAS)]
    rows = [asked(tool_choice=choice) for choice in choices]
    rows += [row | {"temperature": 1.0, "seed": 3} for row in rows] + [asked(tool_choice="none")]
    with speaking(wrapper, TEMPLATES[name]):
        answers = {index: answer for index, [answer] in wrapper.answers(rows)}
    for index, row in enumerate(rows[:-1]):
        answer = answers[index]
        assert not answer.error and not answer.text, (row["tool_choice"], answer)
        check(answer.calls)
        if row["tool_choice"] != "required":
            assert answer.finish_reason == "tool_calls"
            assert [call.name for call in answer.calls] == [row["tool_choice"]["function"]["name"]]
        else:
            assert answer.finish_reason == ("tool_calls" if answer.calls else "") or answer.finish_reason == "length"
    assert answers[len(rows) - 1].calls == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORM_OF)
def test_one_call_at_most_where_the_request_says_so(wrapper, name):
    row = asked(tool_choice="required", parallel_tool_calls=False, temperature=1.0)
    with speaking(wrapper, TEMPLATES[name]):
        for _, [answer] in wrapper.answers([row | {"seed": seed} for seed in range(4)]):
            assert (len(answer.calls), answer.finish_reason) == (1, "tool_calls")


def saying(wrapper, text: str, **values) -> list:
    """The rows of a request, whose model says `text`: a grammar allows nothing else."""
    from llguidance import LLMatcher

    rows = wrapper.prepare(asked(**values))
    parts = [json.dumps(text, ensure_ascii=False)]
    for mark in MARKS:
        if mark in wrapper._added_ids:
            parts = [new for old in parts for new in _split(old, mark, wrapper._added_ids[mark])]
    grammar = LLMatcher.grammar_from_lark("start: " + " ".join(part for part in parts if part != '""'))
    for row in rows:
        wrapper.constraints.constrain(row, grammar)
    return rows


def _split(part: str, mark: str, token: int) -> list[str]:
    pieces = part.split(mark)
    if part.startswith("<[") or len(pieces) == 1:
        return [part]
    quoted = [f'"{piece}"' for piece in part[1:-1].split(mark)]
    return [entry for piece in quoted for entry in (f"<[{token}]>", piece)][1:]


SAID = {  # template, what the model says, content, calls
    "qwen2.5": ('Yes.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "Yes.", [("now", "{}")]),
    "phi4-mini": (
        '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]<|/tool_call|>',
        "",
        [("add", '{"a": 1}'), ("now", "{}")],
    ),
    "llama3": ('<|python_tag|>{"name": "add", "parameters": {"a": "é"}}', "", [("add", '{"a": "é"}')]),
    "hermes": ("Just 3 <b> & text", "Just 3 <b> & text", []),
}


@pytest.mark.parametrize("name", SAID)
def test_calls_of_a_free_answer_are_found_whole_and_streamed(wrapper, name):
    said, content, calls = SAID[name]
    with speaking(wrapper, TEMPLATES[name]):
        rows, streamed = saying(wrapper, said), saying(wrapper, said)
        for _ in wrapper._ended(rows, 1, wrapper._runtime, None):
            pass
        chunks = list(wrapper._chunks(streamed, False))
    [answer] = wrapper.choices(rows)
    assert (answer.text, [(call.name, call.arguments) for call in answer.calls]) == (content, calls)
    reason = "tool_calls" if calls else "stop"
    message = wrapper.completion([answer])["choices"][0]
    assert message["finish_reason"] == answer.finish_reason == reason
    assert message["message"]["content"] == (content or None)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == content
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    told = [call for delta in deltas for call in delta.get("tool_calls", [])]
    heads, bodies = told[::2], told[1::2]
    assert [head["function"] for head in heads] == [{"name": name, "arguments": ""} for name, _ in calls]
    assert [body["function"] for body in bodies] == [{"arguments": arguments} for _, arguments in calls]
    assert [entry["index"] for entry in told] == [place for place in range(len(calls)) for _ in "ab"]
    assert len({head["id"] for head in heads}) == len(calls) and all(head["type"] == "function" for head in heads)


def test_only_the_marks_of_calls_stay_in_a_text_of_special_tokens(random_model):
    with speaking(random_model, TEMPLATES["llama3"]):
        rows = saying(random_model, '<|start_header_id|>a<|python_tag|>{"x": 1}<|tool_call|>')
        for _ in random_model.stream(rows):
            pass
    assert random_model.choices(rows)[0].text == 'a<|python_tag|>{"x": 1}'


@pytest.mark.parametrize("name", ["onnx fp32", "pipeline"])
def test_whole_and_streamed_calls_are_equal_in_both_wrappers(models, name):
    row = asked(tool_choice="required", max_tokens=60, n=2, temperature=0.7)
    with speaking(models[name].unwrap_python_model(), TEMPLATES["qwen3"]):
        [whole] = models[name].predict(row)
        chunks = list(models[name].predict_stream(row))
    for choice in whole["choices"]:
        found: list[dict] = []
        for chunk in chunks:
            [told] = chunk["choices"]
            for call in told["delta"].get("tool_calls", []) if told["index"] == choice["index"] else []:
                if "id" in call:
                    found.append(dict(call["function"]))
                else:
                    found[call["index"]]["arguments"] += call["function"]["arguments"]
        assert found == [call["function"] for call in choice["message"].get("tool_calls", [])]


def test_allowed_tools_hides_the_other_tools_and_may_demand_a_call(models):
    with speaking(models["onnx int4"].unwrap_python_model(), TEMPLATES["qwen2.5"]) as wrapper:
        [row] = wrapper.prepare(asked(tool_choice=allowed("required", named("now"), named("add"))))
        [same] = wrapper.prepare(asked(tools=[ADD, NOW], tool_choice="required"))
        assert row.prompt == same.prompt and row.tools.names == ("add", "now") and row.matcher
        [free] = wrapper.prepare(asked(tool_choice=allowed("auto", named("now"))))
        [alone] = wrapper.prepare(asked(tools=[NOW]))
        assert free.prompt == alone.prompt and free.tools.names == ("now",) and not free.matcher


def test_tool_choice_none_hides_the_tools(models):
    wrapper = models["onnx int4"].unwrap_python_model()
    with speaking(wrapper, TEMPLATES["qwen2.5"]):
        [hidden] = wrapper.prepare(asked(tool_choice="none"))
        [absent] = wrapper.prepare({"messages": ASKED})
        [seen] = wrapper.prepare(asked())
    assert hidden.prompt == absent.prompt != seen.prompt and hidden.tools is None
    assert "get_weather" in wrapper.text_of(seen.prompt)


def test_a_conversation_with_calls_and_answers_reaches_the_model(models):
    wrapper = models["onnx int4"].unwrap_python_model()
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    with speaking(wrapper, TEMPLATES["hermes"]):
        [row] = wrapper.prepare(asked(messages=messages))
    text = wrapper.text_of(row.prompt)
    assert '{"arguments": {"city": "Paris"}, "name": "get_weather"}' in text
    assert '{"name": "get_weather", "content": "sunny"}' in text


def test_a_strict_function_is_held_to_its_schema_although_the_model_may_answer_with_text(wrapper):
    from llguidance import LLMatcher

    strict = tool("add", ADD["function"]["parameters"]["properties"], strict=True)
    for name in FORM_OF.values():
        form = FORMS[name]
        request = chat_model.checked({"tools": [strict, NOW]})
        grammar = tools.tools_grammar(tools.tools_of(request), form, wrapper._added_ids)

        def fits(text: str, grammar=grammar) -> bool:
            ids = wrapper._tokenizer.encode(text, add_special_tokens=False).ids
            matcher = LLMatcher(wrapper.constraints.tokens, grammar)
            return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

        def call(arguments: str, form=form) -> str:
            inner = f'{form.before}{{"name": "add", "{form.arguments}": {arguments}}}{form.after}'
            return inner if form.bare else form.opens[0] + inner + form.closes

        assert fits("The sum is 3.") and fits(call('{"a": 1, "b": true}'))
        assert not fits(call('{"a": 10, "b": true}')) and not fits(call('{"a": 1}'))
        assert form.bare or fits("Wait. " + call('{"a": 1, "b": true}'))


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
IN_JSON = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORM_OF)
def test_with_a_response_format_an_answer_is_valid_calls_or_valid_json(wrapper, name):
    row = asked(response_format=IN_JSON, max_tokens=60)
    rows = [row, row | {"tool_choice": "required"}, *(row | {"temperature": 1.0, "seed": seed} for seed in range(4))]
    rows += [rows[0] | {"tool_choice": "none"}]
    with speaking(wrapper, TEMPLATES[name]):
        answers = {index: answer for index, [answer] in wrapper.answers(rows)}
    for index, row in enumerate(rows):
        answer = answers[index]
        assert not answer.error, (row, answer)
        if row.get("tool_choice") == "required":
            assert not answer.text
            check(answer.calls)
        elif answer.finish_reason == "stop":
            assert not answer.calls
            jsonschema.validate(json.loads(answer.text), CITY)
        else:
            assert answer.finish_reason == "length" or answer.calls
            assert all(call.name in SCHEMAS for call in answer.calls) and not (answer.calls and answer.text)


@pytest.mark.parametrize("name", FORM_OF)
def test_with_a_response_format_no_text_stands_beside_calls(wrapper, name):
    from llguidance import LLMatcher

    form = FORMS[FORM_OF[name]]
    request = chat_model.checked({"tools": [WEATHER, NOW]})
    grammar = tools.tools_grammar(tools.tools_of(request), form, wrapper._added_ids, CITY)

    def fits(text: str) -> bool:
        ids = wrapper._tokenizer.encode(text, add_special_tokens=False).ids
        matcher = LLMatcher(wrapper.constraints.tokens, grammar)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    inner = f'{form.before}{{"name": "now", "{form.arguments}": {{}}}}{form.after}'
    call = inner if form.bare else form.opens[0] + inner + form.closes
    answer = '{"city": "Paris"}'
    assert fits(answer) and fits(call)
    assert not any(map(fits, ["Paris", '{"city": 5}', f"Wait. {call}", answer + call, call + answer]))


def test_a_grammar_that_cannot_go_on_names_the_field_that_it_comes_from(models):
    wrapper = models["onnx int4"].unwrap_python_model()
    with speaking(wrapper, TEMPLATES["qwen2.5"]):
        [row] = wrapper.prepare(asked(tool_choice="required"))
        assert not row.matcher.consume_token(0)  # an error that a matcher never leaves
        for _ in wrapper._ended([row], 1, wrapper._runtime, None):
            pass
    assert row.error.startswith("tools: the grammar can't go on (")


def test_log_probabilities_of_a_call_are_listed_once_whole_and_streamed(models):
    row = asked(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, logprobs=True, top_logprobs=2)
    with speaking(models["onnx fp32"].unwrap_python_model(), TEMPLATES["qwen3"]):
        [whole] = models["onnx fp32"].predict(row)
        chunks = list(models["onnx fp32"].predict_stream(row))
    [choice] = whole["choices"]
    content = choice["logprobs"]["content"]
    said = b"".join(bytes(entry["bytes"]) for entry in content).decode()
    [call] = choice["message"]["tool_calls"]
    assert json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>")) == {
        "name": "get_weather", "arguments": json.loads(call["function"]["arguments"])
    }  # fmt: skip
    told = [chunk["choices"][0].get("logprobs") or {"content": []} for chunk in chunks]
    streamed = [entry for logprobs in told for entry in logprobs["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    assert all(len(entry["top_logprobs"]) == 2 for entry in streamed)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0] must have the type 'function' and a function, got "),
        ({"tools": [{"type": "function"}]}, "tools[0] must have the type 'function' and a function, got "),
        ({"tools": [NOW | {"cache": 1}]}, "tools[0].cache: there is no such field"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]},
            "tools[0].function.paramters: there is no such field (did you mean 'parameters'?)",
        ),
        ({"tools": [tool("a b", {})]}, "tools[0].function.name must have 1 to 64 letters, digits, or marks of _-."),
        ({"tools": [tool("f", {}), tool("f", {})]}, "tools[1].function.name: 'f' is the name of another function"),
        (
            {"tools": [tool("f", {}, parameters={"type": "string"})]},
            "tools[0].function.parameters must be a JSON schema of type object, got {'type': 'string'}",
        ),
        ({"tools": [NOW] * 129}, "tools: 129 functions; at most 128"),
        ({"tools": "now"}, "tools must be a list, got 'now'"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice: 'required' needs tools"),
        ({"tool_choice": named("nov")}, "tool_choice: 'nov' is none of the functions in tools (did you mean 'now'?)"),
        ({"tool_choice": "any"}, "tool_choice must be none, auto, required or a function with its name, got 'any'"),
        (
            {"tool_choice": "required", "tools": [tool("f", {"x": {"not": {}}})]},
            'tools[0].function.parameters: the schema can\'t be used: Unimplemented keys: ["not"]',
        ),
        (
            {"tool_choice": allowed("auto")},
            "tool_choice.allowed_tools must have the mode auto or required, and tools, got {'mode': 'auto', 'tools'",
        ),
        ({"tool_choice": allowed("none", named("now"))}, "tool_choice.allowed_tools must have the mode auto or requ"),
        (
            {"tool_choice": allowed("auto", named("now"), named("ad"))},
            "tool_choice: 'ad' is none of the functions in tools (did you mean 'add'?)",
        ),
        ({"tool_choice": allowed("auto", "now")}, "tool_choice.allowed_tools must have the mode auto or required, "),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls must be true or false, got 'no'"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_generated(models, values, reason):
    wrapper = models["onnx int4"].unwrap_python_model()
    with speaking(wrapper, TEMPLATES["qwen2.5"]), pytest.raises(MlflowException) as refused:
        models["onnx int4"].predict(asked(**values))
    assert str(refused.value).startswith(reason)


def test_a_model_whose_template_ignores_tools_says_so(models):
    with pytest.raises(MlflowException) as refused:
        models["onnx int4"].predict(asked())
    assert str(refused.value).startswith("tools: the model's chat template ignores tools")
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    with pytest.raises(MlflowException, match="the model's chat template ignores tools"):
        models["onnx int4"].predict({"messages": [*PARIS, {"role": "assistant", "tool_calls": [call]}]})
    wrapper = models["onnx prompt"].unwrap_python_model()
    with pytest.raises(ValueError, match="tools is not supported by this model: its answer is one text"):
        wrapper.prepare({"prompt": "Hi", "tools": [NOW]})
