"""Loaded models of all three kinds: the rows that they get, and their answers, failures and time limits."""

import hashlib
import json
import os
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
from support.scored import facts

from slm.answers import endpoints, loading
from slm.answers.forms import Form


def plain(text="x", **changes) -> dict:
    """An answer without the seconds that it took."""
    base = {"text": text, "finish_reason": "stop", "prompt_tokens": None, "output_tokens": None, "error": ""}
    return base | changes


def failure(error: str) -> dict:
    return plain("", finish_reason="error", error=error)


def untimed(replies) -> list[tuple[int, dict]]:
    found = [(place, dict(answer)) for place, answer in replies]
    assert all(0 <= answer.pop("seconds") < 60 for _, answer in found)
    return found


# Models of others ----------------------------------------------------------------------------------------------------


class Pyfunc:
    """What MLflow loads, as far as a call goes: notes each call, and answers with the prompts' column."""

    def __init__(self, column="prompt", answers=None):
        self.calls, self.column, self.answers = [], column, answers

    def predict(self, content, params=None):
        self.calls.append((content.to_dict("records") if isinstance(content, pd.DataFrame) else content, params))
        rows = content.to_dict("records") if isinstance(content, pd.DataFrame) else content
        texts = [row[self.column] if isinstance(row, dict) else row for row in rows]
        if "fail" in texts:
            raise ValueError("it was\n told to")
        return self.answers(texts) if self.answers else texts


def others(pyfunc, form=None, row_timeout=0.0) -> loading.OthersModel:
    return loading.OthersModel(facts(form=form or Form("prompt", False)), pyfunc, row_timeout)


def rows(*texts, column="prompt", **params) -> list[dict]:
    return [{"row": {column: text}, "params": params, "to": ""} for text in texts]


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(0, [1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (9, [5])]
)
def test_texts_go_batch_size_to_a_call(batch_size, sizes):
    pyfunc = Pyfunc()
    found = untimed(others(pyfunc).replies(rows(*"abcde", max_tokens=5), batch_size))
    assert found == [(place, plain(text)) for place, text in enumerate("abcde")]
    assert [len(content) for content, _ in pyfunc.calls] == sizes
    assert pyfunc.calls[0] == ([{"prompt": text} for text in "abcde"[: sizes[0]]], {"max_tokens": 5})


def test_rows_with_other_params_are_not_put_into_one_call():
    pyfunc = Pyfunc()
    mixed = rows("a", seed=1) + rows("b", seed=2)
    assert untimed(others(pyfunc).replies(mixed, 2)) == [(0, plain("a")), (1, plain("b"))]
    assert [params for _, params in pyfunc.calls] == [{"seed": 1}, {"seed": 2}]
    assert Pyfunc().predict([], None) == [] and others(pyfunc).sent(mixed[0]) == ("a", None)


def test_a_row_that_fails_in_a_batch_fails_alone():
    pyfunc = Pyfunc()
    found = untimed(others(pyfunc).replies(rows("a", "fail", "b", "c"), 3))
    assert found == [(0, plain("a")), (1, failure("it was told to")), (2, plain("b")), (3, plain("c"))]
    assert [len(content) for content, _ in pyfunc.calls] == [3, 1, 1, 1, 1]
    assert pyfunc.calls[0][1] is None  # no params at all


def test_another_number_of_answers_than_rows_is_asked_for_row_by_row():
    one_for_all = Pyfunc(answers=lambda texts: " + ".join(texts))
    assert untimed(others(one_for_all).replies(rows("a", "b"), 2)) == [(0, plain("a")), (1, plain("b"))]
    twice = Pyfunc(answers=lambda texts: texts * 2)
    told = "one row was sent, but 2 answers came back"
    assert untimed(others(twice).replies(rows("a"), 0)) == [(0, failure(told))]


@pytest.mark.parametrize(
    ("form", "column", "content"),
    [
        (Form("prompt", False), "prompt", [{"prompt": "a"}]),
        (Form("messages", True), "messages", {"messages": "a"}),  # one conversation is one mapping
        (Form("", False, as_list=True), "", ["a"]),
        (Form("question", False, as_list=True), "question", [{"question": "a"}]),
        (Form("messages", True, as_list=True), "messages", [{"messages": "a"}]),
    ],
)
def test_rows_go_in_the_form_that_the_model_takes(form, column, content):
    pyfunc = Pyfunc(column, answers=lambda texts: ["x"])
    assert untimed(others(pyfunc, form).replies(rows("a", column=column), 3)) == [(0, plain("x"))]
    assert pyfunc.calls == [(content, None)]


def test_a_conversation_is_a_call_of_its_own_whatever_the_batch_size():
    pyfunc = Pyfunc("messages", answers=lambda texts: ["x"])
    assert len(untimed(others(pyfunc, Form("messages", True)).replies(rows("a", "b", column="messages"), 2))) == 2
    assert [content for content, _ in pyfunc.calls] == [{"messages": "a"}, {"messages": "b"}]


def test_a_prompt_that_an_answer_repeats_is_left_out():
    pyfunc = Pyfunc(answers=lambda texts: [f"{text}, and more {text}" for text in texts])
    echoing = Form("prompt", False, echoes=True)
    assert untimed(others(pyfunc, echoing).replies(rows("a", "b"), 2)) == [
        (0, plain(", and more a")),
        (1, plain(", and more b")),
    ]


