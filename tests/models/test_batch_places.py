"""Continuous batching over an ONNX graph: what places hold of other rows and earlier calls changes no answer."""

import itertools
import sys
import threading
import time
from collections import Counter, deque

import numpy as np
import pytest
from support.commands import REPOSITORY, call

from slm.models.chat_model import sample
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

PLACES = [{"role": "system", "content": "You know geography."}, {"role": "user", "content": "Where is Paris?"}]


@pytest.fixture(params=["onnx fp32", "onnx int8", "onnx int4"])
def wrapper(models, request):
    wrapper = models[request.param].unwrap_python_model()
    wrapper._runtime._idle.clear()  # as if it were just loaded
    yield wrapper
    wrapper._runtime._idle.clear()


def fresh(wrapper, row: dict):
    """The answer of a row that finds nothing to build on."""
    wrapper._runtime._idle.clear()
    [(_, [answer])] = wrapper.answers([row])
    return answer


def test_more_rows_than_places_are_answered_as_each_alone(wrapper):
    prompts = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS).prompts[:150:11]
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
        monkeypatch.setattr(wrapper._runtime, "piece_tokens", size)
        assert fresh(wrapper, row).text == whole.text


def test_what_is_in_a_places_memory_before_its_first_token_is_never_read(wrapper):
    rows = [{"messages": PLACES, "max_tokens": 12}, {"messages": PLACES[1:], "max_tokens": 12}]
    expected = [fresh(wrapper, row).text for row in rows]
    list(wrapper.answers(rows))
    [held] = wrapper._runtime._idle
    for array in held.arrays.values():
        array.fill(np.nan)
    held.prompts = [np.zeros(0, dtype=np.int64)] * len(held.prompts)
    found = {index: answer.text for index, [answer] in wrapper.answers(rows)}
    assert [found[0], found[1]] == expected


def test_two_batches_that_are_stepped_in_turns_do_not_disturb_each_other(wrapper):
    rows = [{"messages": PLACES, "max_tokens": 16}, {"messages": PLACES[1:], "max_tokens": 10}]
    expected = [fresh(wrapper, row).text for row in rows]
    batches = [wrapper.prepare(row) for row in rows]
    for _ in itertools.zip_longest(*map(wrapper.stream, batches)):
        pass
    assert [batch[0].text for batch in batches] == expected


def test_a_row_that_was_dropped_leaves_its_place_to_the_next(wrapper):
    rows = [{"messages": PLACES, "max_tokens": 30}, {"messages": PLACES[1:], "max_tokens": 6}]
    expected = fresh(wrapper, rows[1]).text
    dropped, kept = (wrapper.prepare(row)[0] for row in rows)
    for step, _ in enumerate(wrapper._steps([dropped, kept], 1, wrapper._runtime, decoded=True)):
        if step == 2:
            dropped.end("cancelled")
    assert (len(dropped.output), kept.text) == (3, expected)


def test_a_prompts_logits_do_not_depend_on_what_a_shorter_one_left(wrapper):
    runtime = wrapper._runtime
    prompt = np.array(wrapper.prepare({"messages": PLACES})[0].prompt)
    alone = runtime._read(runtime._places(2, 256), 0, prompt)
    for length in (1, 2, 3, len(prompt) - 1, len(prompt)):
        for place in (0, 1):
            held = runtime._places(2, 256)
            runtime._read(held, 0, prompt[:length])
            assert np.array_equal(runtime._read(held, place, prompt), alone), length


def test_an_answer_of_one_token_takes_the_pass_over_its_prompt_alone(wrapper, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"Count from {n}."}], "max_tokens": 2} for n in range(5)]
    longer = {index: answer.text for index, [answer] in wrapper.answers(rows)}
    monkeypatch.setattr(type(wrapper._runtime), "next_logits", None)
    for temperature in (0, 1e-6):  # what is drawn there is the likeliest token
        asked = [row | {"max_tokens": 1, "temperature": temperature} for row in rows]
        found = {index: answer for index, [answer] in wrapper.answers(asked, batch_size=2)}
        assert [found[at].output_tokens for at in range(5)] == [1] * 5
        assert all(longer[at].startswith(found[at].text) for at in range(5))
        assert all(found[at].text for at in range(5))


