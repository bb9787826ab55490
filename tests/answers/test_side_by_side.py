"""Calls side by side: results as they come, a limit for each call, and no further call after the end."""

import threading
import time

import pytest

from slm.answers import side_by_side
from slm.answers.side_by_side import TookTooLong


def test_results_come_in_the_order_in_which_the_calls_end():
    first, second = threading.Event(), threading.Event()
    second.set()
    found = side_by_side.answered(lambda event: event.wait(30), [first, second], threads=2)
    assert next(found) == (1, True)
    first.set()
    assert list(found) == [(0, True)]
    assert list(side_by_side.answered(str, ["a", "b"], threads=1)) == [(0, "a"), (1, "b")]
    assert list(side_by_side.answered(str, [], threads=3)) == []


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_as_many_calls_run_at_a_time_as_there_are_threads(threads):
    together = threading.Barrier(threads)
    running, most, lock = [0], [0], threading.Lock()

    def counted(item):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(10)  # breaks unless so many calls run
        with lock:
            running[0] -= 1
        return item

    items = list(range(2 * threads))
    assert sorted(side_by_side.answered(counted, items, threads)) == [(place, place) for place in items]
    assert most[0] <= threads


def test_a_call_that_takes_too_long_is_given_up_and_the_others_are_answered():
    end = threading.Event()

    def call(item):
        if item == "endless":
            end.wait(30)
        return item

    start = time.monotonic()
    found = dict(side_by_side.answered(call, ["endless", "a", "endless", "b"], threads=1, seconds=0.25))
    took = time.monotonic() - start
    end.set()
    assert (found[1], found[3]) == ("a", "b") and 0.5 <= took < 20
    assert isinstance(found[0], TookTooLong) and isinstance(found[2], TookTooLong)
    assert str(found[0]) == "no answer within 0.25 s (row_timeout)"


def test_no_further_call_starts_once_the_caller_has_gone():
    begun = []

    def call(item):
        begun.append(item)
        time.sleep(0.05)

    results = side_by_side.answered(call, list(range(20)), threads=2)
    next(results)
    results.close()
    time.sleep(0.2)
    assert len(begun) <= 5


def test_items_are_drawn_until_the_source_ends_and_an_error_is_raised_here():
    assert list(side_by_side.drawn(iter("ab"), 5)) == ["a", "b"]

    def failing():
        yield "a"
        raise ValueError("no more")

    found = side_by_side.drawn(failing(), 5)
    assert next(found) == "a"
    with pytest.raises(ValueError, match="no more"):
        next(found)


def test_a_source_that_gives_nothing_in_time_is_given_up():
    end = threading.Event()

    def source():
        yield "a"
        end.wait(30)
        yield "b"

    found = side_by_side.drawn(source(), 0.1)
    assert next(found) == "a"
    with pytest.raises(TookTooLong, match=r"^no answer within 0\.1 s \(row_timeout\)$"):
        next(found)
    end.set()


def test_a_source_is_left_alone_once_the_caller_has_gone():
    given = []

    def source():
        for place in range(100):
            given.append(place)
            time.sleep(0.01)
            yield place

    found = side_by_side.drawn(source(), 5)
    next(found)
    found.close()
    time.sleep(0.1)
    assert len(given) <= 4
