"""Continuous batching over an ONNX graph: what slots hold of other rows and earlier calls changes no answer."""

import itertools

import pytest
from conftest import REPOSITORY
from test_chat_model import logged, models, text  # noqa: F401

from slm.prompts import read_prompt_set

PLACES = [{"role": "system", "content": "You know geography."}, {"role": "user", "content": "Where is Paris?"}]


@pytest.fixture(params=["onnx fp32", "onnx int8", "onnx int4"])
def wrapper(models, request):  # noqa: F811
    wrapper = models[request.param].unwrap_python_model()
    wrapper._runtime._idle = None  # as if it were just loaded
    yield wrapper
    wrapper._runtime._idle = None


def fresh(wrapper, row: dict):
    """The answer of a row that finds nothing to build on."""
    wrapper._runtime._idle = None
    [(_, [answer])] = wrapper.answers([row])
    return answer


def test_more_rows_than_slots_are_answered_as_each_alone(wrapper):
    prompts = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "").prompts[::11]
    rows = [{"messages": list(row.messages), "max_tokens": 4 + at % 5 * 5} for at, row in enumerate(prompts)]
    found = {index: answer.text for index, [answer] in wrapper.answers(rows, batch_size=3)}
    assert [found[index] for index in range(len(rows))] == [fresh(wrapper, row).text for row in rows]


def test_a_conversation_that_goes_on_is_answered_as_if_it_were_new(wrapper):
    talk = [{"messages": PLACES, "max_tokens": 16}]
    for question in ("And Rome?", "And Rome?", "Thanks."):
        [(_, [answer])] = wrapper.answers(talk[-1:])
        turn = [{"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
        talk.append({"messages": [*talk[-1]["messages"], *turn], "max_tokens": 16})
    [(_, [last])] = wrapper.answers(talk[-1:])
    assert last.text == fresh(wrapper, talk[-1]).text


def test_a_prompt_longer_than_a_chunk_is_answered_as_in_one_piece(wrapper, monkeypatch):
    row = {"messages": [{"role": "user", "content": "Count on from here: " + "1 2 3 4 5 " * 20}], "max_tokens": 12}
    whole = fresh(wrapper, row)
    for size in (2, whole.prompt_tokens - 2, 64):  # the last piece would hold one token, were it not avoided
        monkeypatch.setattr(wrapper._runtime, "_at_once", lambda span, size=size: size)
        assert fresh(wrapper, row).text == whole.text


def test_two_batches_that_are_stepped_in_turns_do_not_disturb_each_other(wrapper):
    rows = [{"messages": PLACES, "max_tokens": 16}, {"messages": PLACES[1:], "max_tokens": 10}]
    expected = [fresh(wrapper, row).text for row in rows]
    batches = [wrapper.prepare(row) for row in rows]
    for _ in itertools.zip_longest(*map(wrapper.stream, batches)):
        pass
    assert [batch[0].text for batch in batches] == expected


def test_a_row_that_was_dropped_leaves_its_slot_to_the_next(wrapper):
    rows = [{"messages": PLACES, "max_tokens": 30}, {"messages": PLACES[1:], "max_tokens": 6}]
    expected = fresh(wrapper, rows[1]).text
    dropped, kept = (wrapper.prepare(row)[0] for row in rows)
    for step, _ in enumerate(wrapper._run([dropped, kept], 1, streamed=True)):
        if step == 2:
            dropped.finish_reason = "cancelled"
    assert (len(dropped.output), kept.text) == (3, expected)
