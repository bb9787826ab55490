"""`response_format` on all runtimes: every finished answer satisfies its schema, and other rows are not changed."""

import json
import shutil

import jsonschema
import pytest
from support.effort import some
from support.questions import PARIS, some_questions
from support.schemas import SCHEMAS

from slm.models import chat_model
from slm.models.chat_parts import structured

FORMATS = jsonschema.FormatChecker(formats=("ipv4", "email", "uuid"))  # of a date, the grammar holds the form alone


def form(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def asked(schema: dict, **values) -> dict:
    text = f"Answer with JSON for this schema: {json.dumps(schema)}"
    return {
        "messages": [{"role": "user", "content": text}],
        "response_format": form(schema),
        "max_tokens": 160,
    } | values


def validates(text: str, schema: dict) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


@pytest.fixture(scope="module")
def random_model(checkpoint, tmp_path_factory):
    """A wrapper over weights that were never trained, with the embedded model's tokenizer."""
    import torch
    import transformers
    from mlflow.pyfunc.model import PythonModelContext

    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=4096,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (checkpoint.folder / name).exists():
            shutil.copy(checkpoint.folder / name, folder)
    model = chat_model.SmallLanguageModel()
    model.load_context(PythonModelContext({"checkpoint": str(folder)}, {}))
    return model


@pytest.fixture(scope="module", params=["real weights", "random weights"])
def wrapper(request):
    if request.param == "random weights":
        return request.getfixturevalue("random_model")
    return request.getfixturevalue("models")["onnx int4"].unwrap_python_model()


def test_there_are_fifty_schemas_and_each_can_be_satisfied():
    assert len(SCHEMAS) >= 50
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert structured.checked_grammar(structured.schema_grammar(schema))


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "drawn"])
def test_every_finished_answer_satisfies_its_schema_in_one_batch(request, wrapper, drawn):
    schemas = dict(SCHEMAS)
    if drawn and request.node.callspec.params["wrapper"] == "real weights":  # they generate for seconds
        schemas = dict(some([*SCHEMAS.items()], 18))
    rows = [asked(schema, **drawn) for schema in schemas.values()]
    answers = {index: answer for index, [answer] in wrapper.answers(rows)}
    finished = 0
    for index, (name, schema) in enumerate(schemas.items()):
        answer = answers[index]
        assert answer.finish_reason in ("stop", "length") and not answer.error, (name, answer)
        if answer.finish_reason == "stop":
            finished += 1
            try:
                validates(answer.text, schema)
            except (ValueError, jsonschema.ValidationError) as error:
                pytest.fail(f"{name}: {answer.text!r}: {error}")
        else:
            assert answer.output_tokens == 160
    assert finished >= 0.9 * len(schemas)


OPEN = "start: /(.|\\n)*/"


def texts(wrapper, rows: list) -> list[str]:
    for _ in wrapper.stream(rows):
        pass
    return [row.text for row in rows]


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32", "onnxruntime-genai"])
def test_a_permissive_grammar_equals_unconstrained_greedy_text(models, fp32_export, name):
    from llguidance import LLMatcher

    wrapper = opened(models, fp32_export, name)
    questions = [question | {"max_tokens": 24} for question in some_questions(3)]
    free = [row for question in questions for row in wrapper.prepare(question)]
    held = [row for question in questions for row in wrapper.prepare(question)]
    for row in held:
        wrapper.constraints.constrain(row, structured.checked_grammar(LLMatcher.grammar_from_lark(OPEN)))
    assert not held[0].takes_likeliest
    assert texts(wrapper, held) == texts(wrapper, free)
    assert [row.output for row in held] == [row.output for row in free]


def opened(models, fp32_export, name: str):
    """A wrapper of one of the three runtimes."""
    if name != "onnxruntime-genai":
        return models[name].unwrap_python_model()
    import copy

    wrapper = copy.copy(models["onnx fp32"].unwrap_python_model())
    wrapper._runtime = chat_model.OnnxRuntime(fp32_export.folder, {})
    return wrapper


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32", "onnxruntime-genai"])
def test_rows_with_and_without_schemas_share_a_batch_and_the_free_rows_keep_their_text(models, fp32_export, name):
    wrapper = opened(models, fp32_export, name)
    free = [question | {"max_tokens": 16} for question in some_questions(3)]
    names = ["weather", "enum: texts", "type: boolean", "pattern"]
    held = [asked(SCHEMAS[name], max_tokens=60) for name in names]
    alone = {index: answer for index, [answer] in wrapper.answers(free)}
    mixed = {index: answer for index, [answer] in wrapper.answers([*held[:2], *free, *held[2:]])}
    assert [mixed[2 + index].token_ids for index in range(3)] == [alone[index].token_ids for index in range(3)]
    for place, schema_name in zip((0, 1, 5, 6), names, strict=True):
        assert mixed[place].finish_reason == "stop"
        validates(mixed[place].text, SCHEMAS[schema_name])


@pytest.mark.parametrize("name", ["pipeline", "onnx int4"])
def test_a_stream_is_held_to_its_schema_too(models, name):
    question = asked(SCHEMAS["a judge of MLflow"])
    chunks = list(models[name].predict_stream(question))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    validates(text, SCHEMAS["a judge of MLflow"])


def test_json_object_gives_an_object_or_says_that_it_was_cut(models):
    question = {"messages": PARIS, "response_format": {"type": "json_object"}}
    [whole] = models["onnx int4"].predict(question | {"max_tokens": 200})
    [choice] = whole["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    [cut] = models["onnx int4"].predict(question | {"max_tokens": 3})
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_a_refused_schema_fails_its_row_alone_and_generates_nothing(models, monkeypatch):
    wrapper = models["onnx int4"].unwrap_python_model()
    good, bad = asked(SCHEMAS["type: boolean"]), asked({"not": {}})
    completions = wrapper.predict(None, [good, bad])
    assert completions[0]["choices"][0]["message"]["content"] in ("true", "false")
    assert completions[1]["choices"][0]["finish_reason"] == "error"
    assert (
        completions[1]["error"]["message"] == 'response_format: the schema can\'t be used: Unimplemented keys: ["not"]'
    )
    assert completions[1]["usage"]["completion_tokens"] == 0


def test_a_grammar_that_cannot_go_on_ends_its_row_with_the_reason(models):
    """No token of the vocabulary may follow: a matcher in an error state, as after a limit of its parser."""
    wrapper = models["onnx int4"].unwrap_python_model()
    [broken] = wrapper.prepare(asked(SCHEMAS["weather"]))
    [free] = wrapper.prepare({"messages": PARIS, "max_tokens": 4})
    assert not broken.matcher.consume_token(0)  # an error that a matcher never leaves
    texts(wrapper, [broken, free])
    assert broken.finish_reason == "error" and broken.error.startswith("response_format: the grammar can't go on (")
    assert free.finish_reason == "length" and len(free.output) == 4
    [answer] = wrapper.choices([broken])
    assert wrapper.completion([answer])["error"]["message"] == broken.error
