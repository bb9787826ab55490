"""Rows in other people's shapes: mapped by `fields` and `expected_pattern`, or explained in one line."""

import json
import time

import pytest

from slm.base import parameters
from slm.base.errors import BadInput
from slm.engines import local
from slm.prompts import row_mapping
from slm.prompts.prompt_rows import canonical_rows
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

GSM = [
    {"question": "Ada has 3 pens and buys 4. How many?", "answer": "3 + 4 = 7\n#### 7", "source": "x"},
    {"question": "A box holds 12 eggs. Half break. How many are left?", "answer": "12 / 2 = 6\n#### 6 ", "solution": 1},
]
OURS = [
    {"prompt": "Ada has 3 pens and buys 4. How many?", "expected": "7"},
    {"prompt": "A box holds 12 eggs. Half break. How many are left?", "expected": "6"},
]


@pytest.fixture
def read(tmp_path):
    def read(content: str | list, fields: str = "", pattern: str = "", suffix: str = ".jsonl"):
        path = tmp_path / f"set{suffix}"
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
        return read_prompt_set(path, "given", CHECKS, row_mapping.read(fields, pattern))

    return read


def complaint(function, *arguments) -> str:
    with pytest.raises(BadInput) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


# Columns --------------------------------------------------------------------------------------------------------------


def test_mapped_rows_have_the_hash_of_the_same_rows_written_by_hand(read):
    found = read(GSM, "question:prompt,answer:expected", "#### (.+)")
    by_hand = read(OURS)
    assert (found.prompts, found.sha256) == (by_hand.prompts, by_hand.sha256)
    assert found.left_out == ("solution", "source")
    assert row_mapping.left_out_note(found.left_out) == "left out: solution, source"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", 'nr,question,answer\n1,"2, or 3?",a|b\n2,Why?,c\n'),
        (".yaml", "- {nr: 1, question: '2, or 3?', answer: a|b}\n- {nr: 2, question: 'Why?', answer: c}\n"),
    ],
)
def test_a_mapped_csv_cell_is_one_text_as_in_the_other_formats(read, suffix, text):
    found = read(text, "question:prompt,answer:expected,nr:id", suffix=suffix)
    assert canonical_rows(found.prompts) == [
        {"id": "1", "prompt": "2, or 3?", "expected": ["a|b"], "scorers": [{"contains": {}}], "tags": []},
        {"id": "2", "prompt": "Why?", "expected": ["c"], "scorers": [{"contains": {}}], "tags": []},
    ]
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("row", "fields", "ours"),
    [
        ({"inputs": {"question": "Q"}}, "inputs.question:prompt", {"prompt": "Q"}),
        ({"inputs.question": "Q", "inputs": {"question": "x"}}, "inputs.question:prompt", {"prompt": "Q"}),
        ({"vars": {"q": "Q"}, "assert": [{"value": "A"}]}, "vars.q:prompt,assert.0.value:expected", None),
        ({"q": "Q", "answer": {"aliases": ["A"]}}, "q:prompt,answer.aliases:expected", None),
        ({"prompt": [{"role": "user", "content": "Q"}], "a": "A"}, "prompt:messages,a:expected", ...),
        ({"chat": '[{"role": "user", "content": "Q"}]', "a": "A"}, "chat:messages,a:expected", ...),
        ({"q": "Q", "prompt": "a template", "messages": [], "expected": "A"}, "q:prompt", None),
        ({"q": "Q", "expected": "A", "subject": "s"}, "q:prompt,subject:cluster,subject:tags", {"cluster": "s"}),
        (
            {"q": "Q", "id": "own", "answer": 4, "labels": [1, "x"]},
            "q:prompt,answer:expected,labels:tags",
            {"id": "own"},
        ),
    ],
)
def test_nested_names_lists_and_columns_with_our_own_names(read, row, fields, ours):
    [prompt] = canonical_rows(read([row], fields).prompts)
    if ours is ...:
        assert prompt["messages"] == [{"role": "user", "content": "Q"}]
    else:
        assert prompt["prompt"] == "Q"
        assert (ours or {}).items() <= prompt.items()
    assert prompt["expected"] in (["A"], ["4"], [])


