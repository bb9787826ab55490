"""A model beside the baseline, token by token: 0 for equal models, recomputed by other code, bounded on the disk."""

import os
import shutil
import types
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special
from support.commands import REPOSITORY
from support.damage import not_a_number
from support.scored import prompts

from benchmarks import llama_perplexity
from slm.answers import asking, loading
from slm.engines import distributions
from slm.engines.distributions import Reference, Text
from slm.models import checkpoints
from slm.models.chat_model import SmallLanguageModel
from slm.verdict import fidelity

NAMES = ("pipeline", "onnx fp32", "onnx int8", "onnx int4")
TEXTS = {
    "capital": ("What is the capital of France?", "The capital of France is Paris."),
    "sum": ("What is 2 plus 2?", "2 plus 2 is 4."),
    "poem": ("Write a line about rain.", "Soft rain writes its letters on the roof, and nobody answers."),
}


def opened(wrapper, label: str = "m") -> loading.OwnModel:
    facts = types.SimpleNamespace(label=label, is_chat=True)
    return loading.OwnModel(facts, wrapper, 0.0, lambda: None)


@pytest.fixture(scope="module")
def own(models):
    return {name: opened(models[name].unwrap_python_model(), name) for name in NAMES}


@pytest.fixture(scope="module")
def texts(own):
    wrapper = own["pipeline"].wrapper
    return [
        Text(
            name,
            wrapper.prepare({"messages": [{"role": "user", "content": asked}]})[0].prompt,
            [*wrapper._ids(said), 2],
        )
        for name, (asked, said) in TEXTS.items()
    ]


def compared(baseline, model, texts, is_sample=False):
    reference = Reference(is_sample)
    reference.hold(baseline, texts)
    found = reference.compared(model)
    reference.close()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_model_beside_itself_has_a_divergence_of_exactly_0(own, texts, name):
    found = compared(own[name], own[name], texts)
    assert [prompt.id for prompt in found.prompts] == list(TEXTS)
    for prompt, text in zip(found.prompts, texts, strict=True):
        assert prompt.kl.tolist() == [0.0] * len(text.continuation)
        assert prompt.top1.all() and prompt.nll_difference.tolist() == [0.0] * len(text.continuation)


def test_the_figures_are_those_of_scipy_from_the_whole_distributions(own, texts):
    found = compared(own["pipeline"], own["onnx int4"], texts)
    rows = [(text.context, text.continuation) for text in texts]
    saved: dict[str, dict[int, np.ndarray]] = {"pipeline": {}, "onnx int4": {}}
    for name, rows_of in saved.items():
        list(own[name].token_scores(rows, lambda row, first, seen, rows_of=rows_of: rows_of.update({row: seen.copy()})))
    for place, (prompt, text) in enumerate(zip(found.prompts, texts, strict=True)):
        p, q = (special.softmax(saved[name][place].astype(float), axis=-1) for name in saved)
        np.testing.assert_allclose(prompt.kl, special.rel_entr(p, q).sum(axis=-1), rtol=1e-3, atol=1e-6)
        assert (prompt.top1 == (p.argmax(-1) == q.argmax(-1))).all()
        given = np.arange(len(text.continuation)), text.continuation
        np.testing.assert_allclose(prompt.nll_difference, np.log(p[given]) - np.log(q[given]), atol=1e-4)


# llama-perplexity --kl-divergence (llama-cpp-python 0.3.36, two cores) on the first 2 * 512 tokens of LICENSE: the
# embedded GGUF in F32, and the same with its Q4_1 tensors rounded to Q4_0, also in F32. llama.cpp keeps the baseline's
# log probabilities in 16 bits. With Q4_0 itself, whose products round once more, it prints 0.2984, 0.7157 and 0.1741.
# `python -m benchmarks.llama_perplexity`, given the first 6,200 characters, makes the files and both sides' figures.
LLAMA_CPP = {"kl": 0.2960, "top1": 0.7196, "nll_difference": 0.1709}