def test_a_row_of_others_that_takes_too_long_fails_alone():
    end = threading.Event()
    pyfunc = Pyfunc(answers=lambda texts: end.wait(30) and ["late"] if texts == ["endless"] else texts)
    found = sorted(
        untimed(others(pyfunc, row_timeout=0.5).replies(rows("endless", "a", "fail"), 0)), key=lambda one: one[0]
    )
    end.set()
    assert found == [
        (0, failure("no answer within 0.5 s (row_timeout)")),
        (1, plain("a")),
        (2, failure("it was told to")),
    ]


# Models of this project ----------------------------------------------------------------------------------------------


class Wrapper:
    """The wrapper's calls: rows are prepared, rendered and answered in the order of their lengths."""

    name, end = "ours", threading.Event()

    def prepare(self, row):
        if "refused" in str(row):
            raise ValueError("no system")
        return [SimpleNamespace(prompt=[1, 2])]

    def render(self, messages):
        return f"<{messages}>"

    def answers(self, rows, params, batch_size):
        assert (params, batch_size) == ({}, 4)
        for place in reversed(range(len(rows))):
            if rows[place].get("prompt") == "endless":
                self.end.wait(30)
            yield place, [SimpleNamespace(**plain(rows[place]["prompt"]), seconds=0.5)]


def own(is_chat=False, row_timeout=0.0) -> loading.OwnModel:
    form = Form("messages" if is_chat else "prompt", is_chat)
    return loading.OwnModel(facts(form=form), Wrapper(), row_timeout, lambda: None)


def test_a_model_of_this_project_tells_the_text_and_the_token_ids():
    assert own().sent({"prompt": "a"}) == ("a", [1, 2])
    assert own(is_chat=True).sent({"messages": "a"}) == ("<a>", [1, 2])
    assert own().sent({"prompt": "refused"}) == ("refused: no system", None)


@pytest.mark.parametrize("row_timeout", [0.0, 20.0])
def test_a_model_of_this_project_answers_as_its_wrapper_does(row_timeout):
    found = list(own(row_timeout=row_timeout).replies([{"prompt": "a"}, {"prompt": "b"}], 4))
    assert found == [(1, plain("b") | {"seconds": 0.5}), (0, plain("a") | {"seconds": 0.5})]


def test_rows_that_are_left_when_no_row_ends_in_time_fail():
    found = list(own(row_timeout=0.3).replies([{"prompt": "a"}, {"prompt": "endless"}, {"prompt": "b"}], 4))
    Wrapper.end.set()
    late = failure("no answer within 0.3 s (row_timeout)") | {"seconds": 0.3}
    assert found == [(2, plain("b") | {"seconds": 0.5}), (0, late), (1, late)]


# Endpoints -----------------------------------------------------------------------------------------------------------


def test_an_endpoint_s_reply_is_an_answer_or_the_failure_of_its_row():
    def ask(body):
        if body["prompt"] == "fail":
            raise ValueError("it was\n told to")
        return body["reply"]

    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    replies = [{"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage}, {"choices": ["text"]}, {}]
    asked = [{"row": {"prompt": "a", "reply": reply}, "params": {}, "to": "e"} for reply in replies]
    asked[2]["row"]["prompt"] = "fail"
    endpoint = endpoints.Endpoint("e", "prompt", {}, {}, ask, lambda: None)
    model = loading.EndpointModel(facts(form=Form("prompt", False)), endpoint, 0.0)
    found = dict(untimed(model.replies(asked, 1)))
    assert found[0] == plain("x", finish_reason="length", prompt_tokens=3, output_tokens=4)
    assert found[1]["finish_reason"] == "error" and "'str' object has no attribute 'get'" in found[1]["error"]
    assert found[2] == failure("it was told to")
    assert model.sent(asked[0]) == ("a", None) and model.check_unchanged() is None


# What a model is -----------------------------------------------------------------------------------------------------


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def test_the_identity_of_a_model_is_its_weights_settings_template_schema_and_code():
    metadata = {"model.sha256": "ab", "chat_template": "t", "special_tokens": {"eos_token": "</s>"}, "schema": "chat"}
    config = {"max_tokens": 5, "model_name": "m"}
    described = SimpleNamespace(metadata=metadata | {"x": 1}, flavors={"python_function": {"config": config}})
    expected = digest([["ab", "t", {"eos_token": "</s>"}, "chat"], {"max_tokens": 5}, "c0de"])
    assert loading.identity(described, "c0de") == expected
    assert config["model_name"] == "m"  # the description stays as it is
    bare = SimpleNamespace(metadata={"model.sha256": "ab"}, flavors={"python_function": {}})
    assert loading.identity(bare, "c0de") == digest([["ab", None, None, None], {}, "c0de"])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", {"tokenizer.sha256": None, "chat_template.sha256": None, "tells_date": False}),
        ("{{ x }}", {"chat_template.sha256": digest(["{{ x }}", {"eos_token": "</s>"}]), "tells_date": False}),
        ("{{ strftime_now('%d') }}", {"tells_date": True}),
    ],
)
def test_the_chat_template_of_a_text_model_is_recorded(template, expected):
    found = loading._template_of(Form("prompt", False, template=template, special_tokens={"eos_token": "</s>"}))
    assert found | expected == found and set(found) == {"tokenizer.sha256", "chat_template.sha256", "tells_date"}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel allows no reset here")
def test_the_peak_memory_is_read_in_bytes_and_falls_when_it_is_reset():
    block = b"x" * 100_000_000
    high = loading.peak_memory_bytes()
    assert high > len(block)
    del block
    loading.reset_peak_memory()
    assert loading.peak_memory_bytes() < high - 50_000_000
