"""The samplers on toy logits, against the LogitsProcessors of transformers and the probabilities themselves."""

import numpy as np
import pytest

from slm.models.chat_model import GREEDY, Row, Sampling, checked, next_token, sample, sampling_of
from slm.models.chat_parts.sampling import adjusted

VOCABULARY = 40
LOGITS = np.random.default_rng(3).normal(0, 3, VOCABULARY).astype(np.float32)


def sampled(**values) -> Sampling:
    return sampling_of(checked({"temperature": 1.0} | values))


def row(sampling: Sampling, prompt=(), output=()) -> Row:
    return Row((0, 0), list(prompt), sampling, 100, 0, output=list(output))


def theirs(processors, prompt=(0,)) -> np.ndarray:
    import torch

    scores = torch.tensor(LOGITS)[None]
    ids = torch.tensor([list(prompt)])
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].numpy()


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7},
        {"top_k": 12, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
    ],
)
def test_a_draw_follows_the_distribution_of_transformers_warpers(values):
    from scipy.stats import chisquare
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(float(values.get("temperature", 1.0)))]
    warpers += [TopKLogitsWarper(values["top_k"])] if "top_k" in values else []
    warpers += [TopPLogitsWarper(values["top_p"])] if "top_p" in values else []
    warpers += [MinPLogitsWarper(values["min_p"])] if "min_p" in values else []
    scores = theirs(warpers).astype(np.float64)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    sampling = sampled(**values)
    drawn = np.bincount([sample(LOGITS, sampling, seed, 0) for seed in range(10_000)], minlength=VOCABULARY)
    assert drawn[probabilities == 0].sum() == 0
    often = probabilities * 10_000 >= 5  # as the test requires
    expected = np.append(probabilities[often], probabilities[~often].sum()) * 10_000
    seen = np.append(drawn[often], drawn[~often].sum())
    if expected[-1] < 5:
        expected, seen = expected[:-1], seen[:-1]
    if len(seen) > 1:
        assert chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 0.001


def test_the_repetition_penalty_is_transformers_own():
    from transformers import RepetitionPenaltyLogitsProcessor

    for penalty in (0.7, 1.3, 5.0):
        ours = adjusted(LOGITS, row(sampled(repetition_penalty=penalty), prompt=[1, 5, 5, 9], output=[12, 1]))
        np.testing.assert_array_equal(ours, theirs([RepetitionPenaltyLogitsProcessor(penalty)], [1, 5, 5, 9, 12, 1]))


def test_logit_bias_is_transformers_sequence_bias_of_one_token():
    from transformers import SequenceBiasLogitsProcessor

    biases = {3: -100.0, 7: 12.5}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in biases.items()])
    ours = adjusted(LOGITS, row(sampled(logit_bias={str(token): value for token, value in biases.items()})))
    np.testing.assert_array_equal(ours, theirs([processor]))


def test_frequency_counts_each_time_and_presence_once_and_the_prompt_counts_for_neither():
    ours = adjusted(LOGITS, row(sampled(frequency_penalty=0.5, presence_penalty=1.0), prompt=[4, 8], output=[4, 4, 6]))
    expected = LOGITS.copy()
    expected[4] -= 2 * 0.5 + 1.0
    expected[6] -= 0.5 + 1.0
    np.testing.assert_array_equal(ours, expected)


def test_penalties_and_biases_change_greedy_answers_too():
    best, second = np.argsort(-LOGITS)[:2]
    greedy = {"temperature": 0.0}
    assert next_token(LOGITS, row(sampled(**greedy))) == best
    assert next_token(LOGITS, row(sampled(**greedy, logit_bias={str(best): -100}))) == second
    assert next_token(LOGITS, row(sampled(**greedy, frequency_penalty=2), output=[best] * 9)) != best


def test_neutral_values_give_the_bytes_of_a_request_without_them():
    neutral = {
        "top_k": 0, "min_p": 0.0, "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1,
        "logit_bias": {"5": 0},
    }  # fmt: skip
    assert sampled(**neutral) == sampled()
    assert not sampled(**neutral).changes_logits and row(GREEDY).takes_likeliest
    for seed in range(200):
        assert sample(LOGITS, sampled(**neutral, top_p=0.9), seed, 3) == sample(LOGITS, sampled(top_p=0.9), seed, 3)
    everything = {"top_k": VOCABULARY, "min_p": 1e-300}
    for seed in range(200):
        assert sample(LOGITS, sampled(**everything), seed, 3) == sample(LOGITS, sampled(), seed, 3)


def test_log_probabilities_are_those_before_temperature_and_penalties():
    from scipy.special import log_softmax

    asked = row(sampled(temperature=0.3, logit_bias={"2": 100}, logprobs=True, top_logprobs=4))
    token = next_token(LOGITS, asked)
    assert token == 2
    [found] = asked.log_probabilities
    exact = log_softmax(LOGITS.astype(np.float64))
    assert found.token == 2 and found.value == pytest.approx(exact[2], abs=1e-12)
    assert [place for place, _ in found.likeliest] == np.argsort(-exact)[:4].tolist()
    assert [value for _, value in found.likeliest] == pytest.approx(np.sort(exact)[::-1][:4], abs=1e-12)