def test_the_first_token_is_drawn_from_the_logits_of_its_prompt(wrapper):
    asked = [{"messages": PLACES, "max_tokens": 1, "temperature": 1.5, "seed": seed} for seed in range(8)]
    rows = [wrapper.prepare(row)[0] for row in asked]
    logits = wrapper._runtime._read(wrapper._runtime._places(1, 256), 0, np.array(rows[0].prompt))
    expected = [[sample(logits, row.sampling, row.seed, 0)] for row in rows]
    list(wrapper._steps(rows, 3, wrapper._runtime))
    assert [row.output for row in rows] == expected
    assert len({token for [token] in expected}) > 2  # not the likeliest each time


def test_a_row_that_is_dropped_before_its_turn_is_not_begun(wrapper, monkeypatch):
    read, begun = type(wrapper._runtime).piece, []
    monkeypatch.setattr(type(wrapper._runtime), "piece", lambda self, *words: begun.append(1) or read(self, *words))
    rows = [wrapper.prepare({"messages": PLACES[at:], "max_tokens": 2})[0] for at in (0, 1, 0)]
    for step, _ in enumerate(wrapper._steps(rows, 3, wrapper._runtime, decoded=True)):
        if step == 0:  # the first row's first token
            rows[1].end("cancelled")
    assert ([len(row.output) for row in rows], len(begun)) == ([2, 0, 2], 2)


# ---------------------------------------------------------------------------------------------------------------------
# A small model's rows, a part of them on each core


@pytest.fixture
def on_two_cores(wrapper, all_cores, monkeypatch):
    if wrapper._runtime._small():  # it may have been loaded for one core
        monkeypatch.setattr(wrapper._runtime, "_opened", wrapper._runtime._digests())
    monkeypatch.setattr(wrapper._runtime, "_threads", 2)
    monkeypatch.setattr(wrapper._runtime, "_lanes", [])
    yield wrapper
    for thread in lanes():
        thread.join(60)
    assert len(wrapper._runtime._idle) <= 1


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lane"]


def forty(max_tokens: int) -> list[dict]:
    prompts = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS).prompts[:120:3]
    return [{"messages": list(row.messages), "max_tokens": max_tokens + at % 5} for at, row in enumerate(prompts)]


def test_rows_are_answered_side_by_side_as_each_alone(on_two_cores, monkeypatch):
    rows, running = forty(4), []
    steps = type(on_two_cores._runtime).steps

    def seen(runtime, *batch):
        running.append(threading.current_thread().name)
        yield from steps(runtime, *batch)

    monkeypatch.setattr(type(on_two_cores._runtime), "steps", seen)
    found = {index: answer.text for index, [answer] in on_two_cores.answers(rows)}
    small = on_two_cores._runtime._file.with_name("model.onnx.data").stat().st_size < 2**28
    assert running.count("lane") == (2 if small else 0)
    assert [found[index] for index in range(len(rows))] == [fresh(on_two_cores, row).text for row in rows]


def test_a_row_waits_for_no_core_that_is_busy(on_two_cores, monkeypatch):
    runtime = type(on_two_cores._runtime)
    if len(on_two_cores._runtime.lanes(40)) == 1:
        pytest.skip("its weights are held once")
    pieces, step, begun = runtime.piece, runtime.next_logits, Counter()

    def counted(self, *words):
        begun[threading.get_ident()] += 1
        return pieces(self, *words)

    def slowed(self, *words):
        if threading.get_ident() == next(iter(begun)):
            time.sleep(0.5)
        return step(self, *words)

    monkeypatch.setattr(runtime, "piece", counted)
    monkeypatch.setattr(runtime, "next_logits", slowed)
    rows = [{"messages": [{"role": "user", "content": f"Count from {n}."}], "max_tokens": 3} for n in range(10, 50)]
    assert len([*on_two_cores.answers(rows, batch_size=32)]) == 40
    assert [*begun.values()] == [16, 24]


