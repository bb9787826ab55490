"""Users' own scorers, named as file.py:function: what they are given, what they may return, what is refused."""

import json
import sys

import pytest

from slm.base.errors import BadInput
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers import scorer_calls
from slm.scorers.built_in import Score

PLAIN = Prompt("plain", None, "Say hello.", (), (), None, ())
CHAT = Prompt(
    "chat",
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}),
    None,
    ("4", "four"),
    (),
    None,
    (),
)


def written(tmp_path, source: str, name: str = "mine.py"):
    path = tmp_path / name
    path.write_text(source, encoding="utf-8")
    return path


def scores(tmp_path, source: str, prompt: Prompt = CHAT, output: str = "It is 4.", function: str = "f"):
    asked = scorer_calls.read(f"{written(tmp_path, source)}:{function}")
    with scorer_calls.opened(asked) as score_answer:
        return score_answer(asked.added[0], prompt, output)


@pytest.mark.parametrize(
    ("returned", "value", "reason"),
    [
        ("True", 1.0, "f gave true"),
        ("False", 0.0, "f gave false"),
        ("1", 1.0, "f gave 1"),
        ("0", 0.0, "f gave 0"),
        ("0.25", 0.25, "f gave 0.25"),
        ("np.float32(0.5)", 0.5, "f gave 0.5"),
        ("np.bool_(True)", 1.0, "f gave true"),
        ("np.int64(1)", 1.0, "f gave 1"),
        ("'yes'", 1.0, "f gave yes"),
        ("' No '", 0.0, "f gave no"),
        ("CategoricalRating.YES", 1.0, "f gave yes"),
        ("CategoricalRating.UNKNOWN", None, "f gave 'unknown', which is neither yes nor no"),
        ("'maybe'", None, "f gave 'maybe', which is neither yes nor no"),
        ("''", None, "f gave '', which is neither yes nor no"),
        ("7", None, "f gave 7, which is not a number from 0 to 1"),
        ("-0.1", None, "f gave -0.1, which is not a number from 0 to 1"),
        ("1.0000001", None, "f gave 1.0000001, which is not a number from 0 to 1"),
        ("math.nan", None, "f gave nan, which is not a number from 0 to 1"),
        ("np.float64('nan')", None, "f gave nan, which is not a number from 0 to 1"),
        ("math.inf", None, "f gave inf, which is not a number from 0 to 1"),
        ("None", None, "f gave no value"),
        ("{'score': 1}", None, "f gave {'score': 1}, which is not a number from 0 to 1"),
        ("1/0", None, "f failed: ZeroDivisionError: 'division by zero'"),
        ("sys.exit(3)", None, "f failed: SystemExit: '3'"),
        ("expectations['guidelines']", None, "f failed: KeyError: \"'guidelines'\""),
        ("Feedback(value=True)", 1.0, "f gave true"),
        ("Feedback(value='no', rationale='too\\nshort')", 0.0, "too short"),
        ("Feedback(value='no', rationale='half \\ud83d')", 0.0, "half ?"),
        ("Feedback(name='tone', value=0.5)", 0.5, "f gave 0.5"),
        ("Feedback(value=None, rationale='cannot tell')", None, "cannot tell"),
        ("Feedback(value=7, rationale='great')", None, "f gave 7, which is not a number from 0 to 1: great"),
        ("Feedback(value=[1])", None, "f gave [1], which is not a number from 0 to 1"),
        ("Feedback(error=ValueError('no idea'))", None, "f failed: no idea"),
        ("[]", None, "f gave []; a list must hold Feedbacks, at least one"),
        ("[1, 0]", None, "f gave [1, 0]; a list must hold Feedbacks, at least one"),
        ("[Feedback(name='a', value=1)] * 2", None, "f gave two Feedbacks named 'a'"),
        ("[Feedback(name='a/b%', value=1)]", None, "f gave a Feedback named 'a/b%', which can't name a metric"),
    ],
)
@pytest.mark.parametrize("decorated", [False, True], ids=["plain", "decorated"])
def test_what_a_function_returns_is_a_score_or_unscored_with_the_reason(tmp_path, decorated, returned, value, reason):
    source = f"""
import math, sys
import numpy as np
from mlflow.entities import Feedback
from mlflow.genai.judges import CategoricalRating
from mlflow.genai.scorers import scorer
{"@scorer" if decorated else ""}
def f(outputs, expectations):
    return {returned}
"""
    assert scores(tmp_path, source) == {"f": Score(value, reason)}


def test_a_list_of_feedbacks_gives_several_scores(tmp_path):
    source = """
from mlflow.entities import Feedback
def f(outputs):
    return [Feedback(name="tone", value="yes", rationale="kind"), Feedback(name="length", value=9), Feedback(value=0)]
"""
    assert scores(tmp_path, source) == {
        "f/tone": Score(1.0, "kind"),
        "f/length": Score(None, "f/length gave 9, which is not a number from 0 to 1"),
        "f": Score(0.0, "f gave 0"),
    }


