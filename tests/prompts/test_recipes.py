"""The recipes of docs/prompt-sets.md, run as they stand on small files of the same shape."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from support.commands import REPOSITORY

from slm.base import parameters
from slm.engines import local
from slm.prompts.prompt_rows import canonical_rows

PAGE = (REPOSITORY / "docs" / "prompt-sets.md").read_text(encoding="utf-8")
RECIPES = dict(
    re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE.split("## Recipes for public sets")[1], re.DOTALL | re.MULTILINE)
)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def arc(id: str, stem: str, labels: str, texts: list[str], key: str) -> dict:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": id, "question": {"stem": stem, "choices": choices}, "answerKey": key}


def turns(*texts: str, names=("human", "gpt"), keys=("from", "value")) -> list[dict]:
    return [dict(zip(keys, (names[place % 2], text), strict=True)) for place, text in enumerate(texts)]


def lm_eval(number: int, question: str, target: str) -> dict:
    arguments = {"gen_args_0": {"arg_0": f"Question: {question}\nAnswer:", "arg_1": {"until": ["\n"]}}}
    return {"doc_id": number, "doc": {"question": question}, "target": target, "arguments": arguments, "resps": [["x"]]}


# recipe -> name and content of the file that it starts from, (prompt or last message, expected) of each row, scorers
SHAPES = {
    "GSM8K": (
        "gsm8k.jsonl",
        lines(
            {"question": "A shelf has 3 rows of 9 jars. How many jars?", "answer": "3 * 9 = <<3*9=27>>27\n#### 27"},
            {"question": "Rope costs 2 a metre. What do 600 metres cost?", "answer": "2 * 600 = 1200\n#### 1,200"},
            {"question": "It is 4 degrees and gets 9 colder. How cold is it?", "answer": "4 - 9 = -5\n#### -5"},
        ),
        [("A shelf has", "27"), ("Rope costs", "1,200"), ("It is 4", "-5")],
        {"contains", "number"},
    ),
    "MMLU and other CSV files with choices": (
        "mmlu.csv",
        'question,A,B,C,D,answer\n"Which one, of these, floats?",iron,cork,lead,gold,B\n'
        "Which is a vowel?,b,c,d,e,D\nWhat is 2 + 2?,4,3,5,22,A\n",
        [
            ("Which one, of these, floats?\nA. iron\nB. cork\nC. lead\nD. gold\nAnswer", "B"),
            ("Which is", "D"),
            ("What", "A"),
        ],
        {"choice"},
    ),
    "ARC": (
        "arc.jsonl",
        lines(
            arc("one", "What melts?", "ABCD", ["ice", "sand", "wood", "wool"], "A"),
            arc("two", "What rusts?", "1234", ["glass", "iron", "gold", "silk"], "2"),
            arc("three", "What floats?", "ABCDE", ["lead", "iron", "clay", "sand", "cork"], "E"),
        ),
        [("What melts?\nA. ice\nB. sand", "A"), ("What rusts?\nA. glass\nB. iron", "B"), ("What floats?", "E")],
        {"choice"},
    ),
    "TriviaQA": (
        "triviaqa.jsonl",
        lines(
            {"question": "Which river runs through Cairo?", "question_id": "t1", "answer": {"aliases": ["Nile"]}},
            {"question": "What is 100 in Roman numerals?", "question_id": "t2", "answer": {"aliases": ["C", "c"]}},
            {"question": "Who lays eggs?", "question_id": "t3", "answer": {"aliases": ["hens"], "value": "hens"}},
        ),
        [("Which river", "Nile"), ("What is 100", "C"), ("Who lays", "hens")],
        {"contains"},
    ),
    "SQuAD": (
        "squad.jsonl",
        lines(
            {
                "id": "a",
                "title": "Tea",
                "context": "Tea is old.",
                "question": "What is old?",
                "answers": {"text": ["Tea"]},
            },
            {"id": "b", "title": "Tea", "context": "Tea is old.", "question": "Why?", "answers": {"text": []}},
            {
                "id": "c",
                "title": "Ice",
                "context": "Ice is cold.",
                "question": "What is cold?",
                "answers": {"text": ["Ice"]},
            },
        ),
        [("Tea is old.\n\nWhat is old?", "Tea"), ("Ice is cold.\n\nWhat is cold?", "Ice")],
        {"token_f1"},
    ),
    "Alpaca": (
        "alpaca.json",
        json.dumps(
            [
                {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
                {"instruction": "Put this into the past tense.", "input": "I go.", "output": "I went."},
                {"instruction": "Give an antonym.", "input": "hot", "output": "cold"},
            ]
        ),
        [("Name a fruit.", "A pear."), ("Put this into the past tense.\n\nI go.", "I went."), ("Give", "cold")],
        {"rouge_l"},
    ),
    "ShareGPT": (
        "sharegpt.json",
        json.dumps(
            [
                {"id": "a", "conversations": turns("Hello?", "Good day.")},
                {"id": "b", "conversations": turns("One?", "Two.", "Three?", "Four.")},
                {"id": "c", "conversations": [{"from": "system", "value": "Be short."}, *turns("Yes?", "No.")]},
            ]
        ),
        [("Hello?", "Good day."), ("Three?", "Four."), ("Yes?", "No.")],
        {"rouge_l"},
    ),
    "OpenAI's chat files for fine-tuning": (
        "chat.jsonl",
        lines(
            *(
                {"messages": turns(*texts, names=("user", "assistant"), keys=("role", "content"))}
                for texts in (["Hello?", "Good day."], ["One?", "Two.", "Three?", "Four."], ["Yes?", "No."])
            )
        ),
        [("Hello?", "Good day."), ("Three?", "Four."), ("Yes?", "No.")],
        {"rouge_l"},
    ),
    "OpenAI evals": (
        "evals.jsonl",
        lines(
            *(
                {
                    "input": [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}],
                    "ideal": ideal,
                }
                for text, ideal in (("Where is Oslo?", "Norway"), ("2 + 2?", ["4", "four"]), ("Name a bird.", "owl"))
            )
        ),
        [("Where is Oslo?", "Norway"), ("2 + 2?", "4"), ("Name a bird.", "owl")],
        {"contains"},
    ),
    "lm-eval": (
        "samples.jsonl",
        lines(lm_eval(0, "Where is Oslo?", "Norway"), lm_eval(1, "2 + 2?", "4"), lm_eval(2, "A bird?", "owl")),
        [("Question: Where is Oslo?\nAnswer:", "Norway"), ("Question: 2 + 2?", "4"), ("Question: A bird?", "owl")],
        {"contains"},
    ),
    "promptfoo": (
        "tests.yaml",
        "".join(
            f"- vars: {{question: '{question}'}}\n  assert:\n  - {{type: icontains, value: {value}}}\n"
            for question, value in (("Where is Oslo?", "Norway"), ("Who barks?", "dog"), ("Name a bird.", "owl"))
        ),
        [("Where is Oslo?", "Norway"), ("Who barks?", "dog"), ("Name a bird.", "owl")],
        {"contains"},
    ),
}


def test_every_recipe_has_a_file_of_its_shape_here():
    assert RECIPES.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_reads_a_file_of_its_shape(tmp_path, name):
    file, content, told, scorers = SHAPES[name]
    (tmp_path / file).write_text(content, encoding="utf-8")
    *conversion, command = re.findall(r"```sh\n(.*?)\n```", RECIPES[name], re.DOTALL)[0].splitlines()
    for code in re.findall(r"```python\n(.*?)```", RECIPES[name], re.DOTALL):
        [words] = map(shlex.split, conversion)
        assert words[0] == "python" and words[2] == ">"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        (tmp_path / words[3]).write_text(done.stdout, encoding="utf-8")
    words = shlex.split(command)
    given = [words[place + 1] for place, word in enumerate(words) if word == "-P"]
    args = parameters.parse("evaluate", "", [f"--{value}" for value in given])
    args.prompts = str(tmp_path / args.prompts)
    rows = canonical_rows(local.read_prompts(args).prompts)
    found = [(row["prompt"] if "prompt" in row else row["messages"][-1]["content"], row["expected"][0]) for row in rows]
    assert len(found) == len(told)
    for (prompt, expected), (start, wanted) in zip(found, told, strict=True):
        assert prompt.startswith(start) and expected == wanted
    assert {scorer for row in rows for call in row["scorers"] for scorer in call} == scorers
    assert all(row["messages"][-1]["role"] == "user" for row in rows if "messages" in row)
