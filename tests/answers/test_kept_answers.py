"""Answers that a later run takes over, and those that it does not."""

import pytest
from support.scored import GENERATION, model, prompts

from slm.answers import kept_answers
from slm.engines import answering


def counting(asked: list):
    def ask(model, rows, batch_size):
        for place, row in enumerate(rows):
            asked.append(row["row"]["prompt"])
            answer = {"text": "yes", "finish_reason": "stop", "prompt_tokens": 1, "output_tokens": 1}
            yield place, answer | {"seconds": 0.1, "error": ""}

    return ask


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))


def test_answers_of_an_endpoint_are_not_taken_by_a_later_run(cache):
    asked: list[str] = []
    for _ in range(2):
        found = answering.score(model(counting(asked)), prompts(3), GENERATION)
        assert found.reused == 0
    assert len(asked) == 6


def test_answers_of_a_model_whose_files_are_known_are_taken_by_a_later_run(cache):
    asked: list[str] = []
    for reused in (0, 3):
        found = answering.score(model(counting(asked), sha256="a" * 64), prompts(3), GENERATION)
        assert found.reused == reused
    assert len(asked) == 3


def test_each_repeat_of_a_prompt_is_an_answer_of_its_own(cache):
    asked: list[str] = []
    found = answering.score(model(counting(asked), sha256="b" * 64), prompts(2), GENERATION, repeats=3)
    assert len(asked) == 6 and [sample.repeat for sample in found.samples] == [0, 1, 2] * 2
    again = answering.score(model(counting(asked), sha256="b" * 64), prompts(2), GENERATION, repeats=4)
    assert again.reused == 6 and len(asked) == 8


def test_an_interrupted_run_is_what_came_after_the_last_end(cache):
    """Of three runs, two ended; only the answers of the third, which broke off, may be used again."""
    for key, ends in (("first", True), ("second", True), ("third", False)):
        with kept_answers.opened("model", "all") as kept:
            kept.add(key, {"text": key}, 0.1)
            if ends:
                kept.finish(100)
    with kept_answers.opened("model", "interrupted") as kept:
        assert set(kept.kept) == {"third"}