@pytest.mark.parametrize(
    ("signature", "given"),
    [
        ("outputs", {"outputs": "It is 4."}),
        ("*, outputs", {"outputs": "It is 4."}),
        (
            "inputs, outputs, expectations, trace",
            {
                "inputs": {
                    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
                },
                "outputs": "It is 4.",
                "expectations": {"expected_response": "4", "expected": ["4", "four"]},
                "trace": None,
            },
        ),
        ("outputs, limit=3", {"outputs": "It is 4.", "limit": 3}),
        ("trace=1", {"trace": None}),
        ("", {}),
    ],
)
def test_a_function_is_given_the_arguments_that_it_names(tmp_path, signature, given):
    written(tmp_path, "seen = []\n", "seen_by_f.py")
    source = f"import seen_by_f\ndef f({signature}):\n    seen_by_f.seen.append(dict(locals()))\n    return True\n"
    assert scores(tmp_path, source) == {"f": Score(1.0, "f gave true")}
    assert sys.modules.pop("seen_by_f").seen == [given]


def test_a_function_that_takes_everything_is_given_everything(tmp_path):
    source = "def f(**given): return sorted(given) == ['expectations', 'inputs', 'outputs', 'trace']\n"
    assert scores(tmp_path, source) == {"f": Score(1.0, "f gave true")}


def test_a_plain_prompt_is_one_user_message_and_without_an_expected_text_there_are_no_expectations(tmp_path):
    source = """
def f(inputs, expectations):
    return inputs == {"messages": [{"role": "user", "content": "Say hello."}]} and expectations == {}
"""
    assert scores(tmp_path, source, PLAIN) == {"f": Score(1.0, "f gave true")}


def test_what_a_function_does_to_its_arguments_does_not_reach_the_prompt_set(tmp_path):
    source = (
        "def f(inputs, expectations):\n    inputs['messages'][0].clear()\n    expectations.clear()\n    return True\n"
    )
    assert scores(tmp_path, source) == {"f": Score(1.0, "f gave true")}
    assert CHAT.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_scorer_object_and_a_name_of_its_own_are_taken(tmp_path):
    source = """
from mlflow.genai.scorers import ResponseLength, scorer
short = ResponseLength(max_length=3, name="short")
@scorer(name="calm")
def f(outputs): return "!" not in outputs
"""
    path = written(tmp_path, source)
    asked = scorer_calls.read(f"{path}:short, {path}:f")
    with scorer_calls.opened(asked) as score_answer:
        found = {call.name: score_answer(call, CHAT, "It is 4.")[call.name].value for call in asked.added}
    assert found == {"short": 0.0, "calm": 1.0}


def test_a_file_is_executed_once_and_finds_its_neighbours(tmp_path):
    written(tmp_path, "count = 0\n", "counting.py")
    path = written(tmp_path, "import counting\ncounting.count += 1\ndef f(): return 1\ndef g(): return 0\n")
    scorer_calls.read(f"{path}:f,{path}:g")
    scorer_calls.read(f"{path}:g")
    assert sys.modules.pop("counting").count == 1
    assert str(tmp_path) not in sys.path
    assert not (tmp_path / "__pycache__" / "mine.cpython-311.pyc").exists()


