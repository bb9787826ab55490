"""The form in which a logged model takes a prompt, read from its description, and the text in its output."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support.python_models import signature

from slm.answers import forms
from slm.answers.forms import Field, Form
from slm.base.errors import BadInput
from slm.models import chat_model

URI = "models:/m/1"
USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{{ eos_token }}"


def description(*columns, params=None, flavors=None, metadata=None, taken=None):
    """MLflow's description of a model, as far as this module reads it."""
    found = taken or signature(*columns, params=params)
    return SimpleNamespace(signature=found, flavors={"python_function": {}} | (flavors or {}), metadata=metadata)


def form(*columns, **more) -> Form:
    return forms.form_of(URI, description(*columns, **more), None)


def refusal(*columns, **more) -> str:
    with pytest.raises(BadInput) as refused:
        forms.check(URI, description(*columns, **more))
    return str(refused.value)


# A conversation as a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "Hi"),
        ([SYSTEM], "Be brief."),
        ([SYSTEM, USER], "Be brief.\n\nHi"),
        ([ASSISTANT], "Assistant: Hello\n\nAssistant:"),
        ([USER, USER], "User: Hi\n\nUser: Hi\n\nAssistant:"),
        ([USER, ASSISTANT, USER], "User: Hi\n\nAssistant: Hello\n\nUser: Hi\n\nAssistant:"),
        ([SYSTEM, USER, ASSISTANT], "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nAssistant:"),
    ],
)
def test_without_a_chat_template_a_conversation_is_written_out(messages, text):
    assert forms.text_of(messages, Form("prompt", False)) == text


def test_a_chat_template_gets_the_messages_and_its_special_tokens():
    templated = Form("prompt", False, template=TEMPLATE, special_tokens={"eos_token": "</s>"})
    assert forms.text_of([SYSTEM, USER], templated) == "<system>Be brief.<user>Hi</s>"


# The form ------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_take_prompts_is_refused(monkeypatch):
    text = ("string", "prompt", True)
    nothing = description(text)
    nothing.flavors = {}
    with pytest.raises(BadInput) as refused:
        forms.check(URI, nothing)
    assert str(refused.value) == f"{URI} has no python_function flavor, by which MLflow asks models for answers"
    unsigned = description(text)
    unsigned.signature = None
    with pytest.raises(BadInput) as refused:
        forms.check(URI, unsigned)
    assert str(refused.value) == f"{URI} has no signature; log it with one: a `messages` column, or one text column"
    assert refusal(taken=tensors()) == f"{URI} takes tensors; a `messages` column, or one text column, is needed"


def tensors():
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    return ModelSignature(Schema([TensorSpec(np.dtype("float32"), (-1, 3))]))


@pytest.mark.parametrize(
    ("setting", "refused"), [("false", True), ("0", True), ("TRUE", False), ("1", False), (None, False)]
)
def test_a_pickle_is_refused_where_mlflow_may_not_load_it(monkeypatch, setting, refused):
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    if setting is not None:
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", setting)
    pickled = {"python_function": {"python_model": "python_model.pkl"}}
    if refused:
        assert refusal(("string", "prompt", True), flavors=pickled) == (
            f"{URI} is a pickle, which can run anything; "
            "set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true where you trust who made it"
        )
    else:
        forms.check(URI, description(("string", "prompt", True), flavors=pickled))
    forms.check(URI, description(("string", "prompt", True)))  # its code is a file, and no pickle


def test_parameters_are_taken_from_columns_first_and_then_from_params():
    found = form(
        ("string", "question", True),
        ("double", "temperature", False),
        ("long", "max_output_tokens", False),
        params=[
            ("temperature", "double", 0.0),
            ("max_new_tokens", "long", 9),
            ("stop_sequences", "string", ["x"], (-1,)),
            ("random_seed", "long", 0),
        ],
    )
    assert found == Form(
        "question",
        False,
        {
            "max_tokens": Field("max_output_tokens", False, "long"),
            "temperature": Field("temperature", False, "double"),
            "stop": Field("stop_sequences", True, ""),
            "seed": Field("random_seed", True, "long"),
        },
    )


def test_columns_that_must_be_there_get_a_neutral_value():
    found = form(("string", "text", True), ("long", "n", True), ("boolean", "stream", True), ("string", "stop", True))
    assert (found.column, found.fixed) == ("text", {"n": 1, "stream": False, "stop": []})
    assert form(("string", "text", True), ("long", "n", False)).fixed == {}


def array(*properties, required=True):
    from mlflow.types.schema import Array, Object, Property

    return Array(Object([Property(name, "string", required=required) for name in properties]))


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ([("string", "anything", True)], "anything"),
        ([("string", "anything", False)], "anything"),
        ([("string", "a", True), ("string", "b", False)], "a"),  # the one that must be there
        ([("string", "query", False), ("string", "prompt", False), ("string", "x", False)], "prompt"),
        ([("string", "x", False), ("string", "message", False)], "message"),
        ([("string", "prompt", True), ("double", "top_p", True)], "prompt"),
        ([("string", "question", True), ("string", "stop", True)], "question"),  # `stop` is a parameter
    ],
)
def test_the_column_of_the_prompt_is_the_only_or_the_likeliest_text(columns, column):
    found = form(*columns)
    assert (found.column, found.is_chat) == (column, False)


