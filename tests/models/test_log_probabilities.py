"""`logprobs` of both wrappers in fp32, against a float64 log-softmax of one full pass of transformers."""

import numpy as np
import pytest
from support.questions import some_questions

QUESTIONS = 3
ASKED = {"logprobs": True, "top_logprobs": 5, "max_tokens": 12}
wrappers = pytest.mark.parametrize("name", ["pipeline", "onnx fp32"])


@pytest.fixture(scope="module")
def network(checkpoint):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.folder)


def exact(network, ids: list[int], first: int) -> np.ndarray:
    """The log probabilities at the places from `first` on, (places, vocabulary), in float64."""
    import torch
    from scipy.special import log_softmax

    with torch.inference_mode():
        logits = network(torch.tensor([ids])).logits[0, first - 1 : -1]
    return log_softmax(logits.numpy().astype(np.float64), axis=-1)


@wrappers
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.7, "top_k": 40, "logit_bias": {"100": -5}}])
def test_log_probabilities_are_those_of_a_full_pass_batched_and_alone(models, network, tokenizer, name, drawn):
    wrapper = models[name].unwrap_python_model()
    rows = [question | ASKED | drawn for question in some_questions(QUESTIONS)]
    batched = {index: answer for index, [answer] in wrapper.answers(rows)}
    for index, row in enumerate(rows):
        [(_, [alone])] = wrapper.answers([row])
        answer = batched[index]
        assert answer.token_ids == alone.token_ids
        for one, other in zip(answer.log_probabilities, alone.log_probabilities, strict=True):
            assert one.token == other.token and one.value == pytest.approx(other.value, abs=1e-4)
        [prepared] = wrapper.prepare(row)
        whole = exact(network, [*prepared.prompt, *answer.token_ids], len(prepared.prompt))
        assert len(answer.log_probabilities) in (len(answer.token_ids), len(answer.token_ids) - 1)
        for place, found in enumerate(answer.log_probabilities):
            assert found.token == answer.token_ids[place]
            assert found.value == pytest.approx(whole[place, found.token], abs=1e-4)
            assert [value for _, value in found.likeliest] == pytest.approx(np.sort(whole[place])[::-1][:5], abs=1e-4)


@wrappers
def test_a_completion_has_openais_form_and_a_stream_the_same_tokens(models, tokenizer, name):
    question = some_questions(1)[0] | ASKED
    [whole] = models[name].predict(question)
    [choice] = whole["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)  # greedy
    chunks = list(models[name].predict_stream(question))
    streamed = [
        entry for chunk in chunks for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    for one, other in zip(streamed, content, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


@wrappers
def test_tokens_of_a_stop_string_are_not_listed(models, name):
    question = some_questions(1)[0] | ASKED
    [whole] = models[name].predict(question)
    text = whole["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    [cut] = models[name].predict(question | {"stop": stop})
    [choice] = cut["choices"]
    kept = choice["message"]["content"]
    assert choice["finish_reason"] == "stop" and kept == text.split(stop)[0]
    listed = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
    assert listed.startswith(kept) and len(choice["logprobs"]["content"]) < len(
        whole["choices"][0]["logprobs"]["content"]
    )
    chunks = list(models[name].predict_stream(question | {"stop": stop}))
    streamed = [
        entry for chunk in chunks for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in choice["logprobs"]["content"]]


def test_without_the_field_there_are_no_log_probabilities(models):
    [plain] = models["onnx fp32"].predict(some_questions(1)[0] | {"max_tokens": 2})
    assert "logprobs" not in plain["choices"][0]
