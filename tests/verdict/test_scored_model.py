"""What is computed from a model's samples: counts, latencies, scores by scorer and prompt, pass@k and pass^k."""

import json
from dataclasses import asdict, replace

import pytest
from support.scored import facts, prompts, scored

from slm.verdict import scored_model, statistics
from slm.verdict.scored_model import Sample


def sample(id: str, repeat: int = 0, seconds: float = 1.0, error: bool = False, **scores: float | None) -> Sample:
    return Sample(
        id=id,
        repeat=repeat,
        model="models:/m/1",
        messages=[],
        expected=[],
        output="",
        finish_reason="error" if error else "stop",
        prompt_tokens=1,
        output_tokens=1,
        latency_seconds=seconds,
        scores=scores,
        reasons={},
        error={"type": "refused", "message": "no"} if error else None,
    )


SAMPLES = (sample("a", s=1.0), sample("b", s=None, seconds=3.0), sample("c", error=True, s=None, seconds=99.0))


def test_failed_and_unscored_rows_are_counted_and_latencies_are_of_answers():
    metrics = scored_model.metrics_of(replace(facts(), load_seconds=2.0, bytes=7), SAMPLES, {})
    counts = {
        "rows": 3,
        "rows_failed": 1,
        "rows_unscored": 1,
        "rows_cut": 0,
        "rows_cut/share": 0,
        "output_tokens/mean": 1,
        "model_load_seconds": 2,
        "model_bytes": 7,
    }
    latencies = {"latency_seconds/p50": 2.0, "latency_seconds/p95": 2.9}
    assert metrics == pytest.approx(counts | latencies)


def test_the_overall_score_comes_first():
    estimates = {name: statistics.mean_estimate([0.0, 1.0]) for name in ("a", "score", "score/pass_at_2", "z")}
    names = list(scored_model.metrics_of(facts(), SAMPLES, estimates))
    assert names[:4] == ["score/mean", "score/stderr", "score/ci95_low", "score/ci95_high"] and names[8] == "rows"
    assert {"a/mean", "z/ci95_high"} <= set(names)


def test_what_is_unknown_or_not_wanted_is_left_out():
    metrics = scored_model.metrics_of(replace(facts(), bytes=0), SAMPLES, {}, latencies=False)
    assert set(metrics) == {
        "rows", "rows_failed", "rows_unscored", "rows_cut", "rows_cut/share", "output_tokens/mean", "model_load_seconds"
    }  # fmt: skip
    silent = replace(SAMPLES[0], output_tokens=None)  # a model of others may not count tokens
    assert "output_tokens/mean" not in scored_model.metrics_of(facts(), (silent, *SAMPLES), {})
    metrics = scored_model.metrics_of(facts(), (), {"s": statistics.mean_estimate([])})
    assert not [name for name in metrics if name.startswith(("s/", "latency"))]  # NaN


def test_every_plain_metric_is_named_for_the_gate():
    metrics = scored_model.metrics_of(replace(facts(), bytes=7), SAMPLES, {})
    assert {*metrics, "output_tokens_per_second", "peak_memory_bytes"} == set(scored_model.PLAIN)


def test_a_prompt_s_score_is_the_mean_over_its_repeats_and_scorers():
    values = scored_model.values_by_scorer(
        (sample("a", 0, s=0.2, t=1.0), sample("a", 1, s=0.4, t=0.0), sample("b", 0, s=None, t=0.5))
    )
    assert values == {
        "s": {"a": pytest.approx(0.3)},
        "t": {"a": 0.5, "b": 0.5},
        "score": {"a": pytest.approx((0.6 + 0.2) / 2), "b": 0.5},
    }


def test_scores_of_0_and_1_have_pass_at_k_over_the_prompts_with_k_answers():
    answers = [sample("a", repeat, s=float(repeat == 0)) for repeat in range(3)] + [sample("b", 0, s=1.0)]
    values = scored_model.values_by_scorer(tuple(answers))
    assert {name for name in values if name.startswith("s/")} == {
        "s/pass_at_2", "s/pass_hat_2", "s/pass_at_3", "s/pass_hat_3",
    }  # fmt: skip
    assert values["s/pass_at_2"] == {"a": pytest.approx(2 / 3)}  # of the 3 pairs, 2 have the right one
    assert values["s/pass_at_3"] == {"a": 1.0} and values["s/pass_hat_2"] == {"a": 0.0}


def test_a_graded_score_and_a_single_answer_have_no_pass_at_k():
    assert set(scored_model.values_by_scorer((sample("a", 0, s=0.5), sample("a", 1, s=1.0)))) == {"s", "score"}
    assert set(scored_model.values_by_scorer((sample("a", 0, s=1.0),))) == {"s", "score"}


@pytest.mark.parametrize(
    ("repeats", "expected"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (5, [2, 4, 5]), (9, [2, 4, 8, 9])]
)
def test_k_is_each_power_of_two_and_the_number_of_repeats(repeats, expected):
    assert scored_model.ks(repeats) == expected


def test_each_sample_is_a_line_of_json_with_its_text_as_it_is():
    model = scored([{"s": 1.0}, {"s": None}], prompts(2))
    model = replace(model, samples=(replace(model.samples[0], output="Größe\n\u2028四"), model.samples[1]))
    first, second = model.sample_lines()
    assert '"output": "Größe\\n\u2028四"' in first and "\n" not in first
    assert [json.loads(line) for line in (first, second)] == [asdict(sample) for sample in model.samples]
