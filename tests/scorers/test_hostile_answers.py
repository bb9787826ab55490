"""Faults in what a prompt set asks of scorers: scoring, and reading the set, end in bounded time and memory.

Each call is made in a process of its own, which the system ends after a minute of its own processor time, or at
4 GiB.
"""

import json
import sys

import pytest
from support.commands import call

from slm.base import wording
from slm.scorers import confined

TIME = "took more than 1 s of processor time"
MEMORY = "took more than 1024 MiB of memory"
BOUNDS = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
from slm.scorers import confined
confined.SECONDS = int(sys.argv[2])
"""
SCORE = f"""{BOUNDS}
from concurrent.futures import ThreadPoolExecutor
from slm.scorers.confined import score
name, output, expected, options = json.loads(Path(sys.argv[1]).read_text())
with ThreadPoolExecutor(1) as pool:  # as a server or a notebook may: no signal gets there
    result = pool.submit(score, name, output, tuple(expected), options).result()
print(json.dumps([result.value, result.reason]))
assert score("exact_match", "a", ("a",), {{}}).value == 1
"""
READ = f"""{BOUNDS}
from slm.base.errors import BadInput
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS
try: read_prompt_set(Path(sys.argv[1]), "x", CHECKS)
except BadInput as refusal: print(refusal)
"""


def run(program: str, file, content, reason: str) -> str:
    """A program's one line. What takes time gets one second in the place of five: it would end in neither."""
    file.write_text(json.dumps(content))
    done = call(sys.executable, "-c", program, file, confined.SECONDS if reason == MEMORY else 1)
    assert done.code == 0, done.err[-500:]
    assert done.out.count("\n") == 1 and len(done.out) < 700
    return done.out.strip()


def doubled(depth: int) -> dict:
    """A schema whose check doubles with each level."""
    levels = {f"level{at}": {"allOf": 2 * [{"$ref": f"#/$defs/level{at - 1}"}]} for at in range(1, depth)}
    return {"$defs": {"level0": {"type": "object"}} | levels, "$ref": f"#/$defs/level{depth - 1}"}


WORDS = " ".join(f"w{number % 5000}" for number in range(1_000_000))
SCORED = {
    "prompt sets: a json_schema pattern that backtracks for ever": (
        ("json_schema", json.dumps("a" * 60 + "!"), [], {"schema": {"type": "string", "pattern": "^(a+)+$"}}),
        TIME,
    ),
    "prompt sets: nested allOf and $ref": (("json_schema", "{}", [], {"schema": doubled(60)}), TIME),
    "prompt sets: an expected pattern that takes gigabytes": (
        ("regex", "b", ["(?:(?:(?:(?:a{1000}){1000}){1000}){1000})"], {}),
        MEMORY,
    ),
    "scorers: mathematics without end": (("math", "$9^{9^{9^{9}}}$", ["5"], {}), TIME),
    "scorers: a factorial without end": (("math", "$1000000000!$", ["5"], {}), TIME),
    "scorers: a text of a million words": (("rouge_l", WORDS, [WORDS[:900_000]], {}), ""),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in SCORED])
def test_a_score_without_end_leaves_the_answer_unscored_and_the_next_one_is_scored(name, tmp_path):
    given, reason = SCORED[name]
    value, told = json.loads(run(SCORE, tmp_path / "call.json", given, reason))
    assert value is None
    assert told in ([f"{given[0]} {reason}"] if reason else [f"{given[0]} {TIME}", f"{given[0]} {MEMORY}"])


# Draft 4 wants the items of an enum to differ, and items that can't be sorted are compared with each other
ENUM = {"$schema": "http://json-schema.org/draft-04/schema#", "enum": [x for n in range(30_000) for x in (n, str(n))]}
CHECKED = {
    "prompt sets: a schema check that never ends": ({"json_schema": {"schema": ENUM}}, TIME),
    "prompt sets: a pattern that takes gigabytes to compile": (
        {"regex": {"pattern": "(?:(?:(?:(?:a{1000}){1000}){1000}){1000})"}},
        MEMORY,
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in CHECKED])
def test_a_check_without_end_refuses_the_prompt_set_in_one_line(name, tmp_path):
    [(scorer, options)], reason = CHECKED[name][0].items(), CHECKED[name][1]
    [option] = options
    row = {"id": "a", "prompt": "2+2?", "expected": "4", "scorers": [{scorer: options}]}
    line = run(READ, tmp_path / "set.jsonl", row, reason)
    assert line.startswith(
        f"set.jsonl line 1: option {option} is {wording.quoted(options[option])}: its check {reason}; "
    )
    assert line.endswith(f"write a simpler {option}")


def test_an_option_of_many_rows_is_checked_once(tmp_path):
    from slm.prompts.prompt_sets import read_prompt_set

    rows = [{"id": str(at), "prompt": "?", "scorers": [{"regex": {"pattern": "^a{3}$"}}]} for at in range(2000)]
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = confined._checked.cache_info()
    assert len(read_prompt_set(file, "x", confined.CHECKS).prompts) == 2000
    assert confined._checked.cache_info().misses <= before.misses + 1
