"""What a prompt set may look like, and the one line that each mistake in it gets."""

import gzip
import hashlib
import json
import tracemalloc

import pytest
from support.commands import REPOSITORY

from slm.base import strict_json
from slm.base.errors import BadInput
from slm.base.strict_yaml import parse_yaml
from slm.prompts import prompt_sets, readers
from slm.prompts.prompt_rows import Prompt, ScorerCall, canonical_rows, conversation
from slm.prompts.prompt_sets import read_prompt_set, with_scorers
from slm.prompts.readers import FILE_BYTES, LINE_BYTES, YAML_BYTES
from slm.scorers.confined import CHECKS

PROMPTS = REPOSITORY / "prompts"
USER = [{"role": "user", "content": "Capital of France?"}]
ROW = {"id": "a", "prompt": "2+2?"}


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, suffix: str = ".jsonl", **options):
        path = tmp_path / f"set{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompt_set(path, "given/by/user", options.get("known_scorers", CHECKS))

    return read


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def complaint(read, *args, **options) -> str:
    with pytest.raises(BadInput) as caught:
        read(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_a_full_row_becomes_a_frozen_record(read):
    row = {
        "id": "capital",
        "messages": [{"role": "system", "content": "Be short."}, *USER],
        "expected": ["Paris", "paris"],
        "scorers": ["exact_match", {"contains": {"whole_word": True}}],
        "cluster": "geography",
        "tags": ["easy"],
    }
    prompt_set = read(jsonl(row))
    assert (prompt_set.name, prompt_set.source) == ("set", "given/by/user")
    assert prompt_set.prompts == (
        Prompt(
            id="capital",
            messages=({"role": "system", "content": "Be short."}, {"role": "user", "content": "Capital of France?"}),
            prompt=None,
            expected=("Paris", "paris"),
            scorers=(ScorerCall("exact_match", {}), ScorerCall("contains", {"whole_word": True})),
            cluster="geography",
            tags=("easy",),
        ),
    )


@pytest.mark.parametrize(
    ("row", "expected", "scorers"),
    [
        ({}, (), ()),
        ({"expected": "4"}, ("4",), (ScorerCall("contains", {}),)),
        ({"expected": "4", "scorers": []}, ("4",), ()),
        ({"expected": ["4", "four"], "scorers": "number"}, ("4", "four"), (ScorerCall("number", {}),)),
        (
            {"expected": "4", "scorers": {"number": {"tolerance": 0.5}}},
            ("4",),
            (ScorerCall("number", {"tolerance": 0.5}),),
        ),
        ({"expected": "4", "scorers": {"number": None}}, ("4",), (ScorerCall("number", {}),)),
        ({"scorers": [{"regex": {"pattern": "4"}}]}, (), (ScorerCall("regex", {"pattern": "4"}),)),
        ({"scorers": ["json_schema"]}, (), (ScorerCall("json_schema", {}),)),
    ],
)
def test_expected_and_scorers_in_their_short_and_long_forms(read, row, expected, scorers):
    (prompt,) = read(jsonl(ROW | row)).prompts
    assert (prompt.expected, prompt.scorers) == (expected, scorers)


def test_mlflows_own_dataset_rows_are_read(read):
    more = {"id": "a", "scorers": ["exact_match"], "cluster": "c", "tags": ["x"]}
    theirs = {"inputs": {"messages": USER}, "expectations": {"expected_response": "Paris"}} | more
    ours = {"messages": USER, "expected": "Paris"} | more
    assert read(jsonl(theirs)).prompts == read(jsonl(ours)).prompts
    assert read(jsonl({"inputs": {"messages": USER}})).prompts[0].scorers == ()


FORMATS = {
    ".jsonl": jsonl(
        {"id": "a", "prompt": "1, or 2?", "expected": ["1", "one"], "scorers": ["contains"], "tags": ["x", "y"]},
        {"id": "b", "messages": USER, "cluster": "c"},
    ),
    ".csv": (
        "id,prompt,messages,expected,scorers,cluster,tags\n"
        'a,"1, or 2?",,1|one,contains,,x | y\n'
        'b,,"[{""role"": ""user"", ""content"": ""Capital of France?""}]",,,c,\n'
    ),
    ".yaml": (
        "- id: a\n  prompt: 1, or 2?\n  expected: ['1', one]\n  scorers: [contains]\n  tags: [x, y]\n"
        "- id: b\n  messages:\n  - role: user\n    content: Capital of France?\n  cluster: c\n"
    ),
}


@pytest.mark.parametrize("suffix", [*FORMATS, ".YAML", ".yml"])
@pytest.mark.parametrize(
    "disguise",
    [
        "plain",
        pytest.param("bom", marks=pytest.mark.fault("prompt sets: BOM")),
        pytest.param("crlf", marks=pytest.mark.fault("prompt sets: CRLF")),
    ],
)
def test_every_format_line_end_and_byte_order_mark_gives_the_same_set(read, suffix, disguise):
    text = FORMATS[".yaml" if suffix.lower() == ".yml" else suffix.lower()]
    data = text.replace("\n", "\r\n" if disguise == "crlf" else "\n").encode(
        "utf-8-sig" if disguise == "bom" else "utf-8"
    )
    prompt_set = read(data, suffix)
    assert prompt_set.prompts == read(FORMATS[".jsonl"]).prompts
    assert (
        prompt_set.sha256 == "befb4a007415637c1ad2a8ff69a7b2f62236fe03998160af0d5d8b12fb41a0ea"
    )  # sha256sum of the rows, written out by hand


def test_the_hash_is_that_of_the_canonical_rows_as_compact_sorted_json(read):
    prompt_set = read(jsonl(ROW | {"expected": "vier 四"}))
    row = '[{"expected":["vier 四"],"id":"a","prompt":"2+2?","scorers":[{"contains":{}}],"tags":[]}]'
    assert prompt_set.sha256 == hashlib.sha256(row.encode()).hexdigest()


def test_the_hash_follows_content_and_order_and_nothing_else(read):
    one, other = ROW | {"tags": ["t"]}, ROW | {"id": "b"}
    reordered = dict(reversed(one.items()))
    assert read(jsonl(one, other)).sha256 == read("\n" + jsonl(reordered) + "\n\n" + jsonl(other)).sha256
    assert read(jsonl(one, other)).sha256 != read(jsonl(other, one)).sha256
    assert read(jsonl(one)).sha256 != read(jsonl(ROW)).sha256


@pytest.mark.parametrize("suffix", FORMATS)
def test_canonical_rows_read_back_as_the_same_set(read, suffix):
    once = read(FORMATS[suffix], suffix)
    twice = read(jsonl(*canonical_rows(once.prompts)))
    assert (twice.prompts, twice.sha256) == (once.prompts, once.sha256)


def test_a_missing_id_is_made_of_the_question_and_the_answer_and_stays_put(read):
    first, second, tagged = (
        read(jsonl({"prompt": "2+2?", "expected": "4"} | more)).prompts[0].id
        for more in ({}, {"expected": "5"}, {"tags": ["x"], "scorers": ["exact_match"], "cluster": "c"})
    )
    assert first == tagged == "row-b8d6e05fea9c"
    assert first != second


def test_a_missing_id_is_the_hash_of_the_conversation_and_the_expected_texts(read):
    content = '{"expected":["Paris"],"messages":[{"content":"Capital of France?","role":"user"}]}'
    [prompt] = read(jsonl({"messages": USER, "expected": "Paris"})).prompts
    assert prompt.id == f"row-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def test_rows_that_expect_a_text_and_name_no_scorer_are_counted(read):
    plain, named = {"expected": "4"}, {"expected": "4", "scorers": ["exact_match"]}
    rows = [ROW | {"id": f"{place}"} | more for place, more in enumerate((plain, {}, named, plain, {"scorers": []}))]
    assert read(jsonl(*rows)).unnamed == 2
    assert read(jsonl(*rows[1:3])).unnamed == 0


def test_scorers_of_a_run_are_added_to_each_row_that_does_not_name_them(read):
    strict, loose = ScorerCall("contains", {"whole_word": True}), ScorerCall("contains", {})
    rows = (
        {"id": "a", "prompt": "x", "expected": "4", "scorers": [{"contains": {"whole_word": True}}]},
        ROW | {"id": "b"},
    )
    before = read(jsonl(*rows, ROW | {"id": "c", "expected": "4"}))
    number = ScorerCall("number", {})
    after = with_scorers(before, [loose, number])
    assert [prompt.scorers for prompt in after.prompts] == [(strict, number), (loose, number), (loose, number)]
    assert (after.name, after.source, after.unnamed) == (before.name, before.source, 1)
    assert [prompt.id for prompt in after.prompts] == ["a", "b", "c"] and after.count == 3
    written = json.dumps(canonical_rows(after.prompts), sort_keys=True, separators=(",", ":"))
    assert after.sha256 == hashlib.sha256(written.encode()).hexdigest() != before.sha256
    assert after.scorer_names == {"contains", "number"}


def test_a_plain_prompt_is_a_conversation_of_one_message(read):
    plain, chat = read(jsonl(ROW, {"id": "b", "messages": USER})).prompts
    assert conversation(plain) == [{"role": "user", "content": "2+2?"}]
    assert conversation(chat) == USER and conversation(chat)[0] is not chat.messages[0]


def test_several_scorers_of_a_csv_cell_and_line_ends_within_a_cell_are_kept(read):
    [prompt] = read('prompt,expected,scorers\n"a\r\nb",4,exact_match | number\n', ".csv").prompts
    assert prompt.prompt == "a\r\nb"
    assert prompt.scorers == (ScorerCall("exact_match", {}), ScorerCall("number", {}))
    assert [prompt.id for prompt in read("id,prompt\ra,x\rb,y\r", ".csv").prompts] == ["a", "b"]


def test_unicode_line_separators_inside_json_do_not_split_a_row(read):
    text = "a\u2028b\u0085c"
    assert read(json.dumps({"prompt": text}, ensure_ascii=False)).prompts[0].prompt == text


def test_a_quoted_csv_cell_may_span_lines_and_the_line_named_is_where_its_row_starts(read):
    text = 'id,prompt\na,"one\ntwo"\na,three\n'
    assert (
        complaint(read, text, ".csv")
        == "set.csv line 4: `id` 'a' is already used in line 2; ids are unique: change one"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(
            [ROW, ROW],
            "set.jsonl line 2: `id` 'a' is already used in line 1; ids are unique: change one",
            marks=pytest.mark.fault("prompt sets: duplicate ids"),
        ),
        (
            [{"prompt": "x"}, {"prompt": "x"}],
            "set.jsonl line 2: `id` 'row-530932cc417c' is already used in line 1; remove one, or give each an `id`",
        ),
        pytest.param(
            [{"id": "a", "promt": "x"}],
            "set.jsonl line 1: unknown field 'promt' (did you mean 'prompt'?); "
            "there are id, messages, prompt, expected, scorers, cluster, tags",
            marks=pytest.mark.fault("prompt sets: an unknown column"),
        ),
        (
            [["a"]],
            "set.jsonl line 1: is ['a']; write a mapping with id, messages, prompt, expected, scorers, cluster, tags",
        ),
        ([ROW | {"messages": USER}], "set.jsonl line 1: has both `messages` and `prompt`; give one of them"),
        pytest.param(
            [{"id": "a"}],
            "set.jsonl line 1: has neither `messages` nor `prompt`; give one of them",
            marks=pytest.mark.fault("prompt sets: a missing column"),
        ),
        ([{}], "set.jsonl line 1: has neither `messages` nor `prompt`; give one of them"),
        ([{"prompt": ""}], "set.jsonl line 1: `prompt` is '', an empty text; write something or leave it out"),
        ([{"prompt": " \n"}], r"set.jsonl line 1: `prompt` is ' \n', an empty text"),
        pytest.param(
            [{"prompt": 4}],
            "set.jsonl line 1: `prompt` is 4, not text; write text, in quotes, or leave it out",
            marks=pytest.mark.fault("prompt sets: a number where text belongs"),
        ),
        pytest.param(
            [{"prompt": None}],
            "set.jsonl line 1: `prompt` is null, not text",
            marks=pytest.mark.fault("prompt sets: null where text belongs"),
        ),
        ([{"prompt": ["x"]}], "set.jsonl line 1: `prompt` is ['x'], not text"),
        pytest.param(
            [{"prompt": "a\0b"}],
            r"set.jsonl line 1: `prompt` is 'a\x00b' with a NUL character in it; remove it",
            marks=pytest.mark.fault("prompt sets: NUL"),
        ),
        pytest.param(
            [{"prompt": "a\ud800b"}],
            r"set.jsonl line 1: `prompt` holds \ud800, half a character; write both halves",
            marks=pytest.mark.fault("prompt sets: lone surrogate"),
        ),
        ([ROW | {"id": 7}], "set.jsonl line 1: `id` is 7, not text"),
        ([ROW | {"id": ""}], "set.jsonl line 1: `id` is '', an empty text"),
        ([ROW | {"cluster": None}], "set.jsonl line 1: `cluster` is null, not text"),
        ([ROW | {"tags": [1]}], "set.jsonl line 1: `tags` is 1, not text"),
        ([ROW | {"expected": 4}], "set.jsonl line 1: `expected` is 4, not text"),
        ([ROW | {"expected": ["4", True]}], "set.jsonl line 1: `expected` is true, not text"),
        ([ROW | {"expected": [""]}], "set.jsonl line 1: `expected` is '', an empty text"),
        ([{"messages": []}], "set.jsonl line 1: `messages` is []; write a list of {role, content}, at least one"),
        ([{"messages": "hi"}], "set.jsonl line 1: `messages` is 'hi'; write a list of {role, content}"),
        ([{"messages": ["hi"]}], "set.jsonl line 1: `messages[0]` is 'hi'; write {role, content}"),
        ([{"messages": [{"content": "hi"}]}], "set.jsonl line 1: `messages[0]` has no `role`; write {role, content}"),
        ([{"messages": [{"role": "user"}]}], "set.jsonl line 1: `messages[0]` has no `content`"),
        (
            [{"messages": [*USER, {"role": "asistant", "content": "hi"}]}],
            "set.jsonl line 1: `messages[1].role` is 'asistant' (did you mean 'assistant'?); "
            "there are system, user, assistant",
        ),
        (
            [{"messages": [{"role": "tool", "content": "x"}]}],
            "set.jsonl line 1: `messages[0].role` is 'tool'; there are",
        ),
        (
            [{"messages": [{"role": "user", "content": None}]}],
            "set.jsonl line 1: `messages[0].content` is null, not text",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}],
            "set.jsonl line 1: `messages[0].content` is [{'text': 'x', 'type': 'text'}], not text",
        ),
        (
            [{"messages": [{"role": "user", "content": "x", "name": "Bo"}]}],
            "set.jsonl line 1 `messages[0]`: unknown field 'name'; there are role, content",
        ),
        (
            [ROW | {"expected": "4", "scorers": ["exactmatch"]}],
            "set.jsonl line 1: unknown scorer 'exactmatch' (did you mean 'exact_match'?); "
            "there are exact_match, contains, regex, choice, number, json_schema, token_f1, rouge_l, math",
        ),
        ([ROW | {"scorers": [3]}], "set.jsonl line 1: `scorers` holds 3; write names, or {name: options}"),
        ([ROW | {"scorers": None}], "set.jsonl line 1: `scorers` holds null; write names"),
        ([ROW | {"scorers": ["exact_match"]}], "set.jsonl line 1: scorer exact_match needs `expected`"),
        (
            [ROW | {"expected": "4", "scorers": ["number", {"number": {}}]}],
            "set.jsonl line 1: `scorers` asks for number twice; remove one",
        ),
        (
            [ROW | {"expected": "4", "scorers": {"number": {"tolerence": 1}}}],
            "set.jsonl line 1: scorer number has no option 'tolerence' (did you mean 'tolerance'?); it has tolerance",
        ),
        (
            [ROW | {"expected": "4", "scorers": {"number": [1]}}],
            "set.jsonl line 1: the options of scorer number are [1]; write {option: value}",
        ),
        ([ROW | {"inputs": {"messages": USER}}], "set.jsonl line 1: unknown field 'prompt'; there are inputs, exp"),
        ([{"inputs": "x"}], "set.jsonl line 1: `inputs` is 'x'; write a mapping with `messages`"),
        ([{"inputs": {"question": "x"}}], "set.jsonl line 1 `inputs`: unknown field 'question'; there are messages"),
        ([{"expectations": {"expected_response": "x"}}], "set.jsonl line 1: has neither `messages` nor `prompt`"),
        ([{"inputs": {}}], "set.jsonl line 1: has neither `messages` nor `prompt`"),
        (
            [{"inputs": {"messages": USER}, "expectations": {"expected_facts": ["x"]}}],
            "set.jsonl line 1 `expectations`: unknown field 'expected_facts' (did you mean 'expected_response'?)",
        ),
        ([{"prompt": "x" * 2**20}], "set.jsonl line 1: is 1.0 MiB long; at most 1 MiB is read: shorten it"),
        ([{"x" * 500: 1}], "set.jsonl line 1: unknown field 'xxx"),
    ],
)
def test_a_bad_row_is_named_with_its_line_its_value_and_the_remedy(read, rows, message):
    assert complaint(read, jsonl(*rows)).startswith(message)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        pytest.param(
            "", ".jsonl", "set.jsonl: no rows; write at least one prompt", marks=pytest.mark.fault("prompt sets: empty")
        ),
        ("\n \r\n", ".jsonl", "set.jsonl: no rows"),
        ("", ".csv", "set.csv: no rows"),
        pytest.param("id,prompt\n", ".csv", "set.csv: no rows", marks=pytest.mark.fault("prompt sets: header only")),
        ("", ".yaml", "set.yaml: no rows"),
        ("# nothing\n", ".yaml", "set.yaml: no rows"),
        ("[]", ".yaml", "set.yaml: no rows"),
        ("x", ".txt", "set.txt: a prompt set is a .jsonl, .csv, .yaml, .yml file; rename or convert it"),
        ("x", ".json", "set.json: a prompt set is a .jsonl"),
        pytest.param(
            b'{"prompt": "x"}\n{"prompt": "\xff"}',
            ".jsonl",
            "set.jsonl line 2: byte 0xff is not UTF-8; save as UTF-8",
            marks=pytest.mark.fault("prompt sets: invalid UTF-8"),
        ),
        (b'\n{"prompt": "\xff"}', ".jsonl", "set.jsonl line 2: byte 0xff is not UTF-8"),
        (gzip.compress(jsonl(ROW).encode(), mtime=0), ".jsonl", "set.jsonl: is compressed with gzip; unpack it first"),
        (
            jsonl({"prompt": "x" * LINE_BYTES}),
            ".jsonl",
            "set.jsonl line 1: is 8.0 MiB long; at most 1 MiB is read: sho",
        ),
        (" " * (YAML_BYTES + 1), ".yaml", "set.yaml: is larger than 4 MiB; write it as JSONL"),
        (jsonl(ROW).encode("utf-16"), ".jsonl", "set.jsonl line 1: byte 0xff is not UTF-8"),
        pytest.param(
            jsonl(ROW) + "{'id': 1}",
            ".jsonl",
            "set.jsonl line 2: not JSON: Expecting property name",
            marks=pytest.mark.fault("prompt sets: bad JSON on line k"),
        ),
        ("[\n{}\n]", ".jsonl", "set.jsonl line 1: not JSON: Expecting value at character 2; write one object per line"),
        ('{"prompt": "a", "prompt": "b"}', ".jsonl", "set.jsonl line 1: not JSON: the key 'prompt' is given twice;"),
        pytest.param(
            '{"prompt": NaN}',
            ".jsonl",
            "set.jsonl line 1: not JSON: NaN is not a JSON value",
            marks=pytest.mark.fault("prompt sets: NaN"),
        ),
        ('{"prompt": -Infinity}', ".jsonl", "set.jsonl line 1: not JSON: -Infinity is not a JSON value"),
        ("[" * 100_000, ".jsonl", "set.jsonl line 1: not JSON: nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", ".jsonl", "set.jsonl line 1: not JSON: Exceeds the limit (4300 digits)"),
        (
            '{"prompt":"x","scorers":{"regex":{"pattern":"\\ud800"}}}',
            ".jsonl",
            "set.jsonl line 1: the options of scorer",
        ),
        (
            '{"prompt":"x","expected":"1","scorers":{"number":{"tolerance":1e999}}}',
            ".jsonl",
            "set.jsonl line 1: the options of scorer number are {'tolerance': inf}; write plain text, numbers, lists",
        ),
        ("prompt: x", ".yaml", "set.yaml: is {'prompt': 'x'}; write a list of rows, each starting with '- '"),
        ("- prompt: x\n  prompt: y\n", ".yaml", "set.yaml: not YAML: line 2: the key 'prompt' is given twice"),
        ("- &a {prompt: x}\n- *a\n", ".yaml", "set.yaml: not YAML: line 2: the alias *a is not accepted: write the"),
        ("- prompt: [x\n", ".yaml", "set.yaml: not YAML: line 2: "),
        ("- !!python/object/apply:os.system [x]", ".yaml", "set.yaml: not YAML: line 1: could not determine a constr"),
        ("- prompt: x\n---\n- prompt: y\n", ".yaml", "set.yaml: not YAML: line 2: but found another document"),
        (
            "- {prompt: x, expected: yes}",
            ".yaml",
            "set.yaml row 1: `expected` is true, not text; write text, in quotes",
        ),
        ("- {prompt: x, expected: 4}", ".yaml", "set.yaml row 1: `expected` is 4, not text"),
        ("- {prompt: .nan}", ".yaml", "set.yaml row 1: `prompt` is nan, not text"),
        ("- {prompt: 2024-01-01}", ".yaml", "set.yaml row 1: `prompt` is datetime.date(2024, 1, 1), not text"),
        ("- {prompt: 2024-13-01}", ".yaml", "set.yaml: not YAML: month must be in 1..12"),
        ("- {prompt: !!timestamp x}", ".yaml", "set.yaml: not YAML: a tagged value cannot be read"),
        (
            "- {prompt: 0x" + "f" * 9999 + "}",
            ".yaml",
            "set.yaml row 1: `prompt` is a number of thousands of digits, not",
        ),
        ("- prompt: a\0b", ".yaml", "set.yaml: not YAML: special characters are not allowed"),
        ("- {[1]: x}", ".yaml", "set.yaml: not YAML: line 1: found unhashable key"),
        ("[" * 5000, ".yaml", "set.yaml: not YAML: nested too deeply"),
        ("id,promt\na,b\n", ".csv", "set.csv line 1: unknown column 'promt' (did you mean 'prompt'?); there are id,"),
        ("id;prompt\na;b\n", ".csv", "set.csv line 1: unknown column 'id;prompt'"),
        ("id,id,prompt\na,b,c\n", ".csv", "set.csv line 1: the column 'id' is there twice; rename one"),
        ("id,prompt\na,b,c\n", ".csv", "set.csv line 2: has 3 cells under 2 columns; put a text with a comma in it in"),
        ("id,prompt\na\n", ".csv", "set.csv line 2: has 1 cells under 2 columns"),
        ("id,prompt\na,\n", ".csv", "set.csv line 2: has neither `messages` nor `prompt`"),
        ('id,"prompt\n', ".csv", "set.csv line 1: not CSV: unexpected end of data"),
        ('id,prompt\na,"b\n', ".csv", "set.csv line 2: not CSV: unexpected end of data"),
        ('id,prompt\na,"b"c\n', ".csv", "set.csv line 2: not CSV: ',' expected after '\"'"),
        ("id,prompt\na,b\0c\n", ".csv", r"set.csv line 2: `prompt` is 'b\x00c' with a NUL character in it"),
        ("id,prompt,expected\na,b,c||d\n", ".csv", "set.csv line 2: `expected` is '', an empty text"),
        ("id,messages\na,[x\n", ".csv", "set.csv line 2: `messages` is not JSON: Expecting value at character 2"),
        ("id,prompt\na," + "x" * 2**20 + "y\n", ".csv", "set.csv line 2: not CSV: field larger than field limit"),
    ],
    ids=lambda value: ascii(value[:24]),
)
def test_a_bad_file_is_named_with_its_place_and_the_remedy(read, content, suffix, message):
    assert complaint(read, content, suffix).startswith(message)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        pytest.param(
            "none.jsonl", "there is no such prompt set; check the path", marks=pytest.mark.fault("prompt sets: missing")
        ),
        pytest.param(
            "folder.jsonl", "is a folder; name a prompt set in it", marks=pytest.mark.fault("prompt sets: a directory")
        ),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
        ("a\0b.jsonl", "cannot be read: embedded null byte"),
    ],
)
def test_a_path_that_cannot_be_read_says_why(tmp_path, name, ending):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(BadInput) as caught:
        read_prompt_set(tmp_path / name, "x", CHECKS)
    assert str(caught.value) == f"{tmp_path / name}: {ending}"


