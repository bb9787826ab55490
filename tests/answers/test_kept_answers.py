"""Answers that a later run takes over, and those that it does not."""

from dataclasses import dataclass

import pytest
from support.scored import GENERATION, facts, prompts

from slm.answers import asking, kept_answers
from slm.answers.asking import ModelFacts
from slm.engines import answering
from slm.verdict.scored_model import ScoredModel


@dataclass(frozen=True)
class Counting:
    """A model that says yes, and notes what it is asked."""

    facts: ModelFacts
    asked: list[str]

    def sent(self, row):
        return row["row"]["prompt"], None

    def check_unchanged(self):
        pass

    def replies(self, rows, batch_size):
        for place, row in enumerate(rows):
            self.asked.append(row["row"]["prompt"])
            answer = {"text": "yes", "finish_reason": "stop", "prompt_tokens": 1, "output_tokens": 1}
            yield place, answer | {"seconds": 0.1, "error": ""}


def score(asked: list[str], prompt_set, repeats: int = 1, **changes) -> ScoredModel:
    model = Counting(facts(**changes), asked)
    questions = asking.questions(model, prompt_set.prompts, GENERATION, repeats)
    return answering.score(model, prompt_set, questions, GENERATION)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))


def test_answers_of_an_endpoint_are_not_taken_by_a_later_run(cache):
    asked: list[str] = []
    for _ in range(2):
        found = score(asked, prompts(3))
        assert found.reused == 0
    assert len(asked) == 6


def test_answers_of_a_model_whose_files_are_known_are_taken_by_a_later_run(cache):
    asked: list[str] = []
    for reused in (0, 3):
        found = score(asked, prompts(3), sha256="a" * 64)
        assert found.reused == reused
    assert len(asked) == 3


def test_each_repeat_of_a_prompt_is_an_answer_of_its_own(cache):
    asked: list[str] = []
    found = score(asked, prompts(2), 3, sha256="b" * 64)
    assert len(asked) == 6 and [sample.repeat for sample in found.samples] == [0, 1, 2] * 2
    again = score(asked, prompts(2), 4, sha256="b" * 64)
    assert again.reused == 6 and len(asked) == 8


MEASURED = ("output_tokens_per_second", "latency_seconds/p50", "latency_seconds/p95", "peak_memory_bytes")


def figures(found: ScoredModel) -> dict[str, float]:
    return {name: found.metrics[name] for name in MEASURED if name in found.metrics}


def test_the_speed_of_a_run_whose_answers_are_all_reused_is_the_one_that_was_measured(cache):
    first = score([], prompts(3), sha256="c" * 64)
    assert set(figures(first)) == set(MEASURED)
    again = score([], prompts(3), sha256="c" * 64)
    assert again.reused == 3 and figures(again) == pytest.approx(figures(first), rel=0.05) and again.unmeasured == ""


@pytest.mark.parametrize(
    ("first", "second", "unmeasured"),
    [
        (3, 6, "3 of 6 answers are reused"),  # the other three may have had a batch to themselves
        (6, 3, "no one run gave exactly these answers"),  # three of six: the others had a share of the time
    ],
)
def test_the_speed_of_answers_of_which_some_are_reused_is_told_as_unknown(cache, first, second, unmeasured):
    score([], prompts(first), sha256="d" * 64)
    found = score([], prompts(second), sha256="d" * 64)
    assert (found.reused, found.unmeasured, figures(found)) == (3, unmeasured, {})
    assert found.metrics["rows"] == second and "model_load_seconds" in found.metrics


def test_figures_are_of_one_run_that_ended(cache):
    """The first run breaks off after its answer. The second one takes over this answer, and ends."""
    with kept_answers.opened("model", "all") as kept:
        kept.add("first", {"text": "a"}, 0.1)
    with kept_answers.opened("model", "all") as kept:
        assert kept.measured(["first"]) is None
        kept.add("second", {"text": "b"}, 0.2)
        kept.finish(100)
    with kept_answers.opened("model", "all") as kept:
        assert kept.measured(["first"]) is None
        assert kept.measured(["first", "second"]) is None
        assert kept.measured(["second"]) == kept_answers.Measured(0.2, 100)


def test_an_interrupted_run_is_what_came_after_the_last_end(cache):
    """Of three runs, two ended; only the answers of the third, which broke off, may be used again."""
    for key, ends in (("first", True), ("second", True), ("third", False)):
        with kept_answers.opened("model", "all") as kept:
            kept.add(key, {"text": key}, 0.1)
            if ends:
                kept.finish(100)
    with kept_answers.opened("model", "interrupted") as kept:
        assert set(kept.kept) == {"third"}