@pytest.mark.parametrize(("rows", "batch_size"), [(31, 0), (40, 15)])
def test_cores_share_the_products_of_few_rows(on_two_cores, rows, batch_size):
    for _ in on_two_cores.answers(forty(1)[:rows], batch_size=batch_size):
        assert not lanes()


def test_cores_share_the_products_of_a_model_whose_files_are_gone(on_two_cores, monkeypatch, tmp_path):
    monkeypatch.setattr(on_two_cores._runtime, "_file", tmp_path / "gone" / "model.onnx")
    assert len([*on_two_cores.answers(forty(1))]) == 40
    assert not on_two_cores._runtime._lanes


def test_a_caller_that_leaves_ends_what_runs_side_by_side(on_two_cores):
    rows = forty(400)
    rows[0]["max_tokens"] = 1
    found = on_two_cores.answers(rows)
    next(found)
    found.close()
    for thread in lanes():
        thread.join(60)
        assert not thread.is_alive()
    [(_, [answer])] = on_two_cores.answers(rows[:1])
    assert answer.text == fresh(on_two_cores, rows[0]).text


LEAVES = """
import sys
from types import SimpleNamespace
from slm.models.chat_model import SmallLanguageModel
from slm.scorers.confined import CHECKS

model = SmallLanguageModel()
model.load_context(SimpleNamespace(artifacts={"onnx": sys.argv[1]}, model_config={"threads": 2}))
rows = [{"messages": [{"role": "user", "content": f"Count from {n}."}]} for n in range(40)]
found = model.answers(rows)
next(found)
assert model._runtime._lanes
sys.exit(3)
"""


def test_a_process_that_ends_while_cores_are_at_work_ends_as_it_meant_to(int4_export):
    done = call(sys.executable, "-c", LEAVES, int4_export.folder)
    assert (done.code, done.err) == (3, "")


def test_what_one_core_fails_of_is_the_callers_to_know(on_two_cores, monkeypatch):
    runtime, steps = on_two_cores._runtime, type(on_two_cores._runtime).steps

    def fails(self, rows, *words):
        yield next(steps(self, rows, *words))
        if threading.current_thread() is threads[-1]:
            raise MemoryError("no more")
        yield from steps(self, rows, *words)

    if len(runtime.lanes(40)) == 1:
        pytest.skip("its weights are held once")
    threads = []
    monkeypatch.setattr(
        type(runtime), "steps", lambda *words: threads.append(threading.current_thread()) or fails(*words)
    )
    with pytest.raises(MemoryError, match="no more"):
        list(on_two_cores.answers(forty(8)))


# ---------------------------------------------------------------------------------------------------------------------
# Rows that join a running batch


LONG_PROMPT = [{"role": "user", "content": "Count on from here: " + "1 2 3 4 5 " * 60}]


def joined(wrapper, requests: dict[int, list[dict]], steps: int = 10**6):
    """Generates rows that arrive before the given steps. Gives the rows, and the rows of every step."""
    arriving, rows, history = deque(), [], []
    requests = dict(requests)
    running = wrapper.joined(arriving)
    for number in range(steps):
        for request in requests.pop(number, []):
            [row] = wrapper.prepare({name: value for name, value in request.items() if name != "tenant"})
            row.tenant = request.get("tenant", "")
            rows.append(row)
            arriving.append(row)
        step = next(running, None)
        if step is None:
            assert not requests
            return rows, history
        history.append([rows.index(row) for row, _ in step])
    raise AssertionError("it does not end")