def test_a_dataclass_and_a_relative_path_work(tmp_path, monkeypatch):
    written(
        tmp_path, "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\ndef f(): return C().x\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = scorer_calls.read("mine.py:f")
    with scorer_calls.opened(asked) as score_answer:
        assert score_answer(asked.added[0], CHAT, "") == {"f": Score(1.0, "f gave 1")}


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("mine.py", "scorers: 'mine.py' names no function; write mine.py:function"),
        ("mine.py:", "scorers: 'mine.py:' names no function; write mine.py:function"),
        ("other.py:f", "scorers: 'other.py' does not exist, from the repository's root or from here"),
        (".:f", "scorers: '.' does not exist, from the repository's root or from here"),
        ("mine.py:polit", "scorers: mine.py has no 'polit' (did you mean 'polite'?)"),
        ("mine.py:zzz", "scorers: mine.py has no 'zzz'"),
        ("mine.py:LIMIT", "scorers: mine.py:LIMIT is 3; name a function"),
        ("mine.py:Thing", "scorers: mine.py:Thing is a class; name a function"),
        ("mine.py:contains", "scorers: mine.py:contains is called 'contains', which is taken; rename the function"),
        ("mine.py:safety", "scorers: mine.py:safety is called 'safety', which is taken; rename the function"),
        ("mine.py:score", "scorers: mine.py:score is called 'score', which is taken; rename the function"),
        ("mine.py:polite,mine.py:polite", "scorers: 'polite' is named twice; remove one"),
        ("contains,contains", "scorers: 'contains' is named twice; remove one"),
        ("exact", "scorers: 'exact' is no built-in scorer, judge or file.py:function"),
        (
            "exact_mach",
            "scorers: 'exact_mach' is no built-in scorer, judge or file.py:function (did you mean 'exact_ma",
        ),
        ("mine.py:slow", "scorers: mine.py:slow is an async function; write a plain one"),
        (
            "mine.py:output",
            "scorers: mine.py:output needs the argument 'output' (did you mean 'outputs'?); "
            "a scorer is given inputs, outputs, expectations, trace, by name",
        ),
        ("mine.py:extra", "scorers: mine.py:extra needs the argument 'limit'; a scorer is given inputs, "),
        ("mine.py:position", "scorers: mine.py:position needs the argument 'outputs'; a scorer is given inputs, "),
        ("mine.py:talk", "scorers: mine.py:talk needs the argument 'session'; a scorer is given inputs, "),
        ("mine.py:named", "scorers: mine.py:named is called 'a%b', which can't name a metric; use letters and digits"),
    ],
)
def test_a_wrong_name_is_one_line(tmp_path, monkeypatch, spec, line):
    written(
        tmp_path,
        """
from mlflow.genai.scorers import scorer
LIMIT = 3
class Thing: pass
def polite(outputs): return True
def contains(outputs): return True
def safety(outputs): return True
def score(outputs): return True
def output(output): return True
def extra(outputs, limit, **more): return True
def position(outputs, /): return True
async def slow(outputs): return True
@scorer
def talk(session): return True
@scorer(name="a%b")
def named(outputs): return True
""",
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as raised:
        scorer_calls.read(spec)
    assert str(raised.value).startswith(line)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import not_there_at_all\n", "bad.py line 1: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("\n\ndef f(:\n", "bad.py line 3: SyntaxError: invalid syntax"),
        ("def g():\n    raise ValueError('no\\nway')\ng()\n", "bad.py line 2: ValueError: no way"),
        ("import sys\nsys.exit(0)\n", "bad.py line 2: SystemExit: 0"),
        ("x = '\0'\n", "bad.py: SyntaxError: source code string cannot contain null bytes"),
        ("import json\njson.loads('{')\n", "bad.py line 2: JSONDecodeError: Expecting property name"),
    ],
)
def test_a_file_that_fails_is_one_line_with_the_place(tmp_path, source, line):
    path = written(tmp_path, source, "bad.py")
    modules = set(sys.modules)
    with pytest.raises(BadInput) as raised:
        scorer_calls.read(f"{path}:f")
    assert str(raised.value).startswith(f"scorers: {line}")
    assert "\n" not in str(raised.value)
    assert not [name for name in set(sys.modules) - modules if name.startswith("user_file_")]


def test_the_hash_is_that_of_the_file(tmp_path):
    one, two = (written(tmp_path, f"def f(): return {value}\n", f"mine{value}.py") for value in (0, 1))
    again = written(tmp_path, "def f(): return 0\n", "again.py")
    assert scorer_calls.read(f"{one}:f").sha256 == scorer_calls.read(f"{again}:f").sha256
    assert len({asked.sha256 for asked in map(scorer_calls.read, (f"{one}:f", f"{two}:f", ""))}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Added to a prompt set


ROWS = [
    {"id": "a", "prompt": "Say hello.", "expected": "hello", "scorers": [{"exact_match": {"ignore_case": True}}]},
    {"id": "b", "prompt": "Say anything."},
]


def prompt_set(tmp_path, *rows: dict):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return read_prompt_set(written(tmp_path, lines, "set.jsonl"), "set.jsonl", scorer_calls.IN_ROWS)


def test_scorers_are_added_to_each_rows_own_and_what_a_row_asks_for_itself_stays(tmp_path):
    path = written(tmp_path, "def polite(outputs): return True\n")
    asked = scorer_calls.read(f"{path}:polite,exact_match")
    before = prompt_set(tmp_path, *ROWS)
    after = scorer_calls.add(asked, before)
    assert [prompt.scorers for prompt in after.prompts] == [
        (ScorerCall("exact_match", {"ignore_case": True}), ScorerCall("polite", {})),
        (ScorerCall("polite", {}), ScorerCall("exact_match", {})),
    ]
    assert [prompt.id for prompt in after.prompts] == ["a", "b"]
    assert after.sha256 != before.sha256
    assert scorer_calls.add(scorer_calls.read(""), before) == before


def test_a_row_that_an_added_scorer_cannot_score_is_unscored(tmp_path):
    asked = scorer_calls.read("contains")
    after = scorer_calls.add(asked, prompt_set(tmp_path, *ROWS))
    with scorer_calls.opened(asked) as score_answer:
        found = [score_answer(ScorerCall("contains", {}), prompt, "Hello!")["contains"] for prompt in after.prompts]
    assert found == [Score(1.0, "contains 'hello'"), Score(None, "nothing is expected of this row")]


def test_an_added_scorer_that_can_score_no_row_is_one_line(tmp_path):
    with pytest.raises(BadInput) as raised:
        scorer_calls.add(scorer_calls.read("contains"), prompt_set(tmp_path, ROWS[1]))
    assert str(raised.value) == "scorers: contains can score no row of set: scorer contains needs `expected`"


def test_a_prompt_set_cannot_name_a_file(tmp_path):
    path = written(tmp_path, "raise SystemExit('executed')\n")
    with pytest.raises(BadInput, match="unknown scorer"):
        prompt_set(tmp_path, {"id": "a", "prompt": "Hi", "scorers": [f"{path}:f"]})
