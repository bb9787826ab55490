"""The system message of the rows that have none."""

import json

import pytest

from slm.base.errors import BadInput
from slm.prompts import row_mapping, system_prompts
from slm.prompts.prompt_sets import read_prompt_set, with_scorers
from slm.scorers import scorer_calls

BRIEF = system_prompts.SystemPrompt("Be brief.", "prompts:/system/3")
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
OWN = [{"role": "system", "content": "Be long."}, HI]


@pytest.fixture
def read(tmp_path):
    def read(*rows: dict, system=BRIEF):
        (tmp_path / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        mapping = row_mapping.read("", "", system)
        return read_prompt_set(tmp_path / "set.jsonl", "", scorer_calls.IN_ROWS, mapping)

    return read


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [HI]}, [SYSTEM, HI]),
        ({"prompt": "Hi"}, [SYSTEM, HI]),
        ({"messages": OWN}, OWN),
        ({"inputs": {"messages": [HI]}}, [SYSTEM, HI]),
    ],
)
def test_a_row_without_a_system_message_gets_one_and_keeps_its_id(read, row, messages):
    [prompt], [plain] = read(row).prompts, read(row, system=None).prompts
    assert (list(prompt.messages), prompt.prompt, prompt.id) == (messages, None, plain.id)


def test_the_rows_and_their_hash_are_those_of_a_set_with_the_message_in_it(read):
    ours = read({"id": "a", "prompt": "Hi"})
    assert ours.sha256 == read({"id": "a", "messages": [SYSTEM, HI]}, system=None).sha256
    assert ours.sha256 != read({"id": "a", "messages": [HI]}, system=None).sha256
    assert with_scorers(ours, ()).system == BRIEF


def test_rows_with_a_message_of_their_own_are_told_and_all_of_them_refused(read):
    some = read({"prompt": "Hi"}, {"messages": OWN}).prompts
    assert system_prompts.note(some, BRIEF) == "1 row with a system message of its own, without prompts:/system/3"
    assert system_prompts.note(some[:1], BRIEF) == ""
    with pytest.raises(
        BadInput, match=r"^system_prompt: each row has a system message already; leave prompts:/system/3"
    ):
        system_prompts.note(some[1:], BRIEF)
