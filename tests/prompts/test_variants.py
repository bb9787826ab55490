"""The hint on rows that look like variants of one question and declare no cluster."""

import string
import time
from dataclasses import replace

import pytest
from support.commands import REPOSITORY

from slm.prompts.prompt_rows import Prompt
from slm.prompts.prompt_sets import read_prompt_set
from slm.prompts.variants import hint
from slm.scorers.confined import CHECKS

UNRELATED = """
What is the capital of Japan?|Who painted the Mona Lisa?|How many legs does a spider have?|Why is the sky blue?
Translate 'good morning' into Spanish.|What is 17 times 3?|Name the largest ocean on Earth.|Who wrote Don Quixote?
What gas do plants take in?|In which year did the First World War begin?|What is the chemical symbol for gold?
How do I boil an egg?|Which planet is closest to the sun?|What does HTTP stand for?
Define photosynthesis in one sentence.|What is the square root of 144?|Give an antonym of 'generous'.
Who discovered penicillin?|What is the speed of light?|How many minutes are in a day?
Which language has the most native speakers?|What is the boiling point of water?
Spell the word 'necessary' backwards.|Who was the first person on the Moon?
What is the freezing point of water in Fahrenheit?|List three primary colours.|What is a haiku?
How far is the Moon from the Earth?|Which organ pumps blood?|What is inflation?|Summarise the story of Cinderella.
What is the currency of Brazil?|How is glass made?|Who composed the Four Seasons?|Is a tomato a fruit?
What is the tallest mountain in Africa?|When do leaves fall?|What is a prime number?|What is gravity?
Convert 5 kilometres to miles.|Which metal is liquid at room temperature?|Who invented the telephone?|What is DNA?
How many strings does a violin have?|Which country hosted the 2016 Summer Olympics?
What is the past tense of 'swim'?|How long does light from the sun take to reach us?
Write a polite refusal of an invitation.|What is a black hole?|Which sea lies between Italy and Croatia?
What is the main ingredient of hummus?|How do vaccines work?|What is an isotope?|Name a mammal that lays eggs.
What is the plural of 'mouse'?|Who was Cleopatra?|Which vitamin does sunlight give us?
What is the opposite of north?|How many players are in a football team?|What is sourdough?
Which blood type is universal?
""".replace("\n", "|")
QUESTIONS = [text for text in UNRELATED.split("|") if text][:60]


def prompt(id: str, text: str, cluster: str | None = None) -> Prompt:
    return Prompt(id, None, text, (), (), cluster, ())


def with_ids(ids: list[str]) -> list[Prompt]:
    return [prompt(id, text) for id, text in zip(ids, QUESTIONS, strict=False)]


@pytest.mark.parametrize("name", ["smoke", "general"])
def test_the_prompt_sets_of_the_project_declare_their_clusters_and_get_no_hint(name):
    prompts = read_prompt_set(REPOSITORY / "prompts" / f"{name}.jsonl", "", CHECKS).prompts
    assert hint(prompts) == ""


@pytest.mark.parametrize(
    "ids",
    [
        [f"q{number}" for number in range(1, 61)],
        [f"row-{number}" for number in range(60)],
        [f"row-{number:012x}" for number in range(60)],
        [f"{number:04}" for number in range(60)],
        [f"math-{number}" for number in range(30)] + [f"history-{number}" for number in range(30)],
        [f"MCAS_{year}_{number}" for year in (2001, 2003, 2007) for number in (3, 7, 11, 26, 31)] * 4,
        [f"5733be284776f4190066{number * 7919:x}" for number in range(60)],
        [word for word in string.ascii_letters],
        ["2024-01-05", "2024-01-06", "apollo-11", "apollo-13", "h2o", "co2"],
    ],
    ids=lambda ids: ids[0],
)
def test_sixty_unrelated_questions_get_no_hint_with_any_numbering(ids):
    assert len(QUESTIONS) == 60
    assert hint(with_ids(ids)) == ""


@pytest.mark.parametrize("before", ["Answer with one word. ", "You are a helpful tutor who knows all subjects.\n"])
def test_an_instruction_before_every_question_is_no_sign(before):
    assert hint([prompt(f"q{number}", before + text) for number, text in enumerate(QUESTIONS)]) == ""
    system = ({"role": "system", "content": "Answer every question of the user in one short sentence."},)
    rows = [
        Prompt(f"q{number}", (*system, {"role": "user", "content": text}), None, (), (), None, ())
        for number, text in enumerate(QUESTIONS)
    ]
    assert hint(rows) == ""


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        (["refund-1", "refund-2", "hello"], "2 rows look like variants of 1 question ('refund-1', 'refund-2'); give"),
        (["refund-a", "refund-b", "login-a", "login-b"], "4 rows look like variants of 2 questions ('refund-a', 'ref"),
        (["Refund_01", "x", "refund_02", "refund_03"], "3 rows look like variants of 1 question ('Refund_01', 'refu"),
        (["q1a", "q1b", "q2a", "q2b", "q2c"], "5 rows look like variants of 2 questions ('q1a', 'q1b')"),
        ([f"topic{'abcdefghij'[n // 6]}.{n % 6 + 1}" for n in range(60)], "60 rows look like variants of 10 questions"),
    ],
)
def test_ids_with_one_stem_get_the_hint(ids, start):
    found = hint(with_ids(ids))
    assert found.startswith(start)
    assert found.endswith("; give variants of one question the same `cluster`")


@pytest.mark.parametrize(
    "texts",
    [
        ["What is 12 + 7?", "What is 45 + 3?", "What is 6 + 61?"],
        ["How do I return a pair of shoes?", "How do I return a pair of gloves?", "How do I return a pair of socks?"],
        [
            "How many apples does Ada have if she buys 3 more?",
            "How many pears does Ben have if he buys 12 more?",
            "How many pears does Ada have if she buys 4 more?",
        ],
        [
            "Explain the offside rule to a child.",
            "explain the offside rule to a child",
            "Explain the offside rule to a dog.",
        ],
    ],
    ids=lambda texts: texts[0],
)
def test_texts_that_are_equal_but_for_numbers_or_a_word_or_two_get_the_hint(texts):
    rows = [prompt(f"q{number}", text) for number, text in enumerate([*QUESTIONS[20:57], *texts])]
    found = hint(rows)
    assert found.startswith("3 rows look like variants of 1 question (") and texts[0].split()[1] in found


def test_with_declared_clusters_the_same_rows_get_no_hint():
    rows = [prompt(f"refund-{number}", f"What is {number} + 7?") for number in range(1, 5)]
    rows += [prompt("other", "Who painted the Mona Lisa?")]
    assert hint(rows)
    assert hint([replace(row, cluster=row.id[:6]) for row in rows]) == ""
    assert hint([*(replace(row, cluster="refund") for row in rows[:4]), rows[4]]) == ""


def test_a_set_of_one_template_gets_no_hint():
    assert hint([prompt(f"q{number}", f"What is {number} + 7?") for number in range(60)]) == ""


def test_a_hundred_thousand_rows_take_seconds():
    words = [a + b + c for a in string.ascii_lowercase for b in string.ascii_lowercase for c in "aeiou"]
    rows = [
        prompt(f"q{n}", " ".join(words[(n * step * 7919 + step) % len(words)] for step in range(1, 21)) + "?")
        for n in range(100_000)
    ]
    start = time.process_time()
    hint(rows)
    assert time.process_time() - start < 10