def test_the_figures_are_those_of_llama_perplexity(own, tmp_path):
    chosen = checkpoints.find("smollm2-135m-instruct").fetch().folder
    shutil.copytree(chosen, tmp_path / "q4_0")
    llama_perplexity.round_to_q4_0(tmp_path / "q4_0" / "model.safetensors")
    rounded = SmallLanguageModel()
    rounded.load_context(SimpleNamespace(artifacts={"checkpoint": str(tmp_path / "q4_0")}, model_config={}))
    texts = llama_perplexity.windows(own["pipeline"].wrapper, REPOSITORY / "LICENSE")[:2]
    found = compared(own["pipeline"], opened(rounded), texts)
    assert found.tokens == 2 * 255
    means = {name: np.concatenate([getattr(text, name) for text in found.prompts]).mean() for name in LLAMA_CPP}
    assert means == pytest.approx(LLAMA_CPP, rel=0.02)


def test_int8_is_nearer_to_the_baseline_than_int4(own, texts):
    near, far = (compared(own["pipeline"], own[name], texts) for name in ("onnx int8", "onnx int4"))
    means = [np.concatenate([prompt.kl for prompt in found.prompts]).mean() for found in (near, far)]
    assert 1e-5 < means[0] < means[1] / 2
    same = compared(own["pipeline"], own["onnx fp32"], texts)
    assert max(prompt.kl.max() for prompt in same.prompts) < 1e-5


def test_the_worst_answers_are_shown_with_their_tokens_and_what_both_models_find_likeliest(own, texts):
    found = compared(own["pipeline"], own["onnx int4"], texts)
    means = {prompt.id: prompt.kl.mean() for prompt in found.prompts}
    assert list(found.worst) == sorted(means, key=lambda id: -means[id])
    tokens = found.worst["sum"]
    assert "".join(token.text for token in tokens) == "2 plus 2 is 4.<|im_end|>"
    [by_id] = [prompt for prompt in found.prompts if prompt.id == "sum"]
    assert [token.kl for token in tokens] == by_id.kl.tolist()
    for token in tokens:
        for likely in (token.baseline, token.model):
            shares = [share for _, share in likely]
            assert len(likely) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001


def test_the_space_on_the_disk_is_bounded_and_a_fixed_sample_is_compared(own, texts, monkeypatch):
    tokens = {text.id: len(text.continuation) for text in texts}
    whole = sum(tokens.values())
    monkeypatch.setattr(distributions, "SCRATCH_BYTES", 4 * 49152 * (whole - 1))
    found = [compared(own["pipeline"], own["onnx int4"], some) for some in (texts, texts[::-1])]
    kept = [{prompt.id for prompt in one.prompts} for one in found]
    assert kept[0] == kept[1] and found[0].left_out == 3 - len(kept[0]) > 0
    assert sum(tokens[id] for id in kept[0]) < whole
    assert found[0].why_left_out == "the scratch space is bounded"


@pytest.mark.parametrize(("tokens", "answers", "compared_answers"), [(1, 1, 1), (1, 2, 2), (15, 1, 2), (10**6, 1, 3)])
def test_a_fixed_sample_of_whole_answers_is_compared(own, texts, monkeypatch, tokens, answers, compared_answers):
    monkeypatch.setattr(distributions, "SAMPLE_TOKENS", tokens)
    monkeypatch.setattr(distributions, "SAMPLE_ANSWERS", answers)
    whole = {prompt.id: prompt.kl for prompt in compared(own["pipeline"], own["onnx int4"], texts).prompts}
    found = [compared(own["pipeline"], own["onnx int4"], some, True) for some in (texts, texts[::-1])]
    ids = [[prompt.id for prompt in one.prompts] for one in found]
    assert ids[0] == ids[1][::-1] == [text.id for text in texts if text.id in ids[0]]
    assert (len(ids[0]), found[0].left_out) == (compared_answers, 3 - compared_answers)
    for prompt in found[0].prompts:
        np.testing.assert_allclose(prompt.kl, whole[prompt.id], rtol=1e-2, atol=1e-5)
    if compared_answers < 3:
        assert found[0].why_left_out == "fidelity=all compares all"


def test_nothing_is_left_on_the_disk(own, texts, monkeypatch, tmp_path):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    reference = Reference()
    reference.hold(own["onnx int4"], texts)
    assert [file for _, _, files in os.walk(tmp_path) for file in files] == []
    reference.close()