def test_what_is_left_out_is_told_and_a_replaced_column_with_our_name_too(read):
    row = {"q": "Q", "prompt": "a template", "meta": {"x": 1}, "outer": {"e": "A", "f": "B"}}
    assert read([row], "q:prompt,outer.e:expected").left_out == ("meta", "prompt")
    many = {f"column {number:02}": 1 for number in range(20)}
    note = row_mapping.left_out_note(read([many | {"q": "Q"}], "q:prompt").left_out)
    assert note.endswith("column 07 and 12 more")


def test_a_column_that_only_the_last_row_has_is_found(read):
    found = read([{"q": "one"}, {"q": "two", "a": "2"}], "q:prompt,a:expected")
    assert [prompt.expected for prompt in found.prompts] == [(), ("2",)]


def test_without_fields_an_unknown_column_is_an_error_as_ever(read):
    assert complaint(read, [{"prompt": "x", "source": "y"}]).startswith("set.jsonl line 1: unknown field 'source'")
    assert complaint(read, "prompt,source\nx,y\n", "", "", ".csv").startswith("set.csv line 1: unknown column 'source'")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("question", "fields: 'question' is not theirs:ours; write question:prompt,answer:expected"),
        (":prompt", "fields: ':prompt' is not theirs:ours; write"),
        ("question:", "fields: 'question:' is not theirs:ours; write"),
        (",", "fields: ',' is not theirs:ours; write"),
        (
            "answer:expectd",
            "fields: 'answer:expectd' names no field of a row (did you mean 'expected'?); after the colon, "
            "there are id, messages, prompt, expected, scorers, cluster, tags, response_format",
        ),
        ("a:prompt,b:prompt", "fields: 'a' and 'b' are both for prompt; remove one"),
        ("a:prompt,b:messages", "fields: a row has either prompt or messages; remove one"),
        (
            "qestion:prompt",
            "fields: no row has 'qestion' (did you mean 'question'?) for prompt; there are answer, question, solution, "
            "source",
        ),
        ("question:prompt,answer.text:expected", "fields: no row has 'answer.text'"),
        ("question:prompt,gone:expected", "fields: no row has 'gone' for expected; there are answer, question"),
    ],
)
def test_a_mistake_in_fields_is_one_line(read, fields, message):
    assert complaint(read, GSM, fields).startswith(message)


def test_a_nested_name_that_is_not_there_gets_the_nearest_beside_it(read):
    message = complaint(read, [{"inputs": {"question": "x"}}], "inputs.qestion:prompt")
    assert message.startswith("fields: no row has 'inputs.qestion' (did you mean 'inputs.question'?) for prompt; there")


def test_a_mapped_value_is_checked_like_our_own(read):
    assert complaint(read, [{"q": "x", "a": None}], "q:prompt,a:expected").startswith(
        "set.jsonl line 1: `expected` is null, not text"
    )
    assert complaint(read, [{"q": "x", "a": 0.5}], "q:prompt,a:expected").startswith(
        "set.jsonl line 1: `expected` is 0.5"
    )
    assert complaint(read, [{"q": "[x"}], "q:messages").startswith("set.jsonl line 1: `messages` is not JSON: ")


def test_keys_that_are_no_text_are_left_out_by_their_name(read):
    assert read("- {1: a, null: b, q: x}\n", "q:prompt", suffix=".yaml").left_out == ("1", "None")