def test_a_row_takes_part_from_the_next_step_on(wrapper):
    one, other = {"messages": PLACES, "max_tokens": 12}, {"messages": PLACES[1:], "max_tokens": 4}
    expected = [fresh(wrapper, row).text for row in (one, other)]
    wrapper._runtime._idle.clear()
    rows, history = joined(wrapper, {0: [one], 5: [other]})
    assert history[5] == [1] and [0, 1] in history[6:7]  # its first token, and then both rows together
    assert [row.text for row in rows] == expected


def test_rows_that_join_at_any_time_are_answered_as_each_alone(wrapper):
    """Batch places are replaced by larger ones on the way, for more rows and for longer ones."""
    prompts = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS).prompts[:150:11]
    rows = [{"messages": list(row.messages), "max_tokens": 4 + at % 5 * 5} for at, row in enumerate(prompts)]
    rows[4] = {"messages": LONG_PROMPT, "max_tokens": 6}
    rows[9] = {"messages": [*LONG_PROMPT, *PLACES], "max_tokens": 300, "stop": ["e"]}
    expected = [fresh(wrapper, row).text for row in rows]
    wrapper._runtime._idle.clear()
    found, history = joined(wrapper, {0: rows[:1], 1: rows[1:3], 4: rows[3:10], 6: rows[10:]})
    assert [row.text for row in found] == expected
    assert max(map(len, history)) >= 9


def test_a_long_prompt_does_not_stop_the_others(wrapper):
    rows, history = joined(
        wrapper, {0: [{"messages": PLACES, "max_tokens": 30}], 3: [{"messages": LONG_PROMPT, "max_tokens": 2}]}
    )
    begun = history.index([1])
    assert len(rows[1].prompt) > 4 * 128
    assert history[3:begun] == [[], [0]] * ((begun - 3) // 2) and begun - 3 >= 8  # a piece, a step, a piece, …


def test_a_short_prompt_overtakes_a_long_one(wrapper):
    short = {"messages": PLACES, "max_tokens": 4}
    expected = [fresh(wrapper, row).text for row in ({"messages": LONG_PROMPT, "max_tokens": 4}, short)]
    wrapper._runtime._idle.clear()
    rows, history = joined(wrapper, {0: [{"messages": LONG_PROMPT, "max_tokens": 4}], 1: [short]})
    assert history.index([1]) <= 3 < history.index([0])
    assert [row.text for row in rows] == expected


def test_prompts_that_arrive_together_are_computed_once_within_one_tenant(wrapper, monkeypatch):
    run, counts = type(wrapper._runtime)._run, []

    def counted(self, binding, tokens, lengths):
        counts.append(tokens.shape[1])
        return run(self, binding, tokens, lengths)

    monkeypatch.setattr(type(wrapper._runtime), "_run", counted)
    for tenants, times in ((("a", "a", "a"), 1), (("a", "b", "c"), 3)):
        wrapper._runtime._idle.clear()
        counts.clear()
        requests = [{"messages": LONG_PROMPT, "max_tokens": 1, "tenant": tenant} for tenant in tenants]
        rows, _ = joined(wrapper, {0: requests})
        assert times * len(rows[0].prompt) <= sum(counts) <= times * len(rows[0].prompt) + 2 * (3 - times)


def test_a_row_that_is_dropped_while_its_prompt_is_read_leaves_its_place(wrapper):
    [long], [short] = (wrapper.prepare({"messages": messages, "max_tokens": 5}) for messages in (LONG_PROMPT, PLACES))
    expected = fresh(wrapper, {"messages": PLACES, "max_tokens": 5}).text
    arriving = deque([long])
    running = wrapper.joined(arriving)
    assert next(running) == []
    long.end("cancelled")
    arriving.append(short)
    assert [len(step) for step in running] == [1] * len(short.output)
    assert (long.output, short.text) == ([], expected)