def test_a_conversation_is_preferred_to_a_text():
    from mlflow.types.schema import AnyType, Array

    messages = (array("role", "content"), "messages", True)
    assert form(("string", "prompt", False), messages).column == "messages"
    assert form((Array(AnyType()), "input", True)) == Form("input", True)
    assert form((array("role", "content"), "input", False), messages).column == "messages"
    optional = array("role", "content", "name", required=False)
    assert form((optional, "messages", True)).is_chat
    assert form(messages, metadata={"chat_template": TEMPLATE}).template == ""  # a conversation needs no template


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ([("string", "a", False), ("string", "b", False)], "a (string), b (string)"),
        ([("string", "prompt", True), ("string", "customer", True)], "prompt (string), customer (string)"),
        ([("double", "x", True)], "x (double)"),
        ([(None, None, None)], "unnamed (long)"),
    ],
)
def test_columns_that_are_not_understood_are_named(columns, told):
    columns = [("long", None, True)] if columns == [(None, None, None)] else columns
    expected = f"{URI} takes the columns {told}; a `messages` column, or one text column, is needed"
    assert refusal(*columns) == expected


def test_many_columns_are_cut_in_the_refusal():
    said = refusal(*[("double", f"column_{place:03}", True) for place in range(50)])
    assert said.startswith(f"{URI} takes the columns column_000 (double), column_001")
    assert len(said) == len(f"{URI} takes the columns ; a `messages` column, or one text column, is needed") + 300


def test_a_list_of_texts_or_of_records_goes_as_a_list():
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Object, Property

    texts = form(("string", None, True))
    assert (texts.column, texts.as_list, texts.is_chat) == ("", True, False)
    record = Object([Property("question", "string"), Property("seed", "long", required=False)])
    found = form(taken=ModelSignature(Schema([ColSpec(record)])))
    assert found == Form("question", False, {"seed": Field("seed", False, "long")}, as_list=True)
    assert not form(("string", "prompt", True)).as_list


@pytest.mark.parametrize(
    ("flavor", "params", "expected"),
    [
        (
            {"task": "text-generation"},
            ["do_sample", "max_new_tokens", "stop"],
            ({"max_tokens", "stop"}, 1e-6, True, True),
        ),
        ({"task": "text-generation"}, [], (set(), 1e-6, False, True)),
        ({"task": "text2text-generation"}, [], (set(), 1e-6, False, False)),
        ({"task": "summarization"}, [], (set(), 1e-6, False, False)),
        (
            {"task": "text-generation", "inference_task": "llm/v1/completions"},
            ["max_tokens", "stop"],
            ({"max_tokens"}, 1e-6, False, False),
        ),
        (None, ["stop", "do_sample"], ({"stop"}, 0.0, False, False)),
    ],
)
def test_a_transformers_pipeline_has_its_own_rules(flavor, params, expected):
    kinds = {
        "do_sample": ("boolean", True),
        "stop": ("string", ""),
        "max_tokens": ("long", 1),
        "max_new_tokens": ("long", 1),
    }
    found = form(
        ("string", "prompt", True),
        params=[(name, *kinds[name]) for name in params],
        flavors={"transformers": flavor} if flavor else {},
    )
    assert (set(found.fields), found.lowest_temperature, found.do_sample, found.echoes) == expected


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_model_of_this_project_takes_every_parameter_in_its_rows(column):
    metadata = {"model.sha256": "ab", "chat_template": "logged", "special_tokens": {"bos_token": "<s>"}}
    kind = array("role", "content") if column == "messages" else "string"
    found = form((kind, column, True), metadata=metadata)
    fields = {name: Field(name) for name in ("max_tokens", "temperature", "top_p", "stop", "seed")}
    assert found == Form(column, column == "messages", fields, {}, "logged", {"bos_token": "<s>"})


def test_a_chat_template_is_in_the_metadata_or_else_beside_the_tokenizer(tmp_path):
    tokenizer = tmp_path / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer_config.json").write_text('{"chat_template": "of the tokenizer", "eos_token": "</s>"}')
    text, logged = ("string", "prompt", True), {"chat_template": "logged", "special_tokens": {"bos_token": "<s>"}}
    pipeline = {"transformers": {"task": "text-generation"}}
    assert form(text, metadata=logged).template == "logged"
    assert form(text, metadata=logged).special_tokens == {"bos_token": "<s>"}
    assert form(text, flavors=pipeline).template == form(text).template == ""
    found = forms.form_of(URI, description(text, flavors=pipeline), tmp_path)
    assert (found.template, found.special_tokens["eos_token"]) == ("of the tokenizer", "</s>")
    assert forms.form_of(URI, description(text, flavors=pipeline, metadata=logged), tmp_path).template == "logged"
    assert forms.form_of(URI, description(text), tmp_path).template == ""  # not a transformers model


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (7.0, "long", 7),
        (7.0, "integer", 7),
        (7.5, "long", 7.5),
        (7, "double", 7.0),
        (7, "float", 7.0),
        (7, "string", 7),
        (7, "", 7),
        (["END"], "string", "END"),
        (["a", "b"], "string", ["a", "b"]),
        (["END"], "", ["END"]),
        ("END", "string", "END"),
    ],
)
def test_a_value_gets_the_type_of_the_signature_unless_it_would_lose_data(value, kind, expected):
    found = forms.fitted(value, kind)
    assert found == expected and type(found) is type(expected)


