"""`token_scores` of the wrapper on all three runtimes, held against transformers' single forward pass."""

import numpy as np
import pytest
from support.commands import REPOSITORY

from slm.models.chat_model import OnnxRuntime, SmallLanguageModel
from slm.prompts.prompt_rows import conversation
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

CLOSE = {"pipeline": 1e-4, "onnx fp32": 1e-3, "genai fp32": 1e-3}


@pytest.fixture(scope="module")
def rows(models):
    """(context ids, continuation ids): rendered prompts with an answer; two of them begin alike; one goes on past an
    end token; one has many more tokens than the others."""
    wrapper = models["pipeline"].unwrap_python_model()
    prompts = read_prompt_set(REPOSITORY / "prompts" / "smoke.jsonl", "", CHECKS).prompts[:6]
    contexts = [wrapper.prepare({"messages": conversation(prompt)})[0].prompt for prompt in prompts]
    answers = [wrapper._ids(text) for text in ("The capital is Paris.", " 42", "Yes, I can do that for you.")]
    end = [2]
    found = [(context, answers[place % 3] + end) for place, context in enumerate(contexts)]
    found.append((contexts[3], answers[2] * 4))
    return [*found, (contexts[0], answers[2]), (contexts[1], answers[0] + end + answers[1] + end), (contexts[2], [])]


@pytest.fixture(scope="module")
def expected(checkpoint, rows):
    """transformers' log probabilities of every continuation token, and of the whole vocabulary there."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="float32").eval()
    found = []
    for context, continuation in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        found.append(torch.log_softmax(logits, -1).numpy())
    return found


@pytest.fixture(scope="module")
def genai(models, fp32_export):
    """The fp32 export on onnxruntime-genai, which gives the logits of the last place only."""
    known = models["onnx fp32"].unwrap_python_model()
    wrapper = SmallLanguageModel()
    wrapper.__dict__ |= known.__dict__ | {"_runtime": OnnxRuntime(fp32_export.folder, {})}
    return wrapper


@pytest.fixture(params=CLOSE)
def named(request, models, genai):
    is_genai = request.param.startswith("genai")
    return request.param, genai if is_genai else models[request.param].unwrap_python_model()


def test_every_tokens_log_probability_is_that_of_a_single_forward_pass(named, rows, expected):
    name, wrapper = named
    found = dict(wrapper.token_scores(rows))
    assert sorted(found) == list(range(len(rows)))
    for place, (_, continuation) in enumerate(rows):
        theirs = expected[place][np.arange(len(continuation)), continuation]
        assert found[place].log_probabilities.dtype == np.float32
        np.testing.assert_allclose(found[place].log_probabilities, theirs, atol=CLOSE[name])
        assert (found[place].likeliest == (expected[place].argmax(-1) == continuation)).all()


def test_the_callback_sees_every_distribution_once(named, rows, expected):
    name, wrapper = named
    seen: dict[int, dict] = {place: {} for place in range(len(rows))}

    def see(row, first, distributions):
        assert first not in seen[row]
        seen[row][first] = distributions

    list(wrapper.token_scores(rows, see))
    for place, parts in seen.items():
        whole = np.concatenate([parts[first] for first in sorted(parts)] or [np.zeros((0, 49152))])
        np.testing.assert_allclose(whole, expected[place], atol=10 * CLOSE[name])


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32", "onnx int8", "onnx int4"])
def test_the_same_rows_give_the_very_same_numbers_again(models, rows, name):
    wrapper = models[name].unwrap_python_model()
    first, second = (dict(wrapper.token_scores(rows)) for _ in range(2))
    for place in first:
        assert (first[place].log_probabilities == second[place].log_probabilities).all()


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32"])
def test_small_pieces_give_the_numbers_of_large_ones(models, rows, name, monkeypatch):
    """A long row goes through in pieces, so that its logits never need more than LOGITS_BYTES."""
    import sys

    wrapper = models[name].unwrap_python_model()
    whole = dict(wrapper.token_scores(rows))
    module = sys.modules[type(wrapper._runtime).__module__]
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * wrapper._runtime.vocabulary_size * 3)
    monkeypatch.setattr(module, "READ_TOKENS", 40, raising=False)  # of transformers alone
    sizes = []
    pieces = dict(wrapper.token_scores(rows, lambda row, first, seen: sizes.append(len(seen))))
    assert max(sizes) <= 4  # and a single token never goes in alone
    for place in whole:
        np.testing.assert_allclose(pieces[place].log_probabilities, whole[place].log_probabilities, atol=1e-4)


def test_a_graph_that_gives_the_last_place_only_gives_the_same_numbers(models, rows, monkeypatch):
    wrapper = models["onnx fp32"].unwrap_python_model()
    read = dict(wrapper.token_scores(rows))
    monkeypatch.setattr(wrapper._runtime, "reads", False)
    forced = dict(wrapper.token_scores(rows))
    for place in read:
        np.testing.assert_allclose(forced[place].log_probabilities, read[place].log_probabilities, atol=1e-3)


def test_answers_before_and_after_are_the_same(models, rows):
    """The places in which prompts are kept hold nothing of a reading that an answer could take for its own."""
    for name in ("pipeline", "onnx int4"):
        wrapper = models[name].unwrap_python_model()
        asked = [{"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 12}]
        before = [answer.text for _, [answer] in wrapper.answers(asked)]
        list(wrapper.token_scores(rows))
        assert [answer.text for _, [answer] in wrapper.answers(asked)] == before


def test_an_answer_has_the_ids_of_its_tokens_with_the_end_token(models):
    wrapper = models["onnx int4"].unwrap_python_model()
    [(_, [answer])] = wrapper.answers([{"messages": [{"role": "user", "content": "What is the capital of France?"}]}])
    assert answer.finish_reason == "stop" and answer.token_ids[-1] in wrapper._runtime.end_tokens
    assert wrapper.text_of(answer.token_ids[:-1]) == answer.text
    assert len(answer.token_ids) == answer.output_tokens


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (([], [5]), "row 0: the context is empty"),
        (([5], [49152]), "row 0: token 49152 is not in the vocabulary, which has 49152 tokens"),
        (([5], [-1]), "row 0: token -1 is not in the vocabulary"),
        (([5] * 9000, [5]), "row 0: has 9001 tokens; the context length is 8192"),
    ],
)
def test_a_wrong_row_is_refused_before_any_row_is_read(models, row, told):
    with pytest.raises(ValueError, match=told):  # the Refused of the wrapper's own file
        list(models["onnx int4"].unwrap_python_model().token_scores([row, ([5], [5])]))
