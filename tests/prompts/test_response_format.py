"""Rows that hold their answer to JSON."""

import json

import pytest

from slm.base.errors import BadInput
from slm.prompts.prompt_rows import canonical_rows
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FULL = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
SCORED = {"id": "a", "prompt": "x", "scorers": [{"json_schema": {"schema": SCHEMA}}]}


@pytest.fixture
def read(tmp_path):
    def read(row: dict | str, suffix: str = ".jsonl"):
        path = tmp_path / f"set{suffix}"
        path.write_text(row if isinstance(row, str) else json.dumps(row) + "\n", encoding="utf-8")
        [prompt] = read_prompt_set(path, "set", CHECKS).prompts
        return prompt

    return read


@pytest.mark.parametrize(
    ("given", "found"),
    [("json_schema", FULL), (FULL, FULL), ("json_object", {"type": "json_object"})],
)
def test_one_word_or_openais_form(read, given, found):
    prompt = read(SCORED | {"response_format": given})
    assert prompt.response_format == found
    [row] = canonical_rows([prompt])
    assert read(row) == prompt  # the canonical row gives the same prompt


def test_a_row_without_it_keeps_its_canonical_form(read):
    [row] = canonical_rows([read(SCORED)])
    assert "response_format" not in row


def test_a_cell_of_a_csv_file_holds_a_word_or_json(read):
    assert read("id,prompt,response_format\na,x,json_object\n", ".csv").response_format == {"type": "json_object"}
    cell = json.dumps(FULL).replace('"', '""')
    assert read(f'id,prompt,response_format\na,x,"{cell}"\n', ".csv").response_format == FULL


def test_mlflows_own_rows_take_it_too(read):
    row = {"inputs": {"messages": [{"role": "user", "content": "x"}]}, "response_format": "json_object"}
    assert read(row).response_format == {"type": "json_object"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "x", "response_format": "json_schema"},
            "but the row has no scorer json_schema with a schema; write the schema here",
        ),
        ({"prompt": "x", "response_format": "json_objekt"}, "(did you mean 'json_object'?); write json_object, "),
        ({"prompt": "x", "response_format": {"type": "text"}}, "write json_object, json_schema, or OpenAI's"),
        ({"prompt": "x", "response_formt": "json_object"}, "(did you mean 'response_format'?)"),
    ],
)
def test_a_wrong_one_is_refused_with_the_place_of_its_row(read, row, reason):
    with pytest.raises(BadInput) as refused:
        read(row)
    assert reason in str(refused.value) and "line 1" in str(refused.value)