def test_the_start_of_a_run_names_what_is_left_out_and_hints_at_variants_once(tmp_path, capsys):
    file = tmp_path / "set.jsonl"
    rows = [{"key": f"refund-{n}", "question": f"{n}?", "source": "x"} for n in (1, 2)] + [
        {"key": "a", "question": "b"}
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local.read_prompts(parameters.parse("evaluate", "", [f"--prompts={file}", "--fields=question:prompt,key:id"]))
    assert capsys.readouterr().out.splitlines() == [
        "set: left out: source",
        "set: 2 rows look like variants of 1 question ('refund-1', 'refund-2'); give variants of one question the same "
        "`cluster`",
    ]


@pytest.mark.parametrize(
    ("unnamed", "told"), [(0, []), (1, ["1 row names no scorer, and gets"]), (2, ["2 rows name no scorer, and get"])]
)
def test_rows_that_get_contains_are_told_at_the_start_of_a_run(tmp_path, capsys, unnamed, told):
    file = tmp_path / "set.jsonl"
    rows = [{"prompt": "b", "expected": "c", "scorers": ["exact_match"]}, {"prompt": "nothing is expected"}]
    rows += [{"prompt": f"{n}?", "expected": "x"} for n in range(unnamed)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local.read_prompts(parameters.parse("evaluate", "", [f"--prompts={file}"]))
    assert capsys.readouterr().out.splitlines() == [f"set: {rows} `contains`" for rows in told]


# The part of `expected` to keep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "pattern", "kept"),
    [
        ("2 + 2 = 4\n#### 4", "#### (.+)", ["4"]),
        ("The answer is (B).", r"\([A-D]\)", ["(B)"]),
        ("1 then 22 then 333", r"\d+", ["333"]),
        ("1 then 22 then 333 apples", r"\d*", ["333"]),  # empty matches do not count
        ("A: x, B: y", r"A: (\w)|B", ["x"]),  # nor does a match without group 1
        (["#### 4", "#### four "], "#### (.+)", ["4", "four"]),
        ("one\ntwo", r"(?m)^(\w+)$", ["two"]),
    ],
)
def test_group_1_of_the_last_match_or_the_whole_match_is_kept(read, expected, pattern, kept):
    [prompt] = read([{"prompt": "x", "expected": expected}], "", pattern).prompts
    assert list(prompt.expected) == kept


def test_the_pattern_searches_mlflows_rows_too_and_leaves_rows_without_expected_alone(read):
    theirs = {"inputs": {"messages": [{"role": "user", "content": "x"}]}, "expectations": {"expected_response": "= 4"}}
    assert [prompt.expected for prompt in read([theirs, {"prompt": "y"}], "", r"= (\d)").prompts] == [("4",), ()]


@pytest.mark.parametrize(
    ("rows", "pattern", "message"),
    [
        (
            [{"prompt": "x", "expected": "= 4"}, {"prompt": "y", "expected": "four"}],
            r"= (\d)",
            "set.jsonl line 2: expected_pattern '= (\\\\d)' finds nothing in `expected`, 'four'; change",
        ),
        ([{"prompt": "x", "expected": "= "}], r"=(.*)", "set.jsonl line 1: expected_pattern '=(.*)' finds nothing in"),
        ([{"prompt": "x"}], r"\d", "expected_pattern: no row of set.jsonl has `expected`; map a column to it"),
        ([{"prompt": "x", "expected": "4"}], "(", "expected_pattern: '(' is not a regular expression: "),
        ([{"prompt": "x", "expected": "4"}], "(?:" * 900 + ")" * 900, "expected_pattern: '(?:(?:"),
        ([{"prompt": "x", "expected": 4}], r"\d", "set.jsonl line 1: `expected` is 4, not text"),
    ],
)
def test_a_pattern_that_finds_nothing_or_is_none_is_one_line(read, rows, pattern, message):
    assert complaint(read, rows, "", pattern).startswith(message)


@pytest.mark.fault("prompt sets: an expected_pattern that would search for ever")
@pytest.mark.parametrize("pattern", [r"(?:x|x|xx)+y(?<=z)", "x(.*?)z|x"])
def test_a_pattern_that_would_search_for_ever_is_refused(read, pattern):
    start = time.process_time()
    message = complaint(read, [{"prompt": "x", "expected": "x" * 100_000}], "", pattern)
    assert message.endswith("is too slow; write one that ends within 1 s in `expected`")
    assert time.process_time() - start < 5


def test_a_pattern_may_not_take_a_second_in_each_of_many_rows(read, monkeypatch):
    monkeypatch.setattr(row_mapping, "ALL_SECONDS", 0.02)
    rows = [{"prompt": str(number), "expected": "x" * 3000 + "y"} for number in range(100)]
    assert "is too slow; write one that ends within 0.02 s" in complaint(read, rows, "", "(y)|x.*?z")


# Shapes that are recognised -------------------------------------------------------------------------------------------

EVAL = {"input": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is Oslo?"}]}
LM_EVAL = {
    "doc_id": 0,
    "doc": {"question": "Where is Oslo?", "answer": "Norway"},
    "target": "Norway",
    "arguments": {"gen_args_0": {"arg_0": "Q: Where is Oslo?\nA:", "arg_1": {"until": ["\n"]}}},
    "resps": [["Norway"]],
    "filtered_resps": ["Norway"],
}
PROMPTFOO = {"vars": {"place": "Where is Oslo?"}, "assert": [{"type": "icontains", "value": "Norway"}]}


@pytest.mark.parametrize(
    ("row", "told", "expected"),
    [
        (
            EVAL | {"ideal": "Norway"},
            "is a sample of OpenAI evals (`input`, `ideal`); give fields=input:messages,ideal:expected",
            ("Norway",),
        ),
        (
            {"input": "Where is Oslo?", "ideal": ["Norway", "NO"]},
            "is a sample of OpenAI evals (`input`, `ideal`); give fields=input:prompt,ideal:expected",
            ("Norway", "NO"),
        ),
        (
            LM_EVAL,
            "is a sample of lm-eval (`doc`, `target`); give fields=arguments.gen_args_0.arg_0:prompt,target:expected",
            ("Norway",),
        ),
        (
            LM_EVAL | {"arguments": [["Q: Where is Oslo?\nA:", {}]]},
            "is a sample of lm-eval (`doc`, `target`); give fields=arguments.0.0:prompt,target:expected",
            ("Norway",),
        ),
        (
            {"doc": {"id": 3, "query": "Where is Oslo?"}, "target": "Norway"},
            "is a sample of lm-eval (`doc`, `target`); give fields=doc.query:prompt,target:expected",
            ("Norway",),
        ),
        (
            PROMPTFOO,
            "is a test of promptfoo (`vars`); if vars.place is the whole prompt, give "
            "fields=vars.place:prompt,assert.0.value:expected",
            ("Norway",),
        ),
        (
            {"question": "Where is Oslo?", "answer": "Norway"},
            "unknown field 'question'; there are id, messages, prompt, expected, scorers, cluster, tags, "
            "response_format; give fields=question:prompt,answer:expected",
            ("Norway",),
        ),
    ],
)
def test_a_known_shape_is_named_and_the_proposed_fields_read_it(read, row, told, expected):
    message = complaint(read, [row])
    assert message == f"set.jsonl line 1: {told}"
    fields = message.rpartition("fields=")[2]
    [prompt] = read([row], fields).prompts
    assert prompt.expected == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LM_EVAL | {"target": 2}, "is a sample of lm-eval (`doc`, `target`); write rows: the question and its choices"),
        (
            PROMPTFOO | {"assert": [{"type": "llm-rubric", "value": "is polite"}]},
            "is a test of promptfoo (`vars`); write a row per test, with `prompt`, `expected` and `scorers`",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            "is a conversation of ShareGPT (`conversations`); docs/",
        ),
        ({"instruction": "x", "input": "y", "output": "z"}, "unknown field 'instruction'; there are id, messages,"),
    ],
)
def test_a_shape_that_fields_can_not_read_gets_another_remedy(read, row, message):
    said = complaint(read, [row])
    assert said.startswith(f"set.jsonl line 1: {message}") and "fields=" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompts: ['Say {{word}}']\nproviders: [openai:gpt-4o-mini]\ntests:\n- vars: {word: x}\n",
            "set.yaml: is a configuration of promptfoo (`tests`); write a row per test: the prompt with its `vars` as",
        ),
        (
            "task: mine\ndataset_path: org/mine\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n",
            "set.yaml: is a task of lm-eval (`doc_to_text`) without rows; read the samples_*.jsonl of",
        ),
        (
            "task: mine\ndoc_to_text: !function own.text\n",
            "set.yaml: is a task of lm-eval (`doc_to_text`) without rows;",
        ),
        ("- vars: {word: x}\n", "set.yaml row 1: is a test of promptfoo (`vars`); if vars.word is the whole prompt,"),
    ],
)
def test_a_yaml_file_of_another_tool_is_named(read, text, message):
    assert complaint(read, text, "", "", ".yaml").startswith(message)


def test_a_csv_header_of_usual_names_gets_the_fields_that_read_it(read):
    text = "question,answer\nWhere is Oslo?,Norway\n"
    message = complaint(read, text, "", "", ".csv")
    assert message.startswith("set.csv line 1: unknown column 'question'; there are ")
    assert message.endswith("; give fields=question:prompt,answer:expected")
    assert complaint(read, "question,A,B,answer\nx,1,2,A\n", "", "", ".csv").endswith("how to read such rows")
