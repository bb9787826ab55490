"""How well number, choice and math read answers that reason, and how long they take for hostile answers."""

import hashlib
import json
import time
from pathlib import Path

import pytest

from slm.scorers import reading_answers
from slm.scorers.built_in import BUILT_IN

ROWS = {
    file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for file in sorted((Path(__file__).parent / "adversarial").glob("*.jsonl"))
}


def is_held_out(row: dict) -> bool:
    """Whether the row is in the half that the patterns were not tuned on."""
    return int(hashlib.sha256(row["output"].encode()).hexdigest(), 16) % 2 == 1


@pytest.mark.parametrize("name", ["choice", "math", "number"])
def test_at_least_97_percent_of_the_adversarial_answers_get_the_right_verdict(name, capsys):
    rows, wrong = ROWS[name], []
    assert len(rows) >= 150
    for row in rows:
        score = BUILT_IN[name](row["output"], tuple(row["expected"]), **row["options"])
        if score.value != float(row["right"]):
            wrong.append(f"{row['output'][-80:]!r}, expected {row['expected']}: {score.reason}")
    rate = 1 - len(wrong) / len(rows)
    with capsys.disabled():
        print(f"\n{name}: {rate:.1%} of {len(rows)} verdicts are right")
    assert rate >= 0.97, "\n".join(wrong)


HOSTILE = ["1", "1,", "1 ", "1-", "1/", "**", "\\boxed{", "answer ", "answer is ", "A ", "A and ", "(a", "= 1", "so A "]
HOSTILE += [
    "\\frac{1}",
    "10^",
    "<<1",
    "one ",
    "\u00bd",
    "\nQuestion:",
    ". ",
    "is the answer ",
    "not A ",
    "A-",
    "1 2 ",
    "$",
]


@pytest.mark.fault("answers: a text that repeats one mark for 100,000 characters")
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_answer_is_read_within_the_bound_of_time(text):
    answer = "The answer is " + text * (100_000 // len(text))
    start = time.process_time()
    BUILT_IN["number"](answer, ("5",))
    BUILT_IN["choice"](answer, ("A",), choices="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    list(reading_answers.declared(reading_answers.without_markdown(answer)))
    assert time.process_time() - start < 5  # seconds, for three readings; one reading may take 5 s
