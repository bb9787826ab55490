"""Every prompt of the project has a right answer that its scorers accept, and wrong ones that they refuse.

The right answers come from two places, and neither reads a row's `expected`. `support/recomputed_prompts.py` computes
what can be computed. `second_reading.json` has an answer, written from the prompt alone, to every other row.
"""

import itertools
import json
import re
from collections import Counter

import pytest
from support import recomputed_prompts
from support.commands import REPOSITORY

from slm.prompts.prompt_rows import Prompt
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.built_in import BUILT_IN
from slm.scorers.confined import CHECKS

SETS = {
    path.name: read_prompt_set(path, path.name, CHECKS).prompts
    for path in sorted((REPOSITORY / "prompts").glob("*.jsonl"))
}
ROWS = [row for rows in SETS.values() for row in rows]
GENERAL = SETS["general.jsonl"]
OLDER = 150  # rows of general.jsonl that came before these tests. A few accept their own prompt as an answer
SECOND_READING = json.loads((REPOSITORY / "tests/prompts/second_reading.json").read_text(encoding="utf-8"))
IN_A_SENTENCE = {"contains", "number", "choice"}  # the scorers that find an answer within a sentence


def contents(row: Prompt) -> list[str]:
    return [message["content"] for message in row.messages] if row.messages else [row.prompt]


def values(row: Prompt, answer: str) -> list[float | None]:
    return [BUILT_IN[call.name](answer, row.expected, **call.options).value for call in row.scorers]


def right(row: Prompt, answer: str) -> bool:
    return all(value == 1 for value in values(row, answer))


def test_the_rows_have_unique_ids():
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_an_answer_that_was_found_without_the_expected_one_is_right():
    answers = {row.id: [*recomputed_prompts.found(contents(row)), SECOND_READING.get(row.id)][0] for row in ROWS}
    assert [(row.id, answers[row.id]) for row in ROWS if not right(row, answers[row.id])] == []


def test_each_row_has_one_rule_or_one_second_reading():
    computed = {row.id: recomputed_prompts.found(contents(row)) for row in ROWS}
    assert {name: answers for name, answers in computed.items() if len(answers) > 1} == {}
    assert {name for name, answers in computed.items() if not answers} == set(SECOND_READING)
    assert {row.id for row in ROWS if "arithmetic" in row.tags} & set(SECOND_READING) == set()


def test_each_rule_computes_the_answer_of_a_row():
    texts = ["\n".join(contents(row)) for row in ROWS]
    assert [rule for rule, _ in recomputed_prompts.RULES if not any(re.search(rule, text) for text in texts)] == []


def test_each_expected_text_is_right():
    pairs = [(row, text) for row in ROWS for text in row.expected if not is_pattern(row)]
    assert [(row.id, text) for row, text in pairs if not right(row, text)] == []


def is_pattern(row: Prompt) -> bool:
    """Whether the expected texts are the patterns of the scorer regex."""
    return any(call.name == "regex" and "pattern" not in call.options for call in row.scorers)


def test_a_sentence_with_the_answer_is_right_where_the_scorers_take_sentences():
    rows = [row for row in ROWS if row.expected and {call.name for call in row.scorers} <= IN_A_SENTENCE]
    assert len(rows) > 300
    assert [row.id for row in rows if not right(row, f"The answer is {row.expected[0]}.")] == []


@pytest.mark.parametrize("answer", ["", "I do not know that, sorry.", "Sorry, I can't help.", "Zyxwvut 99999"])
def test_an_answer_that_fits_no_prompt_is_wrong_everywhere(answer):
    assert [row.id for row in ROWS if any(values(row, answer))] == []


def test_every_other_letter_of_a_choice_is_wrong():
    rows = [row for row in ROWS if row.scorers[0].name == "choice"]
    for row in rows:
        letters = {*row.scorers[0].options["choices"]}
        assert [letter for letter in sorted(letters) if right(row, letter)] == [*row.expected], row.id


def test_the_answers_to_other_prompts_are_wrong():
    """Each row refuses answers of its own kind: the expected texts of the rows with the same scorers."""
    for row in ROWS:
        same = {text for other in ROWS if other.scorers == row.scorers for text in other.expected}
        others = sorted(same - {*row.expected})[:40]
        if others and not is_pattern(row):
            assert not all(right(row, text) for text in others), row.id


def test_the_repeated_prompt_is_no_right_answer():
    """Otherwise a model that only repeats "Is it hot or cold?" would be right. Choices begin with A: left out."""
    rows = [row for row in GENERAL[OLDER:] if row.scorers[0].name != "choice"]
    assert [row.id for row in rows if right(row, contents(row)[-1]) or right(row, "\n".join(contents(row)))] == []


def test_the_choices_are_spread_over_the_letters():
    counts = Counter(row.expected[0] for row in GENERAL if row.scorers[0].name == "choice")
    assert max(counts.values()) <= 2 * min(counts.values()), counts


def test_no_two_prompts_are_nearly_the_same():
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+|[^\w\s]", text.casefold())
        return {tuple(words[at : at + 3]) for at in range(max(len(words) - 2, 1))}

    rows = [(row.id, shingles(contents(row)[-1])) for row in GENERAL]
    pairs = itertools.combinations(rows, 2)
    assert [(one, other) for (one, a), (other, b) in pairs if len(a & b) >= 0.8 * len(a | b)] == []


def test_the_general_set_has_many_prompts_of_many_clusters():
    assert len(GENERAL) >= 600
    assert len({row.cluster for row in GENERAL}) >= len(GENERAL) / 2
    assert (REPOSITORY / "prompts" / "general.jsonl").stat().st_size < 2**20
    kinds = Counter(tag for row in GENERAL for tag in row.tags)
    assert kinds["easy"] + kinds["hard"] == len(GENERAL)
    assert min(kinds.values()) >= 0.05 * len(GENERAL), kinds