def test_what_cannot_be_compared_says_why(own, texts):
    others = loading.OthersModel(types.SimpleNamespace(label="theirs"), None, 0.0)
    endpoint = loading.EndpointModel(types.SimpleNamespace(label="far"), None, 0.0)
    old = opened(types.SimpleNamespace(), "old")
    pipeline = own["pipeline"]
    assert compared(pipeline, others, texts).reason == "it was not logged by this project"
    assert compared(pipeline, endpoint, texts).reason == "it is an endpoint"
    assert compared(pipeline, old, texts).reason == "it was logged by a version without token scores; log it again"
    assert compared(endpoint, pipeline, texts).reason == "the baseline, far, is an endpoint"
    assert compared(pipeline, pipeline, []).reason == "the baseline, pipeline, gave no answer"

    class Foreign(loading.OwnModel):
        def vocabulary(self):
            return "other"

    foreign = Foreign(pipeline.facts, pipeline.wrapper, 0.0, lambda: None)
    assert compared(pipeline, foreign, texts).reason == "it has another vocabulary than the baseline"


def test_a_model_without_finite_probabilities_is_not_compared_and_the_report_says_why(own, texts):
    """As an fp16 that overflows: a NaN in the last norm makes every logit NaN."""
    tokens = sum(len(text.continuation) for text in texts)
    why = f"gives no probability (NaN), or the probability 0, for {tokens} of {tokens} tokens"
    with not_a_number(own["pipeline"]):
        found = compared(own["onnx fp32"], own["pipeline"], texts)
        assert found == fidelity.Fidelity(reason=f"it {why}")
        assert compared(own["pipeline"], own["onnx fp32"], texts).reason == f"the baseline, pipeline, {why}"
    assert fidelity.estimates(found, {}) == {} == fidelity.plain_figures(found)
    assert compared(own["onnx fp32"], own["pipeline"], texts).reason == ""


def test_a_probability_of_0_that_the_baseline_does_not_have_is_not_compared(own, texts):
    class Never(loading.OwnModel):
        """Gives token 5 the probability 0, as a model that masks it."""

        def token_scores(self, rows, see):
            def masked(row, first, log_probabilities):
                log_probabilities[:, 5] = -np.inf
                see(row, first, log_probabilities)

            return super().token_scores(rows, masked)

    model = own["pipeline"]
    found = compared(model, Never(model.facts, model.wrapper, 0.0, lambda: None), texts)
    assert found.reason.startswith("it gives no probability (NaN), or the probability 0, for ")


def test_vocabularies_that_differ_by_padding_are_cut_to_the_shorter_one():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(4, 60)).astype(np.float32)
    p, q = special.log_softmax(logits, axis=-1), special.log_softmax(logits[:, :50], axis=-1)
    kl, top1, nll = fidelity.compare(p, q, [1, 2, 3, 4])
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    assert top1.all()
    np.testing.assert_allclose(nll, 0, atol=1e-5)


def test_a_probability_of_0_gives_no_nan():
    p = np.log(np.array([[1.0, 1e-45]], dtype=np.float32))
    q = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    p[0, 1] = -np.inf
    kl, _, _ = fidelity.compare(p, q, [0])
    np.testing.assert_allclose(kl, np.log(2), rtol=1e-6)


def test_drawn_answers_are_compared_over_the_greedy_ones(own):
    prompt_set = prompts(2)
    generation = {"max_tokens": 6, "temperature": 1.5, "top_p": 1.0, "seed": 1, "stop": [], "batch_size": 0}

    class Asked(loading.OwnModel):
        """Gives the tokens that a greedy request has, whatever was asked before."""

    facts = asking.ModelFacts("m", "m", "m", _form(), 0.0, "", code_sha256="x")
    model = Asked(facts, own["onnx int4"].wrapper, 0.0, lambda: None)
    greedy = distributions.greedy(model, prompt_set.prompts, generation)
    again = distributions.greedy(model, prompt_set.prompts, generation | {"seed": 9})
    assert greedy == again and all(greedy[prompt.id] for prompt in prompt_set.prompts)


def _form():
    from slm.answers import forms

    return forms.Form("messages", True, {name: forms.Field(name) for name in forms.NAMES})