@pytest.mark.fault("prompt sets: a pipe")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "set.jsonl")
    with pytest.raises(BadInput, match=r"set\.jsonl: is not a file"):
        read_prompt_set(tmp_path / "set.jsonl", "x", CHECKS)


def test_a_file_and_a_set_of_just_the_limits_are_read(read, monkeypatch):
    rows = [ROW, ROW | {"id": "b"}, ROW | {"id": "c"}]
    monkeypatch.setattr(readers, "FILE_BYTES", len(jsonl(*rows)))
    monkeypatch.setattr(prompt_sets, "ROWS", 3)
    assert read(jsonl(*rows)).count == 3
    assert complaint(read, jsonl(*rows) + " ") == "set.jsonl: is larger than 0 MiB; split it"
    monkeypatch.setattr(readers, "FILE_BYTES", FILE_BYTES)
    assert complaint(read, jsonl(*rows, ROW | {"id": "d"})) == (
        "set.jsonl: has more than 3 rows; split it, or draw a sample"
    )


def test_a_huge_file_is_not_read_into_memory(tmp_path):
    path = tmp_path / "set.jsonl"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    complaint(read_prompt_set, path, "x", CHECKS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000


def test_a_file_above_64_mib_is_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    with path.open("wb") as file:
        file.truncate(FILE_BYTES + 1)
    with pytest.raises(BadInput, match=r"set\.jsonl: is larger than 64 MiB; split it"):
        read_prompt_set(path, "x", CHECKS)


def test_a_row_just_below_1_mib_is_read_in_every_format(read):
    text = "x" * (2**20 - 100)
    for content, suffix in [
        (jsonl({"prompt": text}), ".jsonl"),
        (f"prompt\n{text}\n", ".csv"),
        (f"- prompt: {text}", ".yaml"),
    ]:
        assert read(content, suffix).prompts[0].prompt == text


def test_a_row_of_exactly_1_mib_in_its_canonical_form_and_a_line_of_8_mib_are_read(read):
    empty = '{"expected":[],"id":"","prompt":"","scorers":[],"tags":[]}'
    text = "x" * (2**20 - len(empty))
    assert read(jsonl({"prompt": text}).rstrip("\n").ljust(LINE_BYTES)).prompts[0].prompt == text
    longer = complaint(read, jsonl({"prompt": text + "x"}))
    assert longer == "set.jsonl line 1: is 1.0 MiB long; at most 1 MiB is read: shorten it"


def test_a_users_own_scorer_is_known_when_named_and_its_options_are_left_alone(read):
    content = jsonl(ROW | {"scorers": {"polite": {"anything": 1}}})
    assert complaint(read, content).startswith("set.jsonl line 1: unknown scorer 'polite'")
    known = {"polite": lambda expected, options: None}
    assert read(content, known_scorers=known).prompts[0].scorers == (ScorerCall("polite", {"anything": 1}),)


def test_the_strict_parsers_read_what_is_plain():
    assert strict_json.parse('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    assert parse_yaml("a: {b: [1, x]}\nc: &anchor 2\n") == {"a": {"b": [1, "x"]}, "c": 2}


@pytest.mark.parametrize("path", sorted(PROMPTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_the_prompt_sets_of_the_project_read_cleanly(path):
    prompt_set = read_prompt_set(path, f"prompts/{path.name}", CHECKS)
    assert prompt_set.prompts
    assert all(prompt.id and not prompt.id.startswith("row-") for prompt in prompt_set.prompts)
