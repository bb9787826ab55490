"""Work done in threads that nothing waits for: several at a time, and with a limit to what one piece may take.

A thread can't be stopped from outside: what takes too long is left behind, and its result, if it ever comes, is thrown
away. The threads end with the process.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress


class TookTooLong(Exception):
    """Nothing came within the limit."""

    def __init__(self, seconds: float):
        super().__init__(f"no answer within {seconds:g} s (row_timeout)")


def answered(
    function: Callable, items: list, threads: int, seconds: float = 0.0
) -> Iterator[tuple[int, object | TookTooLong]]:
    """Yields (place, function(item)) as they come, `threads` at a time.

    An item that takes longer than `seconds` (0: no limit) gives TookTooLong, and another thread takes its place.
    `function` must not raise.
    """
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
    for place, item in enumerate(items):
        waiting.put((place, item))
    begun: dict[int, float] = {}  # place -> when
    open_places = set(range(len(items)))

    def work():
        with suppress(queue.Empty):
            while True:
                place, item = waiting.get_nowait()
                begun[place] = time.monotonic()
                done.put((place, function(item)))
                if place not in open_places:  # it took too long, and another thread goes on
                    return

    def begin():
        threading.Thread(target=work, daemon=True).start()

    for _ in range(min(threads, len(items))):
        begin()
    try:
        while open_places:
            try:
                place, result = done.get(timeout=_left(begun, open_places, seconds))
            except queue.Empty:
                late = [place for place in open_places if place in begun and _age(begun, place) >= seconds]
                for place in late:
                    open_places.discard(place)
                    begin()
                    yield place, TookTooLong(seconds)
                continue
            if place in open_places:
                open_places.discard(place)
                yield place, result
    finally:
        with suppress(queue.Empty):  # nothing more is asked
            while True:
                waiting.get_nowait()


def drawn(source: Iterable, seconds: float) -> Iterator:
    """What `source` yields, drawn in a thread of its own.

    Raises:
        TookTooLong: nothing came for `seconds`.
    """
    done, end = queue.SimpleQueue(), object()

    def work():
        try:
            for item in source:
                done.put((item, None))
        except BaseException as error:
            done.put((None, error))
        done.put((end, None))

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            item, error = done.get(timeout=seconds)
        except queue.Empty:
            raise TookTooLong(seconds) from None
        if error is not None:
            raise error
        if item is end:
            return
        yield item


def _age(begun: dict[int, float], place: int) -> float:
    return time.monotonic() - begun[place]


def _left(begun: dict[int, float], open_places: set[int], seconds: float) -> float | None:
    """How long the one that has been at it longest may still take."""
    if not seconds:
        return None
    ages = [_age(begun, place) for place in open_places if place in begun]
    return max(seconds - max(ages, default=0.0), 0.001)