# The output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "rows"),
    [
        (pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}), [{"a": "x", "b": 1}, {"a": "y", "b": 2}]),
        (pd.Series(["x", "y"]), ["x", "y"]),
        (np.array(["x", "y"]), ["x", "y"]),
        (np.array("x"), ["x"]),
        (["x"], ["x"]),
        (("x", "y"), ["x", "y"]),
        ("x", ["x"]),
        ({"a": "x"}, [{"a": "x"}]),
        (None, [None]),
    ],
)
def test_a_prediction_of_any_kind_is_a_list_of_rows(output, rows):
    assert forms.rows_of(output) == rows


def answer(text, finish_reason="stop", prompt_tokens=None, output_tokens=None) -> dict:
    return {
        "text": text,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": 0.0,
        "error": "",
    }


USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
THEIR_USAGE = {"usage": {"input_tokens": 5, "output_tokens": 6}}
PARTS = [{"type": "output_text", "text": "a"}, {"type": "refusal", "text": "x"}, {"type": "output_text", "text": "b"}]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("x", answer("x")),
        ("", answer("")),
        (5, answer("5")),
        (0.5, answer("0.5")),
        ({"anything": "x"}, answer("x")),
        ({"anything": 5}, answer("5")),
        ({"anything": "y", "answer": "x"} | USAGE, answer("x", "stop", 3, 4)),
        ({"text": "x", "finish_reason": "max_tokens"} | THEIR_USAGE, answer("x", "length", 5, 6)),
        ({"content": "y", "text": "x", "usage": None}, answer("x")),
        ({"text": None, "generated_text": "x"}, answer("x")),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]} | USAGE, answer("x", "length", 3, 4)),
        ({"choices": [{"text": "x", "finish_reason": "tool_calls"}, {"text": "y"}]}, answer("x")),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "thought"},
                    {"role": "assistant", "content": "x"},
                    {"role": "tool", "content": "y"},
                ],
                "finish_reason": "length",
            }
            | USAGE,
            answer("x", "length", 3, 4),
        ),
        (
            {"output": [{"type": "reasoning"}, {"type": "message", "content": PARTS}, {"type": "message"}]}
            | THEIR_USAGE,
            answer("ab", "stop", 5, 6),
        ),
        ({"output": [{"type": "message", "content": PARTS}], "status": "incomplete"}, answer("ab", "length")),
        (SimpleNamespace(model_dump=lambda: {"answer": "x"}), answer("x")),
        ("a\ud83d", answer("a\ufffd")),  # cut inside an emoji
        ("\ude00b", answer("\ufffdb")),
        ("\ud83d\ude00", answer("\U0001f600")),
        (
            {"text": "x", "usage": {"prompt_tokens": np.int64(3), "completion_tokens": np.float64(4)}},
            answer("x", "stop", 3, 4),
        ),
        ({"text": "x", "usage": {"prompt_tokens": "3", "completion_tokens": float("nan")}}, answer("x")),
        ({"text": "x", "usage": {"prompt_tokens": -1, "completion_tokens": True}}, answer("x")),
        ({"text": "x", "usage": float("nan")}, answer("x")),  # a row without usage in a table
    ],
)
def test_the_text_is_found_in_the_schemas_of_openai_and_mlflow_and_in_known_fields(output, expected):
    assert forms.answer_of(output) == expected


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "the answer holds no text, but None (finish reason None)"),
        (float("nan"), "the answer holds no text, but nan (finish reason None)"),
        (["x" * 99], f"the answer holds no text, but ['{'x' * 78} (finish reason None)"),
        (
            {"choices": [{"message": {}, "finish_reason": "stop"}]},
            "the answer holds no text, but None (finish reason stop)",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "the answer holds no text, but None (finish reason None)"),
        ({"output": [{"type": "reasoning"}]}, "the answer holds no text, but None (finish reason stop)"),
        ({"error": {"message": "full"}}, "the model answered with an error: {'message': 'full'}"),
        ({"error": "x" * 300}, f"the model answered with an error: '{'x' * 199}"),
        ({"a": "x", "b": "y"}, "no text is found in the answer's fields a, b"),
        ({}, "no text is found in the answer's fields "),
    ],
)
def test_an_answer_without_a_text_says_what_it_holds(output, told):
    with pytest.raises(ValueError) as refused:
        forms.answer_of(output)
    assert str(refused.value) == told


def test_a_chat_template_that_refuses_is_the_rows_fault():
    refusing = Form("prompt", False, template="{{ raise_exception('no system') }}")
    with pytest.raises(chat_model.Refused, match="no system"):
        forms.text_of([SYSTEM, USER], refusing)
