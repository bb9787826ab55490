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
    begun: dict[int, float] = {}  # places that are worked at -> since when; who takes one out says what became of it
    owned = threading.Lock()

    def taken(place: int) -> bool:
        with owned:
            return begun.pop(place, None) is not None

    def work():
        with suppress(queue.Empty):
            while True:
                place, item = waiting.get_nowait()
                begun[place] = time.monotonic()
                result = function(item)
                if not taken(place):  # it took too long, and another thread goes on
                    return
                done.put((place, result))

    def begin():
        threading.Thread(target=work, daemon=True).start()

    for _ in range(min(threads, len(items))):
        begin()
    left = len(items)
    try:
        while left:
            since = min(list(begun.values()), default=time.monotonic())
            try:
                yield done.get(timeout=max(since + seconds - time.monotonic(), 0.001) if seconds else None)
                left -= 1
            except queue.Empty:
                for place, since in list(begun.items()):
                    if time.monotonic() - since >= seconds and taken(place):
                        begin()
                        yield place, TookTooLong(seconds)
                        left -= 1
    finally:
        with suppress(queue.Empty):  # nothing more is asked
            while True:
                waiting.get_nowait()


def drawn(source: Iterable, seconds: float) -> Iterator:
    """What `source` yields, drawn in a thread of its own.

    Raises:
        TookTooLong: nothing came for `seconds`.
    """
    done, end, left_alone = queue.SimpleQueue(), object(), threading.Event()

    def work():
        try:
            for item in source:
                done.put((item, None))
                if left_alone.is_set():
                    return
            done.put((end, None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
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
    finally:
        left_alone.set()
