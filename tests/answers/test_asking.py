"""What a prompt becomes for a model, and how the answers come back to their questions."""

import hashlib
import json
from dataclasses import dataclass, field, replace

import pytest
from support.scored import facts

from slm.answers import asking
from slm.answers.asking import ModelFacts
from slm.answers.forms import Field, Form
from slm.base.errors import BadInput
from slm.prompts.prompt_rows import Prompt

GENERATION = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.9, "seed": 7, "stop": [], "batch_size": 3}
PLAIN = Prompt("plain", None, "Größe?", ("x",), (), None, ())
CHAT = Prompt(
    "chat",
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}),
    None,
    ("x",),
    (),
    None,
    (),
)
OURS = Form("messages", True, {name: Field(name) for name in ("max_tokens", "temperature", "top_p", "stop", "seed")})
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
)


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Echo:
    """A model that answers backwards, and notes the rows and the batch size that it gets."""

    facts: ModelFacts
    got: list = field(default_factory=list)

    def sent(self, row):
        return asking.text_sent(row, self.facts.form), [1, 2]

    def check_unchanged(self):
        pass

    def replies(self, rows, batch_size):
        self.got.append((rows, batch_size))
        for place in reversed(range(len(rows))):
            yield place, {"text": rows[place]["row"]["prompt"], "seconds": 0.5}


def test_a_model_of_this_project_gets_one_flat_row_with_all_parameters():
    ours = facts(form=OURS, code_sha256="c0de", sha256="ab")
    expected = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.9, "stop": [], "seed": 7}
    assert asking.row_of(ours, PLAIN, 0, GENERATION) == {"messages": [{"role": "user", "content": "Größe?"}]} | expected
    assert asking.row_of(ours, CHAT, 2, GENERATION) == {"messages": list(CHAT.messages)} | expected | {"seed": 9}
    assert ours.is_ours and ours.is_chat and ours.ignored == ()


def test_another_model_gets_its_fields_and_params_in_its_own_types():
    fields = {
        "max_tokens": Field("max_new_tokens", True, "long"),
        "temperature": Field("temperature", False, "double"),
        "stop": Field("stop", True, "string"),
        "seed": Field("random_seed", True, "double"),
    }
    form = Form("question", False, fields, {"n": 1}, lowest_temperature=1e-6, do_sample=True)
    model = facts(form=form, sha256="ab")
    found = asking.row_of(model, CHAT, 1, GENERATION)
    assert found == {
        "row": {"question": "Be brief.\n\nHi", "n": 1, "temperature": 1e-6},
        "params": {"max_new_tokens": 5, "random_seed": 8.0, "do_sample": False},
        "to": "",
    }
    warm = asking.row_of(model, CHAT, 0, GENERATION | {"temperature": 0.5, "stop": ["END"]})
    assert warm["row"]["temperature"] == 0.5
    assert warm["params"] == {"max_new_tokens": 5, "random_seed": 7.0, "stop": "END", "do_sample": True}
    assert not model.is_ours and not model.is_chat and model.ignored == ("top_p",)


def test_an_endpoint_is_named_in_its_rows():
    row = asking.row_of(facts(form=Form("prompt", False)), PLAIN, 0, GENERATION)
    assert row == {"row": {"prompt": "Größe?"}, "params": {}, "to": "http://host/v1"}


def test_each_prompt_is_asked_as_often_as_repeats_say_with_one_key_for_each():
    model = Echo(facts(form=Form("prompt", False, {"seed": Field("seed")})))
    found = asking.questions(model, [PLAIN, CHAT], GENERATION, 2)
    assert [(one.prompt.id, one.repeat) for one in found] == [("plain", 0), ("plain", 1), ("chat", 0), ("chat", 1)]
    rows = [{"row": {"prompt": "Größe?", "seed": seed}, "params": {}, "to": "http://host/v1"} for seed in (7, 8)]
    assert [one.row for one in found[:2]] == rows
    assert [one.key for one in found[:2]] == [digest([rows[0], 0]), digest([rows[1], 1])]
    assert [(one.text, one.token_ids) for one in found] == [("Größe?", [1, 2])] * 2 + [("Be brief.\n\nHi", [1, 2])] * 2


def test_a_prompt_that_the_chat_template_refuses_fails_before_the_others_are_answered():
    model = Echo(facts(form=Form("prompt", False, template=REFUSING)))
    other = Prompt("other", None, "x", (), (), None, ())
    asked = asking.questions(model, [PLAIN, CHAT, other], GENERATION, 1)
    refused = "the model's chat template refused the conversation: no system"
    assert (asked[1].row, asked[1].text, asked[1].token_ids) == ({"refused": refused}, f"refused: {refused}", None)
    answers = [(question.prompt.id, answer) for question, answer in asking.answers(model, asked, 3)]
    assert answers == [
        (
            "chat",
            {
                "text": "",
                "finish_reason": "error",
                "prompt_tokens": None,
                "output_tokens": None,
                "seconds": 0.0,
                "error": refused,
            },
        ),
        ("other", {"text": "x", "seconds": 0.5}),
        ("plain", {"text": "Größe?", "seconds": 0.5}),
    ]
    assert model.got == [([asked[0].row, asked[2].row], 3)]
    list(asking.answers(model, asked))
    assert model.got[1][1] == 0  # the model's own batch size


@pytest.mark.parametrize(
    ("content", "text"),
    [("Größe?", "Größe?"), ([{"role": "user", "content": "Größe?"}], '[{"role": "user", "content": "Größe?"}]')],
)
def test_a_conversation_is_told_as_json_and_a_text_as_it_is(content, text):
    assert asking.text_sent({"row": {"x": content}}, Form("x", True)) == text


@pytest.mark.parametrize(
    ("uri", "version"), [("models:/phi3/7", ("phi3", "7")), ("models:/m-0123", None), ("http://host/v1", None)]
)
def test_the_version_of_a_model_is_in_its_uri(uri, version):
    assert facts(uri=uri).version == version


SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}


def test_a_rows_response_format_is_sent_to_models_that_take_it_and_fails_the_row_elsewhere():
    prompt = replace(PLAIN, response_format=SCHEMA)
    ours = facts(form=OURS, code_sha256="c0de", sha256="ab")
    assert asking.row_of(ours, prompt, 0, GENERATION)["response_format"] == SCHEMA
    endpoint = facts(form=OURS, uri="http://127.0.0.1:5005/v1#phi3")
    assert asking.row_of(endpoint, prompt, 0, GENERATION)["row"]["response_format"] == SCHEMA
    others = asking.row_of(facts(form=OURS, sha256="ab", uri="models:/other/1"), prompt, 0, GENERATION)
    assert others == {
        "refused": "the row has a response_format, which only models of this project and OpenAI's API take"
    }


def test_a_schema_that_no_grammar_holds_is_an_error_before_a_model_is_loaded():
    asking.check_response_formats([PLAIN, replace(PLAIN, response_format=SCHEMA)])
    wrong = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"not": {}}}}
    with pytest.raises(BadInput) as refused:
        asking.check_response_formats([replace(PLAIN, response_format=wrong)])
    told = 'prompt plain: response_format: the schema can\'t be used: Unimplemented keys: ["not"]'
    assert str(refused.value) == told
